"""MMD: the features of all domains have the same distribution, as Gaussian kernels tell it."""

import functools

import jax.numpy as jnp

from lpa_jax.core.arguments import at_step, Number
from lpa_jax.core.perturbation import Perturbation, stateless
from lpa_jax.transforms import _domains

SCALES = tuple(10.0**power for power in range(-3, 4))
"""DomainBed's, in place of a width that is chosen."""


def mmd(site: str, gamma: Number, num_domains: int) -> Perturbation:
    r"""MMD: penalize the maximum mean discrepancy between the domains' features.

    .. math::
        \ell + \frac{\gamma}{K} \sum_{m < n} \left[
            \bar k_{mm} + \bar k_{nn} - 2 \bar k_{mn} \right], \qquad
        k(a, b) = \sum_{s = -3}^{3} \exp(-10^s \|a - b\|_2^2)

    over the K pairs of domains in the batch, where the mean of the kernel is over all pairs of an
    example of one and an example of the other domain, an example and itself among them. As in
    DomainBed. The value stays as it is: the gradient of the penalty is added to the gradient at the
    site, and the loss the step returns is without it.

    Args:
      site: Path of a layer whose output is `[B, D]`: what the head takes in.
      gamma: Weight of the penalty, at least 0, or a schedule. DomainBed's default: 1.
      num_domains: Number of domains M. The step's `extra` has the `domains`, int `[B]` in `[0, M)`.

    *Ours*: a domain without examples in the batch is in no pair; an example counts once, whatever
    its weight; after mixing it is of the domain of the first of its pair. Gradient steps of other
    transforms climb the loss without the penalty.

    Raises:
      ValueError: If an argument is outside its range. The step raises it if the value is not
        `[B, D]`, or the domains are not integers `[B]`; one outside of `[0, M)` makes the gradient
        NaN.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.mmd("features", gamma=1.0, num_domains=3)
      Perturbation(sites=('features',))

    References:
      Li et al., Domain Generalization with Adversarial Feature Learning, CVPR 2018.
    """
    _domains.check_penalty("mmd", site, gamma, num_domains)

    def update(value, *, weights, domains=None, step=0, axis_name=(), **_):
        _domains.check_features("mmd", site, value)
        real, features = _domains.real_features(value, weights)
        members = _domains.by_domain("mmd", domains, real, num_domains, axis_name)

        everywhere = functools.partial(_domains.everywhere, axis_name=axis_name)
        number = jnp.sum((members.counts > 0).astype(jnp.float32))
        share = real / jnp.maximum(members.to_examples(members.counts), 1.0)
        same = members.rows[:, None] == everywhere(members.rows)[None]
        # Those of a domain attract each other in each of its pairs, and those of two in one.
        parts = jnp.where(same, number - 1.0, -1.0) * share[:, None] * everywhere(share)[None]
        apart = features[:, None] - everywhere(features)[None]
        distances = jnp.sum(apart**2, axis=2)
        slopes = sum(scale * jnp.exp(-scale * distances) for scale in SCALES)
        pull = -4.0 * jnp.sum((parts * slopes)[:, :, None] * apart, axis=1)
        pairs = jnp.maximum(0.5 * number * (number - 1.0), 1.0)
        gradient = at_step(gamma, step) * pull / pairs
        return _domains.pulled(value, gradient, weights, axis_name)

    return stateless(site, update, needs_gradient=False)
