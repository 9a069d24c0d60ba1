"""Perturbations of the parameter gradient: SAM and ASAM (clipping and noise are optax's own)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpa_jax.perturb import sites


def sam(rho: sites.Number) -> sites.Perturbation:
    r"""SAM: take the gradient at `w + rho * g / ||g||` in place of that at `w`.

    At the moved parameters the whole chain is run again, with the same random draws.

    Args:
      rho: Radius, at least 0, or a schedule.

    Raises:
      ValueError: If `rho` is negative or not a number.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> sharp = lpa_jax.sam(rho=0.5)
      >>> loss_and_gradient = lambda w: (0.5 * w**2, w)
      >>> w = jnp.array(2.0)
      >>> sharp.update(w, sharp.init(w), w, gradient_fn=loss_and_gradient)[0]
      Array(2.5, dtype=float32, weak_type=True)

    References:
      Foret et al., Sharpness-Aware Minimization, ICLR 2021, arXiv:2010.01412.
    """
    return _sharpness_aware("rho", rho, lambda params: jax.tree.map(jnp.ones_like, params))


def asam(rho: sites.Number, eta: float = 0.01) -> sites.Perturbation:
    r"""ASAM: SAM in units of the parameters, `w + rho * T^2 g / ||T g||`, `T = |w| + eta`.

    Args:
      rho: Radius, at least 0, or a schedule. The paper's: 0.5 to 2, ten times SAM's.
      eta: Added to `|w|` for stability, at least 0.

    Raises:
      ValueError: If `rho` or `eta` is negative or not a number.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.asam(rho=0.5)
      Perturbation(sites=('param_grads',))

    References:
      Kwon et al., ASAM, ICML 2021, arXiv:2102.11600. *Ours*: every parameter is scaled, as in the
      paper's text; its code leaves biases unscaled.
    """
    sites.check_number("eta", eta)
    return _sharpness_aware(
        "rho", rho, lambda params: jax.tree.map(lambda w: jnp.abs(w) + eta, params)
    )


def _sharpness_aware(
    name: str, rho: sites.Number, scale: Callable[[Any], Any]
) -> sites.Perturbation:
    sites.check_number(name, rho)

    def update(grads, *, params, gradient_fn=None, site=sites.PARAM_GRADS, step=0, **_):
        if gradient_fn is None or params is None:
            raise sites.SiteError(
                f"sam needs the gradient at moved parameters, which only 'param_grads' has, "
                f"not {site!r}."
            )
        units = scale(params)
        scaled = jax.tree.map(jnp.multiply, units, grads)
        norm = optax.tree.norm(scaled)
        length = sites.at_step(rho, step) / jnp.where(norm > 0, norm, 1.0)

        def move(weight, unit, gradient):
            return weight + (length * unit * gradient).astype(weight.dtype)

        return gradient_fn(jax.tree.map(move, params, units, scaled))[1]

    return sites.stateless(sites.PARAM_GRADS, update)
