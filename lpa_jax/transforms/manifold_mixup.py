"""Manifold Mixup: examples and targets are interpolated at a layer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lpa_jax.core import pgd
from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import check_activations, LABELS, Perturbation, SiteError, stateless


def manifold_mixup(sites: str | Sequence[str], alpha: Number) -> Perturbation:
    r"""Manifold Mixup: interpolate the examples of a batch at a layer drawn for each batch.

    .. math::
        a_i \leftarrow \lambda a_i + (1 - \lambda) a_{i-1}, \qquad
        t_i \leftarrow \lambda t_i + (1 - \lambda) t_{i-1}, \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    Each example is paired with the one before it in the batch (*ours*; batches are shuffled, and
    on many devices a shift is one neighbor's exchange where a permutation is a gather of all). An
    example next to padding stays as it is. Gradients flow through both partners. Class-level
    perturbations must act after the last of the sites, where examples and targets agree.

    Args:
      sites: The layers to draw from with equal chance, module paths or `"inputs"`. The targets are
        mixed along with them, and so is the class membership that LPA, LPL and LPG see.
      alpha: Parameter of the Beta distribution, at least 0 (0: no mixing), or a schedule. The
        paper's: 2.0 on CIFAR and SVHN, 0.2 on TinyImageNet.

    Raises:
      ValueError: If `alpha` is negative or not a number.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.manifold_mixup(("inputs", "group1"), alpha=2.0)
      Perturbation(sites=('inputs', 'group1', 'labels'))

    References:
      Verma et al., Manifold Mixup: Better Representations by Interpolating Hidden States, ICML
      2019, arXiv:1806.05236.
    """
    check_number("alpha", alpha)
    layers = (sites,) if isinstance(sites, str) else tuple(sites)
    if not layers:
        raise SiteError("manifold_mixup needs at least one layer to mix at.")
    check_activations("manifold_mixup", layers)

    def mixed(value, lam):
        lam = pgd.column(lam, value).astype(value.dtype)
        return jnp.where(lam < 1, lam * value + (1 - lam) * jnp.roll(value, 1, axis=0), value)

    def update(value, *, site=layers[0], key, weights, step=0, **_):
        # One key at all sites: they agree on the layer, lambda and the pairing without a state.
        layer_key, lam_key = jax.random.split(key)
        concentration = at_step(alpha, step)
        safe = jnp.maximum(concentration, 1e-3)
        lam = jnp.where(concentration > 0, jax.random.beta(lam_key, safe, safe), 1.0)
        real = weights > 0
        lam = jnp.where(real & jnp.roll(real, 1), lam, 1.0)
        if site == LABELS:
            return mixed(value, lam)
        chosen = jax.random.randint(layer_key, (), 0, len(layers)) == layers.index(site)
        # Inputs may be a tree of arrays.
        return jax.tree.map(lambda leaf: jnp.where(chosen, mixed(leaf, lam), leaf), value)

    return stateless((*layers, LABELS), update, mixes=True, needs_gradient=False)
