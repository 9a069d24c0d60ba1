"""IRM: no scale of the logits would suit one domain better than another."""

import jax
import jax.numpy as jnp

from lpa_jax.core import membership
from lpa_jax.core.arguments import check_count, check_number, Number
from lpa_jax.core.perturbation import LOGIT_GRADS, Perturbation, stateless
from lpa_jax.transforms import _domains


def irm(penalty_weight: Number, num_domains: int, anneal_steps: int = 0) -> Perturbation:
    r"""IRM: penalize the gradient of each domain's loss in a scale of the logits.

    .. math::
        \ell + \frac{w}{M} \sum_m g_m g'_m, \qquad
        g_m = \frac{d}{d s} \frac{1}{n} \sum_i \ell(s u_i, t_i) \Big|_{s = 1}
            = \frac{1}{n} \sum_i \langle p_i - t_i, u_i \rangle

    over the M domains in the batch, where g is of every other example of a domain, from the first
    on, and g' of those between, with the softmax p of the logits u: the product is an unbiased
    estimate of the square of IRMv1. The gradient of the penalty is added to that at the logits, and
    the loss the step returns is without it.

    Args:
      penalty_weight: Weight w of the penalty, at least 0, or a schedule. DomainBed's default: 100.
      num_domains: Number of domains. The step's `extra` has the `domains`, int `[B]` from 0 on.
      anneal_steps: Number of steps, at least 0, in which the weight is 1. DomainBed's default: 500.

    *Ours*: the loss in the penalty is cross-entropy, whatever is trained on; a domain with a single
    example in the batch has no gradient of it; after mixing an example is of the domain of the
    first of its pair. Gradient steps of other transforms climb the loss without the penalty.
    DomainBed begins the optimizer anew after `anneal_steps`, which a transform cannot do.

    Raises:
      ValueError: If an argument is outside its range. The step raises it if the domains are not
        integers `[B]`; one outside of `[0, num_domains)` makes the gradient NaN.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.irm(penalty_weight=100.0, num_domains=3, anneal_steps=500)
      Perturbation(sites=('logit_grads',))

    References:
      Arjovsky et al., Invariant Risk Minimization, 2019, arXiv:1907.02893.
    """
    check_number("penalty_weight", penalty_weight)
    check_count("num_domains", num_domains, low=1)
    check_count("anneal_steps", anneal_steps, low=0)

    def update(value, *, logits, targets, weights, domains=None, step=0, axis_name=(), **_):
        whole = _domains.by_domain("irm", domains, weights, num_domains, axis_name)
        rows, real = whole.rows, weights > 0
        all_rows, all_real = (_domains.everywhere(array, axis_name) for array in (rows, real))
        places = jnp.arange(real.shape[0])
        if axis_name:
            places += real.shape[0] * jax.lax.axis_index(axis_name)
        before = jnp.arange(all_real.shape[0])[None] < places[:, None]
        before &= (rows[:, None] == all_rows[None]) & all_real[None]
        half = 2 * rows + jnp.sum(before.astype(jnp.int32), axis=1) % 2
        halves = membership.by_class(half, weights, 2 * num_domains, axis_name)

        u = jnp.where(real[:, None], logits, 0.0)
        t = jnp.where(real[:, None], targets, 0.0)
        p, mass = jax.nn.softmax(u), jnp.sum(t, axis=1, keepdims=True)
        first = mass * p - t
        own = jnp.sum(p * u, axis=1, keepdims=True)
        # The gradient of <first, u>.
        second = first + mass * p * (u - own)
        slopes = halves.put(jnp.zeros(2 * num_domains), halves.mean(jnp.sum(first * u, axis=1)))
        # NaN where one of the counts is.
        number = jnp.maximum(jnp.sum(jnp.sign(whole.counts)), 1.0)
        # The other half's slope, for each example, and its share of the mean over its own.
        factors = slopes[half ^ 1] * halves.to_examples(_domains.scales(halves))
        pull = _domains.annealed(penalty_weight, anneal_steps, step) / number * factors
        return value + (pull[:, None] * second).astype(value.dtype)

    return stateless(LOGIT_GRADS, update, needs_gradient=False)
