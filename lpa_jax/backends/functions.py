"""Opens plain functions, whose values are named by `lpa_jax.tap`, or by `checkpoint_name`."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from lpa_jax.core.network import Network


def open_function(function: Callable[..., Any], params: PyTree) -> Network:
    """Open the parameters of `function(params, inputs, **kwargs)`, a tree of arrays."""

    def run(params, rest, inputs, kwargs):
        return function(params, inputs, **kwargs), {}

    return Network(params, {}, run)
