"""Mixup: inputs and targets are interpolated."""

from lpa_jax.core.arguments import Number
from lpa_jax.core.perturbation import INPUTS, Perturbation
from lpa_jax.transforms.manifold_mixup import manifold_mixup


def mixup(alpha: Number) -> Perturbation:
    """Interpolate the inputs and targets of a batch: `manifold_mixup` with the inputs alone.

    Args:
      alpha: Parameter of the Beta distribution, at least 0, or a schedule.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.mixup(alpha=1.0)
      Perturbation(sites=('inputs', 'labels'))

    References:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv:1710.09412.
    """
    return manifold_mixup(INPUTS, alpha)
