"""Perturbations of hidden activations: LPA, dropout, DropBlock, shake."""

from collections.abc import Sequence
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lpa_jax.perturb import bounds, classwise, membership, pgd, sites, splits


def lpa(
    site: str | Sequence[str],
    epsilon: sites.Number | Sequence[sites.Number],
    *,
    delta_epsilon: sites.Number = 0.0,
    steps: int = 3,
    split: splits.Split | None = None,
    direction: Literal["normalized", "raw"] = "normalized",
    sharing: Literal["channel", "full"] = "channel",
    radius: Literal["absolute", "relative"] = "relative",
    low_rank: int | None = None,
    objective: Literal["loss", "norm"] = "loss",
    granularity: Literal["class", "sample"] = "class",
) -> sites.Perturbation:
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
    The loss climbed contains what stands at the logits and asks for no gradient of its own (logit
    adjustment, margins, ISDA), as the training loss does. A class whose gradient is no longer than
    its rounding noise, as where what follows removes the shift, stays where it is (*ours*). The
    noise is judged by the dtype at the site, so not at float32 inputs of a bfloat16 network.
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
    sites.check_climbable("lpa", names)
    plans = {
        name: classwise.planner(number, delta_epsilon, split)
        for name, number in bounds.per_site(epsilon, names).items()
    }
    sites.check_count("steps", steps)
    sites.check_choice("direction", direction, ("normalized", "raw"))
    sites.check_choice("sharing", sharing, ("channel", "full"))
    sites.check_choice("radius", radius, ("absolute", "relative"))
    sites.check_choice("objective", objective, ("loss", "norm"))
    sites.check_choice("granularity", granularity, ("class", "sample"))
    if low_rank is not None:
        sites.check_count("low_rank", low_rank)

    def update(
        value,
        *,
        labels,
        targets,
        weights,
        class_stats,
        gradient_fn=None,
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
            climb = sites.require_gradient("lpa", site, gradient_fn)
            # Nothing is added yet, and the pass for the class statistics is shared.
            start = jax.lax.stop_gradient(climb(value)[1])
            summed, noise = _with_noise(start, positions, members)

            def gradient(delta):
                if delta is zero:
                    return gather(summed) if low_rank is None else direction_of(start)
                _, uphill = climb(frozen + members.spread(delta).astype(frozen.dtype))
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
        return value + jax.lax.stop_gradient(members.spread(delta)).astype(value.dtype)

    def report(site, stats, step):
        return plans[site].report(stats, step)

    return sites.stateless(names, update, report)


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


class AdaptiveState(NamedTuple):
    """State of `adaptive`.

    Attributes:
      inner: State of the perturbation.
      chosen: Index of the site perturbed, int32 scalar.
      scores: `sum_c |loss change of class c|` at each site when last measured, float32 `[sites]`.
    """

    inner: Any
    chosen: Int[Array, ""]
    scores: Float[Array, "sites"]


def adaptive(perturbation: sites.Perturbation, every: int) -> sites.Perturbation:
    """Perturb only the site where it matters most: `argmax_l sum_c |loss change|` (LPA eq 13).

    Every `every`-th step measures each site alone, against no perturbation, and is itself trained
    without one: what stands at an earlier site would change the scores of the later ones. It costs
    each site its own perturbation and two more passes through the network's tail; the other steps
    cost the chosen site alone.

    Args:
      perturbation: A perturbation of at least two sites that have a gradient, `lpa` for instance.
      every: Number of steps from one measurement to the next, at least 2; step 0 is the first.

    Returns:
      The perturbation of one site at a time.

    Raises:
      ValueError: If there are fewer than two sites, or `every` is less than 2.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.adaptive(lpa_jax.lpa(("group2", "group3"), epsilon=0.2), every=100)
      Perturbation(sites=('group2', 'group3'))
    """
    names = perturbation.sites
    sites.check_count("every", every, low=2)
    if len(names) < 2:
        raise ValueError(f"adaptive chooses among several sites; {perturbation} has one.")

    def init(value):
        start = (jnp.zeros((), jnp.int32), jnp.zeros(len(names), jnp.float32))
        return AdaptiveState(perturbation.init(value), *start)

    def update(
        value, state, params=None, *, site, step, labels, targets, weights, axis_name=(), **extra
    ):
        index = names.index(site)
        gradient_fn = sites.require_gradient("adaptive", site, extra.get("gradient_fn"))
        measuring = step % every == 0
        chosen = jnp.where(measuring, state.chosen, jnp.argmax(state.scores)).astype(jnp.int32)
        mine = ~measuring & (chosen == index)

        def run():
            return perturbation.update(
                value,
                state.inner,
                params,
                site=site,
                step=step,
                labels=labels,
                targets=targets,
                weights=weights,
                axis_name=axis_name,
                **extra,
            )

        def score(new):
            change = gradient_fn(new)[0] - gradient_fn(value)[0]
            members = membership.by_class(labels, weights, targets.shape[1], axis_name)
            return jnp.sum(jnp.abs(members.mean(change)))

        new, inner = jax.lax.cond(measuring | mine, run, lambda: (value, state.inner))
        frozen = jax.lax.stop_gradient(new)
        measured = jax.lax.cond(measuring, lambda: score(frozen), lambda: state.scores[index])
        new = jnp.where(mine, new, value)
        return new, AdaptiveState(inner, chosen, state.scores.at[index].set(measured))

    return sites.Perturbation(
        names, init, update, perturbation.report, class_level=perturbation.class_level
    )


def dropout(site: str, rate: sites.Number) -> sites.Perturbation:
    """Zero each entry with probability `rate` and scale the others by `1 / (1 - rate)`.

    Args:
      site: A module path, `"inputs"` or `"logits"`; the value is `[B, ...]`.
      rate: Probability in [0, 1), or a schedule.

    Raises:
      ValueError: If `rate` lies outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, lpa_jax
      >>> drop = lpa_jax.dropout("group3", rate=0.5)
      >>> value, _ = drop.update(jnp.ones((1, 4)), drop.init(None), key=jax.random.key(0))
      >>> sorted(set(value.tolist()[0])) in ([0.0, 2.0], [2.0], [0.0])
      True

    References:
      Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, JMLR
      2014.
    """
    sites.check_activations("dropout", [site])
    _check_rate(rate)

    def update(value, *, key, step=0, **_):
        keep = 1.0 - sites.at_step(rate, step)
        kept = jax.random.bernoulli(key, keep, value.shape)
        # A schedule may reach 1.
        scale = jnp.where(keep > 0, keep, 1.0).astype(value.dtype)
        return jnp.where(kept, value / scale, 0)

    return sites.stateless(site, update)


def dropblock(site: str, rate: sites.Number, block_size: int) -> sites.Perturbation:
    """Zero square blocks of each channel, about `rate` of all entries, and rescale the rest.

    Args:
      site: A module path or `"inputs"`; the value is `[B, H, W, channels]`.
      rate: Share of the entries to drop, in [0, 1), or a schedule.
      block_size: Side of the blocks, at least 1 and at most `min(H, W)`; 1 is dropout.

    Raises:
      ValueError: If an argument is outside its range, or the value is not `[B, H, W, channels]`.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.dropblock("group2", rate=0.1, block_size=3)
      Perturbation(sites=('group2',))

    References:
      Ghiasi, Lin and Le, DropBlock: A regularization method for convolutional networks, NeurIPS
      2018, arXiv:1810.12890. *Ours*: rescaled by example rather than by batch, so that examples
      stay independent.
    """
    sites.check_activations("dropblock", [site])
    _check_rate(rate)
    sites.check_count("block_size", block_size)

    def update(value, *, key, step=0, **_):
        if value.ndim != 4 or min(value.shape[1:3]) < block_size:
            raise ValueError(
                f"dropblock at {site!r} needs a value [B, H, W, channels] with H and W at least "
                f"block_size {block_size}, not {value.shape}."
            )
        batch, height, width, channels = value.shape
        seeds = (height - block_size + 1, width - block_size + 1)
        gamma = sites.at_step(rate, step) / block_size**2 * height * width / math.prod(seeds)
        centers = jax.random.bernoulli(key, gamma, (batch, *seeds, channels))
        # Each seed is a block's first corner; the pooling window looks back from every entry.
        margin = ((0, 0), (block_size - 1,) * 2, (block_size - 1,) * 2, (0, 0))
        window = (1, block_size, block_size, 1)
        padded = jnp.pad(centers.astype(jnp.float32), margin)
        dropped = jax.lax.reduce_window(
            padded, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "VALID"
        )
        kept = 1.0 - dropped
        share = jnp.mean(kept, axis=(1, 2, 3), keepdims=True)
        scale = kept / jnp.where(share > 0, share, 1.0)
        return value * scale.astype(value.dtype)

    return sites.stateless(site, update)


def shake(site: str, strength: sites.Number) -> sites.Perturbation:
    r"""Scale each example's value at random, forwards and backwards by independent factors.

    Both factors are uniform in `[1 - strength, 1 + strength]`, as in Shake-Shake's best variant,
    which draws them for each example and apart for the two directions. *Ours*: it scales one value
    in place of a mixture of two branches; a residual block's branch is the like of it.

    Args:
      site: A module path, `"inputs"` or `"logits"`; the value is `[B, ...]`.
      strength: In [0, 1], or a schedule.

    Raises:
      ValueError: If `strength` lies outside [0, 1], or the site holds no activations.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.shake("group3", strength=0.5)
      Perturbation(sites=('group3',))

    References:
      Gastaldi, Shake-Shake regularization, 2017, arXiv:1705.07485.
    """
    sites.check_activations("shake", [site])
    sites.check_number("strength", strength, 0.0, 1.0)

    def update(value, *, key, step=0, **_):
        draws = jax.random.uniform(key, (2, value.shape[0]), minval=-1.0, maxval=1.0)
        factors = (1.0 + sites.at_step(strength, step) * draws).astype(value.dtype)
        forward, backward = (pgd.column(factor, value) for factor in factors)
        # The gradient sees the second term alone.
        return jax.lax.stop_gradient((forward - backward) * value) + backward * value

    return sites.stateless(site, update)


def _check_rate(rate: sites.Number) -> None:
    sites.check_number("rate", rate, 0.0, 1.0)
    if not callable(rate) and not isinstance(rate, jax.Array) and rate >= 1.0:
        raise ValueError(f"rate must be below 1, not {rate!r}.")
