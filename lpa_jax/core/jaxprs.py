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
    return eqn.params["name"].removeprefix(MARK) if _names(eqn) else None


def _names(eqn: Any, begin: str = "") -> bool:
    """Return whether an equation names its value, by a name that begins like this."""
    return eqn.primitive.name == "name" and eqn.params["name"].startswith(begin)


def is_named(jaxpr: Any, begin: str = "") -> bool:
    """Return whether a jaxpr names a value, by a name that begins like this."""
    return any(
        _names(eqn, begin) or any(is_named(opened(sub)[0], begin) for sub in inside(eqn))
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
        if _names(eqn, MARK):
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


def num_constant_and_carried(eqn: Any, body: Any) -> tuple[int, int]:
    """Return how many inputs of a scan are the same at all turns, and how many it carries on."""

    def unstacked(outer, inner):
        # What is scanned over has one axis more outside than inside.
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outer, inner, strict=True))

    carried = unstacked(eqn.outvars, body.outvars)
    return unstacked(eqn.invars, body.invars) - carried, carried


def needed_by(jaxpr: Any, wanted: Sequence[bool]) -> set[Any]:
    """Return the variables on which the wanted results of a jaxpr depend."""
    results = zip(jaxpr.outvars, wanted, strict=True)
    alive = {var for var, want in results if want and not isinstance(var, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if alive.isdisjoint(eqn.outvars) and not eqn.effects:
            continue
        needs = eqn.invars
        if eqn.primitive.name in (*INLINED, *REMATERIALIZED, "scan"):
            body, _ = opened(inside(eqn)[0])
            within = needed_by(body, wanted_within(eqn, body, alive))
            pairs = zip(eqn.invars, body.invars, strict=True)
            needs = [outer for outer, inner in pairs if inner in within]
        alive.update(var for var in needs if not isinstance(var, jex.Literal))
    return alive


def wanted_within(eqn: Any, body: Any, alive: set[Any]) -> list[bool]:
    """Return which results of the body of an equation are needed, given those of the equation."""
    # What has an effect, such as writing to a reference, may be needed without a result.
    wanted = [bool(eqn.effects) or var in alive for var in eqn.outvars]
    if eqn.primitive.name != "scan":
        return wanted
    constant, carried = num_constant_and_carried(eqn, body)
    while True:
        within = needed_by(body, wanted)
        # What a turn takes in is what the one before has carried on.
        taken = [var in within for var in body.invars[constant : constant + carried]]
        more = [*map(max, wanted, taken), *wanted[carried:]]
        if more == wanted:
            return wanted
        wanted = more
