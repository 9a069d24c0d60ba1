"""The gradient at moved parameters, for SAM and ASAM."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from lpa_jax.core import pgd
from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import PARAM_GRADS, Perturbation, SiteError, stateless

Mask = PyTree | Callable[[PyTree], PyTree] | None


def sharpness_aware(name: str, rho: Number, mask: Mask, unit: Callable[[Any], Any]) -> Perturbation:
    check_number("rho", rho)

    def update(grads, *, params, gradient_fn=None, site=PARAM_GRADS, step=0, **_):
        if gradient_fn is None or jax.tree.structure(params) != jax.tree.structure(grads):
            raise SiteError(
                f"{name} needs the gradient at moved parameters: it acts at 'param_grads', not "
                f"{site!r}."
            )
        if mask is not None:
            grads = _masked(name, mask(params) if callable(mask) else mask, grads)
        scaled = jax.tree.map(lambda weight, grad: unit(weight) * grad, params, grads)
        norm = pgd.tree_norm(scaled)
        length = at_step(rho, step) / jnp.where(norm > 0, norm, 1.0)

        def move(weight, grad):
            return weight + (length * unit(weight) * grad).astype(weight.dtype)

        return gradient_fn(jax.tree.map(move, params, scaled))[1]

    return stateless(PARAM_GRADS, update, needs_gradient=True)


def _masked(name: str, mask: PyTree, grads: PyTree) -> PyTree:
    """Return gradients of which those outside of a mask are 0."""
    try:
        if not all(isinstance(moves, bool | np.bool_) for moves in jax.tree.leaves(mask)):
            raise ValueError("not all of its leaves are booleans")
        return jax.tree.map(
            lambda moves, part: part if moves else jax.tree.map(jnp.zeros_like, part), mask, grads
        )
    except ValueError as error:
        raise SiteError(
            f"The mask of {name} must hold True or False in a tree like the parameters or a prefix "
            f"of it, such as {jax.tree.map(lambda _: True, grads)!r:.200}: {error}."
        ) from error
