"""Additive margin: one margin for all classes."""

import jax.numpy as jnp

from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import LOGITS, Perturbation, stateless
from lpa_jax.transforms._margins import with_margins


def additive_margin(margin: Number, scale: Number = 1.0) -> Perturbation:
    r"""Large margin in its additive form: `u - scale * margin e_y`, one margin for all classes.

    The papers take the loss of `scale * (cos - margin e_y)`, which this is where the logits are
    `u = scale * cos`: those of our networks with `head="normalized"`, whose scale is 30. If your
    own head returns plain cosines, multiply them by the scale in the network.

    Args:
      margin: At least 0, in units of `1 / scale` of a logit, or a schedule. The papers' is 0.35, of
        cosines.
      scale: What the network has multiplied cosines by, at least 0: 30 with our normalized head. 1,
        with a linear head, has the margin in the units of the logits.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> large_margin = lpa_jax.additive_margin(0.5)
      >>> labels = jnp.array([1])
      >>> large_margin.update(jnp.zeros((1, 2)), large_margin.init(None), labels=labels)[0]
      Array([[ 0. , -0.5]], dtype=float32)

    References:
      Wang et al., Additive Margin Softmax for Face Verification, 2018, arXiv:1801.05599; Wang et
      al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018, arXiv:1801.09414.
      The large-margin softmax multiplies the angle instead and needs a head of its own: Liu et al.,
      Large-Margin Softmax Loss for Convolutional Neural Networks, ICML 2016, arXiv:1612.02295.
    """
    check_number("margin", margin)
    check_number("scale", scale)

    def update(value, *, labels, step=0, **_):
        size = at_step(scale, step) * at_step(margin, step)
        return with_margins(value, labels, jnp.full(value.shape[1], size))

    return stateless(LOGITS, update, needs_gradient=False)
