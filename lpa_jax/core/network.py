"""A network as a step has it: opened by a backend, traced, the batch axis of values found."""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lpa_jax.core.jaxprs import Path
from lpa_jax.core.program import Program, Site

COPIES = 2
"""How many times as many examples the second trace has; what batches divide by stays a divisor."""


class Network(NamedTuple):
    """What a backend makes of the variables that a step is given.

    Attributes:
      params: The parameters, a tree of arrays; the gradient has its form.
      rest: Everything else that the network holds, a tree of arrays.
      run: Maps `(params, rest, inputs, keyword arguments)` to what the network returns and the
        state that it mutated, naming the values of its layers by `tap`.
      layers: Names of the layers that are known without a trace.
    """

    params: PyTree
    rest: PyTree
    run: Callable[[PyTree, PyTree, PyTree, Mapping[str, Any]], tuple[PyTree, PyTree]]
    layers: Sequence[str] = ()


Backend = Callable[[PyTree], Network]


class Place(NamedTuple):
    """A site within the network.

    Attributes:
      site: The named value.
      axis: Which of its axes is that of the batch.
      names: What it goes by.
    """

    site: Site
    axis: int
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, the batch first."""
        shape, axis = self.site.shape, self.axis
        return (shape[axis], *shape[:axis], *shape[axis + 1 :])


class Rows(NamedTuple):
    """The rows of a batch, one for each label: the examples, or all positions of all examples.

    Class-level work sees values `[rows, ...]`, whatever the shape of the labels.

    Attributes:
      shape: Shape of integer labels, `[B]`, or `[B, T]` for a label at each position.
    """

    shape: tuple[int, ...]

    @property
    def number(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    def fit(self, shape: Sequence[int]) -> bool:
        """Return whether values of this shape, the batch first, are one for each label."""
        return tuple(shape[: len(self.shape)]) == self.shape

    def of(self, value: Array, axis: int = 0) -> Array:
        """Return a value by rows, given which of its axes is that of the batch."""
        value = value if axis == 0 else jnp.moveaxis(value, axis, 0)
        if len(self.shape) == 1:
            return value
        return value.reshape(self.number, *value.shape[len(self.shape) :])

    def back(self, rows: Array, axis: int = 0) -> Array:
        """Undo `of`."""
        value = rows
        if len(self.shape) > 1:
            value = rows.reshape(*self.shape, *rows.shape[1:])
        return value if axis == 0 else jnp.moveaxis(value, 0, axis)


@dataclasses.dataclass(frozen=True)
class Call:
    """How a network is called, and where its logits are.

    Attributes:
      network: The network.
      kwargs: Keyword arguments that are the same for all examples.
      pick: Which part of what it returns is the logits; None if that is all it returns.
      axis_names: Names of the axes of devices over which the step may be mapped.
    """

    network: Network
    kwargs: Mapping[str, Any]
    pick: Callable[[Any], Array] | None
    axis_names: Sequence[str]

    def trace(self, params: PyTree, rest: PyTree, inputs: PyTree, given: Mapping) -> Program:
        """Trace `(params, rest, inputs, given) -> (logits, mutated state)` by the shapes alone.

        Raises:
          ValueError: If a keyword argument that is given has no axis of the batch, or the network
            returns no logits.
        """
        batch = jax.tree.leaves(inputs)[0].shape[:1]
        for name, value in given.items():
            shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(value)]
            if any(shape[:1] != batch for shape in shapes):
                raise ValueError(
                    f"per_example names {name!r}, which must hold a value for each of the "
                    f"{batch[0]} examples along its first axis, but its shape is {shapes}."
                )
        return self._trace(params, rest, inputs, given)

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays among the keyword arguments that are the same for all examples."""
        values = self.kwargs.items()
        return [name for name, value in values if any(map(jnp.ndim, jax.tree.leaves(value)))]

    def trace_larger(
        self, params: PyTree, rest: PyTree, inputs: PyTree, given: Mapping
    ) -> "Larger | str":
        """Trace with more examples, by which the axis of the batch is found.

        Args:
          params: As in `trace`.
          rest: As in `trace`. Where it holds values of each example, there are more of them too.
          inputs: As in `trace`.
          given: As in `trace`.

        Returns:
          The program, or why there is none.
        """
        args = (params, rest, inputs, given)
        batch = jax.tree.leaves(inputs)[0].shape[:1]

        def trace(rest_too):
            marks = [lambda leaf: False, lambda leaf: rest_too and leaf.shape[:1] == batch]
            marks += [lambda leaf: True] * 2
            several = tuple(map(jax.tree.map, marks, args))
            program = self._trace(*args, several=several)
            # Each is made by one equation, ahead of those of the network.
            return Larger(program, sum(jax.tree.leaves(several)))

        try:
            return trace(rest_too=False)
        except Exception as error:  # The network's own code may raise anything.
            first = error
        try:
            return trace(rest_too=True)
        except Exception:
            told = f"{type(first).__name__}: {first}".split("\n")[0]
            advice = (
                f"if {', '.join(self.arrays)} hold a value for each example, name them in "
                "per_example"
                if self.arrays
                else "write no size of the batch into the network"
            )
            return (
                "the axis of its examples is not known, as the network cannot be traced with "
                f"{COPIES} times as many of them ({told:.200}); {advice}"
            )

    def places(
        self,
        program: Program,
        larger: "Larger | str",
        rows: Rows,
        reserved: Collection[str] = (),
    ) -> tuple[list[Place], dict[str, str]]:
        """Find the values that grow with the batch.

        Args:
          program: What `trace` returned.
          larger: What `trace_larger` returned.
          rows: Of the labels.
          reserved: Names that layers may have, but sites within the network may not.

        Returns:
          The sites with a batch axis, and why each other layer or named value is none, by its name.
        """
        refused = dict(program.unreachable)
        if isinstance(larger, str):
            return [], refused | {site.given: larger for site in program.sites}
        paths = ((s, (s.path[0] - larger.shift, *s.path[1:])) for s in larger.program.sites)
        shapes: dict[tuple[str, Path], tuple[int, ...]]
        shapes = {(s.given, path): s.shape for s, path in paths}
        found, reasons = [], {}
        for site in program.sites:
            again = shapes.get((site.given, site.path))
            axis = _batch_axis(site.shape, again, rows.shape[0])
            if not isinstance(axis, int):
                reasons[site] = axis
            elif not rows.fit((place := Place(site, axis, site.names)).shape):
                reasons[site] = (
                    f"its values, {place.shape}, are not one for each label, {rows.shape}"
                )
            elif site.given in reserved:
                reasons[site] = "the layer of this name has the name of another site"
            else:
                found.append(place)
        some = {place.site.given for place in found}
        refused |= {s.name if s.given in some else s.given: why for s, why in reasons.items()}
        seen = {name.split(":")[0] for name in (*some, *refused)}
        never = "no call of it was seen: it is not called here, or by another method than __call__"
        return found, refused | {name: never for name in self.network.layers if name not in seen}

    def _trace(self, *args: PyTree, several: PyTree = None) -> Program:
        """Trace, with several copies of the arguments that are marked, if any is."""

        def run(*args):
            if several is not None:

                def larger(marked, leaf):
                    return jnp.concatenate([leaf] * COPIES) if marked else leaf

                args = jax.tree.map(larger, several, args)
            params, rest, inputs, given = args
            output, updates = self.network.run(params, rest, inputs, {**self.kwargs, **given})
            return self._logits(output), updates

        unbound = [name for name in self.axis_names if not is_bound(name)]
        return Program.trace(run, *args, axis_names=unbound, results=1)

    def _logits(self, output: Any) -> Array:
        logits = output if self.pick is None else self.pick(output)
        if isinstance(logits, jax.Array) and jnp.issubdtype(logits.dtype, jnp.floating):
            return logits
        kind = getattr(logits, "dtype", None) or f"{type(logits).__name__}"
        raise ValueError(
            f"The network returns no array of float logits, but {kind}: say which part of its "
            "output they are, as in value_and_grad(..., logits=lambda output: output[0]). Where a "
            "Linen model returns mutated collections beside them, give mutable= to the step and "
            "not to the model."
        )


class Larger(NamedTuple):
    """A trace with more examples.

    Attributes:
      program: The program.
      shift: How many equations make the arguments larger, ahead of those of the network.
    """

    program: Program
    shift: int


def _batch_axis(shape: tuple[int, ...], larger: tuple[int, ...] | None, batch: int) -> int | str:
    """Return the axis that grows with the batch, or why there is none."""
    if larger is None:
        return "the network computes it in another way where the batch has another size"
    if len(shape) == len(larger):
        grown = [axis for axis in range(len(shape)) if shape[axis] != larger[axis]]
        if len(grown) == 1 and shape[grown[0]] == batch:
            return grown[0]
        if len(grown) == 1:
            return (
                f"its axis {grown[0]}, of {shape[grown[0]]}, joins the {batch} examples with other "
                "positions"
            )
        if grown:
            return f"several of its axes, {grown} of {shape}, grow with the batch"
    return f"no axis of its shape, {shape}, grows with the batch"


def is_bound(axis_name: str) -> bool:
    """Return whether the step is mapped over an axis of this name."""
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def mapped_axes(tree: PyTree) -> frozenset[str]:
    """Return the axes of `shard_map` over which arrays are divided."""
    kinds = (jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(tree))
    return frozenset[str]().union(*(kind.varying for kind in kinds))


def varying(tree: PyTree, axes: frozenset[str]) -> PyTree:
    """Return a tree of which each device along the axes has a gradient of its own.

    Within `shard_map`, the gradient at a value that is the same everywhere would be summed.
    """

    def vary(leaf):
        missing = tuple(axes - mapped_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)
