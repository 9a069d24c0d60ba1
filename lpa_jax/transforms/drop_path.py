"""Stochastic depth: the value of a whole example is dropped."""

import jax
import jax.numpy as jnp

from lpa_jax.core import pgd
from lpa_jax.core.arguments import at_step, check_rate, Number
from lpa_jax.core.perturbation import check_activations, Perturbation, stateless


def drop_path(site: str, rate: Number) -> Perturbation:
    r"""Stochastic depth: drop the residual branch of an example, and scale the others' up.

    .. math::
        a_i \leftarrow \frac{b_i}{1 - r} a_i, \qquad b_i \sim \mathrm{Bernoulli}(1 - r)

    The site is the output of the branch, ahead of the sum with the skip connection; at the output
    of a block or a group nothing of the example would be left. *Ours*: each example draws for
    itself (in the first paper a batch does), and kept values are scaled up in training, in place of
    a scale at test time. One rate for all the blocks that a pattern names; the paper's grows with
    depth: give each block a perturbation of its own for that.

    Args:
      site: Path of the layer that ends the branch, or a pattern such as `"group*/block*/conv2"`,
        where each layer draws for itself; the value is `[B, ...]`.
      rate: Probability of dropping, in [0, 1), or a schedule.

    Returns:
      The perturbation.

    Raises:
      ValueError: If `rate` lies outside [0, 1), or the site holds no activations.

    Example:
      >>> import jax, jax.numpy as jnp, lpa_jax
      >>> drop = lpa_jax.drop_path("group3/block0/conv2", rate=0.5)
      >>> value, _ = drop.update(jnp.ones((8, 4)), drop.init(None), key=jax.random.key(0))
      >>> {tuple(row) for row in value.tolist()} <= {(0.0,) * 4, (2.0,) * 4}
      True

    References:
      Huang et al., Deep Networks with Stochastic Depth, ECCV 2016, arXiv:1603.09382; Larsson, Maire
      and Shakhnarovich, FractalNet: Ultra-Deep Neural Networks without Residuals, ICLR 2017,
      arXiv:1605.07648.
    """
    check_activations("drop_path", [site])
    check_rate("rate", rate)

    def update(value, *, key, step=0, **_):
        keep = 1.0 - at_step(rate, step)
        kept = jax.random.bernoulli(key, keep, value.shape[:1])
        # A schedule may reach 1.
        scale = jnp.where(keep > 0, keep, 1.0).astype(value.dtype)
        return jnp.where(pgd.column(kept, value), value / scale, 0)

    return stateless(site, update, needs_gradient=False)
