"""Perturbations of the targets `[B, C]`."""

import jax
import jax.numpy as jnp

from lpa_jax.perturb import sites


def label_smoothing(alpha: sites.Number) -> sites.Perturbation:
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
    sites.check_number("alpha", alpha, 0.0, 1.0)

    def update(value, *, step=0, **_):
        weight = sites.at_step(alpha, step)
        return (1.0 - weight) * value + weight / value.shape[1]

    return sites.stateless(sites.LABELS, update)


def disturb_label(rate: sites.Number) -> sites.Perturbation:
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
    sites.check_number("rate", rate, 0.0, 1.0)

    def update(value, *, key, step=0, **_):
        batch, num_classes = value.shape
        which_key, class_key = jax.random.split(key)
        disturbed = jax.random.bernoulli(which_key, sites.at_step(rate, step), (batch, 1))
        drawn = jax.random.randint(class_key, (batch,), 0, num_classes)
        # Targets of an unknown label are NaN, and stay so.
        known = ~jnp.isnan(value).any(axis=1, keepdims=True)
        other = jax.nn.one_hot(drawn, num_classes, dtype=value.dtype)
        return jnp.where(disturbed & known, other, value)

    return sites.stateless(sites.LABELS, update)
