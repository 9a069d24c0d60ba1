"""Perturbations of the parameter gradient: SAM, ASAM, clipping, noise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
import optax

from lpa_jax.perturb import pgd, sites

Mask = PyTree | Callable[[PyTree], PyTree] | None


def sam(rho: sites.Number, mask: Mask = None) -> sites.Perturbation:
    r"""SAM: take the gradient at `w + rho * g / ||g||` in place of that at `w`.

    At the moved parameters the whole chain is run again, with the same random draws.

    Args:
      rho: Radius, at least 0, or a schedule.
      mask: Which parameters move, as `optax.masked` takes it: booleans in a tree like the
        parameters or a prefix of it, or a function from parameters to such a tree; None for all.
        The norm is that of their gradient alone.

    Raises:
      ValueError: If `rho` is negative or not a number. The step raises `SiteError` if the mask does
        not fit the parameters, and behind `optax.masked` or `optax.partition`, which hide
        parameters from it.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> sharp = lpa_jax.sam(rho=0.5)
      >>> loss_and_gradient = lambda w: (0.5 * w**2, w)
      >>> w = jnp.array(2.0)
      >>> float(sharp.update(w, sharp.init(w), w, gradient_fn=loss_and_gradient)[0])
      2.5

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR
      2021, arXiv:2010.01412.
    """
    return _sharpness_aware("sam", rho, mask, lambda weight: 1.0)


def asam(rho: sites.Number, eta: float = 0.01, mask: Mask = None) -> sites.Perturbation:
    r"""ASAM: SAM in units of the parameters, `w + rho * T^2 g / ||T g||`, `T = |w| + eta`.

    Args:
      rho: Radius, at least 0, or a schedule. The paper's: 0.5 to 2, ten times SAM's.
      eta: Added to `|w|` for stability, at least 0.
      mask: Which parameters move, as in `sam`.

    Raises:
      ValueError: If `rho` or `eta` is negative or not a number.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.asam(rho=0.5)
      Perturbation(sites=('param_grads',))

    References:
      Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
      Neural Networks, ICML 2021, arXiv:2102.11600. *Ours*: every parameter is scaled, as in the
      paper's text; its code leaves biases unscaled.
    """
    sites.check_number("eta", eta)
    return _sharpness_aware("asam", rho, mask, lambda weight: jnp.abs(weight) + eta)


def _sharpness_aware(
    name: str, rho: sites.Number, mask: Mask, unit: Callable[[Any], Any]
) -> sites.Perturbation:
    sites.check_number("rho", rho)

    def update(grads, *, params, gradient_fn=None, site=sites.PARAM_GRADS, step=0, **_):
        if gradient_fn is None or jax.tree.structure(params) != jax.tree.structure(grads):
            raise sites.SiteError(
                f"{name} needs the gradient at moved parameters: it stands at 'param_grads', not "
                f"{site!r}."
            )
        if mask is not None:
            grads = _masked(name, mask(params) if callable(mask) else mask, grads)
        scaled = jax.tree.map(lambda weight, grad: unit(weight) * grad, params, grads)
        norm = pgd.tree_norm(scaled)
        length = sites.at_step(rho, step) / jnp.where(norm > 0, norm, 1.0)

        def move(weight, grad):
            return weight + (length * unit(weight) * grad).astype(weight.dtype)

        return gradient_fn(jax.tree.map(move, params, scaled))[1]

    return sites.stateless(sites.PARAM_GRADS, update)


def _masked(name: str, mask: PyTree, grads: PyTree) -> PyTree:
    """Return gradients of which those outside of a mask are 0."""
    try:
        if not all(isinstance(moves, bool | np.bool_) for moves in jax.tree.leaves(mask)):
            raise ValueError("not all of its leaves are booleans")
        return jax.tree.map(
            lambda moves, part: part if moves else jax.tree.map(jnp.zeros_like, part), mask, grads
        )
    except ValueError as error:
        raise sites.SiteError(
            f"The mask of {name} must hold True or False in a tree like the parameters or a prefix "
            f"of it, such as {jax.tree.map(lambda _: True, grads)!r:.200}: {error}."
        ) from error


def gradient_clipping(max_norm: sites.Number) -> sites.Perturbation:
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
    sites.check_number("max_norm", max_norm)

    def update(grads, *, step=0, **_):
        norm, limit = pgd.tree_norm(grads), sites.at_step(max_norm, step)
        factor = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1.0), 1.0)
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return sites.stateless(sites.PARAM_GRADS, update)


def gradient_noise(eta: sites.Number, gamma: float = 0.55) -> sites.Perturbation:
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
    sites.check_number("eta", eta)
    sites.check_number("gamma", gamma)

    def update(grads, *, key, step=0, **_):
        count = 1.0 + jnp.asarray(step, jnp.float32)
        stddev = jnp.sqrt(sites.at_step(eta, step) / count**gamma)
        noise = optax.tree.random_like(key, grads, jax.random.normal)
        return jax.tree.map(lambda grad, z: grad + stddev.astype(grad.dtype) * z, grads, noise)

    return sites.stateless(sites.PARAM_GRADS, update)
