"""Labeled images, what is required of them, and which are held out."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool, Int, Int32, UInt8
import numpy as np

from lpa_jax.data import streams


class DataError(ValueError):
    """Examples that cannot be read or used; the message names the remedy."""


class Examples(NamedTuple):
    """Images and their labels.

    Attributes:
      images: Pixels, uint8 `[N, H, W, C]`.
      labels: Numbers of classes, int32 `[N]`.
    """

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, "n"]


class Source(NamedTuple):
    """What a source of examples holds, before anything is held out of its training examples."""

    train: Examples
    test: Examples
    class_names: tuple[str, ...]


def checked(
    where: str,
    images: UInt8[np.ndarray, "n height width channels"],
    labels: Int[np.ndarray, "m"],
    num_classes: int,
) -> Examples:
    """Return images and labels as examples; `where` says in an error which they are.

    Raises:
      DataError: If there are none, their numbers differ, or a label is outside the classes.
    """
    if len(images) != len(labels):
        raise DataError(
            f"{where}: there are {len(images)} images but {len(labels)} labels; give each image "
            "one label."
        )
    if not images.size:
        raise DataError(f"{where}: it is empty; give at least one image.")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        from_1 = labels.min() == 1 and labels.max() == num_classes
        looks = " (the labels look as if they were numbered from 1: subtract 1)" if from_1 else ""
        raise DataError(
            f"{where}: the label {outside[0]} is outside the classes 0 to {num_classes - 1}"
            f"{looks}; remove its examples or number the classes of all splits from 0 without gaps."
        )
    return Examples(images, labels.astype(np.int32))


def missing_classes(
    classes: Sequence[int] | Int[np.ndarray, "m"],
    labels: Int[np.ndarray, "n"],
    class_names: tuple[str, ...],
) -> str:
    """Return which of some classes no label is of, by number and name; `""` if each is there.

    Example:
      >>> missing_classes(range(4), np.array([1, 3]), ("cat", "dog", "emu", "fox"))
      "classes 0 ('cat'), 2 ('emu')"
    """
    absent = np.setdiff1d(classes, labels).tolist()
    named = ", ".join(f"{label} ({class_names[label]!r})" for label in absent[:3])
    more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
    return f"class{'es' * (len(absent) > 1)} {named}{more}" if absent else ""


def take(examples: Examples, chosen: Int[np.ndarray, "m"] | Bool[np.ndarray, "n"]) -> Examples:
    """Return the examples that indices or a mask choose, in that order."""
    return Examples(examples.images[chosen], examples.labels[chosen])


def held_out(
    labels: Int[np.ndarray, "n"], fraction: float, seed: int, class_names: tuple[str, ...]
) -> Bool[np.ndarray, "n"]:
    """Draw at random which examples are held out, class by class.

    Args:
      labels: Labels of any number of examples.
      fraction: Share of each class to hold out, in [0, 1), rounded to at least one example
        unless it is 0.
      seed: At least 0.
      class_names: Names for an error.

    Returns:
      True for each example that is held out.

    Raises:
      DataError: If a class would have no example left.
    """
    held = np.zeros(len(labels), bool)
    rng = streams.stream("held_out", seed)
    for label in np.unique(labels) if fraction else ():
        members = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(members)))
        if count == len(members):
            raise DataError(
                f"Holding out a share of {fraction} would leave no training example of class "
                f"{class_names[label]!r}, which has {len(members)}: give more examples, or a "
                "smaller validation_fraction (0 holds out none)."
            )
        held[rng.permutation(members)[:count]] = True
    return held
