"""What LPA, LPL and LPG share: the sign and the bound of every class, and their rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lpa_jax.perturb import bounds, membership, pgd, sites, splits, statistics


class Plan(NamedTuple):
    """What is to happen to each class at this step.

    Attributes:
      sign: +1 (raise the loss), -1 (lower it) or 0 (leave alone), float32 `[C]`.
      radius: The bound, float32 `[C]`, at least 0.
    """

    sign: Float[Array, "classes"]
    radius: Float[Array, "classes"]

    def rows(self, members: membership.Membership) -> tuple[pgd.PerRow, pgd.PerRow]:
        """Return signs and bounds by row, `[R]`; both are 0 for a row without members."""
        present = members.counts > 0
        sign = jnp.where(present, members.take_class(self.sign), 0.0)
        return sign, jnp.where(present, members.take_class(self.radius), 0.0)


def planner(
    epsilon: sites.Number, delta_epsilon: sites.Number, split: splits.Split | None
) -> Callable[[statistics.ClassStats, Any], Plan]:
    """Return the function of the statistics and the step that decides what happens to each class.

    Raises:
      ValueError: If a number is outside its range.
    """
    sites.check_number("epsilon", epsilon)
    sites.check_number("delta_epsilon", delta_epsilon)
    split = splits.mean_threshold() if split is None else split

    def plan(stats, step):
        return Plan(split.signs(stats), bounds.radii(epsilon, delta_epsilon, split, stats, step))

    return plan
