"""DisturbLabel: some targets are replaced by random classes."""

import jax
import jax.numpy as jnp

from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import LABELS, Perturbation, stateless


def disturb_label(rate: Number) -> Perturbation:
    """Replace the target by a class drawn uniformly from all C, with probability `rate`.

    Args:
      rate: Probability in [0, 1], or a schedule. The true class may be drawn again.

    Raises:
      ValueError: If `rate` lies outside [0, 1].

    Example:
      >>> import lpa_jax
      >>> lpa_jax.disturb_label(0.1)
      Perturbation(sites=('labels',))

    References:
      Xie et al., DisturbLabel: Regularizing CNN on the Loss Layer, CVPR 2016, arXiv:1605.00055.
    """
    check_number("rate", rate, 0.0, 1.0)

    def update(value, *, key, step=0, **_):
        batch, num_classes = value.shape
        which_key, class_key = jax.random.split(key)
        disturbed = jax.random.bernoulli(which_key, at_step(rate, step), (batch, 1))
        drawn = jax.random.randint(class_key, (batch,), 0, num_classes)
        # Targets of an unknown label are NaN, and stay so.
        known = ~jnp.isnan(value).any(axis=1, keepdims=True)
        other = jax.nn.one_hot(drawn, num_classes, dtype=value.dtype)
        return jnp.where(disturbed & known, other, value)

    return stateless(LABELS, update, needs_gradient=False)
