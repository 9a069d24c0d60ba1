"""Class-balanced re-weighting of each example's gradient."""

from collections.abc import Sequence

import jax.numpy as jnp

from lpa_jax.core import membership
from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import LOGIT_GRADS, Perturbation, stateless


def reweight(
    class_counts: Sequence[float], beta: Number = 0.9999, normalize: bool = False
) -> Perturbation:
    r"""Class-balanced re-weighting: scale each example's gradient by the weight of its class.

    .. math::
        w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad \sum_c w_c = C

    the inverse of the effective number of samples. With cross-entropy the parameter gradient is
    that of class-balanced CE, with `losses.softmax_focal_loss` that of class-balanced focal loss;
    the loss the step returns is not weighted. The mean is over the examples, as in the paper.

    Args:
      class_counts: Number of training examples of each class, `[C]`, all positive.
      beta: In [0, 1], or a schedule. 0: no weights; 1: by inverse frequency.
      normalize: Whether the mean is weighted, `sum_i w_{y_i} l_i / sum_i w_{y_i}` over the global
        batch, as in LDAM's code. Most examples of a long tail have small weights: without that,
        gradients are several times smaller than unweighted ones.

    With soft labels an example has the mixture of the weights of its classes (*ours*).

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> balance = lpa_jax.reweight([30, 10], beta=1.0)
      >>> given = dict(labels=jnp.array([0, 1]), weights=jnp.ones(2))
      >>> balance.update(jnp.ones((2, 2)), balance.init(None), **given)[0].tolist()
      [[0.5, 0.5], [1.5, 1.5]]

    References:
      Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
      arXiv:1901.05555.
    """
    counts = membership.counts_of(class_counts)
    check_number("beta", beta, 0.0, 1.0)

    def update(value, *, labels, weights, step=0, axis_name=(), **_):
        membership.check_classes(counts, value)
        rest = 1.0 - at_step(beta, step)
        safe = jnp.where(rest > 0, rest, 1.0)
        # 1 - beta^n, with all its digits where beta is near 1.
        grown = -jnp.expm1(counts * jnp.log1p(-safe))
        by_class = 1.0 / jnp.where(rest > 0, grown / safe, counts)
        by_class *= counts.shape[0] / jnp.sum(by_class)
        members = membership.by_class(labels, weights, value.shape[1], axis_name)
        factors = members.to_examples(members.take_class(by_class))
        if normalize:
            real = weights > 0
            total = members.summed(jnp.sum(jnp.where(real, weights * factors, 0.0)))
            count = members.summed(jnp.sum(jnp.where(real, weights, 0.0)))
            factors *= count / jnp.where(total > 0, total, 1.0)
        # Soft labels that sum to 1 but for a rounding are left alone as well.
        factors = jnp.where(rest < 1, factors, 1.0)
        return value * factors[:, None].astype(value.dtype)

    return stateless(LOGIT_GRADS, update, needs_gradient=False)
