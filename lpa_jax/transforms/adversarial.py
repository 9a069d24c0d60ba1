"""FGSM and PGD: each example is moved uphill in its own loss."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from lpa_jax.core import pgd
from lpa_jax.core.arguments import at_step, check_choice, check_count, check_number, Number
from lpa_jax.core.perturbation import check_activations, Perturbation, stateless


def adversarial(
    site: str,
    epsilon: Number,
    *,
    steps: int = 1,
    step_size: Number | None = None,
    norm: Literal["linf", "l2"] = "linf",
    bounds: tuple[float, float] | None = None,
) -> Perturbation:
    """Move each example uphill in its own loss: FGSM (one step) or PGD, from the clean value.

    Args:
      site: A module path, `"inputs"` or `"logits"`.
      epsilon: Radius of the ball around the value, at least 0, or a schedule.
      steps: Number of steps, at least 1.
      step_size: Length of a step; default `epsilon` for one step and `2.5 * epsilon / steps` for
        more.
      norm: `"linf"` (steps along the sign of the gradient) or `"l2"` (along the gradient).
      bounds: Range the result is clipped to, `(0.0, 1.0)` for pixels; None for activations.

    Raises:
      ValueError: If an argument is outside its range, or the site has no gradient.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.adversarial("inputs", 8 / 255, steps=10, bounds=(0.0, 1.0))
      Perturbation(sites=('inputs',))

    References:
      Goodfellow, Shlens and Szegedy, Explaining and Harnessing Adversarial Examples, ICLR 2015,
      arXiv:1412.6572; Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks,
      ICLR 2018, arXiv:1706.06083.
    """
    check_number("epsilon", epsilon)
    check_count("steps", steps)
    check_choice("norm", norm, ("linf", "l2"))
    check_activations("adversarial", [site])
    if step_size is not None:
        check_number("step_size", step_size)
    if bounds is not None:
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise ValueError(f"bounds must be two numbers, or None, not {bounds!r}.")
        check_number("bounds[0]", bounds[0], -math.inf)
        check_number("bounds[1]", bounds[1], bounds[0])

    def update(value, *, gradient_fn, step=0, **_):
        start = jax.lax.stop_gradient(value)
        size = at_step(epsilon, step)
        default = size if steps == 1 else 2.5 * size / steps
        stride = default if step_size is None else at_step(step_size, step)

        delta = pgd.climb_within(
            lambda moved: gradient_fn(moved)[1],
            start,
            jnp.zeros_like(start, jnp.float32),
            size,
            stride,
            steps,
            norm,
            bounds,
        )
        return value + delta.astype(value.dtype)

    return stateless(site, update, needs_gradient=True)
