"""Which classes the examples of a batch belong to: the only interface of class-level work."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer
import numpy as np

Labels = Integer[Array, "batch"] | Float[Array, "batch classes"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "classes", "weights", "counts"],
    meta_fields=["axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Membership:
    """The batch seen by class, in *rows*.

    Integer labels are served by gather and segment-sum, with at most `batch` rows; soft labels
    (after mixup) by matrix products, with a row for every class. Under `jit` over a sharded batch
    all means are over the global batch, and so they are within `shard_map` or `pmap` over axes that
    are named.

    Attributes:
      rows: The row of each example (int `[B]`), or its share in every row (float `[B, R]`).
      classes: The class of each row, int `[R]`; `num_classes` where a row is unused.
      weights: The weight of each example, float32 `[B]`, 0 for padding.
      counts: Summed weights of the members of each row, float32 `[R]`.
      axis_name: Axes of devices over which to sum, each of which has a part of the batch.
    """

    rows: Array
    classes: Int[Array, "rows"]
    weights: Float[Array, "batch"]
    counts: Float[Array, "rows"]
    axis_name: tuple[str, ...] = ()

    def summed(self, values: Array) -> Array:
        """Sum over the devices what each has of its part of the batch."""
        return jax.lax.psum(values, self.axis_name) if self.axis_name else values

    def total(self, values: Float[Array, "batch ..."]) -> Float[Array, "rows ..."]:
        """Sum `values` over the members of each row, by weight, in float32."""
        values = values.astype(jnp.float32)
        weights = self.weights.reshape((-1,) + (1,) * (values.ndim - 1))
        # A padding example may hold anything, NaN included: it is cut out, not multiplied by 0.
        values = jnp.where(weights > 0, values * weights, 0.0)
        if self.rows.ndim == 1:
            return self.summed(jax.ops.segment_sum(values, self.rows, self.classes.shape[0]))
        exact = jax.lax.Precision.HIGHEST
        return self.summed(jnp.einsum("br,b...->r...", self.rows, values, precision=exact))

    def mean(self, values: Float[Array, "batch ..."]) -> Float[Array, "rows ..."]:
        """Average `values` over the members of each row; 0 for a row without members."""
        counts = self.counts.reshape((-1,) + (1,) * (values.ndim - 1))
        return self.total(values) / jnp.where(counts > 0, counts, 1.0)

    def own(self, table: Float[Array, "batch classes"]) -> Float[Array, "rows"]:
        """Sum over the members of each row the entries of `table` in the column of its class."""
        if self.rows.ndim == 1:
            columns = self.take_class(jnp.arange(table.shape[1]))[self.rows]
            return self.total(jnp.take_along_axis(table, columns[:, None], axis=1)[:, 0])
        weights = self.weights[:, None]
        own = jnp.where(weights > 0, weights * self.rows * table, 0.0)
        return self.summed(jnp.sum(own, axis=0))

    def to_examples(self, per_row: Float[Array, "rows ..."]) -> Float[Array, "batch ..."]:
        """Give each example the entry of its row (soft labels: the mixture of its rows)."""
        if self.rows.ndim == 1:
            return per_row[self.rows]
        return jnp.einsum("br,r...->b...", self.rows, per_row, precision=jax.lax.Precision.HIGHEST)

    def take_class(self, table: Array) -> Array:
        """Look up a table by class, `[C, ...]`, for each row."""
        return table[jnp.minimum(self.classes, table.shape[0] - 1)]

    def shares(self) -> Float[Array, "batch rows"]:
        """Return the share of each example in each row, by weight; 0 for padding."""
        rows = self.rows
        if rows.ndim == 1:
            rows = jax.nn.one_hot(rows, self.classes.shape[0], dtype=jnp.float32)
        return jnp.where(self.weights > 0, self.weights, 0.0)[:, None] * rows

    def put(self, table: Float[Array, "classes ..."], per_row: Float[Array, "rows ..."]) -> Array:
        """Write the entries of the rows with members into a table by class."""
        present = jnp.where(self.counts > 0, self.classes, table.shape[0])
        return table.at[present].set(per_row, mode="drop")


def by_class(
    labels: Labels,
    weights: Float[Array, "batch"],
    num_classes: int,
    axis_name: tuple[str, ...] = (),
) -> Membership:
    """Return the class membership of a batch.

    Args:
      labels: Integer labels `[B]` in `[0, num_classes)`, or soft labels `[B, num_classes]`.
      weights: Example weights, float32 `[B]`, 0 for padding.
      num_classes: Number of classes C. With integer labels there are `min(B, C)` rows; C, where the
        batch is spread over named axes.
      axis_name: Axes of devices, in `shard_map` or `pmap`, each of which has a part of the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> members = by_class(jnp.array([7, 2, 7]), jnp.ones(3), num_classes=1000)
      >>> members.mean(jnp.array([1.0, 5.0, 3.0])), members.classes
      (Array([5., 2., 0.], dtype=float32), Array([   2,    7, 1000], dtype=int32))
    """
    weights = weights.astype(jnp.float32)
    batch = labels.shape[0]
    if labels.ndim == 2:
        rows, classes = labels.astype(jnp.float32), jnp.arange(num_classes)
        counts = jnp.where(weights > 0, weights, 0.0) @ rows
    else:
        if num_classes <= batch or axis_name:
            rows, classes = labels, jnp.arange(num_classes)
        else:
            classes, rows = jnp.unique(
                labels, size=batch, fill_value=num_classes, return_inverse=True
            )
        counts = jax.ops.segment_sum(weights, rows, classes.shape[0])
    counts = jax.lax.psum(counts, axis_name) if axis_name else counts
    return Membership(rows, classes, weights, counts, axis_name)


def share_of(labels: Labels, classes: Int[Array, "batch"]) -> Float[Array, "batch"]:
    """Return the share of each example in the class that is named for it, in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> share_of(jnp.array([2, 0]), jnp.array([2, 1])).tolist()
      [1.0, 0.0]
      >>> share_of(jnp.array([[0.25, 0.75]]), jnp.array([1])).tolist()
      [0.75]
    """
    if labels.ndim == 1:
        return (labels == classes).astype(jnp.float32)
    return jnp.take_along_axis(labels, classes[:, None], axis=1)[:, 0]


def by_example(labels: Labels, weights: Float[Array, "batch"]) -> Membership:
    """Return the membership in which every example is its own row, of its dominant class."""
    classes = labels if labels.ndim == 1 else jnp.argmax(labels, axis=1)
    weights = weights.astype(jnp.float32)
    return Membership(jnp.arange(labels.shape[0]), classes, weights, weights)


def counts_of(class_counts: Sequence[float]) -> Float[Array, "classes"]:
    """Return the number of training examples of each class as an array.

    Raises:
      ValueError: If it is no sequence of numbers, or one is not positive or not finite.
    """
    if isinstance(class_counts, Mapping) or np.ndim(class_counts) != 1 or not len(class_counts):
        raise ValueError(
            f"class_counts must be a sequence with a number for each class, such as "
            f"np.bincount(labels, minlength=C), not {class_counts!r}."
        )
    for label, count in enumerate(class_counts):
        if not 0 < count < math.inf:
            raise ValueError(
                f"class_counts must be positive, but class {label} has {count}: give it a training "
                "example, or leave the class out."
            )
    return jnp.asarray(class_counts, jnp.float32)


def check_classes(counts: Float[Array, "counted"], logits: Float[Array, "batch classes"]) -> None:
    """Raise `ValueError` unless there is a logit for each class counted."""
    if counts.shape[0] != logits.shape[1]:
        raise ValueError(
            f"class_counts names {counts.shape[0]} classes, but there are {logits.shape[1]} logits."
        )
