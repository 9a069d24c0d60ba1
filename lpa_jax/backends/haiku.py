"""Names the values of Haiku models; the only file that knows Haiku's interceptors."""

import inspect
from typing import Any

from jaxtyping import PyTree

from lpa_jax.backends.naming import interceptor
from lpa_jax.core.network import Network


def open_haiku(transformed: Any, methods: tuple[str, ...], variables: PyTree) -> Network:
    """Open the parameters of `hk.transform` or `hk.transform_with_state`.

    Args:
      transformed: What Haiku returned, of a function of the inputs and keyword arguments. The step
        takes its random key as the keyword argument `rng`.
      methods: Names of the methods whose results are named, `__call__` among them.
      variables: The parameters; of a function with state, `(params, state)`.

    Returns:
      The network. The state that it mutates is Haiku's new state.
    """
    import haiku

    # Its names are not declared where type checkers look.
    hk: Any = haiku

    stateful = isinstance(transformed, hk.TransformedWithState)
    if stateful != isinstance(variables, tuple):
        what = "(params, state), as of" if stateful else "the parameters alone, without a state, of"
        raise ValueError(f"The variables must be {what} what hk.transform made.")
    params, rest = variables if stateful else (variables, {})

    # Not after hk.without_apply_rng.
    takes_rng = "rng" in inspect.signature(transformed.apply).parameters

    def run(params, rest, inputs, kwargs):
        rng = (None,) if takes_rng else ()
        if "rng" in kwargs and takes_rng:
            kwargs = dict(kwargs)
            rng = (kwargs.pop("rng"),)
        with hk.intercept_methods(interceptor(_path_of, methods)):
            if stateful:
                return transformed.apply(params, rest, *rng, inputs, **kwargs)
            return transformed.apply(params, *rng, inputs, **kwargs), {}

    # A stack of layers keeps parameters in a scope of its own, which is no part of their names.
    layers = ("/".join(part for part in name.split("/") if part[:2] != "__") for name in params)
    return Network(params, rest, run, tuple(layers))


def _path_of(module: Any) -> str:
    return module.module_name
