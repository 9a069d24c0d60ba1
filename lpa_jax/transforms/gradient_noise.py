"""Normal noise of falling variance added to the gradient."""

import jax
import jax.numpy as jnp
import optax

from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import PARAM_GRADS, Perturbation, stateless


def gradient_noise(eta: Number, gamma: float = 0.55) -> Perturbation:
    r"""Add independent normal noise of variance `eta / (1 + step)^gamma` to the gradient.

    Args:
      eta: Variance at the first step, at least 0, or a schedule. The paper's: 0.01, 0.3 or 1.
      gamma: Decay of the variance, at least 0.

    Raises:
      ValueError: If an argument is negative or not a number.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.gradient_noise(eta=0.01)
      Perturbation(sites=('param_grads',))

    References:
      Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks, 2015,
      arXiv:1511.06807. Unlike `optax.add_noise` it draws from the step's key.
    """
    check_number("eta", eta)
    check_number("gamma", gamma)

    def update(grads, *, key, step=0, **_):
        count = 1.0 + jnp.asarray(step, jnp.float32)
        stddev = jnp.sqrt(at_step(eta, step) / count**gamma)
        noise = optax.tree.random_like(key, grads, jax.random.normal)
        return jax.tree.map(lambda grad, z: grad + stddev.astype(grad.dtype) * z, grads, noise)

    return stateless(PARAM_GRADS, update, needs_gradient=False)
