"""Losses of one example beside optax's own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def softmax_binary_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, "batch"]:
    r"""Binary cross-entropy of the softmax probabilities, averaged over classes.

    .. math::
        \ell_i = -\frac{1}{C} \sum_c t_{ic} \log p_{ic} + (1 - t_{ic}) \log (1 - p_{ic})

    the loss of Manifold Mixup's published code.

    Args:
      logits: Unnormalised log-probabilities, `[B, C]`.
      targets: Probabilities, `[B, C]`.

    Returns:
      The loss of each example, `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> softmax_binary_cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])).round(4)
      Array([0.6931], dtype=float32)

    References:
      Verma et al., Manifold Mixup, ICML 2019, arXiv:1806.05236.
    """
    log_p = jax.nn.log_softmax(logits)
    # 1 - p loses all its digits where p is near 1; there the other classes' sum has them.
    largest = jnp.argmax(logits, axis=1, keepdims=True)
    is_largest = jnp.arange(logits.shape[1]) == largest
    log_others = jax.nn.logsumexp(jnp.where(is_largest, -jnp.inf, log_p), axis=1, keepdims=True)
    p = jnp.where(is_largest, 0.0, jnp.exp(log_p))
    log_not_p = jnp.where(is_largest, log_others, jnp.log1p(-p))
    return -jnp.mean(targets * log_p + (1.0 - targets) * log_not_p, axis=1)
