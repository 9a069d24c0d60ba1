"""A jaxpr cut into operations at the values that are wanted, in remat regions and scans too."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex
import jax.numpy as jnp

from lpa_jax.core.jaxprs import (
    ClosedJaxpr,
    inside,
    num_constant_and_carried,
    opened,
    Path,
    REMATERIALIZED,
    without_names,
)


class Value:
    """Stands for an array; a variable of a jaxpr would be another one at each call of it."""


Env = dict[Value, Any]


class Op(NamedTuple):
    """`outputs = run(*inputs)`, values or literals; where there is a site, the identity."""

    inputs: list[Any]
    outputs: list[Any]
    run: Callable[..., Sequence[Any]]
    site: Any = None


def get(env: Env, value: Any) -> Any:
    """Return the array that a value stands for."""
    return value.val if isinstance(value, jex.Literal) else env[value]


def evaluate(ops: Iterable[Op], env: Env) -> Env:
    """Run operations, and add what they return to the arrays that are known."""
    for op in ops:
        results = op.run(*(get(env, value) for value in op.inputs))
        env.update(zip(op.outputs, results, strict=True))
    return env


def _variables(values: Iterable[Any]) -> dict[Any, None]:
    """Return those that are no literals, each once, in their order."""
    return dict.fromkeys(v for v in values if not isinstance(v, jex.Literal))


def needed(ops: Iterable[Op], results: Iterable[Any] = ()) -> dict[Any, None]:
    """Return what some operations take in, and what is wanted besides."""
    return _variables([*(value for op in ops for value in op.inputs), *results])


def _same(value: Any) -> list[Any]:
    return [value]


def _flatten(
    jaxpr: Any,
    consts: Sequence[Any],
    values: dict[Any, Value],
    wanted: Mapping[Path, Any],
    path: Path,
) -> Iterator[Op]:
    """Yield the operations of a jaxpr, cut at the wanted sites and else as large as can be.

    Args:
      jaxpr: The jaxpr.
      consts: Its constants.
      values: What stands for its variables; those of arguments are there already, others are added.
      wanted: The sites to cut at, by their paths.
      path: Of the equation around.
    """

    def look(var):
        return var if isinstance(var, jex.Literal) else values.setdefault(var, Value())

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        yield Op([], [look(var)], functools.partial(lambda const: [const], const))
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
            yield Op(ins, outs, _same, inner[at])
            continue
        (sub,) = inside(eqn)
        body, body_consts = opened(sub)
        if kind == "scan":
            yield from _cut_scan(eqn, body, body_consts, ins, outs, inner, at)
            continue
        within, ops = entered(body, body_consts, ins, inner, at)
        if kind in REMATERIALIZED:
            ops = _cut_remat(list(ops), [*within(body.outvars)], eqn.params)
        yield from ops
        yield from _renamed(within(body.outvars), outs)
    yield from piece(len(jaxpr.eqns))


def entered(body, consts, ins, wanted, path):
    """Return what gives the values of a body's variables, and its operations."""
    values, given = {}, []
    for var, value in zip(body.invars, ins, strict=True):
        if isinstance(value, jex.Literal):
            value, literal = Value(), value
            given += _renamed([literal], [value])
        values[var] = value

    def within(variables):
        return [v if isinstance(v, jex.Literal) else values[v] for v in variables]

    def ops():
        yield from given
        yield from _flatten(body, consts, values, wanted, path)

    return within, ops()


def _renamed(values, outs):
    return [Op([value], [out], _same) for value, out in zip(values, outs, strict=True)]


def _piece(jaxpr: Any, eqns: Sequence[Any], outs: Sequence[Any], look: Any) -> Op:
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
    return Op([look(var) for var in needs], [look(var) for var in outs], run)


def _grouped(ops: Sequence[Op], later: Mapping[Any, None], wrap: Callable[[Any], Any]) -> Op:
    """Return operations as one, whose results are those that `later` ones need."""
    made = {value for op in ops for value in op.outputs}
    outs = [value for value in later if value in made]
    needs = [value for value in needed(ops) if value not in made]

    def run(*arrays):
        env = evaluate(ops, dict(zip(needs, arrays, strict=True)))
        return [env[value] for value in outs]

    return Op(needs, outs, wrap(run))


def _cut_remat(ops: list[Op], results: list[Any], params: Mapping[str, Any]) -> Iterator[Op]:
    """Cut a rematerialized region at its sites; each part stays rematerialized."""
    wrap = functools.partial(
        jax.checkpoint, policy=params["policy"], prevent_cse=params["prevent_cse"]
    )
    cuts = [place for place, op in enumerate(ops) if op.site is not None]
    for begin, end in zip([-1, *cuts], [*cuts, len(ops)], strict=True):
        if ops[begin + 1 : end]:
            yield _grouped(ops[begin + 1 : end], needed(ops[end:], results), wrap)
        if end < len(ops):
            yield ops[end]


def _cut_scan(eqn, body, consts, ins, outs, wanted, path) -> Iterator[Op]:
    """Cut a scan at the turns that are wanted: a scan up to each, the turn by itself, the rest."""
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    num_consts, num_carry = num_constant_and_carried(eqn, body)
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

        new = [Value() for _ in outs]
        pieces.append((low, new[num_carry:], True))
        return Op([*fixed, *carry, *stacked], new, run), new[:num_carry]

    begin = 0
    for place in sorted(order.index(turn) for turn in turns):
        if begin < place:
            op, carry = several(begin, place, carry)
            yield op
        turn, begin = order[place], place + 1
        slices = [Value() for _ in stacked]
        yield Op(stacked, slices, lambda *arrays, turn=turn: [array[turn] for array in arrays])
        within, ops = entered(body, consts, [*fixed, *carry, *slices], wanted, (*path, turn))
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

        yield Op([ys[number] for _, ys, _ in pieces], [out], join)
