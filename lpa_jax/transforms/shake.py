"""Shake: each example's value is scaled, forwards and backwards by different factors."""

import jax

from lpa_jax.core import pgd
from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import check_activations, Perturbation, stateless


def shake(site: str, strength: Number) -> Perturbation:
    r"""Scale each example's value at random, forwards and backwards by independent factors.

    Both factors are uniform in `[1 - strength, 1 + strength]`, as in Shake-Shake's best variant,
    which draws them for each example and apart for the two directions. *Ours*: it scales one value
    in place of a mixture of two branches; a residual block's branch corresponds to it.

    Args:
      site: A module path, `"inputs"` or `"logits"`; the value is `[B, ...]`.
      strength: In [0, 1], or a schedule.

    Raises:
      ValueError: If `strength` lies outside [0, 1], or the site holds no activations.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.shake("group3", strength=0.5)
      Perturbation(sites=('group3',))

    References:
      Gastaldi, Shake-Shake regularization, 2017, arXiv:1705.07485.
    """
    check_activations("shake", [site])
    check_number("strength", strength, 0.0, 1.0)

    def update(value, *, key, step=0, **_):
        draws = jax.random.uniform(key, (2, value.shape[0]), minval=-1.0, maxval=1.0)
        factors = (1.0 + at_step(strength, step) * draws).astype(value.dtype)
        forward, backward = (pgd.column(factor, value) for factor in factors)
        # The gradient sees the second term alone.
        return jax.lax.stop_gradient((forward - backward) * value) + backward * value

    return stateless(site, update, needs_gradient=False)
