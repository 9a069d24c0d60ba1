"""Which classes are pushed out, which are pulled in, and how far each may move."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lpa_jax.core import arguments, class_stats, membership

Classes = Int[Array, "rows"]
PerRow = Float[Array, "rows"]


class Split(NamedTuple):
    """A pair of pure functions of the class statistics, and of the classes asked about.

    Both are given `classes`, int `[R]`: only those present in a batch are decided on, so that the
    work does not grow with the number of classes. Numbers beyond the last class may stand for "no
    class"; what is returned for them is not used.

    Attributes:
      signs: Returns `[R]` in {+1, 0, -1}: +1 raises the class's loss (positive augmentation), -1
        lowers it (negative augmentation), 0 leaves the class alone.
      spread: Returns `[R]`, at least 0: what `delta_epsilon` is multiplied by in the bound
        `epsilon + delta_epsilon * spread` (LPL eq 13 and 14, LPA eq 14).
    """

    signs: Callable[[class_stats.ClassStats, Classes], PerRow]
    spread: Callable[[class_stats.ClassStats, Classes], PerRow]


Statistic = Literal["confidence", "accuracy"]
Window = Literal["ema", "epoch", "batch"]
_NO_SCHEDULE = "{} must be a number: a split is a function of the statistics alone."


def _threshold(tau: float | None, statistic: Statistic, window: Window) -> Split:
    arguments.check_choice("statistic", statistic, ("confidence", "accuracy"))
    arguments.check_choice("window", window, ("ema", "epoch", "batch"))

    def offset(stats, classes):
        known = getattr(stats, window)
        middle = known.over_classes(statistic) if tau is None else tau
        mean, weight = (_of(table, classes) for table in (getattr(known, statistic), known.weight))
        # Equal statistics may differ by roundings, and a moving average stops short of its limit.
        offset = jnp.where(jnp.abs(middle - mean) > 1e-5, middle - mean, 0.0)
        return jnp.where(weight > 0, offset, 0.0)

    return Split(
        lambda stats, classes: jnp.sign(offset(stats, classes)),
        lambda stats, classes: jnp.abs(offset(stats, classes)),
    )


def _of(table: Float[Array, "classes"], classes: Classes) -> PerRow:
    return table.at[classes].get(mode="clip")


def mean_threshold(statistic: Statistic = "confidence", window: Window = "ema") -> Split:
    """Push out the classes below the mean of `statistic` over the classes seen, pull in the others.

    Args:
      statistic: Mean true-class probability (LPL) or accuracy (LPA) of the class.
      window: A moving average, the last finished epoch (LPA's Algorithm 1; no perturbation until
        one has finished, see `step.end_epoch`) or the present batch (LPL's released code). *Ours*:
        the moving average. All are taken before class-level work moves any value, in the pass
        through the rest of the network that LPA's first gradient needs anyway.

    Returns:
      The split. Classes never seen have sign 0 and take no part in the mean (*ours*); the varied
      bound grows with the distance from the mean.

    Raises:
      ValueError: If `statistic` or `window` is not one of those listed.

    Example:
      >>> import jax.numpy as jnp
      >>> from lpa_jax.core import class_stats
      >>> confidence, weight = jnp.array([.9, .2, 0.]), jnp.array([1., 1., 0.])
      >>> seen = class_stats.Means(confidence, jnp.zeros(3), weight, num_seen=jnp.int32(2))
      >>> mean_threshold().signs(class_stats.init(3)._replace(ema=seen), jnp.arange(3))
      Array([-1.,  1.,  0.], dtype=float32)
    """
    return _threshold(None, statistic, window)


def threshold(tau: float, statistic: Statistic = "confidence", window: Window = "ema") -> Split:
    """Push out the classes whose statistic is below `tau`, in [0, 1]; pull in those above.

    The other arguments, the bound and the errors are those of `mean_threshold`.
    """
    if callable(tau):
        raise ValueError(_NO_SCHEDULE.format("tau"))
    arguments.check_number("tau", tau, 0.0, 1.0)
    return _threshold(tau, statistic, window)


def tail(
    num_head: int, class_counts: Sequence[float] | None = None, head_scale: float = 1.0
) -> Split:
    """Pull in the `num_head` most frequent classes and push out the others (long tail).

    Args:
      num_head: Number of head classes, at least 0.
      class_counts: Number of training examples of each class, `[C]`. By default the examples seen
        so far are counted, and unseen classes have sign 0.
      head_scale: Factor on the spread of head classes, at least 0. LPL's released code takes 0.6 on
        CIFAR-10-LT and 0.2 on CIFAR-100-LT; the paper has none.

    Returns:
      The split. The varied bound grows with `head_scale * f_c / f_1` for head and `f_C / f_c` for
      tail classes, where `f` is the sorted frequency (LPL eq 14). Equally frequent classes are
      ordered by index.

    Raises:
      ValueError: If `num_head` or `head_scale` is negative or a count is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from lpa_jax.core import class_stats
      >>> split = tail(1, class_counts=[10, 40, 20])
      >>> stats, classes = class_stats.init(3), jnp.arange(3)
      >>> split.signs(stats, classes).tolist(), split.spread(stats, classes).tolist()
      ([1.0, -1.0, 1.0], [1.0, 1.0, 0.5])
    """
    arguments.check_count("num_head", num_head, low=0)
    if callable(head_scale):
        raise ValueError(_NO_SCHEDULE.format("head_scale"))
    arguments.check_number("head_scale", head_scale)
    if class_counts is not None:
        membership.counts_of(class_counts)

    def frequency(stats):
        if class_counts is None:
            return stats.frequency
        if len(class_counts) != stats.frequency.shape[0]:
            raise ValueError(
                f"class_counts names {len(class_counts)} classes, but there are "
                f"{stats.frequency.shape[0]}."
            )
        return jnp.asarray(class_counts, jnp.float32)

    def is_head(counts):
        rank = jnp.argsort(jnp.argsort(-counts, stable=True), stable=True)
        return rank < num_head

    def signs(stats, classes):
        counts = frequency(stats)
        sign = jnp.where(is_head(counts), -1.0, 1.0)
        return _of(jnp.where(counts > 0, sign, 0.0), classes)

    def spread(stats, classes):
        counts = frequency(stats)
        seen = counts > 0
        safe = jnp.where(seen, counts, 1.0)
        rarest = jnp.min(jnp.where(seen, counts, jnp.inf))
        head = head_scale * counts / jnp.max(safe)
        ratio = jnp.where(is_head(counts), head, rarest / safe)
        return _of(jnp.where(seen, ratio, 0.0), classes)

    return Split(signs, spread)


def _constant(sign: float) -> Split:
    return Split(
        lambda stats, classes: jnp.full(classes.shape, sign, jnp.float32),
        lambda stats, classes: jnp.zeros(classes.shape, jnp.float32),
    )


def all_positive() -> Split:
    """Push out every class (domain generalization); all have the same bound."""
    return _constant(1.0)


def all_negative() -> Split:
    """Pull in every class; all have the same bound."""
    return _constant(-1.0)


def inverted(split: Split) -> Split:
    """Push out the classes that `split` pulls in and pull in those it pushes out.

    The bound of each class stays. With wrong labels LPG takes the mean threshold so: it dampens the
    classes with the highest loss, whose labels are the least to be trusted.

    Args:
      split: Any split.

    Returns:
      The split with all signs negated.

    Raises:
      ValueError: If `split` is not a `Split`.

    Example:
      >>> import jax.numpy as jnp
      >>> from lpa_jax.core import class_stats
      >>> split = inverted(tail(1, class_counts=[10, 40, 20]))
      >>> split.signs(class_stats.init(3), jnp.arange(3)).tolist()
      [-1.0, 1.0, -1.0]
    """
    if not isinstance(split, Split):
        raise ValueError(f"inverted needs a split, such as mean_threshold(), not {split!r}.")
    return Split(lambda stats, classes: -split.signs(stats, classes), split.spread)
