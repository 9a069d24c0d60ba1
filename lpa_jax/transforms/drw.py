"""DRW: re-weighting that begins late in the run."""

from collections.abc import Sequence

import jax.numpy as jnp

from lpa_jax.core.arguments import at_step, check_count, check_number, Number
from lpa_jax.core.perturbation import Perturbation
from lpa_jax.transforms.reweight import reweight


def drw(
    class_counts: Sequence[float],
    start: int,
    beta: Number = 0.9999,
    normalize: bool = True,
) -> Perturbation:
    """DRW: deferred re-weighting, `reweight` from step `start` on and nothing before it.

    Args:
      class_counts: Number of training examples of each class, `[C]`, all positive.
      start: First step that is weighted, at least 0. The paper's: epoch 160 of 200.
      beta: As in `reweight`.
      normalize: As in `reweight`; by default as in the paper's code.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.chain(lpa_jax.ldam([30, 10]), lpa_jax.drw([30, 10], start=8000))
      (Perturbation(sites=('logits',)), Perturbation(sites=('logit_grads',)))

    References:
      Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
      2019, arXiv:1906.07413.
    """
    check_count("start", start, low=0)
    check_number("beta", beta, 0.0, 1.0)

    def deferred(step):
        return jnp.where(jnp.asarray(step) < start, 0.0, at_step(beta, step))

    return reweight(class_counts, deferred, normalize)
