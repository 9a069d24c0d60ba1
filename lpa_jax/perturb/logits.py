"""Perturbations of the logits `[B, C]`: LPL, logit adjustment, LDAM."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from lpa_jax.perturb import classwise, membership, pgd, sites, splits


def lpl(
    epsilon: sites.Number,
    *,
    delta_epsilon: sites.Number = 0.0,
    split: splits.Split | None = None,
    solver: Literal["steps", "projected"] = "steps",
    step_size: sites.Number = 0.01,
    steps: int | None = None,
) -> sites.Perturbation:
    r"""LPL: learning perturbations of logits, one perturbation a class.

    .. math::
        d_c \leftarrow d_c + s_c \frac{\alpha}{N_c} \sum_{i : y_i = c}
            \left(\mathrm{softmax}(u_i + d_c) - e_c\right)

    The training loss is then taken at `u_i + d_{y_i}`, with `d` a constant. With another loss than
    cross-entropy, its own gradient takes the place of `softmax - e_c`.

    Args:
      epsilon: The bound, at least 0, or a schedule.
      delta_epsilon: Varied bound: `epsilon + delta_epsilon * split.spread` (eq 13 and 14).
      split: Which classes are pushed out and which pulled in; default `splits.mean_threshold()`.
      solver: `"steps"`, the paper's: class c takes `floor(epsilon_c / step_size)` steps and is not
        projected (as `||p - e_c|| <= sqrt(2)`, `||d_c|| <= sqrt(2) * epsilon_c`). `"projected"`:
        that many `steps` of length `2 * epsilon_c / steps` along the normalised gradient, projected
        onto the ball of radius `epsilon_c`, as in LPA.
      step_size: Alpha, above 0; of the `"steps"` solver alone.
      steps: `"projected"`: number of steps, default 3. `"steps"`: at most that many, default no
        limit.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.lpl(epsilon=0.5)
      Perturbation(sites=('logits',))

    References:
      Li et al., Logit Perturbation, AAAI 2022; arXiv:2209.05668.
    """
    planner = classwise.planner(epsilon, delta_epsilon, split)
    sites.check_number("step_size", step_size)
    sites.check_choice("solver", solver, ("steps", "projected"))
    if not callable(step_size) and not isinstance(step_size, jax.Array) and step_size == 0:
        raise ValueError("step_size must be above 0.")
    if steps is not None:
        sites.check_count("steps", steps)

    def update(
        value, *, labels, targets, weights, class_stats, gradient_fn=None, site=None, step=0, **_
    ):
        gradient_fn = sites.require_gradient("lpl", site, gradient_fn)
        frozen = jax.lax.stop_gradient(value)
        members = membership.by_class(labels, weights, targets.shape[1])
        signs, radii = planner.of(members, class_stats, step)
        start = jnp.zeros((signs.shape[0], value.shape[1]), jnp.float32)

        def gradient(delta):
            return members.mean(gradient_fn(frozen + members.spread(delta))[1])

        if solver == "projected":
            delta = pgd.ascend(lambda d: pgd.unit(gradient(d)), start, signs, radii, steps or 3)
        else:
            alpha = sites.at_step(step_size, step)
            # A hair above, so that 0.5 / 0.01 makes 50 steps also where it rounds to 49.999996.
            safe = jnp.where(alpha > 0, alpha, 1.0)
            moving = (alpha > 0) & (signs != 0)
            counts = jnp.where(moving, jnp.floor(radii / safe * (1 + 1e-6)), 0).astype(jnp.int32)
            counts = counts if steps is None else jnp.minimum(counts, steps)
            stride = signs * alpha

            def body(t, delta):
                length = jnp.where(t < counts, stride, 0.0)
                return delta + pgd.column(length, delta) * gradient(delta)

            delta = pgd.repeat(body, start, jnp.max(counts))
        return value + jax.lax.stop_gradient(members.spread(delta)).astype(value.dtype)

    return sites.stateless(sites.LOGITS, update, lambda _, stats, step: planner.report(stats, step))


def logit_adjustment(class_counts: Sequence[float], tau: sites.Number = 1.0) -> sites.Perturbation:
    """Add `tau * log(prior)` to the logits in the training loss.

    Args:
      class_counts: Number of training examples of each class, `[C]`, all positive.
      tau: Strength, at least 0, or a schedule.

    Raises:
      ValueError: If a count is not positive, or their number is not that of the classes.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> adjust = lpa_jax.logit_adjustment([30, 10])
      >>> adjust.update(jnp.zeros((1, 2)), adjust.init(None))[0].round(3).tolist()
      [[-0.288, -1.386]]

    References:
      Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv:2007.07314.
    """
    counts = _counts(class_counts)
    sites.check_number("tau", tau)

    def update(value, *, step=0, **_):
        _check_classes(counts, value)
        shift = sites.at_step(tau, step) * jnp.log(counts / jnp.sum(counts))
        return value + shift.astype(value.dtype)

    return sites.stateless(sites.LOGITS, update)


def ldam(
    class_counts: Sequence[float], max_margin: sites.Number = 0.5, scale: sites.Number = 30.0
) -> sites.Perturbation:
    r"""LDAM: label-distribution-aware margins, `scale * (u - margin_y e_y)`.

    The margin of class c is proportional to `n_c^{-1/4}`, the largest being `max_margin`.

    Args:
      class_counts: Number of training examples of each class, `[C]`, all positive.
      max_margin: Margin of the rarest class, in the units of the logits, at least 0.
      scale: Factor on the result, at least 0. The default, the paper's, is meant for cosine logits
        in [-1, 1]; use 1 with an ordinary linear head.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> margin = lpa_jax.ldam([16, 1], scale=1.0)
      >>> eye = jnp.eye(2)
      >>> margin.update(jnp.zeros((2, 2)), margin.init(None), labels=eye, targets=eye)[0]
      Array([[-0.25,  0.  ],
             [ 0.  , -0.5 ]], dtype=float32)

    References:
      Cao et al., LDAM, NeurIPS 2019, arXiv:1906.07413.
    """
    counts = _counts(class_counts)
    sites.check_number("max_margin", max_margin)
    sites.check_number("scale", scale)

    def update(value, *, labels, step=0, **_):
        _check_classes(counts, value)
        margins = counts**-0.25
        margins = margins / jnp.max(margins) * sites.at_step(max_margin, step)
        if labels.ndim == 1:
            labels = jax.nn.one_hot(labels, value.shape[1])
        shifted = value - (labels * margins).astype(value.dtype)
        return shifted * sites.at_step(scale, step).astype(value.dtype)

    return sites.stateless(sites.LOGITS, update)


def _counts(class_counts: Sequence[float]) -> jax.Array:
    if not len(class_counts) or not all(count > 0 for count in class_counts):
        raise ValueError(f"class_counts must be positive, not {class_counts!r}.")
    return jnp.asarray(class_counts, jnp.float32)


def _check_classes(counts: jax.Array, logits: jax.Array) -> None:
    if counts.shape[0] != logits.shape[1]:
        raise ValueError(
            f"class_counts names {counts.shape[0]} classes, but there are {logits.shape[1]} logits."
        )
