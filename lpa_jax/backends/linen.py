"""Names the values of `flax.linen` models; the only file that knows Flax's interceptors."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import PyTree

from lpa_jax.backends.naming import interceptor
from lpa_jax.core.network import Network

# In which every module finds its path; it does not leave the trace.
COLLECTION = "lpa_jax"


def open_linen(
    apply_fn: Callable[..., Any], methods: tuple[str, ...], variables: Mapping[str, PyTree]
) -> Network:
    """Open what `model.init` returned, to be given to `model.apply`.

    Args:
      apply_fn: `model.apply`, or a function that calls it.
      methods: Names of the methods whose results are named, `__call__` among them.
      variables: Collections of arrays, the parameters among them.

    Returns:
      The network. The state that it mutates is that of the collections named by `mutable`, of which
      the parameters are none.
    """

    def run(params, rest, inputs, kwargs):
        told = {**rest, "params": params, COLLECTION: _paths(params)}
        with nn.intercept_methods(interceptor(_path_of, methods)):
            result = apply_fn(told, inputs, **kwargs)
        if kwargs.get("mutable", False) is False:
            return result, {}
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise ValueError(
                "As mutable= is given, the function that calls the model must return what "
                "model.apply does: the output, and the mutated collections."
            )
        output, updates = result
        ours = ("params", COLLECTION)
        return output, {name: new for name, new in updates.items() if name not in ours}

    rest = {name: scope for name, scope in variables.items() if name != "params"}
    layers = tuple(_scopes(variables["params"]))
    return Network(variables["params"], rest, run, layers)


def _scopes(params: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of the modules that have parameters."""
    for name, scope in params.items():
        if isinstance(scope, Mapping):
            yield path + name
            yield from _scopes(scope, f"{path}{name}/")


def _paths(params: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return a collection in which every module finds its path.

    Modules under `nn.jit` that are alike are traced once, unless their variables have other names.
    """
    below = {
        name: _paths(scope, f"{path}/{name}")
        for name, scope in params.items()
        if isinstance(scope, Mapping)
    }
    return {path or "/": jnp.zeros(())} | below


def _path_of(module: nn.Module) -> str:
    return "/".join(module.path)
