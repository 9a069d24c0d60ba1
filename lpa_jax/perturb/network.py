"""What the engine needs of a network; `lpa_jax.taps` provides it for a library of layers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, PyTree

Position = tuple[int, ...]


class Tap(NamedTuple):
    """One value inside a network that can be captured and replaced.

    Attributes:
      name: Its own name: the site, followed by `[i]` where the site is computed several times.
      site: Name of the site, the path of a module.
      call: Which call of the module.
      layer: Which layer of a scanned stack, and their number; None outside of one.
      position: Its place in the order of computation.
      shape: Shape `[B, ...]`.
      dtype: Data type, a floating one.
    """

    name: str
    site: str
    call: int
    layer: tuple[int, int] | None
    position: Position
    shape: tuple[int, ...]
    dtype: Any


class Trace(NamedTuple):
    """What one abstract pass through a network tells.

    Attributes:
      taps: All taps, in the order in which they are computed.
      inputs: Shape and dtype of the network's input.
      logits: Shape and dtype of its output.
      updates: Position at which each leaf of the mutated variables is computed, in the order of
        `jax.tree.leaves`.
    """

    taps: tuple[Tap, ...]
    inputs: jax.ShapeDtypeStruct
    logits: jax.ShapeDtypeStruct
    updates: tuple[Position, ...]


class Network(Protocol):
    """A network whose inner values can be captured and replaced."""

    def trace(self, variables: PyTree, inputs: Array, kwargs: Mapping[str, Any]) -> Trace:
        """Find the taps, without computing anything."""
        ...

    def run(
        self,
        variables: PyTree,
        inputs: Array,
        replaced: Mapping[Tap, Array],
        wanted: Sequence[Tap],
        kwargs: Mapping[str, Any],
    ) -> tuple[Array, list[Array], PyTree]:
        """Return the logits, the wanted values and the mutated variables, with taps replaced."""
        ...
