"""Long-tailed training sets: how many examples each class keeps, which, and groups of classes."""

from collections.abc import Sequence

from jaxtyping import Int, Int64
import numpy as np

from lpa_jax.data import streams
from lpa_jax.data.source import DataError

PROFILES = ("exponential", "step")
MANY, FEW = 100, 20
"""Medium-shot classes have this many training examples at most, and at least."""


def long_tail_counts(
    available: Sequence[int], ratio: float, kind: str = "exponential"
) -> Int64[np.ndarray, "classes"]:
    r"""Return how many examples each class keeps.

    .. math::
        n_c = \lfloor n_{\max} \, \rho^{-c/(C-1)} \rfloor

    for `"exponential"`; for `"step"` the first half of the classes keeps `n_max` and the others
    `n_max / ratio`. Classes are taken in the order of their numbers, so that class 0 is the head.

    Args:
      available: Number of examples that each class has, `[C]`.
      ratio: Of the largest class to the smallest, at least 1.
      kind: `"exponential"` or `"step"`.

    Returns:
      Numbers of examples, int64 `[C]`. *Ours*, for classes that differ in size: `n_max` is the
      largest number that asks no class for more examples than it has, before rounding down.

    Raises:
      DataError: If an argument is outside its range, or a class would have no example.

    Example:
      >>> long_tail_counts([5000] * 10, ratio=100).tolist()
      [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
      >>> long_tail_counts([5000] * 4, ratio=10, kind="step").tolist()
      [5000, 5000, 500, 500]

    References:
      Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019,
      arXiv:1901.05555. Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware
      Margin Loss, NeurIPS 2019, arXiv:1906.07413, section 4.1.
    """
    if kind not in PROFILES:
        raise DataError(f"There is no imbalance {kind!r}: give {' or '.join(PROFILES)}.")
    if not 1 <= ratio < np.inf:
        raise DataError(f"The ratio of the imbalance is {ratio}: give a number from 1.")
    num_classes = len(available)
    if kind == "exponential":
        shares = float(ratio) ** -np.linspace(0.0, 1.0, num_classes)
    else:
        shares = np.where(np.arange(num_classes) < num_classes // 2, 1.0, 1.0 / ratio)
    if 0 in available:
        raise DataError(
            f"Class {list(available).index(0)} has no example, so that no long tail can be made: "
            "give it examples, or leave it out and number the classes anew."
        )
    # Powers are rounded differently on different machines; 45 must not be 44 on one of them.
    rounding = 1e-6
    largest = np.min(np.floor(np.asarray(available) / shares + rounding))
    counts = np.floor(largest * shares + rounding).astype(np.int64)
    if not counts.all():
        raise DataError(
            f"A ratio of {ratio} leaves class {int(counts.argmin())} without a training example, "
            f"the largest class having {int(largest)}: give a smaller ratio, or more examples."
        )
    return counts


def long_tail_subset(
    labels: Int[np.ndarray, "n"], num_classes: int, ratio: float, kind: str, seed: int
) -> Int64[np.ndarray, "kept"]:
    """Draw the examples that a long-tailed training set keeps.

    The draw is a function of labels and seed alone, the same on every machine. With one seed, the
    examples that a class keeps at one ratio are among those it keeps at a smaller one.

    Args:
      labels: Labels in [0, num_classes).
      num_classes: At least 1.
      ratio: See `long_tail_counts`, as for its errors.
      kind: Likewise.
      seed: At least 0.

    Returns:
      Indices of the examples kept, ascending.

    Example:
      >>> labels = np.array([0, 1, 0, 1, 0, 1, 0, 1])
      >>> kept = long_tail_subset(labels, num_classes=2, ratio=4, kind="exponential", seed=0)
      >>> np.bincount(labels[kept]).tolist()
      [4, 1]
    """
    counts = long_tail_counts(np.bincount(labels, minlength=num_classes).tolist(), ratio, kind)
    rng = streams.stream("long_tail", seed)
    members = (rng.permutation(np.flatnonzero(labels == c)) for c in range(num_classes))
    kept = [drawn[:count] for drawn, count in zip(members, counts, strict=True)]
    return np.sort(np.concatenate(kept))


def class_groups(class_counts: Sequence[int]) -> dict[str, list[int]]:
    """Return groups of classes whose accuracy is told apart on long-tailed data.

    Args:
      class_counts: Number of training examples of each class, `[C]`.

    Returns:
      The classes of each group that has any: `"many"` with more than 100 training examples,
      `"medium"` with 20 to 100 and `"few"` with fewer; and the thirds `"head"`, `"middle"` and
      `"tail"` by frequency, of which the first are larger where three does not divide the
      number of classes. Equally frequent classes are ordered by number; classes without training
      examples are in no group.

    Example:
      >>> class_groups([5000, 300, 83, 19])["medium"]
      [2]
      >>> class_groups([5000, 300, 83, 19])["head"]
      [0, 1]

    References:
      Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019, arXiv:1904.05160
      (the groups by number of examples).
    """
    counts = np.asarray(class_counts)
    by_frequency = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    thirds = np.array_split(by_frequency, 3)
    groups = {
        "many": np.flatnonzero(counts > MANY),
        "medium": np.flatnonzero((counts >= FEW) & (counts <= MANY)),
        "few": np.flatnonzero((counts > 0) & (counts < FEW)),
        **dict(zip(("head", "middle", "tail"), thirds, strict=True)),
    }
    return {name: sorted(group.tolist()) for name, group in groups.items() if len(group)}
