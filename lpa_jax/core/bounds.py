"""How far a class may be moved: the radius of its ball."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lpa_jax.core import arguments


def radii(
    epsilon: arguments.Number,
    delta_epsilon: arguments.Number,
    spread: Float[Array, "rows"],
    step: Any,
) -> Float[Array, "rows"]:
    """Return the bound of each class, `epsilon + delta_epsilon * spread_c`, at least 0.

    Fixed where `delta_epsilon` is 0; varied (LPL eq 13, LPA eq 14) with a threshold split; by
    frequency (LPL eq 14) with `splits.tail`.
    """
    bound = arguments.at_step(epsilon, step) + arguments.at_step(delta_epsilon, step) * spread
    return jnp.maximum(bound, 0.0)


def layer_scale(epsilon: float, num_sites: int, beta: float = 0.7) -> tuple[float, ...]:
    """Return one bound for each of `num_sites` stages, smaller the earlier the stage (LPA eq 15).

    Args:
      epsilon: The bound at the last stage, at least 0.
      num_sites: Number of stages, at least 1.
      beta: Factor for each stage that comes after, in (0, 1].

    Example:
      >>> layer_scale(0.2, 3, beta=0.5)
      (0.05, 0.1, 0.2)
    """
    arguments.check_number("epsilon", epsilon)
    arguments.check_count("num_sites", num_sites)
    arguments.check_number("beta", beta, 0.0, 1.0)
    if beta == 0.0:
        raise ValueError("beta must be above 0.")
    return tuple(epsilon * beta**after for after in reversed(range(num_sites)))


def per_site(number: Any, names: Sequence[str]) -> dict[str, arguments.Number]:
    """Give each site its own bound: one number for all of them, or a sequence with one each."""
    numbers = list(number) if isinstance(number, (tuple, list)) else [number] * len(names)
    if len(numbers) != len(names):
        raise ValueError(f"epsilon has {len(numbers)} entries for {len(names)} sites.")
    return dict(zip(names, numbers, strict=True))
