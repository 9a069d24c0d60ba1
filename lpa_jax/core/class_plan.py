"""What LPA, LPL and LPG share: the sign and the bound of every class."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lpa_jax.core import arguments, bounds, class_stats, membership, splits


class Plan(NamedTuple):
    """What is to happen to each of some classes at this step.

    Attributes:
      sign: +1 (raise the loss), -1 (lower it) or 0 (leave alone), float32 `[R]`.
      radius: The bound, float32 `[R]`, at least 0.
    """

    sign: Float[Array, "rows"]
    radius: Float[Array, "rows"]


class Planner(NamedTuple):
    """Decides what happens to each class, from what is known of it.

    Attributes:
      epsilon: The bound.
      delta_epsilon: The varied bound.
      split: Which classes are pushed out and which pulled in.
    """

    epsilon: arguments.Number
    delta_epsilon: arguments.Number
    split: splits.Split

    def of(self, members: membership.Membership, stats: class_stats.ClassStats, step: Any) -> Plan:
        """Return the plan for each row; a row without members has sign and bound 0."""
        return self._plan(stats, step, members.classes, members.counts > 0)

    def report(self, stats: class_stats.ClassStats, step: Any) -> dict[str, Array]:
        """Return the plan for all classes, float32 `[C]` each."""
        classes = jnp.arange(stats.frequency.shape[0])
        return self._plan(stats, step, classes, jnp.ones_like(classes, bool))._asdict()

    def _plan(self, stats, step, classes, present: Bool[Array, "rows"]) -> Plan:
        sign = self.split.signs(stats, classes)
        spread = self.split.spread(stats, classes)
        radius = bounds.radii(self.epsilon, self.delta_epsilon, spread, step)
        return Plan(jnp.where(present, sign, 0.0), jnp.where(present, radius, 0.0))


def planner(
    epsilon: arguments.Number, delta_epsilon: arguments.Number, split: splits.Split | None
) -> Planner:
    """Return the planner for these bounds, and by default for the mean threshold.

    Raises:
      ValueError: If a number is outside its range, or the split is none.
    """
    if not isinstance(split, splits.Split | None):
        raise ValueError(
            f"split must come from a function of lpa_jax.splits, as in splits.mean_threshold(), "
            f"not {split!r}."
        )
    arguments.check_number("epsilon", epsilon)
    arguments.check_number("delta_epsilon", delta_epsilon)
    return Planner(epsilon, delta_epsilon, splits.mean_threshold() if split is None else split)
