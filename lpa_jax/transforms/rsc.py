"""RSC: the features that speak the most for the right class are taken away."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import Perturbation, stateless
from lpa_jax.transforms import _domains, _heads


def rsc(
    site: str, features: Number = 1 / 3, batch: Number = 1 / 3, *, head: str = "head"
) -> Perturbation:
    r"""RSC: representation self-challenging, which mutes the features that a prediction rests on.

    .. math::
        a_{ij} \leftarrow 0 \quad \text{where} \quad
        \frac{\partial u_{i y_i}}{\partial a_{ij}} \text{ is among the largest of } i, \text{ and }
        p_{y_i}(a_i) - p_{y_i}(a_i^{\text{muted}}) \text{ among those of the batch}

    The gradient of the true class's logit is its column of the head's kernel. The features of an
    example that are muted are `floor(f * (D - 1)) + 1` of D, and the examples `floor(b * (n - 1)) +
    1` of the n of the batch, as in DomainBed, and more where numbers are equal.

    Args:
      site: Path of the layer whose output `[B, D]` the head takes in.
      features: Share f of the features, in [0, 1], or a schedule. 0: none. DomainBed's: 1/3.
      batch: Share b of the examples, in [0, 1], or a schedule. 0: none. DomainBed's: 1/3.
      head: Path of the last, linear module, whose parameter `kernel` is `[D, C]`.

    *Ours*: the probability of the class is `exp(-loss)`, by the loss that is trained on; with soft
    labels the gradient is that of the mixture of the logits.

    Raises:
      ValueError: If an argument is outside its range. The step raises `SiteError` (a ValueError) if
        the site does not hold `[B, D]`, or the head has no kernel `[D, C]`.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.rsc("features")
      Perturbation(sites=('features',))

    References:
      Huang et al., Self-Challenging Improves Cross-Domain Generalization, ECCV 2020,
      arXiv:2007.02454.
    """
    _domains.check_layer("rsc", site)
    check_number("features", features, 0.0, 1.0)
    check_number("batch", batch, 0.0, 1.0)

    def update(value, *, params, targets, weights, gradient_fn, step=0, axis_name=(), **_):
        _domains.check_features("rsc", site, value)
        size = value.shape[1]
        kernel = _heads.kernel_of("rsc", params, head, (size, targets.shape[1]))
        kernel = jax.lax.stop_gradient(kernel).astype(jnp.float32)
        slopes = jnp.matmul(targets, kernel.T, precision=jax.lax.Precision.HIGHEST)
        least = _largest(slopes, _number(at_step(features, step), size))
        muted = slopes >= least[:, None]
        before, _ = gradient_fn(value)
        after, _ = gradient_fn(jnp.where(muted, jnp.zeros_like(value), value))
        falls = jnp.where(weights > 0, jnp.exp(-before) - jnp.exp(-after), -jnp.inf)
        whole = _domains.everywhere(falls, axis_name)
        real = jnp.sum((whole > -jnp.inf).astype(jnp.int32))
        least = _largest(whole[None], _number(at_step(batch, step), real))
        chosen = (falls >= least) & (weights > 0)
        return jnp.where(muted & chosen[:, None], jnp.zeros_like(value), value)

    return stateless(site, update, needs_gradient=True)


def _number(share: Float[Array, ""], size: int | Int[Array, ""]) -> Int[Array, ""]:
    """Return how many of `size` numbers lie at or above the percentile of 1 - share."""
    above = jnp.floor(share * (jnp.asarray(size, jnp.float32) - 1.0)).astype(jnp.int32)
    return jnp.where(share > 0, above + 1, 0)


def _largest(rows: Float[Array, "rows size"], number: Int[Array, ""]) -> Float[Array, "rows"]:
    """Return the smallest of so many of the largest in each row; infinity of none."""
    ordered = jnp.sort(rows, axis=1)
    place = jnp.clip(rows.shape[1] - number, 0, rows.shape[1] - 1)
    return jnp.where(number > 0, jnp.take(ordered, place, axis=1), jnp.inf)
