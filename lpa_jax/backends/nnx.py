"""Names the values of `flax.nnx` models; the only file that knows NNX's modules."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx

from lpa_jax.backends.naming import named
from lpa_jax.core.network import Network

_SITE = "_lpa_jax_site"


def open_nnx(methods: tuple[str, ...], model: nnx.Module) -> Network:
    """Open an NNX model. It is not mutated: what is called is a copy.

    Args:
      methods: Names of the methods whose results are named, `__call__` among them.
      model: The model, which is called as `model(inputs, **kwargs)`.

    Returns:
      The network. Parameters, and so the gradient, are the `nnx.State` of all `nnx.Param`; what it
      mutates is the state of all other variables, ready for `nnx.update(model, state)`.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"The variables of an NNX model are the model itself, not {type(model).__name__}: give "
            "it, or nnx.merge(graphdef, state)."
        )
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params, rest, inputs, kwargs):
        copy = nnx.merge(graph, params, rest, copy=True)
        _name_modules(copy, methods)
        output = copy(inputs, **kwargs)
        return output, nnx.state(copy, nnx.Not(nnx.Param))

    layers = tuple(
        "/".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        # These hold layers, and are not called.
        if path and not isinstance(module, nnx.List | nnx.Dict)
    )
    return Network(params, rest, run, layers)


def _name_modules(model: nnx.Module, methods: tuple[str, ...]) -> None:
    """Turn every module of a model into one that names what it returns."""
    for path, module in nnx.iter_modules(model):
        object.__setattr__(module, "__class__", _named_class(type(module), methods))
        object.__setattr__(module, _SITE, "/".join(map(str, path)))


@functools.cache
def _named_class(kind: type[nnx.Module], methods: tuple[str, ...]) -> type[nnx.Module]:
    """Make the subclass of a module class whose methods name what they return.

    A class that cannot be inherited from in this way is returned as it is.
    """
    # Every class has a `__call__`, which makes an instance; what counts is one of its own.
    own = (m for m in methods if any(m in vars(base) for base in kind.__mro__))
    named_methods = {method: _named_method(method, getattr(kind, method)) for method in own}
    try:
        return type(kind.__name__, (kind,), {**named_methods, "__module__": kind.__module__})
    except TypeError:
        return kind


def _named_method(method: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self, *args, **kwargs):
        return named(getattr(self, _SITE), method, function(self, *args, **kwargs))

    return call
