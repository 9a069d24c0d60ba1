"""Perturbations of the per-example gradient of the loss at the logits, `[B, C]`: LPG, ELR."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lpa_jax.perturb import classwise, membership, pgd, sites, splits


def lpg(
    epsilon: sites.Number,
    *,
    delta_epsilon: sites.Number = 0.0,
    split: splits.Split | None = None,
    solver: Literal["closed_form", "iterative"] = "closed_form",
) -> sites.Perturbation:
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
    planner = classwise.planner(epsilon, delta_epsilon, split)
    sites.check_choice("solver", solver, ("closed_form", "iterative"))

    def update(value, *, labels, targets, weights, class_stats, step=0, axis_name=(), **_):
        members = membership.by_class(labels, weights, targets.shape[1], axis_name)
        signs, radii = planner.of(members, class_stats, step)
        mean = members.mean(value)
        if solver == "closed_form":
            delta = pgd.stretch(mean, signs, radii)
        else:
            delta = _iterate(mean, signs, radii)
        return value + members.spread(delta).astype(value.dtype)

    return sites.stateless(
        sites.LOGIT_GRADS, update, lambda _, stats, step: planner.report(stats, step)
    )


def _iterate(mean: pgd.Rows, signs: pgd.PerRow, radii: pgd.PerRow, steps: int = 4) -> pgd.Rows:
    """Solve `stretch` by projected steps along the gradient of `||mean + d||`."""
    stride = 2.0 * radii / steps

    def body(_, delta):
        total = mean + delta
        # A step down is no longer than what is left: beyond the origin the norm would grow again.
        length = jnp.where(signs > 0, stride, jnp.minimum(stride, pgd.norms(total)))
        return pgd.project(delta + pgd.column(signs * length, delta) * pgd.unit(total), radii)

    return pgd.repeat(body, jnp.zeros_like(mean), steps)


def reweight(
    class_counts: Sequence[float], beta: sites.Number = 0.9999, normalize: bool = False
) -> sites.Perturbation:
    r"""Class-balanced re-weighting: scale each example's gradient by the weight of its class.

    .. math::
        w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad \sum_c w_c = C

    the inverse of the effective number of samples. With cross-entropy the parameter gradient is
    that of class-balanced CE, with `losses.softmax_focal_loss` that of class-balanced focal loss;
    the loss the step returns is not weighted. The mean is over the examples, as in the paper.

    Args:
      class_counts: Number of training examples of each class, `[C]`, all positive.
      beta: In [0, 1], or a schedule. 0: no weights; 1: by inverse frequency.
      normalize: Whether the mean is weighted, `sum_i w_{y_i} l_i / sum_i w_{y_i}` over the global
        batch, as in LDAM's code. Most examples of a long tail have small weights: without that,
        gradients are several times smaller than unweighted ones.

    With soft labels an example has the mixture of the weights of its classes (*ours*).

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> balance = lpa_jax.reweight([30, 10], beta=1.0)
      >>> given = dict(labels=jnp.array([0, 1]), weights=jnp.ones(2))
      >>> balance.update(jnp.ones((2, 2)), balance.init(None), **given)[0].tolist()
      [[0.5, 0.5], [1.5, 1.5]]

    References:
      Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
      arXiv:1901.05555.
    """
    counts = membership.counts_of(class_counts)
    sites.check_number("beta", beta, 0.0, 1.0)

    def update(value, *, labels, weights, step=0, axis_name=(), **_):
        membership.check_classes(counts, value)
        rest = 1.0 - sites.at_step(beta, step)
        safe = jnp.where(rest > 0, rest, 1.0)
        # 1 - beta^n, with all its digits where beta is near 1.
        grown = -jnp.expm1(counts * jnp.log1p(-safe))
        by_class = 1.0 / jnp.where(rest > 0, grown / safe, counts)
        by_class *= counts.shape[0] / jnp.sum(by_class)
        members = membership.by_class(labels, weights, value.shape[1], axis_name)
        factors = members.spread(members.take_class(by_class))
        if normalize:
            real = weights > 0
            total = members.summed(jnp.sum(jnp.where(real, weights * factors, 0.0)))
            count = members.summed(jnp.sum(jnp.where(real, weights, 0.0)))
            factors *= count / jnp.where(total > 0, total, 1.0)
        # Soft labels that sum to 1 but for a rounding are left alone as well.
        factors = jnp.where(rest < 1, factors, 1.0)
        return value * factors[:, None].astype(value.dtype)

    return sites.stateless(sites.LOGIT_GRADS, update)


def drw(
    class_counts: Sequence[float],
    start: int,
    beta: sites.Number = 0.9999,
    normalize: bool = True,
) -> sites.Perturbation:
    """DRW: deferred re-weighting, `reweight` from step `start` on and nothing before it.

    Args:
      class_counts: Number of training examples of each class, `[C]`, all positive.
      start: First step that is weighted, at least 0. The paper's: epoch 160 of 200.
      beta: As in `reweight`.
      normalize: As in `reweight`; by default as in the paper's code.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.chain(lpa_jax.ldam([30, 10]), lpa_jax.drw([30, 10], start=8000))
      (Perturbation(sites=('logits',)), Perturbation(sites=('logit_grads',)))

    References:
      Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
      2019, arXiv:1906.07413.
    """
    sites.check_count("start", start, low=0)
    sites.check_number("beta", beta, 0.0, 1.0)

    def deferred(step):
        return jnp.where(jnp.asarray(step) < start, 0.0, sites.at_step(beta, step))

    return reweight(class_counts, deferred, normalize)


def elr(num_examples: int, strength: sites.Number, beta: sites.Number = 0.7) -> sites.Perturbation:
    r"""ELR: early-learning regularization, which holds predictions to what they used to be.

    .. math::
        \ell_i + \lambda \log(1 - \langle p_i, t_i \rangle), \qquad
        t_i \leftarrow \beta t_i + (1 - \beta) p_i

    with `t_i` a moving average of the predictions on example i of the training set, begun at 0 and
    a constant for the gradient. What is added at the logits is the gradient of the second term,
    `lambda * p * (<p, t> - t) / (1 - <p, t>)`; the loss the step returns is without it.

    Args:
      num_examples: Number of training examples N; the state is float32 `[N, C]`.
      strength: The paper's lambda, at least 0, or a schedule. 3 on CIFAR-10 and 7 on CIFAR-100.
      beta: Decay of the average, in [0, 1], or a schedule. 0.7 on CIFAR-10 and 0.9 on CIFAR-100.

    *Ours*: `p` is the softmax of the logits as other perturbations have made them; the denominator
    is at least 1e-4 (the paper's code clips `p`); an example that a batch has several times counts
    once, with the mean of its predictions; after mixing, an example's average is of its mixtures.

    Raises:
      ValueError: If an argument is outside its range. The step raises it if it is not told which
        `examples` it is given; an example below 0 or of N or more makes the gradient NaN.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.elr(num_examples=50_000, strength=3.0)
      Perturbation(sites=('logit_grads',))

    References:
      Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels, NeurIPS 2020,
      arXiv:2007.00151.
    """
    sites.check_count("num_examples", num_examples)
    sites.check_number("strength", strength)
    sites.check_number("beta", beta, 0.0, 1.0)

    def init(value: Float[Array, "batch classes"]) -> Float[Array, "examples classes"]:
        return jnp.zeros((num_examples, value.shape[1]), jnp.float32)

    def update(
        value, state, params=None, *, weights, logits, examples=None, step=0, axis_name=(), **_
    ):
        del params
        if axis_name:
            raise sites.SiteError(
                "elr keeps a table of all training examples, of which each device of axis_name "
                "would see its own alone: shard the arrays of a jitted step over the devices."
            )
        if examples is None:
            raise ValueError(
                "elr remembers every example of the training set: give the step examples=, the "
                "places of the batch's examples in it."
            )
        real = weights > 0
        p = jnp.where(real[:, None], jax.nn.softmax(logits), 0.0)
        # One mean for all of an example's places in the batch: writes to one row have no order.
        same = ((examples[:, None] == examples[None]) & real[None]).astype(jnp.float32)
        total = jnp.matmul(same, p, precision=jax.lax.Precision.HIGHEST)
        own = total / jnp.maximum(jnp.sum(same, axis=1, keepdims=True), 1.0)
        decay = sites.at_step(beta, step)
        # Negative numbers would count from the end.
        examples = jnp.where(examples < 0, num_examples, examples)
        before = state.at[examples].get(mode="fill", fill_value=jnp.nan)
        t = jnp.where(real[:, None], decay * before + (1.0 - decay) * own, 0.0)
        state = state.at[jnp.where(real, examples, num_examples)].set(t, mode="drop")
        agreement = jnp.sum(p * t, axis=1, keepdims=True)
        pull = p * (agreement - t) / jnp.maximum(1.0 - agreement, 1e-4)
        return value + (sites.at_step(strength, step) * pull).astype(value.dtype), state

    return sites.Perturbation(sites.LOGIT_GRADS, init, update)
