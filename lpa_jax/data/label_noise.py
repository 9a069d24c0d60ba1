"""Wrong labels: drawn at random, or those that people gave.

Each function makes new labels of the original ones, so that no label is changed twice.
"""

from collections.abc import Sequence

from jaxtyping import Bool, Int, Int32
import numpy as np

from lpa_jax.data import npz, streams
from lpa_jax.data.source import checked_labels, DataError

CIFAR10_MAP = {
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}


def symmetric(
    labels: Int[np.ndarray, "n"], rate: float, num_classes: int, seed: int, *, inclusive: bool
) -> Int32[np.ndarray, "n"]:
    """Replace a share of the labels of each class by labels drawn uniformly.

    Args:
      labels: Original labels in [0, num_classes).
      rate: Share of each class whose labels are drawn anew, in [0, 1], rounded to whole examples.
      num_classes: At least 2.
      seed: At least 0.
      inclusive: Whether to draw among all C classes, the original one too, so that only
        `rate * (C - 1) / C` of the labels are wrong; or among the other `C - 1` classes, so that
        `rate` of them are. Publications differ in this.

    Returns:
      New labels, int32 `[N]`.

    Raises:
      DataError: If `rate` or `num_classes` is outside its range.

    Example:
      >>> labels = np.zeros(10, np.int32)
      >>> int((symmetric(labels, 0.4, num_classes=10, seed=0, inclusive=False) != 0).sum())
      4
    """
    if num_classes < 2:
        raise DataError("Label noise needs at least 2 classes: give a set that has them.")
    rng, chosen = _choose(labels, rate, seed)
    first = 0 if inclusive else 1
    shift = rng.integers(first, num_classes, size=int(chosen.sum()))
    noisy = labels.astype(np.int32)
    noisy[chosen] = (noisy[chosen] + shift) % num_classes
    return noisy


def asymmetric(
    labels: Int[np.ndarray, "n"], rate: float, class_names: Sequence[str], seed: int
) -> Int32[np.ndarray, "n"]:
    """Replace a share of the labels of each mapped class by that of a class it is taken for.

    On CIFAR-10, which is known by the names of its classes, the published map: truck to
    automobile, bird to airplane, deer to horse, cat to dog and dog to cat; the other five classes
    keep their labels. On every other set, CIFAR-100 too, each class maps to the next and the last
    to the first. (*Ours* for CIFAR-100, where publications take the next class of the same
    superclass: sets do not carry their superclasses.)

    Args:
      labels: Original labels, numbers of the classes named.
      rate: Share of each mapped class whose labels change, in [0, 1], rounded to whole examples.
      class_names: One name for each class.
      seed: At least 0.

    Returns:
      New labels, int32 `[N]`.

    Raises:
      DataError: If `rate` is outside its range.

    Example:
      >>> asymmetric(np.array([0, 1, 2]), 1.0, ("x", "y", "z"), seed=0)
      array([1, 2, 0], dtype=int32)

    References:
      Patrini et al., Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach,
      CVPR 2017, arXiv:1609.03683.
    """
    names = list(class_names)
    target = (np.arange(len(names), dtype=np.int32) + 1) % len(names)
    if set(CIFAR10_MAP) | set(CIFAR10_MAP.values()) <= set(names):
        target = np.array([names.index(CIFAR10_MAP.get(name, name)) for name in names], np.int32)
    _, chosen = _choose(labels, rate, seed)
    return np.where(chosen, target[labels], labels).astype(np.int32)


def human(
    path: str, key: str, labels: Int[np.ndarray, "n"], num_classes: int
) -> Int32[np.ndarray, "n"]:
    """Read labels that people gave, such as CIFAR-10N's.

    Args:
      path: A file that `np.savez` wrote, with integer labels `[N]` in the order of the source's
        training examples; pickled objects are refused. Where the file also holds `clean_label`,
        these must be the original labels: another order of the examples would go unnoticed.
      key: Name of the array.
      labels: The original labels, of all training examples of the source.
      num_classes: At least 1.

    Returns:
      New labels, int32 `[N]`.

    Raises:
      DataError: If the file cannot be read, or the labels do not fit.

    References:
      Wei et al., Learning with Noisy Labels Revisited: A Study Using Real-World Human Annotations,
      ICLR 2022, arXiv:2110.12088.
    """
    remedy = "give the name of one of them as noise.key"
    arrays = npz.read_arrays(path, (key,), ("clean_label",), remedy)
    found = {name: checked_labels(f"{name} in {path}", array) for name, array in arrays.items()}
    for name, array in found.items():
        if len(array) != len(labels):
            raise DataError(
                f"{name} in {path} has {len(array)} labels, but the set has {len(labels)} training "
                "examples: give one label for each, those to be held out too."
            )
    differing = int((found.get("clean_label", labels) != labels).sum())
    if differing:
        raise DataError(
            f"clean_label in {path} differs from the set's own labels in {differing} of "
            f"{len(labels)}: save its arrays in the order of this set's training examples."
        )
    noisy = found[key]
    outside = noisy[(noisy < 0) | (noisy >= num_classes)]
    if outside.size:
        raise DataError(
            f"{key} in {path} has the label {outside[0]}, outside the classes 0 to "
            f"{num_classes - 1}: number its classes as the set does."
        )
    return noisy.astype(np.int32)


def _choose(
    labels: Int[np.ndarray, "n"], rate: float, seed: int
) -> tuple[np.random.Generator, Bool[np.ndarray, "n"]]:
    if not 0 <= rate <= 1:
        raise DataError(f"The rate of the label noise is {rate}: give 0 to 1.")
    rng = streams.stream("label_noise", seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(rate * len(members))]] = True
    return rng, chosen
