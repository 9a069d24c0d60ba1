"""What a transform is handed in place of a value that it must not use."""

from typing import Any

from lpa_jax.core.perturbation import SiteError


class Refusal:
    """An object that raises `SiteError` with its message wherever it is used."""

    def __init__(self, message: str):
        """Keep what is to be said."""
        self._message = message

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise SiteError(self._message)

    # Python looks these up on the class.
    __call__ = __getattr__ = __getitem__ = __len__ = __iter__ = __bool__ = _refuse
    __array__ = __jax_array__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __invert__ = __abs__ = __and__ = __or__ = __xor__ = _refuse
    __hash__ = object.__hash__
