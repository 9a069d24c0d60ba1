"""Opens plain functions, whose values are named by `lpa_jax.tap`, or by `checkpoint_name`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lpa_jax.core.network import Network


def open_function(function: Callable[..., Any], params: PyTree) -> Network:
    """Open the parameters of `function(params, inputs, **kwargs)`, a tree of arrays."""

    def place(path):
        return f"params{jax.tree_util.keystr(path)}"

    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"The parameters must be a tree of arrays, but at {place(path)} there is a "
                f"{type(leaf).__name__}: take the arrays apart, as eqx.partition does, and close "
                "over the rest."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"The parameters must be floats, but {place(path)} is {leaf.dtype}: close over it."
            )

    def run(params, rest, inputs, kwargs):
        return function(params, inputs, **kwargs), {}

    return Network(params, {}, run)
