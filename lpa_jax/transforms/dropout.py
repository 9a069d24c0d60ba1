"""Dropout: entries are set to zero."""

import jax
import jax.numpy as jnp

from lpa_jax.core.arguments import at_step, check_rate, Number
from lpa_jax.core.perturbation import check_activations, Perturbation, stateless


def dropout(site: str, rate: Number) -> Perturbation:
    """Zero each entry with probability `rate` and scale the others by `1 / (1 - rate)`.

    Args:
      site: A module path, `"inputs"` or `"logits"`; the value is `[B, ...]`.
      rate: Probability in [0, 1), or a schedule.

    Raises:
      ValueError: If `rate` lies outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, lpa_jax
      >>> drop = lpa_jax.dropout("group3", rate=0.5)
      >>> value, _ = drop.update(jnp.ones((1, 4)), drop.init(None), key=jax.random.key(0))
      >>> sorted(set(value.tolist()[0])) in ([0.0, 2.0], [2.0], [0.0])
      True

    References:
      Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, JMLR
      2014.
    """
    check_activations("dropout", [site])
    check_rate("rate", rate)

    def update(value, *, key, step=0, **_):
        keep = 1.0 - at_step(rate, step)
        kept = jax.random.bernoulli(key, keep, value.shape)
        # A schedule may reach 1.
        scale = jnp.where(keep > 0, keep, 1.0).astype(value.dtype)
        return jnp.where(kept, value / scale, 0)

    return stateless(site, update, needs_gradient=False)
