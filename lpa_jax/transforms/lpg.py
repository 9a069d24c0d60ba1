"""LPG: one perturbation of logit gradients for each class."""

from typing import Literal

import jax.numpy as jnp

from lpa_jax.core import class_plan, membership, pgd, splits
from lpa_jax.core.arguments import check_choice, Number
from lpa_jax.core.perturbation import LOGIT_GRADS, Perturbation, stateless


def lpg(
    epsilon: Number,
    *,
    delta_epsilon: Number = 0.0,
    split: splits.Split | None = None,
    solver: Literal["closed_form", "iterative"] = "closed_form",
) -> Perturbation:
    r"""LPG, Learning to Perturb Gradients: one perturbation a class, of its logit gradients.

    `g_i + d_{y_i}` is back-propagated in place of `g_i = dl_i/du_i`, where `d_c` amplifies (+1) or
    dampens (-1) the class-mean gradient. With `g_c` that mean (*ours*; only the paper's abstract is
    public in full):

    .. math::
        d_c = \epsilon_c \frac{g_c}{\|g_c\|} \;(s_c = +1), \qquad
        d_c = -\min(\epsilon_c, \|g_c\|) \frac{g_c}{\|g_c\|} \;(s_c = -1)

    the exact maximizer and minimizer of `||g_c + d||` on the ball. The parameter gradient equals
    that of `l_i + <d_{y_i}, u_i>` with `d` constant.

    Args:
      epsilon: The bound on `||d_c||_2`, at least 0, or a schedule. (`||g_i|| <= sqrt(2)` for
        cross-entropy.)
      delta_epsilon: Varied bound: `epsilon + delta_epsilon * split.spread`.
      split: Which classes are amplified and which dampened; default `splits.mean_threshold()`. With
        wrong labels `splits.inverted(splits.mean_threshold())`, which dampens those with the
        highest loss.
      solver: The closed form, or projected steps on the same objective, which agree with it.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.lpg(epsilon=0.1)
      Perturbation(sites=('logit_grads',))

    References:
      Hua Li, Gradient Perturbation: Learning to Perturb Gradients for Adaptive Training, 2026,
      arXiv:2605.29494.
    """
    planner = class_plan.planner(epsilon, delta_epsilon, split)
    check_choice("solver", solver, ("closed_form", "iterative"))

    def update(value, *, labels, targets, weights, class_stats, step=0, axis_name=(), **_):
        members = membership.by_class(labels, weights, targets.shape[1], axis_name)
        signs, radii = planner.of(members, class_stats, step)
        mean = members.mean(value)
        if solver == "closed_form":
            delta = pgd.stretch(mean, signs, radii)
        else:
            delta = _iterate(mean, signs, radii)
        return value + members.to_examples(delta).astype(value.dtype)

    def report(_, stats, step):
        return planner.report(stats, step)

    return stateless(LOGIT_GRADS, update, report, class_level=True, needs_gradient=False)


def _iterate(mean: pgd.Rows, signs: pgd.PerRow, radii: pgd.PerRow, steps: int = 4) -> pgd.Rows:
    """Solve `stretch` by projected steps along the gradient of `||mean + d||`."""
    stride = 2.0 * radii / steps

    def body(_, delta):
        total = mean + delta
        # A step down is no longer than what is left: beyond the origin the norm would grow again.
        length = jnp.where(signs > 0, stride, jnp.minimum(stride, pgd.norms(total)))
        return pgd.project(delta + pgd.column(signs * length, delta) * pgd.unit(total), radii)

    return pgd.repeat(body, jnp.zeros_like(mean), steps)
