"""A network as a traced program: a jaxpr in which some values have names.

Whoever writes the network names values by `tap`, or a backend does so for every layer. A named
value is a *site*: `Program.walk` evaluates the program once, hands over the value at each site that
is wanted, and continues with what it gets back. Order, tails and costs are properties of the jaxpr.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lpa_jax.core.costs import flops
from lpa_jax.core.cuts import entered, evaluate, get, needed, Value
from lpa_jax.core.jaxprs import (
    INLINED,
    inside,
    is_named,
    MARK,
    name_of,
    needed_by,
    opened,
    Path,
    REMATERIALIZED,
    wanted_within,
)

REASONS = {
    "while": "it lies in a loop whose number of turns is not known (while_loop, fori_loop)",
    "cond": "it lies in a branch that may not be taken (cond, switch)",
    "custom_jvp_call": "it lies in a function with a derivative of its own (custom_jvp)",
    "custom_vjp_call": "it lies in a function with a derivative of its own (custom_vjp)",
    "shard_map": "it lies in a shard_map, whose values are parts of the global ones",
}

Visit = Callable[["Site", Array, Callable[[Array], PyTree]], Array]


class Site(NamedTuple):
    """A named value of a program.

    Attributes:
      name: Its own name: that given, followed by `[i]` where it is given several times.
      given: The name given, the same for all calls of a function and all turns of a scan.
      shape: Shape.
      dtype: Data type.
      path: Where it is computed.
    """

    name: str
    given: str
    shape: tuple[int, ...]
    dtype: Any
    path: Path

    @property
    def names(self) -> tuple[str, str]:
        """What the site goes by: its own name, and that given."""
        return self.name, self.given


def tap(name: str, value: PyTree) -> PyTree:
    """Return the value, an array or a tree of arrays, under a name by which a step finds it.

    Each of several arrays gets the name followed by its place in the tree, `"block:0"`. Where no
    program is traced, as in inference, this is the identity.

    Example:
      >>> import jax.numpy as jnp
      >>> network = lambda w, x: jnp.dot(tap("hidden", jnp.tanh(x @ w)), w)
      >>> Program.trace(network, jnp.eye(2), jnp.ones((3, 2))).sites[0].name
      'hidden'
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"tap takes a name and a value, as in tap('hidden', value), not {name!r}.")
    leaves, tree = jax.tree.flatten(value)
    names = [name] if len(leaves) == 1 else [f"{name}:{place}" for place in range(len(leaves))]
    return tree.unflatten(
        checkpoint_name(leaf, MARK + own) if isinstance(leaf, jax.Array) else leaf
        for own, leaf in zip(names, leaves, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A function traced once, to be evaluated with values replaced at its sites.

    Attributes:
      closed: The jaxpr, of flat arguments and results.
      shapes: Shapes and data types of what the function returns.
      sites: The values that can be replaced, in the order in which they are computed.
      unreachable: Why each other named value cannot be, by its name.
    """

    closed: Any
    shapes: PyTree
    sites: tuple[Site, ...]
    unreachable: Mapping[str, str]

    @classmethod
    def trace(
        cls,
        function: Callable[..., PyTree],
        *args: PyTree,
        axis_names: Sequence[str] = (),
        results: int | None = None,
    ) -> "Program":
        """Trace a function of trees of arrays; nothing is computed.

        Args:
          function: The function.
          *args: Its arguments, of which the shapes count.
          axis_names: Axes over which it may reduce (`jax.lax.psum`) though they are not in force.
          results: How many of the arrays that it returns count, all if not told; a value on which
            none of them depends is no site.

        Example:
          >>> import jax.numpy as jnp
          >>> network = lambda w, x: tap("hidden", x @ w) @ w
          >>> program = Program.trace(network, jnp.eye(2), jnp.ones((1, 2)))
          >>> double = lambda site, value, tail: 2.0 * value
          >>> program.walk((jnp.eye(2), jnp.ones((1, 2))), ["hidden"], double)
          Array([[2., 2.]], dtype=float32)
        """
        axes = [(name, 1) for name in axis_names]
        make = jax.make_jaxpr(function, axis_env=axes or None, return_shape=True)
        closed, shapes = make(*args)
        jaxpr, _ = opened(closed)
        counts = range(len(jaxpr.outvars))[:results]
        wanted = [place in counts for place in range(len(jaxpr.outvars))]
        sites, unreachable = _named(jaxpr, wanted)
        return cls(closed, shapes, sites, unreachable)

    def walk(self, args: Sequence[PyTree], wanted: Iterable[str], visit: Visit) -> PyTree:
        """Evaluate the program, once, replacing the values at sites.

        Args:
          args: As in `trace`.
          wanted: Names of the sites to visit, `name` or `given` of each.
          visit: Called as `visit(site, value, tail)` in the order of computation; returns what to
            continue with. `tail(value)` is the program's result with another value there, computed
            by what comes after the site alone; gradients flow through that value, all else is held
            constant.

        Returns:
          What the function returns. Gradients flow through it, too.
        """
        wanted = set(wanted)
        paths = {site.path: site for site in self.sites if wanted.intersection(site.names)}
        jaxpr, consts = opened(self.closed)
        entries = [Value() for _ in jaxpr.invars]
        within, ops = entered(jaxpr, consts, entries, paths, ())
        ops, env = list(ops), dict(zip(entries, jax.tree.leaves(args), strict=True))
        results = within(jaxpr.outvars)

        def finish(env):
            found = [get(env, value) for value in results]
            return jax.tree.unflatten(jax.tree.structure(self.shapes), found)

        for place, op in enumerate(ops):
            evaluate([op], env)
            if (site := op.site) is None:
                continue
            rest, (out,) = ops[place + 1 :], op.outputs
            alive = needed(rest, results)
            held = {v: jax.lax.stop_gradient(env[v]) for v in alive if v in env}

            def tail(value, rest=rest, held=held, out=out):
                return finish(evaluate(rest, {**held, out: value}))

            env[out] = visit(site, env[out], tail)
        return finish(env)

    def costs(self) -> dict[str, float]:
        """Return what comes after each site, as a share of the FLOPs of the program."""
        jaxpr, _ = opened(self.closed)
        total = max(flops(jaxpr), 1)
        return {site.name: flops(jaxpr, site.path) / total for site in self.sites}


def _named(jaxpr: Any, wanted: Sequence[bool]) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Find the sites, in order, and why other named values are none."""
    found: list[tuple[tuple[Any, ...], Site]] = []
    unreachable: dict[str, str] = {}

    def search(jaxpr, path, order, reason, wanted):
        alive = needed_by(jaxpr, wanted)
        for place, eqn in enumerate(jaxpr.eqns):
            kind, at, then = eqn.primitive.name, (*path, place), (*order, place)
            if (given := name_of(eqn)) is not None:
                aval = eqn.outvars[0].aval
                if (why := reason or _useless(aval, eqn.outvars[0] in alive)) is None:
                    found.append((then, Site(given, given, aval.shape, aval.dtype, at)))
                else:
                    unreachable.setdefault(given, why)
            for sub in inside(eqn):
                body, _ = opened(sub)
                if reason is not None or kind not in (*INLINED, *REMATERIALIZED, "scan"):
                    why = REASONS.get(kind, f"it lies in a {kind}, which is not opened")
                    search(body, at, then, reason or why, [True] * len(body.outvars))
                    continue
                within = wanted_within(eqn, body, alive)
                if kind == "scan":
                    # Without a name inside there is no need to go through all turns.
                    for turn in range(eqn.params["length"] if is_named(body) else 0):
                        length, reverse = eqn.params["length"], eqn.params["reverse"]
                        when = length - 1 - turn if reverse else turn
                        search(body, (*at, turn), (*then, when), reason, within)
                else:
                    search(body, at, then, reason, within)

    search(jaxpr, (), (), None, wanted)
    counts, seen = collections.Counter(site.given for _, site in found), collections.Counter()
    numbered = []
    for order, site in found:
        number = f"[{seen[site.given]}]" if counts[site.given] > 1 else ""
        seen[site.given] += 1
        numbered.append((order, site._replace(name=site.given + number)))
    return tuple(site for _, site in sorted(numbered, key=lambda pair: pair[0])), unreachable


def _useless(aval: Any, used: bool) -> str | None:
    """Return why a value that can be replaced is no site, if it is none."""
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return f"it is {aval.dtype}, and perturbations need floats"
    if 0 in aval.shape:
        return f"it is empty, {aval.shape}"
    return None if used else "the network's output does not depend on it"
