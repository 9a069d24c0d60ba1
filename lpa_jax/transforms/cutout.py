"""Cutout: a square of each image is covered."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import INPUTS, Perturbation, stateless
from lpa_jax.transforms._image_boxes import box, image_size


def cutout(size: Number, mean: float | Sequence[float] = 0.0) -> Perturbation:
    """Cutout: cover a square of each image, at a place of its own.

    Args:
      size: Side of the square in pixels, at least 0, or a schedule; the borders cut it off. The
        paper's: 16 on CIFAR-10, 8 on CIFAR-100.
      mean: What covers it, one number or one for each channel. The paper's is the mean of the
        training images.

    Raises:
      ValueError: If `size` is negative, or the inputs are not `[B, H, W, channels]`.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.cutout(16, mean=(0.49, 0.48, 0.45))
      Perturbation(sites=('inputs',))

    References:
      DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout,
      2017, arXiv:1708.04552.
    """
    check_number("size", size)
    color = jnp.asarray(mean)

    def update(value, *, key, step=0, **_):
        shape = jnp.asarray(image_size("cutout", value), jnp.float32)
        center = jnp.floor(jax.random.uniform(key, (value.shape[0], 2)) * shape[None])
        square = box(value, center, jnp.full(2, at_step(size, step)))
        cover = jnp.broadcast_to(color.astype(value.dtype), value.shape)
        return jnp.where(square, cover, value)

    return stateless(INPUTS, update, needs_gradient=False)
