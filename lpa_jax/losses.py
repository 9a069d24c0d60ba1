"""Losses of one example beside optax's own."""

import math

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
      logits: Unnormalized log-probabilities, `[B, C]`.
      targets: Probabilities, `[B, C]`.

    Returns:
      The loss of each example, `[B]`.

    Raises:
      ValueError: If the targets have another shape than the logits.

    Example:
      >>> import jax.numpy as jnp
      >>> softmax_binary_cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])).round(4)
      Array([0.6931], dtype=float32)

    References:
      Verma et al., Manifold Mixup: Better Representations by Interpolating Hidden States, ICML
      2019, arXiv:1806.05236.
    """
    _check(logits, targets)
    log_p, log_not_p = _log_probabilities(logits)
    return -jnp.mean(targets * log_p + (1.0 - targets) * log_not_p, axis=1)


def softmax_focal_loss(
    logits: Float[Array, "batch classes"],
    targets: Float[Array, "batch classes"],
    gamma: float = 2.0,
) -> Float[Array, "batch"]:
    r"""Focal loss of the softmax probabilities: well-classified examples count for little.

    .. math::
        \ell_i = -\sum_c t_{ic} (1 - p_{ic})^\gamma \log p_{ic}

    *Ours* is the sum for soft targets. With the perturbation `reweight` it is class-balanced focal
    loss (Cui et al., arXiv:1901.05555, whose own is of sigmoids).

    Args:
      logits: Unnormalized log-probabilities, `[B, C]`.
      targets: Probabilities, `[B, C]`.
      gamma: At least 0, which is cross-entropy; the paper's is 2.

    Returns:
      The loss of each example, `[B]`.

    Raises:
      ValueError: If `gamma` is outside its range, or the targets have another shape than the
        logits.

    Example:
      >>> import jax.numpy as jnp
      >>> softmax_focal_loss(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])).round(4)
      Array([0.1733], dtype=float32)

    References:
      Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, arXiv:1708.02002.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be at least 0, not {gamma!r}.")
    _check(logits, targets)
    log_p, log_not_p = _log_probabilities(logits)
    return -jnp.sum(targets * jnp.exp(gamma * log_not_p) * log_p, axis=1)


def generalized_cross_entropy(
    logits: Float[Array, "batch classes"],
    targets: Float[Array, "batch classes"],
    q: float = 0.7,
) -> Float[Array, "batch"]:
    r"""Generalized cross-entropy (GCE, the L_q loss), between cross-entropy and absolute error.

    .. math::
        \ell_i = \sum_c t_{ic} \frac{1 - p_{ic}^q}{q}

    *Ours* is the sum for soft targets; the paper's truncated loss is not offered.

    Args:
      logits: Unnormalized log-probabilities, `[B, C]`.
      targets: Probabilities, `[B, C]`.
      q: In (0, 1]: near 0 it is cross-entropy, at 1 the error `1 - p`, which forgives wrong labels
        most and learns slowest.

    Returns:
      The loss of each example, `[B]`.

    Raises:
      ValueError: If `q` is outside its range, or the targets have another shape than the logits.

    Example:
      >>> import jax.numpy as jnp
      >>> generalized_cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])).round(4)
      Array([0.5492], dtype=float32)

    References:
      Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
      Labels, NeurIPS 2018, arXiv:1805.07836.
    """
    if not 0 < q <= 1:
        raise ValueError(f"q must be above 0 and at most 1, not {q!r}.")
    _check(logits, targets)
    return jnp.sum(targets * -jnp.expm1(q * jax.nn.log_softmax(logits)), axis=1) / q


def _check(logits: Array, targets: Array) -> None:
    # Labels [B] would be broadcast where there are as many classes as examples.
    if logits.shape != targets.shape:
        raise ValueError(
            f"targets must be probabilities of the shape of the logits, {logits.shape}, not "
            f"{targets.shape}: give jax.nn.one_hot(labels, {logits.shape[-1]})."
        )


def _log_probabilities(
    logits: Float[Array, "batch classes"],
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
    """Return `log p` and `log(1 - p)`."""
    log_p = jax.nn.log_softmax(logits)
    # 1 - p loses all its digits where p is near 1; there the other classes' sum has them.
    largest = jnp.argmax(logits, axis=1, keepdims=True)
    is_largest = jnp.arange(logits.shape[1]) == largest
    log_others = jax.nn.logsumexp(jnp.where(is_largest, -jnp.inf, log_p), axis=1, keepdims=True)
    p = jnp.where(is_largest, 0.0, jnp.exp(log_p))
    log_not_p = jnp.where(is_largest, log_others, jnp.log1p(-p))
    return log_p, log_not_p
