"""How well each class is learned: confidence and accuracy, over three windows of time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lpa_jax.core import membership

EMA_DECAY = 0.98
"""Decay of the moving average at each batch in which the class is present: some 50 batches."""


class Means(NamedTuple):
    """Means by class over the examples in a window.

    Attributes:
      confidence: Mean true-class probability, float32 `[C]` in [0, 1]; 0 for an unseen class.
      accuracy: Share of correctly classified examples, likewise.
      weight: Number of examples, float32 `[C]`; 0 for a class that the window has not seen.
      num_seen: Number of classes seen, int32. It is counted as they come: the mean over all classes
        is taken in every step, of any number of classes.
    """

    confidence: Float[Array, "classes"]
    accuracy: Float[Array, "classes"]
    weight: Float[Array, "classes"]
    num_seen: Int[Array, ""]

    def over_classes(self, statistic: str) -> Float[Array, ""]:
        """Return the mean over the classes seen of `"confidence"` or `"accuracy"`."""
        seen = jnp.maximum(self.num_seen, 1).astype(jnp.float32)
        return jnp.sum(getattr(self, statistic)) / seen


class ClassStats(NamedTuple):
    """What is known of each class when a perturbation chooses its sign and bound.

    Attributes:
      frequency: Number of examples seen in training, float32 `[C]`.
      ema: Exponentially decayed means (the default window).
      epoch: Means over the last finished epoch, frozen during the present one.
      running: Means over the present epoch so far; `end_epoch` moves them to `epoch`.
      batch: Means over the present batch, measured before class-level work moves any value.
    """

    frequency: Float[Array, "classes"]
    ema: Means
    epoch: Means
    running: Means
    batch: Means


def init(num_classes: int) -> ClassStats:
    """Return the statistics of `num_classes` classes of which nothing has been seen."""

    # A fresh array for every field: a donated state must not hold one buffer twice.
    def zeros():
        return jnp.zeros(num_classes, jnp.float32)

    def empty():
        return Means(zeros(), zeros(), zeros(), jnp.zeros((), jnp.int32))

    return ClassStats(zeros(), empty(), empty(), empty(), empty())


ClassStatistic = Callable[[Float[Array, "batch classes"]], tuple[Array, Array]]
"""What logits say of each class: confidence in [0, 1] and correctness (0 or 1), `[B, C]` each."""


def observe_batch(
    stats: ClassStats,
    logits: Float[Array, "batch classes"],
    members: membership.Membership,
    class_statistic: ClassStatistic,
) -> ClassStats:
    """Measure the present batch; the other windows stay as they are."""
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    confidences, correct = class_statistic(logits)
    seen = members.counts > 0
    safe = jnp.where(seen, members.counts, 1.0)

    def by_class(rows):
        return members.put(jnp.zeros_like(stats.frequency), rows)

    batch = Means(
        by_class(members.own(confidences) / safe),
        by_class(members.own(correct) / safe),
        by_class(members.counts),
        jnp.sum(seen, dtype=jnp.int32),
    )
    return stats._replace(batch=batch)


def end_batch(stats: ClassStats, members: membership.Membership) -> ClassStats:
    """Take the present batch into the windows that outlast it."""
    confidence, accuracy, weight = (members.take_class(table) for table in stats.batch[:3])

    def add(window, decay):
        known_weight = members.take_class(window.weight)
        new = (members.counts > 0) & (weight > 0) & (known_weight == 0)
        before = decay * known_weight
        total = before + weight
        part = weight / jnp.where(total > 0, total, 1.0)

        def join(table, rows):
            known = members.take_class(table)
            return members.put(table, known + part * (rows - known))

        return Means(
            join(window.confidence, confidence),
            join(window.accuracy, accuracy),
            members.put(window.weight, total),
            window.num_seen + jnp.sum(new, dtype=jnp.int32),
        )

    return stats._replace(
        frequency=members.put(stats.frequency, members.take_class(stats.frequency) + weight),
        ema=add(stats.ema, EMA_DECAY),
        running=add(stats.running, 1.0),
    )


def end_epoch(stats: ClassStats) -> ClassStats:
    """Freeze the means of the epoch just finished and start new ones (LPA, Algorithm 1)."""
    return stats._replace(epoch=stats.running, running=jax.tree.map(jnp.zeros_like, stats.running))
