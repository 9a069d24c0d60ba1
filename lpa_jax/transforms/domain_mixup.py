"""Mixup of domains: the examples of one domain are interpolated with those of another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lpa_jax.core import pgd
from lpa_jax.core.arguments import at_step, check_count, check_number, Number
from lpa_jax.core.perturbation import INPUTS, LABELS, Perturbation, stateless
from lpa_jax.transforms import _domains


def domain_mixup(alpha: Number, num_domains: int) -> Perturbation:
    r"""Mixup of domains: interpolate inputs and targets of each domain with those of another.

    .. math::
        x_i \leftarrow \lambda_m x_i + (1 - \lambda_m) x_j, \qquad
        t_i \leftarrow \lambda_m t_i + (1 - \lambda_m) t_j, \qquad
        \lambda_m \sim \mathrm{Beta}(\alpha, \alpha)

    The domains of the batch are put in a random circle. The first example of a domain is mixed with
    the first of the next domain, the second with the second, and so on, as in DomainBed. *Ours*: if
    the next domain has fewer examples, it begins anew. On devices of `axis_name` each mixes its own
    examples.

    Args:
      alpha: Parameter of the Beta distribution, at least 0 (0: no mixing), or a schedule.
        DomainBed's default: 0.2.
      num_domains: Number of domains M. The step's `extra` has the `domains`, int `[B]` in `[0, M)`.

    Raises:
      ValueError: If an argument is outside its range. The step raises it if the domains are not
        integers `[B]`; one outside of `[0, M)` makes the loss NaN.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.domain_mixup(alpha=0.2, num_domains=3)
      Perturbation(sites=('inputs', 'labels'))

    References:
      Yan et al., Improve Unsupervised Domain Adaptation with Mixup Training, 2020,
      arXiv:2001.00677.
    """
    check_number("alpha", alpha)
    check_count("num_domains", num_domains, low=2)

    def update(value, *, key, weights, domains=None, step=0, **_):
        # One key at both sites: they agree without a state.
        circle_key, lam_key = jax.random.split(key)
        members = _domains.by_domain("domain_mixup", domains, weights, num_domains, ())
        domains, real = members.take_class(jnp.arange(num_domains))[members.rows], weights > 0
        present = jnp.any((domains[None] == jnp.arange(num_domains)[:, None]) & real[None], axis=1)
        following = _following(jax.random.uniform(circle_key, (num_domains,)), present)
        turn = _domains.turns(domains, real)
        other = following[domains]
        number = jnp.sum((other[:, None] == domains[None]) & real[None], axis=1)
        wanted = turn % jnp.maximum(number, 1)
        fits = (other[:, None] == domains[None]) & real[None] & (wanted[:, None] == turn[None])
        partner = jnp.argmax(fits, axis=1)

        concentration = at_step(alpha, step)
        safe = jnp.maximum(concentration, 1e-3)
        lam = jax.random.beta(lam_key, safe, safe, (num_domains,))[domains]
        moved = real & (partner != jnp.arange(real.shape[0])) & (concentration > 0)
        # NaN where the number of a domain is wrong, as the counts are.
        lam = jnp.where(moved, lam, 1.0) + 0.0 * jnp.sum(members.counts)

        def mixed(leaf):
            share = pgd.column(lam, leaf).astype(leaf.dtype)
            return jnp.where(share == 1, leaf, share * leaf + (1 - share) * leaf[partner])

        return jax.tree.map(mixed, value)

    return stateless((INPUTS, LABELS), update, mixes=True, needs_gradient=False)


def _following(
    places: Float[Array, "domains"], present: Bool[Array, "domains"]
) -> Int[Array, "domains"]:
    """Return which domain of the batch follows each in a circle."""
    later = (places[None] > places[:, None]) & present[None]
    first = jnp.argmin(jnp.where(present, places, jnp.inf))
    following = jnp.argmin(jnp.where(later, places[None], jnp.inf), axis=1)
    return jnp.where(jnp.any(later, axis=1), following, first)
