"""Reading jaxprs, and the names of values in them; by what `jax.extend.core` offers."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex

MARK = "lpa_jax:"
"""What the names that `tap` gives begin with in a jaxpr; others are a model's own."""
INLINED = ("jit", "pjit", "closed_call", "core_call")
REMATERIALIZED = ("checkpoint", "remat", "remat2")
# With its constants; jax 0.12 has one class for both.
ClosedJaxpr: Any = jex.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]
Path = tuple[int, ...]
"""Where an equation is: its place, after that of the equation (and the turn of the scan) around."""


def opened(sub: Any) -> tuple[Any, Sequence[Any]]:
    """Return a jaxpr and its constants; jax 0.12 has them in one, and earlier versions apart."""
    return getattr(sub, "jaxpr", sub), getattr(sub, "consts", ())


def inside(eqn: Any) -> list[Any]:
    """Return the jaxprs in the parameters of an equation."""
    params = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    return [param for param in params if _is_jaxpr(param)]


def _is_jaxpr(param: Any) -> bool:
    return isinstance(param, (jex.Jaxpr, ClosedJaxpr))


def name_of(eqn: Any) -> str | None:
    """Return the name that an equation gives its value, if it does so."""
    return eqn.params["name"].removeprefix(MARK) if eqn.primitive.name == "name" else None


def is_named(jaxpr: Any, begin: str = "") -> bool:
    """Return whether a jaxpr names a value, by a name that begins like this."""
    return any(
        (eqn.primitive.name == "name" and eqn.params["name"].startswith(begin))
        or any(is_named(opened(sub)[0], begin) for sub in inside(eqn))
        for eqn in jaxpr.eqns
    )


def without_names(sub: Any) -> Any:
    """Return a jaxpr without the names that `tap` gave, which a policy of remat could see."""
    jaxpr, _ = opened(sub)
    if not is_named(jaxpr, MARK):
        return sub
    same: dict[Any, Any] = {}

    def look(var):
        return var if isinstance(var, jex.Literal) else same.get(var, var)

    eqns = []
    for eqn in jaxpr.eqns:
        invars = [look(var) for var in eqn.invars]
        if eqn.primitive.name == "name" and eqn.params["name"].startswith(MARK):
            same[eqn.outvars[0]] = invars[0]
            continue
        params = jax.tree.map(
            lambda param: without_names(param) if _is_jaxpr(param) else param,
            dict(eqn.params),
            is_leaf=_is_jaxpr,
        )
        eqns.append(eqn.replace(invars=invars, params=params))
    changes = {"eqns": eqns, "outvars": [look(var) for var in jaxpr.outvars]}
    if isinstance(sub, jex.Jaxpr):
        return sub.replace(**changes)
    return sub.replace(jaxpr=jaxpr.replace(**changes))
