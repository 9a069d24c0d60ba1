"""Perturbations that began at the inputs and serve at activations too: noise, attacks, mixing."""

from collections.abc import Sequence
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lpa_jax.perturb import pgd
from lpa_jax.perturb.sites import (
    at_step,
    check_activations,
    check_choice,
    check_climbable,
    check_count,
    check_number,
    INPUTS,
    LABELS,
    Number,
    PARAM_GRADS,
    Perturbation,
    require_gradient,
    SiteError,
    stateless,
)


def gaussian_noise(site: str, stddev: Number) -> Perturbation:
    """Add independent normal noise.

    Args:
      site: Any site whose value is one array: `"inputs"`, a module path, `"logits"`,
        `"logit_grads"`.
      stddev: Standard deviation in the units of the value, at least 0, or a schedule.

    Raises:
      ValueError: If `stddev` is negative or not a number.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.gaussian_noise("inputs", stddev=0.05)
      Perturbation(sites=('inputs',))
    """
    if site == PARAM_GRADS:
        raise SiteError(
            "gaussian_noise needs a value that is one array; for 'param_grads' place "
            "optax.add_noise there."
        )
    check_number("stddev", stddev)

    def update(value, *, key, step=0, **_):
        noise = jax.random.normal(key, value.shape, value.dtype)
        return value + noise * at_step(stddev, step).astype(value.dtype)

    return stateless(site, update)


def adversarial(
    site: str,
    epsilon: Number,
    *,
    steps: int = 1,
    step_size: Number | None = None,
    norm: Literal["linf", "l2"] = "linf",
    bounds: tuple[float, float] | None = None,
) -> Perturbation:
    """Move each example uphill in its own loss: FGSM (one step) or PGD, from the clean value.

    Args:
      site: A module path, `"inputs"` or `"logits"`.
      epsilon: Radius of the ball around the value, at least 0, or a schedule.
      steps: Number of steps, at least 1.
      step_size: Length of a step; default `epsilon` for one step and `2.5 * epsilon / steps` for
        more.
      norm: `"linf"` (steps along the sign of the gradient) or `"l2"` (along the gradient).
      bounds: Range the result is clipped to, `(0.0, 1.0)` for pixels; None for activations.

    Raises:
      ValueError: If an argument is outside its range, or the site has no gradient.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.adversarial("inputs", 8 / 255, steps=10, bounds=(0.0, 1.0))
      Perturbation(sites=('inputs',))

    References:
      Goodfellow, Shlens and Szegedy, Explaining and Harnessing Adversarial Examples, ICLR 2015,
      arXiv:1412.6572; Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks,
      ICLR 2018, arXiv:1706.06083.
    """
    check_number("epsilon", epsilon)
    check_count("steps", steps)
    check_choice("norm", norm, ("linf", "l2"))
    check_climbable("adversarial", [site])
    if step_size is not None:
        check_number("step_size", step_size)
    if bounds is not None:
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise ValueError(f"bounds must be two numbers, or None, not {bounds!r}.")
        check_number("bounds[0]", bounds[0], -math.inf)
        check_number("bounds[1]", bounds[1], bounds[0])

    def update(value, *, gradient_fn=None, step=0, **_):
        gradient_fn = require_gradient("adversarial", site, gradient_fn)
        start = jax.lax.stop_gradient(value)
        size = at_step(epsilon, step)
        default = size if steps == 1 else 2.5 * size / steps
        stride = default if step_size is None else at_step(step_size, step)

        delta = pgd.climb_within(
            lambda moved: gradient_fn(moved)[1],
            start,
            jnp.zeros_like(start, jnp.float32),
            size,
            stride,
            steps,
            norm,
            bounds,
        )
        return value + delta.astype(value.dtype)

    return stateless(site, update)


def manifold_mixup(sites: str | Sequence[str], alpha: Number) -> Perturbation:
    r"""Manifold Mixup: interpolate the examples of a batch at a layer drawn for each batch.

    .. math::
        a_i \leftarrow \lambda a_i + (1 - \lambda) a_{i-1}, \qquad
        t_i \leftarrow \lambda t_i + (1 - \lambda) t_{i-1}, \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    Each example is paired with the one before it in the batch (*ours*; batches are shuffled, and
    on many devices a shift is one neighbor's exchange where a permutation is a gather of all). An
    example next to padding stays as it is. Gradients flow through both partners. Class-level
    perturbations must stand after the last of the sites, where examples and targets agree.

    Args:
      sites: The layers to draw from with equal chance, module paths or `"inputs"`. The targets are
        mixed along with them, and so is the class membership that LPA, LPL and LPG see.
      alpha: Parameter of the Beta distribution, at least 0 (0: no mixing), or a schedule. The
        paper's: 2.0 on CIFAR and SVHN, 0.2 on TinyImageNet.

    Raises:
      ValueError: If `alpha` is negative or not a number.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.manifold_mixup(("inputs", "group1"), alpha=2.0)
      Perturbation(sites=('inputs', 'group1', 'labels'))

    References:
      Verma et al., Manifold Mixup: Better Representations by Interpolating Hidden States, ICML
      2019, arXiv:1806.05236.
    """
    check_number("alpha", alpha)
    layers = (sites,) if isinstance(sites, str) else tuple(sites)
    if not layers:
        raise SiteError("manifold_mixup needs at least one layer to mix at.")
    check_activations("manifold_mixup", layers)

    def mixed(value, lam):
        lam = pgd.column(lam, value).astype(value.dtype)
        return jnp.where(lam < 1, lam * value + (1 - lam) * jnp.roll(value, 1, axis=0), value)

    def update(value, *, site=layers[0], key, weights, step=0, **_):
        # One key at all sites: they agree on the layer, lambda and the pairing without a state.
        layer_key, lam_key = jax.random.split(key)
        concentration = at_step(alpha, step)
        safe = jnp.maximum(concentration, 1e-3)
        lam = jnp.where(concentration > 0, jax.random.beta(lam_key, safe, safe), 1.0)
        real = weights > 0
        lam = jnp.where(real & jnp.roll(real, 1), lam, 1.0)
        if site == LABELS:
            return mixed(value, lam)
        chosen = jax.random.randint(layer_key, (), 0, len(layers)) == layers.index(site)
        # Inputs may be a tree of arrays.
        return jax.tree.map(lambda leaf: jnp.where(chosen, mixed(leaf, lam), leaf), value)

    return stateless((*layers, LABELS), update)


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
        size = jnp.asarray(_image_size("cutmix", value), jnp.float32)
        lam_key, center_key, apply_key = jax.random.split(key, 3)
        concentration = at_step(alpha, step)
        safe = jnp.maximum(concentration, 1e-3)
        applied = jax.random.bernoulli(apply_key, at_step(probability, step))
        lam = jax.random.beta(lam_key, safe, safe)
        lam = jnp.where(applied & (concentration > 0), lam, 1.0)
        center = jnp.floor(jax.random.uniform(center_key, (1, 2)) * size[None])
        box = _box(value, center, jnp.floor(size * jnp.sqrt(1.0 - lam)))
        mixed = jnp.where(paired[:, None, None, None] & box, other, value)
        return mixed, 1.0 - jnp.mean(box.astype(jnp.float32))

    return Perturbation((INPUTS, LABELS), lambda _: jnp.ones((), jnp.float32), update)


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
        shape = jnp.asarray(_image_size("cutout", value), jnp.float32)
        center = jnp.floor(jax.random.uniform(key, (value.shape[0], 2)) * shape[None])
        square = _box(value, center, jnp.full(2, at_step(size, step)))
        cover = jnp.broadcast_to(color.astype(value.dtype), value.shape)
        return jnp.where(square, cover, value)

    return stateless(INPUTS, update)


def _image_size(name: str, value: Array) -> tuple[int, int]:
    if value.ndim != 4:
        raise ValueError(f"{name} needs inputs [B, H, W, channels], not {value.shape}.")
    return value.shape[1], value.shape[2]


def _box(
    value: Float[Array, "B H W C"], center: Float[Array, "boxes 2"], size: Float[Array, "2"]
) -> Bool[Array, "boxes H W 1"]:
    """Return which pixels lie in a box: from half its size before its center to half beyond."""

    def within(axis):
        places = jnp.arange(value.shape[1 + axis], dtype=jnp.float32)
        offset = places[None] - center[:, axis, None]
        return (offset >= -size[axis] / 2) & (offset < size[axis] / 2)

    return (within(0)[:, :, None] & within(1)[:, None])[..., None]
