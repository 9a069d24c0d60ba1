"""How calls of layers are named, for the libraries that have interceptors."""

from collections.abc import Callable
from typing import Any

from lpa_jax.core.program import tap

CALL = "__call__"


def named(path: str, method: str, value: Any) -> Any:
    """Return the value of a layer's method under its name; the whole network's own has none."""
    parts = [path] if method == CALL else [path, method]
    name = ".".join(filter(None, parts))
    return tap(name, value) if name else value


def interceptor(
    path_of: Callable[[Any], str], methods: tuple[str, ...]
) -> Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], Any]:
    """Make an interceptor that names what methods of layers return.

    Args:
      path_of: Maps a layer to its path, words joined by slashes.
      methods: Names of the methods.
    """
    running: list[tuple[str, str]] = []

    def intercept(next_fun, args, kwargs, context):
        if (method := context.method_name) not in methods:
            return next_fun(*args, **kwargs)
        path = path_of(context.module)
        # A `super().__call__` inside a module's own is a part of it, not a second call.
        if running and running[-1] == (path, method):
            return next_fun(*args, **kwargs)
        running.append((path, method))
        try:
            return named(path, method, next_fun(*args, **kwargs))
        finally:
            running.pop()

    return intercept
