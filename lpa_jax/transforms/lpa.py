"""LPA: one perturbation of activations for each class, found by gradient steps."""

from collections.abc import Sequence
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lpa_jax.core import bounds, class_plan, membership, pgd, splits
from lpa_jax.core.arguments import check_choice, check_count, Number
from lpa_jax.core.perturbation import check_activations, Perturbation, stateless


def lpa(
    site: str | Sequence[str],
    epsilon: Number | Sequence[Number],
    *,
    delta_epsilon: Number = 0.0,
    steps: int = 3,
    split: splits.Split | None = None,
    direction: Literal["normalized", "raw"] = "normalized",
    sharing: Literal["channel", "full"] = "channel",
    radius: Literal["absolute", "relative"] = "relative",
    low_rank: int | None = None,
    objective: Literal["loss", "norm"] = "loss",
    granularity: Literal["class", "sample"] = "class",
) -> Perturbation:
    r"""LPA, Learning to Perturb Activations: one perturbation a class.

    For every class present, `T` projected gradient steps from 0 raise (sign +1) or lower (sign -1)
    the mean loss of its examples when `d_c` is added to their activation `a_i`:

    .. math::
        d_c \leftarrow \mathrm{Proj}_{\|d\| \le \epsilon_c}
            \left(d_c + s_c \frac{2\epsilon_c}{T} \mathrm{dir}_c\right), \qquad
        \mathrm{dir}_c \propto \frac{1}{N_c} \sum_{i : y_i = c}
            \nabla_{a_i} \ell_i(a_i + d_{y_i})

    The training loss is then taken at `a_i + d_{y_i}`, with `d` a constant (*ours*, as in LPL's
    code). Where batch normalization couples examples, the gradient is that of the summed loss.
    The loss climbed contains what acts at the logits and asks for no gradient of its own (logit
    adjustment, margins, ISDA), as the training loss does. A class whose gradient is no longer than
    its rounding noise, as where what follows removes the shift, stays where it is (*ours*). The
    noise is estimated by the dtype at the site, so not at float32 inputs of a bfloat16 network.
    What the papers leave open was tried on a long-tailed CIFAR-10, three seeds, with a relative
    radius of 0.1 (docs/results.md): no choice was shown to be better than the default, and a fixed
    `splits.tail` was worse.

    Args:
      site: Path of a layer (its output `[B, ..., channels]` is perturbed), `"inputs"` or
        `"logits"`; or several of these, each perturbed within its own bound.
      epsilon: The bound on `||d_c||_2`, at least 0; a number or schedule for all sites, or a
        sequence with one for each (see `bounds.layer_scale`).
      delta_epsilon: Varied bound: `epsilon + delta_epsilon * split.spread` (eq 14).
      steps: Number of gradient steps T, at least 1; each costs one pass through the network's tail.
      split: Which classes are pushed out and which pulled in; default `splits.mean_threshold()`.
        It goes by the batches before, and so nothing moves in the first step.
      direction: The class-mean gradient, scaled to l2 norm 1 (*ours*, default: with the step tied
        to epsilon a raw gradient never reaches the ball) or raw.
      sharing: One entry of `d_c` per channel, added at every position, or one per feature. The
        bound is on `d_c` as it is shared.
      radius: `"relative"` (default) multiplies the bound by the class-mean of `||a_i||`, scaled so
        that `||change|| / ||a||` is at most epsilon for either sharing; `"absolute"` takes it as it
        is.
      low_rank: Keep the part of the gradient in its top-k right singular directions, `[positions,
        channels]` (eq 12; *ours*: of the gradient map, a single vector has rank 1).
      objective: `"norm"` expands (+1) or contracts (-1) the class-mean activation instead, in
        closed form, to test conjectures 1 and 2. *Ours*: a contraction stops at the origin.
      granularity: `"sample"` gives each example its own perturbation (beyond the paper).

    Returns:
      The perturbation.

    Raises:
      ValueError: If an argument is outside its range, or the site has no gradient.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.lpa("group3", epsilon=0.2, steps=3, split=lpa_jax.splits.mean_threshold())
      Perturbation(sites=('group3',))

    References:
      Hua Li, Learning to Perturb Hidden Representations for Generalizable Deep Learning, 2026,
      arXiv:2605.29525.
    """
    names = (site,) if isinstance(site, str) else tuple(site)
    check_activations("lpa", names)
    plans = {
        name: class_plan.planner(number, delta_epsilon, split)
        for name, number in bounds.per_site(epsilon, names).items()
    }
    check_count("steps", steps)
    check_choice("direction", direction, ("normalized", "raw"))
    check_choice("sharing", sharing, ("channel", "full"))
    check_choice("radius", radius, ("absolute", "relative"))
    check_choice("objective", objective, ("loss", "norm"))
    check_choice("granularity", granularity, ("class", "sample"))
    if low_rank is not None:
        check_count("low_rank", low_rank)

    def update(
        value,
        *,
        labels,
        targets,
        weights,
        class_stats,
        gradient_fn: Any = None,
        site=None,
        step=0,
        axis_name=(),
        **_,
    ):
        frozen = jax.lax.stop_gradient(value)
        # The axes along which entries share one of the perturbation's, and how many do.
        positions = tuple(range(1, value.ndim - 1)) if sharing == "channel" else ()
        copies = math.prod(value.shape[axis] for axis in positions)

        def reduce(entries):
            return jnp.sum(entries.astype(jnp.float32), axis=positions, keepdims=True)

        if granularity == "class":
            members = membership.by_class(labels, weights, targets.shape[1], axis_name)
        else:
            members = membership.by_example(labels, weights)
        signs, radii = plans[site or names[0]].of(members, class_stats, step)
        if radius == "relative":
            radii *= members.mean(pgd.norms(frozen)) / math.sqrt(copies)

        # The length of a direction that is normalized does not matter.
        gather = members.total if direction == "normalized" else members.mean
        zero = jnp.zeros_like(gather(reduce(frozen)))

        def direction_of(uphill):
            if low_rank is None:
                return gather(reduce(uphill))
            return reduce(_top_directions(gather(uphill), low_rank))

        if objective == "norm":
            delta = pgd.stretch(members.mean(reduce(frozen)) / copies, signs, radii)
        else:
            # Nothing is added yet, and the pass for the class statistics is shared.
            start = jax.lax.stop_gradient(gradient_fn(value)[1])
            summed, noise = _with_noise(start, positions, members)

            def gradient(delta):
                if delta is zero:
                    return gather(summed) if low_rank is None else direction_of(start)
                _, uphill = gradient_fn(frozen + members.to_examples(delta).astype(frozen.dtype))
                return direction_of(uphill)

            delta = pgd.ascend(
                gradient,
                zero,
                signs,
                radii,
                steps,
                normalized=direction == "normalized",
                floor=noise,
            )
        return value + jax.lax.stop_gradient(members.to_examples(delta)).astype(value.dtype)

    def report(site, stats, step):
        return plans[site].report(stats, step)

    return stateless(names, update, report, class_level=True, needs_gradient=objective == "loss")


def _with_noise(
    uphill: Array, axes: tuple[int, ...], members: membership.Membership
) -> tuple[Array, pgd.PerRow]:
    """Sum gradients over axes; return that, and a length below which a row of it is rounding noise.

    Where the rest of the network removes a shift (one vector added to all keys of an attention, or
    ahead of an instance normalization) the sum is 0 but for rounding, whose size grows with that of
    its terms and with the precision of the value.
    """
    # The first axis is summed last: the terms left tell the size, without a pass of their own.
    terms = jnp.sum(uphill.astype(jnp.float32), axis=axes[1:], keepdims=True)
    squares = jnp.sum(terms**2, axis=tuple(range(1, terms.ndim)))
    length = jnp.sqrt(members.total(squares))
    # Measured of attentions and instance normalizations: up to 1e-5 (float32) and 0.2 (bfloat16) of
    # the length. A sum of many terms of random signs is about as long as that.
    precision = 4.0 * math.sqrt(float(jnp.finfo(uphill.dtype).eps))
    # Squares that float32 does not hold tell nothing.
    noise = jnp.where(jnp.isfinite(length), precision * length, 0.0)
    return jnp.sum(terms, axis=axes[:1], keepdims=True), noise


def _top_directions(gradient: pgd.Rows, rank: int) -> pgd.Rows:
    """Keep each row's part in its top right singular directions, as `[positions, channels]`."""
    maps = gradient.reshape(gradient.shape[0], -1, gradient.shape[-1])
    left, singular, right = jnp.linalg.svd(maps, full_matrices=False)
    kept = (left[..., :rank] * singular[:, None, :rank]) @ right[:, :rank]
    return kept.reshape(gradient.shape)
