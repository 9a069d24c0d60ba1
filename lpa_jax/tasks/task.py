"""What a task must say: the one interface through which trainer and tables see labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

Metrics = dict[str, Any]
"""Of one split in one condition: numbers by name; lists and dictionaries of numbers besides."""


class Metric(NamedTuple):
    """How a metric is read and shown.

    Attributes:
      label: In tables and plots, with its unit.
      scale: What the number is multiplied by there.
      digits: Behind the point.
      maximize: Whether more is better.
    """

    label: str
    scale: float = 1.0
    digits: int = 2
    maximize: bool = False


@runtime_checkable
class Task(Protocol):
    """What labels mean; all that depends on it, and nothing else does.

    Labels are int `[B]`, or float `[B, C]` where an example may be of several classes.

    Attributes:
      losses: By name `loss(logits, targets, **options) -> [B]`, with logits and targets `[B, C]`.
      shown: The metrics that tables show, by name, the first of which is what rows are compared by.
      selection: The metric that chooses epochs and settings, one of `shown`.
    """

    @property
    def losses(self) -> Mapping[str, Callable[..., jax.Array]]:
        """Losses by name."""
        ...

    @property
    def shown(self) -> Mapping[str, Metric]:
        """The metrics that tables show."""
        ...

    @property
    def selection(self) -> str:
        """The metric that selects."""
        ...

    def class_statistic(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return how well each class would be met by each example, were it of that class.

        Args:
          logits: float32 `[B, C]`.

        Returns:
          Confidence in [0, 1] and correctness (0 or 1), both `[B, C]`: what `splits` decide by.
        """
        ...

    def correct(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the share of each example, in [0, 1], that is right: the training accuracy.

        Args:
          logits: float32 `[B, C]`.
          labels: int `[B]`, or float `[B, C]` after mixing.
        """
        ...

    def outcomes(self, logits: jax.Array, labels: jax.Array) -> Any:
        """Return what is kept of each example of a batch: a tree of arrays `[B, ...]`."""
        ...

    def metrics(
        self,
        outcomes: Any,
        labels: np.ndarray,
        num_classes: int,
        groups: Mapping[str, Sequence[int]],
    ) -> Metrics:
        """Return the metrics of a split, from the outcomes of all its examples as NumPy arrays.

        Args:
          outcomes: Of all examples, as `outcomes` returns them.
          labels: Of these examples.
          num_classes: Number of classes C.
          groups: Classes of each group that is told apart.
        """
        ...

    def details(self, outcomes: Any, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
        """Return what an evaluation records of clean examples besides, for its file and plots."""
        ...

    def class_counts(self, labels: np.ndarray, num_classes: int) -> list[int]:
        """Return the number of training examples of each class."""
        ...


def is_better(metric: Metric, new: float, old: float | None) -> bool:
    """Return whether a value is better than another, or than none.

    Example:
      >>> is_better(Metric("error", maximize=False), 0.1, 0.2), is_better(Metric("x"), 0.1, None)
      (True, True)
    """
    return old is None or (new > old if metric.maximize else new < old)
