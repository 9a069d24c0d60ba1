"""The gradient is scaled down to a global norm."""

import jax
import jax.numpy as jnp

from lpa_jax.core import pgd
from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import PARAM_GRADS, Perturbation, stateless


def gradient_clipping(max_norm: Number) -> Perturbation:
    """Scale the gradient down to a global norm, where it is longer.

    Args:
      max_norm: Largest l2 norm of the whole gradient, at least 0, or a schedule.

    Raises:
      ValueError: If `max_norm` is negative or not a number.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> clip = lpa_jax.gradient_clipping(1.0)
      >>> clip.update(jnp.array([3.0, 4.0]), clip.init(None))[0].round(2).tolist()
      [0.6, 0.8]

    References:
      Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, ICML
      2013, arXiv:1211.5063.
    """
    check_number("max_norm", max_norm)

    def update(grads, *, step=0, **_):
        norm, limit = pgd.tree_norm(grads), at_step(max_norm, step)
        factor = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1.0), 1.0)
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return stateless(PARAM_GRADS, update, needs_gradient=False)
