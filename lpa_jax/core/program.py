"""A network as a traced program: a jaxpr in which some values have names.

Whoever writes the network names values by `tap`, or a backend does so for every layer. A named
value is a *site*: `Program.walk` evaluates the program once, hands over the value at each site that
is wanted, and goes on with what it gets back. Order, tails and costs are properties of the jaxpr.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lpa_jax.core.costs import flops
from lpa_jax.core.jaxprs import (
    ClosedJaxpr,
    inside,
    is_named,
    MARK,
    name_of,
    opened,
    Path,
    without_names,
)

INLINED = ("jit", "pjit", "closed_call", "core_call")
REMATERIALIZED = ("checkpoint", "remat", "remat2")
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
        cls, function: Callable[..., PyTree], *args: PyTree, axis_names: Sequence[str] = ()
    ) -> "Program":
        """Trace a function of trees of arrays; nothing is computed.

        Args:
          function: The function.
          *args: Its arguments, of which the shapes count.
          axis_names: Axes over which it may reduce (`jax.lax.psum`) though they are not in force.

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
        sites, unreachable = _named(opened(closed)[0])
        return cls(closed, shapes, sites, unreachable)

    def walk(self, args: Sequence[PyTree], wanted: Iterable[str], visit: Visit) -> PyTree:
        """Evaluate the program, once, replacing the values at sites.

        Args:
          args: As in `trace`.
          wanted: Names of the sites to visit, `name` or `given` of each.
          visit: Called as `visit(site, value, tail)` in the order of computation; returns what to
            go on with. `tail(value)` is the program's result with another value there, computed by
            what comes after the site alone; gradients flow through that value, all else is held
            constant.

        Returns:
          What the function returns. Gradients flow through it, too.
        """
        wanted = set(wanted)
        paths = {site.path: site for site in self.sites if wanted.intersection(site.names)}
        jaxpr, consts = opened(self.closed)
        entries = [_Value() for _ in jaxpr.invars]
        within, ops = _entered(jaxpr, consts, entries, paths, ())
        ops, env = list(ops), dict(zip(entries, jax.tree.leaves(args), strict=True))
        results = within(jaxpr.outvars)

        def finish(env):
            found = [_get(env, value) for value in results]
            return jax.tree.unflatten(jax.tree.structure(self.shapes), found)

        for place, op in enumerate(ops):
            _evaluate([op], env)
            if (site := op.site) is None:
                continue
            rest, (out,) = ops[place + 1 :], op.outputs
            alive = _needed(rest, results)
            held = {v: jax.lax.stop_gradient(env[v]) for v in alive if v in env}

            def tail(value, rest=rest, held=held, out=out):
                return finish(_evaluate(rest, {**held, out: value}))

            env[out] = visit(site, env[out], tail)
        return finish(env)

    def costs(self) -> dict[str, float]:
        """Return what comes after each site, as a share of the FLOPs of the program."""
        jaxpr, _ = opened(self.closed)
        total = max(flops(jaxpr), 1)
        return {site.name: flops(jaxpr, site.path) / total for site in self.sites}


def _named(jaxpr: Any) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Find the sites, in order, and why other named values are none."""
    found: list[tuple[tuple[Any, ...], Site]] = []
    unreachable: dict[str, str] = {}

    def search(jaxpr, path, order, reason):
        for place, eqn in enumerate(jaxpr.eqns):
            kind, at, then = eqn.primitive.name, (*path, place), (*order, place)
            if (given := name_of(eqn)) is not None:
                aval = eqn.outvars[0].aval
                if reason is None and not jnp.issubdtype(aval.dtype, jnp.floating):
                    unreachable[given] = f"it is {aval.dtype}, and perturbations need floats"
                elif reason is None:
                    found.append((then, Site(given, given, aval.shape, aval.dtype, at)))
                else:
                    unreachable.setdefault(given, reason)
            for sub in inside(eqn):
                body, _ = opened(sub)
                if reason is not None or kind not in (*INLINED, *REMATERIALIZED, "scan"):
                    why = REASONS.get(kind, f"it lies in a {kind}, which is not opened")
                    search(body, at, then, reason or why)
                elif kind == "scan":
                    # Without a name inside there is no need to go through all turns.
                    for turn in range(eqn.params["length"] if is_named(body) else 0):
                        length, reverse = eqn.params["length"], eqn.params["reverse"]
                        when = length - 1 - turn if reverse else turn
                        search(body, (*at, turn), (*then, when), reason)
                else:
                    search(body, at, then, reason)

    search(jaxpr, (), (), None)
    counts, seen = collections.Counter(site.given for _, site in found), collections.Counter()
    numbered = []
    for order, site in found:
        number = f"[{seen[site.given]}]" if counts[site.given] > 1 else ""
        seen[site.given] += 1
        numbered.append((order, site._replace(name=site.given + number)))
    return tuple(site for _, site in sorted(numbered, key=lambda pair: pair[0])), unreachable


# ---------------------------------------------------------------- evaluating it in pieces


class _Value:
    """Stands for an array; a variable of a jaxpr would be another one at each call of it."""


_Env = dict[_Value, Any]


class _Op(NamedTuple):
    """`outputs = run(*inputs)`, values or literals; where there is a site, the identity."""

    inputs: list[Any]
    outputs: list[Any]
    run: Callable[..., Sequence[Any]]
    site: Site | None = None


def _get(env: _Env, value: Any) -> Any:
    return value.val if isinstance(value, jex.Literal) else env[value]


def _evaluate(ops: Iterable[_Op], env: _Env) -> _Env:
    for op in ops:
        results = op.run(*(_get(env, value) for value in op.inputs))
        env.update(zip(op.outputs, results, strict=True))
    return env


def _variables(values: Iterable[Any]) -> dict[Any, None]:
    """Return those that are no literals, each once, in their order."""
    return dict.fromkeys(v for v in values if not isinstance(v, jex.Literal))


def _needed(ops: Iterable[_Op], results: Iterable[Any] = ()) -> dict[Any, None]:
    """Return what some operations take in, and what is wanted besides."""
    return _variables([*(value for op in ops for value in op.inputs), *results])


def _same(value: Any) -> list[Any]:
    return [value]


def _flatten(
    jaxpr: Any,
    consts: Sequence[Any],
    values: dict[Any, _Value],
    wanted: Mapping[Path, Site],
    path: Path,
) -> Iterator[_Op]:
    """Yield the operations of a jaxpr, cut at the wanted sites and else as large as can be.

    Args:
      jaxpr: The jaxpr.
      consts: Its constants.
      values: What stands for its variables; those of arguments are there already, others are added.
      wanted: The sites to cut at, by their paths.
      path: Of the equation around.
    """

    def look(var):
        return var if isinstance(var, jex.Literal) else values.setdefault(var, _Value())

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        yield _Op([], [look(var)], functools.partial(lambda const: [const], const))
    last_use = {
        var: place for place, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)
    }
    last_use |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    first = 0

    def piece(end):
        if first == end:
            return
        made = [var for eqn in jaxpr.eqns[first:end] for var in eqn.outvars]
        outs = [var for var in made if last_use.get(var, -1) >= end]
        yield _piece(jaxpr, jaxpr.eqns[first:end], outs, look)

    for place, eqn in enumerate(jaxpr.eqns):
        at, kind = (*path, place), eqn.primitive.name
        inner = {key: site for key, site in wanted.items() if key[: len(at)] == at}
        if not inner:
            continue
        yield from piece(place)
        first = place + 1
        ins, outs = [look(var) for var in eqn.invars], [look(var) for var in eqn.outvars]
        if at in inner:
            yield _Op(ins, outs, _same, inner[at])
            continue
        (sub,) = inside(eqn)
        body, body_consts = opened(sub)
        if kind == "scan":
            yield from _cut_scan(eqn, body, body_consts, ins, outs, inner, at)
            continue
        within, ops = _entered(body, body_consts, ins, inner, at)
        if kind in REMATERIALIZED:
            ops = _cut_remat(list(ops), [*within(body.outvars)], eqn.params)
        yield from ops
        yield from _renamed(within(body.outvars), outs)
    yield from piece(len(jaxpr.eqns))


def _entered(body, consts, ins, wanted, path):
    """Return what gives the values of a body's variables, and its operations."""
    values, given = {}, []
    for var, value in zip(body.invars, ins, strict=True):
        if isinstance(value, jex.Literal):
            value, literal = _Value(), value
            given += _renamed([literal], [value])
        values[var] = value

    def within(variables):
        return [v if isinstance(v, jex.Literal) else values[v] for v in variables]

    def ops():
        yield from given
        yield from _flatten(body, consts, values, wanted, path)

    return within, ops()


def _renamed(values, outs):
    return [_Op([value], [out], _same) for value, out in zip(values, outs, strict=True)]


def _piece(jaxpr: Any, eqns: Sequence[Any], outs: Sequence[Any], look: Any) -> _Op:
    """Return some equations of a jaxpr as one operation."""
    made = {var for eqn in eqns for var in eqn.outvars}
    needs = [v for v in _variables(v for eqn in eqns for v in eqn.invars) if v not in made]
    part = jaxpr.replace(
        constvars=(),
        invars=needs,
        outvars=list(outs),
        eqns=list(eqns),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    run = jex.jaxpr_as_fun(ClosedJaxpr(without_names(part), ()))
    return _Op([look(var) for var in needs], [look(var) for var in outs], run)


def _grouped(ops: Sequence[_Op], later: Mapping[Any, None], wrap: Callable[[Any], Any]) -> _Op:
    """Return operations as one, whose results are those that `later` ones need."""
    made = {value for op in ops for value in op.outputs}
    outs = [value for value in later if value in made]
    needs = [value for value in _needed(ops) if value not in made]

    def run(*arrays):
        env = _evaluate(ops, dict(zip(needs, arrays, strict=True)))
        return [env[value] for value in outs]

    return _Op(needs, outs, wrap(run))


def _cut_remat(ops: list[_Op], results: list[Any], params: Mapping[str, Any]) -> Iterator[_Op]:
    """Cut a rematerialized region at its sites; each part stays rematerialized."""
    wrap = functools.partial(
        jax.checkpoint, policy=params["policy"], prevent_cse=params["prevent_cse"]
    )
    cuts = [place for place, op in enumerate(ops) if op.site is not None]
    for begin, end in zip([-1, *cuts], [*cuts, len(ops)], strict=True):
        if ops[begin + 1 : end]:
            yield _grouped(ops[begin + 1 : end], _needed(ops[end:], results), wrap)
        if end < len(ops):
            yield ops[end]


def _cut_scan(eqn, body, consts, ins, outs, wanted, path) -> Iterator[_Op]:
    """Cut a scan at the turns that are wanted: a scan up to each, the turn by itself, the rest."""
    length, reverse = eqn.params["length"], eqn.params["reverse"]

    def unstacked(outer, inner):
        # What is scanned over has one axis more outside than inside.
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outer, inner, strict=True))

    num_carry = unstacked(eqn.outvars, body.outvars)
    num_consts = unstacked(eqn.invars, body.invars) - num_carry
    fixed, carry = ins[:num_consts], ins[num_consts : num_consts + num_carry]
    stacked = ins[num_consts + num_carry :]
    once = jex.jaxpr_as_fun(ClosedJaxpr(without_names(body), consts))
    order = range(length)[::-1] if reverse else range(length)
    turns = {key[len(path)] for key in wanted}
    pieces: list[tuple[int, list[Any], bool]] = []

    def several(begin, end, carry):
        """Return the scan over some turns, by their places in the order."""
        low, high = (length - end, length - begin) if reverse else (begin, end)

        def run(*arrays):
            held, start = arrays[:num_consts], arrays[num_consts : num_consts + num_carry]
            slices = [array[low:high] for array in arrays[num_consts + num_carry :]]

            def turn(carry, slices):
                results = once(*held, *carry, *slices)
                return list(results[:num_carry]), list(results[num_carry:])

            end_carry, ys = jax.lax.scan(
                turn, list(start), slices, high - low, reverse, eqn.params["unroll"]
            )
            return [*end_carry, *ys]

        new = [_Value() for _ in outs]
        pieces.append((low, new[num_carry:], True))
        return _Op([*fixed, *carry, *stacked], new, run), new[:num_carry]

    begin = 0
    for place in sorted(order.index(turn) for turn in turns):
        if begin < place:
            op, carry = several(begin, place, carry)
            yield op
        turn, begin = order[place], place + 1
        slices = [_Value() for _ in stacked]
        yield _Op(stacked, slices, lambda *arrays, turn=turn: [array[turn] for array in arrays])
        within, ops = _entered(body, consts, [*fixed, *carry, *slices], wanted, (*path, turn))
        yield from ops
        results = within(body.outvars)
        carry = results[:num_carry]
        pieces.append((turn, results[num_carry:], False))
    if begin < length:
        op, carry = several(begin, length, carry)
        yield op
    yield from _renamed(carry, outs[:num_carry])
    pieces.sort(key=lambda piece: piece[0])
    parts = [stack for _, _, stack in pieces]
    for number, out in enumerate(outs[num_carry:]):

        def join(*arrays):
            whole = [a if stack else a[None] for a, stack in zip(arrays, parts, strict=True)]
            return [jnp.concatenate(whole)]

        yield _Op([ys[number] for _, ys, _ in pieces], [out], join)
