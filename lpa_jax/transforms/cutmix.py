"""CutMix: boxes of one image are pasted into another."""

import jax
import jax.numpy as jnp

from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import INPUTS, LABELS, Perturbation
from lpa_jax.transforms._image_boxes import box, image_size


def cutmix(alpha: Number, probability: Number = 1.0) -> Perturbation:
    r"""CutMix: paste a box of another example, and mix the targets by the box's area.

    The box, one for the batch, has `1 - lambda` of the area, `lambda ~ Beta(alpha, alpha)`, and a
    center drawn anywhere in the image, whose borders cut it off; the targets are mixed by what is
    left of it. Each example is paired with the one before it, as in `manifold_mixup` (*ours*).

    Args:
      alpha: Parameter of the Beta distribution, at least 0 (0: no mixing), or a schedule. The
        paper's: 1.0.
      probability: Share of the batches that are mixed, in [0, 1], or a schedule. The paper's code:
        0.5 on CIFAR.

    Raises:
      ValueError: If an argument is outside its range, or the inputs are not `[B, H, W, channels]`.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.cutmix(alpha=1.0)
      Perturbation(sites=('inputs', 'labels'))

    References:
      Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
      Features, ICCV 2019, arXiv:1905.04899.
    """
    check_number("alpha", alpha)
    check_number("probability", probability, 0.0, 1.0)

    def update(value, state, params=None, *, site=INPUTS, key, weights, step=0, **_):
        del params
        real = weights > 0
        paired = real & jnp.roll(real, 1)
        other = jnp.roll(value, 1, axis=0)
        if site == LABELS:
            # The area in pixels, which the labels do not tell, comes from the inputs.
            lam = jnp.where(paired, state, 1.0)[:, None].astype(value.dtype)
            return jnp.where(lam < 1, lam * value + (1 - lam) * other, value), state
        size = jnp.asarray(image_size("cutmix", value), jnp.float32)
        lam_key, center_key, apply_key = jax.random.split(key, 3)
        concentration = at_step(alpha, step)
        safe = jnp.maximum(concentration, 1e-3)
        applied = jax.random.bernoulli(apply_key, at_step(probability, step))
        lam = jax.random.beta(lam_key, safe, safe)
        lam = jnp.where(applied & (concentration > 0), lam, 1.0)
        center = jnp.floor(jax.random.uniform(center_key, (1, 2)) * size[None])
        pasted = box(value, center, jnp.floor(size * jnp.sqrt(1.0 - lam)))
        mixed = jnp.where(paired[:, None, None, None] & pasted, other, value)
        return mixed, 1.0 - jnp.mean(pasted.astype(jnp.float32))

    return Perturbation(
        (INPUTS, LABELS),
        lambda _: jnp.ones((), jnp.float32),
        update,
        mixes=True,
        needs_gradient=False,
    )
