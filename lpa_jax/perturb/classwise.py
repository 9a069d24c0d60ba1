"""What LPA, LPL and LPG share: the sign and the bound of every class, and their rows."""

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


def plan(
    split: splits.Split,
    epsilon: sites.Number,
    delta_epsilon: sites.Number,
    stats: statistics.ClassStats,
    step: Any,
) -> Plan:
    """Decide the sign and the bound of every class from what is known of it."""
    radius = bounds.radii(epsilon, delta_epsilon, split, stats, step)
    return Plan(split.signs(stats), radius)
