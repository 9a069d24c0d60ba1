"""Arguments of perturbations: numbers or schedules of them, counts and choices, checked."""

from collections.abc import Sequence
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

Number = float | Float[Array, ""] | optax.Schedule


def at_step(number: Number, step: Any) -> Float[Array, ""]:
    """Return `number`, or its value at `step` where it is an optax schedule, as float32."""
    return jnp.asarray(number(step) if callable(number) else number, jnp.float32)


def check_number(name: str, number: Number, low: float = 0.0, high: float = math.inf) -> None:
    """Raise `ValueError` unless `number` lies in `[low, high]`; schedules and arrays pass."""
    if callable(number) or isinstance(number, jax.Array):
        return
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise ValueError(f"{name} must be a number or an optax schedule, not {number!r}.")
    if not low <= number <= high or math.isinf(number):
        span = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {span}, not {number!r}.")


def check_rate(name: str, rate: Number) -> None:
    """Raise `ValueError` unless `rate` lies in `[0, 1)`; schedules and arrays pass."""
    check_number(name, rate, 0.0, 1.0)
    if not callable(rate) and not isinstance(rate, jax.Array) and rate >= 1.0:
        raise ValueError(f"{name} must be below 1, not {rate!r}.")


def check_count(name: str, number: int, low: int = 1) -> None:
    """Raise `ValueError` unless `number` is a whole number of at least `low`."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, not {number!r}.")


def check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `choice` is one of `choices`."""
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {choice!r}.")
