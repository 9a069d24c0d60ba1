"""MixStyle: the channel statistics of examples are mixed, and their contents are not."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lpa_jax.core import pgd
from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import check_activations, Perturbation, SiteError, stateless
from lpa_jax.transforms import _domains

EPSILON = 1e-6
"""Added to the variances, as in the paper's code."""


def mixstyle(site: str, alpha: Number, probability: Number = 0.5) -> Perturbation:
    r"""MixStyle: give each example a mixture of its own channel statistics and another's.

    .. math::
        a_i \leftarrow \gamma_i \frac{a_i - \mu_i}{\sigma_i} + \beta_i, \qquad
        \gamma_i = \lambda_i \sigma_i + (1 - \lambda_i) \sigma_j, \qquad
        \beta_i = \lambda_i \mu_i + (1 - \lambda_i) \mu_j

    with `mu` and `sigma` the mean and standard deviation of a channel over the positions of one
    example, constants for the gradient as in the paper, and `lambda_i ~ Beta(alpha, alpha)`. The
    labels stay as they are.

    Each example is paired with the one before it in the batch, as in `manifold_mixup` (*ours*: the
    paper permutes the batch). If the step's `extra` has `domains`, int `[B]`, j is the last one
    before it, around the end of the batch, that is of another domain (*ours*: the paper swaps the
    halves of a batch of two domains). An example next to padding, or without another domain in the
    batch, stays as it is.

    Args:
      site: Path of a layer, or `"inputs"`; the value is `[B, ..., channels]` with positions, such
        as `[B, H, W, channels]`. The paper's: after the first and second group of a ResNet.
      alpha: Parameter of the Beta distribution, at least 0 (0: no mixing), or a schedule. The
        paper's: 0.1.
      probability: Share of the batches that are mixed, in [0, 1], or a schedule. The paper's: 0.5.

    Returns:
      The perturbation.

    Raises:
      ValueError: If an argument is outside its range. The step raises it if the value has no
        positions, or the domains are not integers `[B]`.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.mixstyle("group1", alpha=0.1)
      Perturbation(sites=('group1',))

    References:
      Zhou et al., Domain Generalization with MixStyle, ICLR 2021, arXiv:2104.02008.
    """
    check_activations("mixstyle", [site])
    check_number("alpha", alpha)
    check_number("probability", probability, 0.0, 1.0)

    def update(value, *, key, weights, domains=None, step=0, **_):
        if value.ndim < 3:
            raise SiteError(
                f"mixstyle at {site!r} needs a value [B, ..., channels] with positions, not "
                f"{value.shape}."
            )
        lam_key, apply_key = jax.random.split(key)
        concentration = at_step(alpha, step)
        safe = jnp.maximum(concentration, 1e-3)
        lam = jax.random.beta(lam_key, safe, safe, value.shape[:1])
        applied = jax.random.bernoulli(apply_key, at_step(probability, step))
        partner, paired = _partners(weights > 0, domains)
        mixed = paired & applied & (concentration > 0) & (lam < 1)

        mean, std = map(jax.lax.stop_gradient, _statistics(value.astype(jnp.float32)))
        lam, mixes = pgd.column(lam, mean), pgd.column(mixed, mean)
        # Of what stays as it is, padding for instance, not even a gradient sees the statistics.
        own_mean, own_std = jnp.where(mixes, mean, 0.0), jnp.where(mixes, std, 1.0)
        new_mean = lam * own_mean + (1.0 - lam) * jnp.where(mixes, mean[partner], 0.0)
        new_std = lam * own_std + (1.0 - lam) * jnp.where(mixes, std[partner], 1.0)
        styled = (value.astype(jnp.float32) - own_mean) / own_std * new_std + new_mean
        return jnp.where(mixes, styled.astype(value.dtype), value)

    return stateless(site, update, needs_gradient=False)


def _partners(
    real: Bool[Array, "batch"], domains: Array | None
) -> tuple[Int[Array, "batch"], Bool[Array, "batch"]]:
    """Return the partner of each example, and whether it has one."""
    places = jnp.arange(real.shape[0])
    if domains is None:
        return jnp.roll(places, 1), real & jnp.roll(real, 1)
    domains = _domains.checked("mixstyle", domains, real)
    fits = real[:, None] & real[None] & (domains[:, None] != domains[None])
    # How far back each example lies from each.
    back = (places[:, None] - places[None]) % real.shape[0]
    nearest = jnp.argmin(jnp.where(fits, back, real.shape[0]), axis=1)
    return nearest, jnp.any(fits, axis=1)


def _statistics(
    value: Float[Array, "batch ... channels"],
) -> tuple[Float[Array, "batch ... channels"], Float[Array, "batch ... channels"]]:
    """Return mean and standard deviation over the positions of each example, `[B, 1, ..., C]`."""
    axes = tuple(range(1, value.ndim - 1))
    mean = jnp.mean(value, axis=axes, keepdims=True)
    variance = jnp.mean((value - mean) ** 2, axis=axes, keepdims=True)
    return mean, jnp.sqrt(variance + EPSILON)
