"""GroupDRO: the domains with the highest losses weigh the most."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lpa_jax.core.arguments import at_step, check_count, check_number, Number
from lpa_jax.core.perturbation import LOGIT_GRADS, Perturbation
from lpa_jax.transforms import _domains


def group_dro(eta: Number, num_domains: int) -> Perturbation:
    r"""GroupDRO: weigh the domains by how high their losses have been.

    .. math::
        q_m \leftarrow \frac{q_m e^{\eta \ell_m}}{\sum_n q_n e^{\eta \ell_n}}, \qquad
        \ell = \sum_m q_m \ell_m

    with the mean loss `l_m` of the examples of domain m. Each example's gradient is scaled by
    `q_m * n / n_m`, for n examples in the batch and n_m of its domain; the loss the step returns is
    the mean of all examples. The state is `log q`, float32 `[M]`.

    Args:
      eta: Step size of the weights, at least 0, or a schedule. 0: all domains weigh the same.
        DomainBed's default: 0.01.
      num_domains: Number of domains M. The step's `extra` has the `domains`, int `[B]` in `[0, M)`.

    *Ours*: a domain without examples in the batch keeps its weight, and those of the others sum to
    1 in the loss; after mixing an example is of the domain of the first of its pair. Gradient steps
    of other transforms climb the mean loss of the examples.

    Raises:
      ValueError: If an argument is outside its range. The step raises it if the domains are not
        integers `[B]`; one outside of `[0, M)` makes the gradient NaN.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.group_dro(eta=0.01, num_domains=3)
      Perturbation(sites=('logit_grads',))

    References:
      Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020, arXiv:1911.08731.
    """
    check_number("eta", eta)
    check_count("num_domains", num_domains, low=2)

    def init(value: Array) -> Float[Array, "domains"]:
        del value
        return jnp.zeros(num_domains, jnp.float32)

    def update(
        value, state, params=None, *, losses, weights, domains=None, step=0, axis_name=(), **_
    ):
        del params
        members = _domains.by_domain("group_dro", domains, weights, num_domains, axis_name)
        scores = members.take_class(state) + at_step(eta, step) * members.mean(losses)
        present = members.counts > 0
        highest = jnp.max(scores, initial=-jnp.inf, where=present)
        highest = jnp.where(jnp.any(present), highest, 0.0)
        shares = jnp.where(present, jnp.exp(scores - highest), 0.0)
        total = jnp.sum(shares)
        shares /= jnp.where(total > 0, total, 1.0)
        factors = members.to_examples(shares * _domains.scales(members))
        state = members.put(state, scores)
        # Differences alone count, and sums of losses would grow.
        return value * factors[:, None].astype(value.dtype), state - jnp.max(state)

    return Perturbation(LOGIT_GRADS, init, update, needs_gradient=False)
