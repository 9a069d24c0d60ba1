"""V-REx: the losses of all domains are the same."""

import jax.numpy as jnp

from lpa_jax.core.arguments import check_count, check_number, Number
from lpa_jax.core.perturbation import LOGIT_GRADS, Perturbation, stateless
from lpa_jax.transforms import _domains


def vrex(penalty_weight: Number, num_domains: int, anneal_steps: int = 0) -> Perturbation:
    r"""V-REx: penalize the variance of the domains' losses.

    .. math::
        \ell + \frac{w}{M} \sum_m (\ell_m - \bar \ell)^2, \qquad
        \bar \ell = \frac{1}{M} \sum_m \ell_m

    over the M domains in the batch, with the mean loss `l_m` of the examples of domain m. Each
    example's gradient is scaled by `1 + 2 w (l_m - l) n / (M n_m)`, for n examples in the batch and
    n_m of its domain; the loss the step returns is without the penalty.

    Args:
      penalty_weight: Weight w of the penalty, at least 0, or a schedule. DomainBed's default: 10.
      num_domains: Number of domains. The step's `extra` has the `domains`, int `[B]` from 0 on.
      anneal_steps: Number of steps, at least 0, in which the weight is 1. DomainBed's default: 500.

    *Ours*: a domain without examples in the batch does not count; after mixing an example is of the
    domain of the first of its pair. Gradient steps of other transforms climb the loss without the
    penalty. DomainBed begins the optimizer anew after `anneal_steps`, which a transform cannot do.

    Raises:
      ValueError: If an argument is outside its range. The step raises it if the domains are not
        integers `[B]`; one outside of `[0, num_domains)` makes the gradient NaN.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.vrex(penalty_weight=10.0, num_domains=3, anneal_steps=500)
      Perturbation(sites=('logit_grads',))

    References:
      Krueger et al., Out-of-Distribution Generalization via Risk Extrapolation (REx), ICML 2021,
      arXiv:2003.00688.
    """
    check_number("penalty_weight", penalty_weight)
    check_count("num_domains", num_domains, low=2)
    check_count("anneal_steps", anneal_steps, low=0)

    def update(value, *, losses, weights, domains=None, step=0, axis_name=(), **_):
        members = _domains.by_domain("vrex", domains, weights, num_domains, axis_name)
        means = members.mean(losses)
        present = (members.counts > 0).astype(jnp.float32)
        number = jnp.maximum(jnp.sum(present), 1.0)
        apart = present * (means - jnp.sum(present * means) / number)
        weight = _domains.annealed(penalty_weight, anneal_steps, step)
        pull = 2.0 * weight * apart / number * _domains.scales(members)
        return value * (1.0 + members.to_examples(pull))[:, None].astype(value.dtype)

    return stateless(LOGIT_GRADS, update, needs_gradient=False)
