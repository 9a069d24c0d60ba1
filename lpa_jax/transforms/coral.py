"""CORAL: the features of all domains have the same means and covariances."""

import jax
import jax.numpy as jnp

from lpa_jax.core.arguments import at_step, Number
from lpa_jax.core.perturbation import Perturbation, stateless
from lpa_jax.transforms import _domains


def coral(site: str, gamma: Number, num_domains: int) -> Perturbation:
    r"""CORAL: penalize differences between the domains' means and covariances of the features.

    .. math::
        \ell + \frac{\gamma}{K} \sum_{m < n} \left[
            \frac{1}{D} \|\mu_m - \mu_n\|_2^2 + \frac{1}{D^2} \|C_m - C_n\|_F^2 \right]

    over the K pairs of domains in the batch, with the covariance of n examples divided by n - 1. As
    in DomainBed; the paper has the covariances alone. The value stays as it is: the gradient of the
    penalty is added to the gradient at the site, and the loss the step returns is without it.

    Args:
      site: Path of a layer whose output is `[B, D]`: what the head takes in.
      gamma: Weight of the penalty, at least 0, or a schedule. DomainBed's default: 1.
      num_domains: Number of domains M. The step's `extra` has the `domains`, int `[B]` in `[0, M)`.

    *Ours*: a domain without examples in the batch is in no pair, and one with a single example has
    no covariance; an example counts once, whatever its weight; after mixing it is of the domain of
    the first of its pair. Gradient steps of other transforms climb the loss without the penalty.

    Raises:
      ValueError: If an argument is outside its range. The step raises it if the value is not
        `[B, D]`, or the domains are not integers `[B]`; one outside of `[0, M)` makes the gradient
        NaN.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.coral("features", gamma=1.0, num_domains=3)
      Perturbation(sites=('features',))

    References:
      Sun and Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV Workshops
      2016, arXiv:1607.01719.
    """
    _domains.check_penalty("coral", site, gamma, num_domains)

    def update(value, *, weights, domains=None, step=0, axis_name=(), **_):
        _domains.check_features("coral", site, value)
        real, features = _domains.real_features(value, weights)
        members = _domains.by_domain("coral", domains, real, num_domains, axis_name)
        counts, size = members.counts, features.shape[1]
        means = members.mean(features)
        centered = members.shares()[:, :, None] * (features[:, None] - means[None])
        exact = jax.lax.Precision.HIGHEST
        products = jnp.einsum("brd,bre->rde", centered, centered, precision=exact)
        free = jnp.maximum(counts - 1.0, 1.0)[:, None, None]
        covariances = members.summed(products) / free

        present, several = _indicator(counts > 0), _indicator(counts > 1)
        number = jnp.sum(present)
        # The sum over the pairs of a domain of the differences.
        of_means = _apart(means, present)
        of_covariances = _apart(covariances, several)
        back = of_means / jnp.maximum(counts, 1.0)[:, None] * (2.0 / size)
        pull = members.to_examples(back)
        pull += jnp.einsum(
            "brd,rde->be", centered, of_covariances / free * (4.0 / size**2), precision=exact
        )
        pairs = jnp.maximum(0.5 * number * (number - 1.0), 1.0)
        gradient = at_step(gamma, step) * pull / pairs
        return _domains.pulled(value, gradient, weights, axis_name)

    return stateless(site, update, needs_gradient=False)


def _indicator(chosen):
    return chosen.astype(jnp.float32)


def _apart(values, chosen):
    """Return for each row the sum of its differences to the chosen ones; 0 for the others."""
    column = chosen.reshape((-1,) + (1,) * (values.ndim - 1))
    number = jnp.sum(chosen)
    mean = jnp.sum(column * values, axis=0, keepdims=True) / jnp.maximum(number, 1.0)
    return column * (values - mean) * number
