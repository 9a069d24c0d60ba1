"""Logit adjustment: the log-prior of the classes is added."""

from collections.abc import Sequence

import jax.numpy as jnp

from lpa_jax.core import membership
from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import LOGITS, Perturbation, stateless


def logit_adjustment(class_counts: Sequence[float], tau: Number = 1.0) -> Perturbation:
    """Add `tau * log(prior)` to the logits in the training loss.

    Args:
      class_counts: Number of training examples of each class, `[C]`, all positive.
      tau: Strength, at least 0, or a schedule.

    Raises:
      ValueError: If a count is not positive, or their number is not that of the classes.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> adjust = lpa_jax.logit_adjustment([30, 10])
      >>> adjust.update(jnp.zeros((1, 2)), adjust.init(None))[0].round(3).tolist()
      [[-0.288, -1.386]]

    References:
      Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv:2007.07314.
    """
    counts = membership.counts_of(class_counts)
    check_number("tau", tau)

    def update(value, *, step=0, **_):
        membership.check_classes(counts, value)
        shift = at_step(tau, step) * jnp.log(counts / jnp.sum(counts))
        return value + shift[None].astype(value.dtype)

    return stateless(LOGITS, update, needs_gradient=False)
