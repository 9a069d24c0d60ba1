"""LPL: one perturbation of logits for each class."""

from typing import Literal

import jax
import jax.numpy as jnp

from lpa_jax.core import class_plan, membership, pgd, splits
from lpa_jax.core.arguments import at_step, check_choice, check_count, check_number, Number
from lpa_jax.core.perturbation import LOGITS, Perturbation, stateless


def lpl(
    epsilon: Number,
    *,
    delta_epsilon: Number = 0.0,
    split: splits.Split | None = None,
    solver: Literal["steps", "rounded_steps", "projected"] = "steps",
    step_size: Number = 0.01,
    steps: int | None = None,
) -> Perturbation:
    r"""LPL, class-level logit perturbation: one perturbation a class.

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
        projected (as `||p - e_c|| <= sqrt(2)`, `||d_c|| <= sqrt(2) * epsilon_c`).
        `"rounded_steps"`, that of LPL's released code on long tails:
        `max(1, round(epsilon_c / step_size))` steps, but none where the bound or the sign is 0.
        `"projected"`: that many `steps` of length `2 * epsilon_c / steps` along the normalized
        gradient, projected onto the ball of radius `epsilon_c`, as in LPA.
      step_size: Alpha, above 0; not used by `"projected"`.
      steps: `"projected"`: number of steps, default 3. Else: at most that many, default no limit.

    The released code's numbers of steps on CIFAR-10-LT are those of `epsilon=0`,
    `delta_epsilon=1.5`, `step_size=0.15`, `solver="rounded_steps"` and
    `splits.tail(4, class_counts, head_scale=0.6)`; on CIFAR-100-LT those of 27 head classes and
    `head_scale=0.2`. *Ours*: a class whose number rounds to 0 takes one step; that code's index of
    -1 selects the result of the most steps. The metrics of the site tell each class's number of
    `steps`, float32 `[C]`, but with `"projected"`.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.lpl(epsilon=0.5)
      Perturbation(sites=('logits',))

    References:
      Mengyang Li, Fengguang Su, Ou Wu and Ji Zhang, Class-Level Logit Perturbation, TNNLS,
      arXiv:2209.05668; its first version: Logit Perturbation, AAAI 2022.
    """
    planner = class_plan.planner(epsilon, delta_epsilon, split)
    check_number("step_size", step_size)
    check_choice("solver", solver, ("steps", "rounded_steps", "projected"))
    if not callable(step_size) and not isinstance(step_size, jax.Array) and step_size == 0:
        raise ValueError("step_size must be above 0.")
    if steps is not None:
        check_count("steps", steps)

    def step_counts(plan, alpha):
        ratio = plan.radius / jnp.where(alpha > 0, alpha, 1.0)
        if solver == "rounded_steps":
            # Off by the rounding of float32, a tie such as 2.5 must still go to the even number.
            ratio = jnp.round(ratio * 2.0**13) / 2.0**13
            counts = jnp.maximum(jnp.round(ratio), 1.0)
        else:
            # A hair above, so that 0.5 / 0.01 makes 50 steps also where it rounds to 49.999996.
            counts = jnp.floor(ratio * (1 + 1e-6))
        moving = (alpha > 0) & (plan.sign != 0) & (plan.radius > 0)
        counts = jnp.where(moving, counts, 0.0)
        return counts if steps is None else jnp.minimum(counts, steps)

    def report(_, stats, step):
        plan = planner.report(stats, step)
        if solver == "projected":
            return plan
        counts = step_counts(class_plan.Plan(**plan), at_step(step_size, step))
        return plan | {"steps": counts}

    def update(
        value,
        *,
        labels,
        targets,
        weights,
        class_stats,
        gradient_fn,
        step=0,
        axis_name=(),
        **_,
    ):
        frozen = jax.lax.stop_gradient(value)
        members = membership.by_class(labels, weights, targets.shape[1], axis_name)
        plan = planner.of(members, class_stats, step)
        signs, radii = plan
        zero = jnp.zeros((signs.shape[0], value.shape[1]), jnp.float32)

        def gradient(delta):
            return members.mean(gradient_fn(frozen + members.to_examples(delta))[1])

        if solver == "projected":
            delta = pgd.ascend(gradient, zero, signs, radii, steps or 3)
        else:
            alpha = at_step(step_size, step)
            counts = step_counts(plan, alpha).astype(jnp.int32)
            stride = signs * alpha

            def body(t, delta):
                length = jnp.where(t < counts, stride, 0.0)
                return delta + pgd.column(length, delta) * gradient(delta)

            delta = pgd.repeat(body, zero, jnp.max(counts))
        return value + jax.lax.stop_gradient(members.to_examples(delta)).astype(value.dtype)

    return stateless(LOGITS, update, report, class_level=True, needs_gradient=True)
