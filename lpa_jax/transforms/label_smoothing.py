"""Label smoothing: targets are mixed with the uniform distribution."""

from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import LABELS, Perturbation, stateless


def label_smoothing(alpha: Number) -> Perturbation:
    """Mix the targets with the uniform distribution: `(1 - alpha) * t + alpha / C`.

    Args:
      alpha: Weight of the uniform distribution, in [0, 1], or a schedule.

    Raises:
      ValueError: If `alpha` lies outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> smooth = lpa_jax.label_smoothing(0.2)
      >>> smooth.update(jnp.array([[0.0, 1.0]]), smooth.init(None))[0].round(2).tolist()
      [[0.1, 0.9]]

    References:
      Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016,
      arXiv:1512.00567.
    """
    check_number("alpha", alpha, 0.0, 1.0)

    def update(value, *, step=0, **_):
        weight = at_step(alpha, step)
        return (1.0 - weight) * value + weight / value.shape[1]

    return stateless(LABELS, update, needs_gradient=False)
