"""How well each class is learned: confidence and accuracy, over three windows of time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lpa_jax.perturb import membership

EMA_DECAY = 0.98
"""Decay of the moving average at each batch in which the class is present: some 50 batches."""


class Sums(NamedTuple):
    """Sums by class over the examples in a window, each float32 `[C]`.

    Attributes:
      confidence: Sum of true-class probabilities.
      accuracy: Number of correctly classified examples.
      weight: Number of examples, 0 for a class that the window has not seen.
    """

    confidence: Float[Array, "classes"]
    accuracy: Float[Array, "classes"]
    weight: Float[Array, "classes"]

    def mean(self, statistic: str) -> Float[Array, "classes"]:
        """Return the mean `"confidence"` or `"accuracy"`, in [0, 1]; 0 for unseen classes."""
        return getattr(self, statistic) / jnp.where(self.weight > 0, self.weight, 1.0)


class ClassStats(NamedTuple):
    """What is known of each class when a perturbation chooses its sign and bound.

    Attributes:
      frequency: Number of examples seen in training, float32 `[C]`.
      ema: Exponentially decayed sums (the default window).
      epoch: Sums over the last finished epoch, frozen during the present one.
      running: Sums over the present epoch so far; `end_epoch` moves them to `epoch`.
      batch: Sums over the present batch, measured before class-level work moves any value.
    """

    frequency: Float[Array, "classes"]
    ema: Sums
    epoch: Sums
    running: Sums
    batch: Sums


def init(num_classes: int) -> ClassStats:
    """Return the statistics of `num_classes` classes of which nothing has been seen."""

    # A fresh array for every field: a donated state must not hold one buffer twice.
    def zeros():
        return jnp.zeros(num_classes, jnp.float32)

    def empty():
        return Sums(zeros(), zeros(), zeros())

    return ClassStats(zeros(), empty(), empty(), empty(), empty())


def observe_batch(
    stats: ClassStats,
    logits: Float[Array, "batch classes"],
    members: membership.Membership,
) -> ClassStats:
    """Measure the present batch; the other windows stay as they are."""
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    probabilities = jnp.exp(logits - jax.nn.logsumexp(logits, axis=1, keepdims=True))
    correct = jax.nn.one_hot(jnp.argmax(logits, axis=1), logits.shape[1], dtype=jnp.float32)
    rows = Sums(members.own(probabilities), members.own(correct), members.counts)
    empty = jnp.zeros_like(stats.frequency)
    return stats._replace(batch=Sums(*(members.put(empty, row) for row in rows)))


def end_batch(stats: ClassStats, members: membership.Membership) -> ClassStats:
    """Take the present batch into the windows that outlast it."""

    def add(table, batch, decay):
        new = decay * members.take_class(table) + members.take_class(batch)
        return members.put(table, new)

    return stats._replace(
        frequency=add(stats.frequency, stats.batch.weight, 1.0),
        ema=Sums(*(add(*pair, EMA_DECAY) for pair in zip(stats.ema, stats.batch, strict=True))),
        running=Sums(*(add(*pair, 1.0) for pair in zip(stats.running, stats.batch, strict=True))),
    )


def end_epoch(stats: ClassStats) -> ClassStats:
    """Freeze the sums of the epoch just finished and start new ones (LPA, Algorithm 1)."""
    return stats._replace(epoch=stats.running, running=jax.tree.map(jnp.zeros_like, stats.running))
