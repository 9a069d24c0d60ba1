"""The last, linear module of a network, of whose kernel some methods are."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, PyTree

from lpa_jax.core.perturbation import SiteError


def kernel_of(
    name: str, params: PyTree, head: str, shape: tuple[int, int]
) -> Float[Array, "features classes"]:
    """Return the head's kernel, or raise `SiteError`."""
    scope: Any = params
    for part in (*head.split("/"), "kernel"):
        if not isinstance(scope, Mapping) or part not in scope:
            known = ", ".join(map(repr, scope)) if isinstance(scope, Mapping) else "nothing"
            raise SiteError(
                f"{name} needs the kernel of the network's last linear module, but the parameters "
                f"have no {head + '/kernel'!r}: where {part!r} was looked for there is {known}. "
                "Name the module, as in head='head'."
            )
        scope = scope[part]
    # What nn.with_partitioning puts around it.
    scope = scope.unbox() if hasattr(scope, "unbox") else scope
    if scope.shape != shape:
        raise SiteError(
            f"{name} needs a kernel [features, classes] = {list(shape)}, but that of {head!r} is "
            f"{list(scope.shape)}: the site must be what this module takes in."
        )
    return scope
