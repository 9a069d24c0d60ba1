"""Labeled examples, what is required of them, and which are held out."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import math
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Int, Shaped
import numpy as np

from lpa_jax.data import streams
from lpa_jax.data.errors import DataError as DataError
from lpa_jax.data.streamed import Streamed
from lpa_jax.registry import reason


@runtime_checkable
class Source(Protocol):
    """Examples of one split, in any order that stays: an array in memory, or files read on demand.

    Attributes:
      class_names: One name for each class.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return an example: its `"image"`, its `"label"`, and what else a method may need.

        The names of the rest are those that methods know them by, as `"domains"` for `mixstyle`.
        """
        ...

    def fingerprint(self) -> str:
        """Return a digest of the contents: another one where any example is another."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A source whose labels are in memory, and mostly its images.

    Attributes:
      images: What the network takes: pixels, uint8 `[N, H, W, C]`, in memory or read on demand, or
        features, float `[N, ...]`.
      labels: Numbers of classes, int32 `[N]`, or float `[N, C]`.
      class_names: One name for each class.
      extra: What else is known of each example, by name, `[N, ...]`: `{"domains": ...}`.

    Example:
      >>> pixels, labels = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1], np.int32)
      >>> examples = Examples(pixels, labels, ("cat", "dog"), {"domains": np.array([3, 4])})
      >>> image, *others = examples[1].items()
      >>> len(examples), {name: int(value) for name, value in others}
      (2, {'label': 1, 'domains': 4})
    """

    images: Shaped[np.ndarray, "n ..."] | Streamed
    labels: Shaped[np.ndarray, "n ..."]
    class_names: tuple[str, ...] = ()
    extra: Mapping[str, Shaped[np.ndarray, "n ..."]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Return an example as a dictionary."""
        others = {name: array[index] for name, array in self.extra.items()}
        return {"image": self.images[index], "label": self.labels[index], **others}

    def fingerprint(self) -> str:
        """Return a digest of all arrays and the names of the classes."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(json.dumps(self.class_names).encode(), digest_size=16)
        arrays = {"images": self.images, "labels": self.labels, **self.extra}
        for name, array in arrays.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            if isinstance(array, Streamed):
                digest.update(array.fingerprint().encode())
            else:
                digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return digest.hexdigest()

    def take(self, chosen: Int[np.ndarray, "m"] | Bool[np.ndarray, "n"]) -> "Examples":
        """Return the examples that indices or a mask choose, in that order."""
        images = self.images
        return dataclasses.replace(
            self,
            images=images.take(chosen) if isinstance(images, Streamed) else images[chosen],
            labels=self.labels[chosen],
            extra={name: array[chosen] for name, array in self.extra.items()},
        )


def joined(parts: Sequence[Examples]) -> Examples:
    """Return examples one after the other.

    Args:
      parts: At least one. All have the same class names and shapes, and what they know of each
        example; images that are read on demand are of one store.

    Raises:
      DataError: If they differ in one of these.

    Example:
      >>> one = Examples(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]), ("cat", "dog"))
      >>> joined([one, one]).labels
      array([0, 1, 0, 1])
    """
    first = parts[0]
    for told, of in (
        ("class names", lambda one: one.class_names),
        ("shapes and types of images", lambda one: (one.images.shape[1:], one.images.dtype)),
        ("shapes of labels", lambda one: one.labels.shape[1:]),
        ("extra arrays", lambda one: {*one.extra}),
        (
            "stores or parts of images",
            lambda one: (id(getattr(one.images, "store", None)), getattr(one.images, "part", None)),
        ),
    ):
        if any(of(one) != of(first) for one in parts):
            raise DataError(
                f"Examples that differ in their {told} cannot be joined: give all the same."
            )
    streamed = [one.images for one in parts if isinstance(one.images, Streamed)]
    arrays = [one.images for one in parts if not isinstance(one.images, Streamed)]
    return dataclasses.replace(
        first,
        images=dataclasses.replace(
            streamed[0], index=np.concatenate([one.index for one in streamed])
        )
        if streamed
        else np.concatenate(arrays),
        labels=np.concatenate([one.labels for one in parts]),
        extra={name: np.concatenate([one.extra[name] for one in parts]) for name in first.extra},
    )


def in_memory(source: "Source | tuple[Any, Any]", where: str = "The examples") -> Examples:
    """Read a source whole, or take `(images, labels)`; `where` says in an error which they are.

    Raises:
      DataError: If it is no source, its examples differ in shape, or are no numbers.

    Example:
      >>> in_memory((np.zeros((3, 4, 4, 1), np.uint8), [0, 2, 1])).class_names
      ('0', '1', '2')
    """
    extra: Mapping[str, np.ndarray] = {}
    if isinstance(source, Examples):
        images, labels = source.images, np.asarray(source.labels)
        images = images if isinstance(images, Streamed) else np.asarray(images)
        extra = {name: np.asarray(array) for name, array in source.extra.items()}
        names = source.class_names
    elif isinstance(source, tuple) and len(source) == 2:
        names, extra = None, {}
        try:
            images, labels = map(np.asarray, source)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{where}: they are no arrays ({error}): give every example the same shape."
            ) from error
    elif isinstance(source, Source):
        images, labels, extra = _read(where, source)
        names = tuple(map(str, source.class_names))
    else:
        raise DataError(
            f"{where}: {source!r:.100} is no source of examples: give (images, labels), or an "
            "object with len, [i], class_names and fingerprint()."
        )
    if images.dtype == np.uint8 and images.ndim == 3:
        # Gray images, as in files.
        images = images[..., None]
    for name, array in {"images": images, **extra}.items():
        if not isinstance(array, Streamed):
            _check_numbers(where, name, array)
        if array.shape[:1] != images.shape[:1]:
            raise DataError(
                f"{where}: there are {len(images)} images, but {name} has the shape "
                f"{array.shape}: give each image one."
            )
    if images.ndim < 2 or not math.prod(images.shape):
        raise DataError(
            f"{where}: the images have the shape {images.shape}: give at least one, [N, ...]."
        )
    if labels.dtype.kind == "f" and labels.ndim > 1:
        _check_numbers(where, "labels", labels)
        found = Examples(images, labels.astype(np.float32), names or _numbers(labels.shape[-1]))
        if labels.shape != (len(images), len(found.class_names)):
            raise DataError(
                f"{where}: float labels must have the shape ({len(images)}, "
                f"{len(found.class_names)}), a number for each class, not {labels.shape}."
            )
    else:
        labels = checked_labels(f"{where}: labels", labels)
        found = checked(where, images, labels, names or _numbers(1 + int(labels.max(initial=-1))))
    return dataclasses.replace(found, extra=extra)


MOST = 2**20
"""Classes that are named by their numbers."""


def _numbers(number: int) -> tuple[str, ...]:
    if number > MOST:
        raise DataError(
            f"There is the label {number - 1}: number the classes from 0 without gaps, as "
            "np.unique(y, return_inverse=True) does."
        )
    return tuple(map(str, range(number)))


def _read(where: str, source: Source) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return images, labels and the other columns of a source."""
    rows = []
    for i in range(len(source)):
        try:
            rows.append(source[i])
        except Exception as error:  # Of any kind: it is the user's own code.
            raise DataError(
                f"{where}: example {i} cannot be read ({reason(error)}): correct that."
            ) from error
    if not rows:
        raise DataError(f"{where}: it is empty; give at least one image.")
    try:
        columns = {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
        return columns.pop("image"), columns.pop("label"), columns
    except (IndexError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{where}: the examples cannot be stacked ({error}): each must have an "
            "'image' and a 'label' of one shape."
        ) from error


def _check_numbers(where: str, name: str, array: Any) -> None:
    """Raise `DataError` unless an array is of finite numbers that networks take."""
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: {name} has dtype {array.dtype}: give numbers.")
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        raise DataError(
            f"{where}: {name} of example {np.argwhere(~finite)[0, 0]} is not finite: correct "
            "it, or leave the example out."
        )


def checked_labels(where: str, array: np.ndarray) -> Int[np.ndarray, "n"]:
    """Return labels as int64; a `DataError` that begins with `where` if they are no labels."""
    if array.dtype.kind not in "iu":
        names = "as in names, y = np.unique(y, return_inverse=True)"
        remedy = "y.astype(np.int32)" if array.dtype.kind in "fb" else names
        raise DataError(f"{where} has dtype {array.dtype}: save integers, {remedy}.")
    if array.ndim != 1:
        raise DataError(
            f"{where} has shape {array.shape}, not [N]: save y.reshape(-1), or y.argmax(axis=1) "
            "if it is one-hot."
        )
    if array.dtype == np.uint64:
        # Those that int64 does not hold would come out as negative.
        array = np.minimum(array, np.uint64(2**63 - 1))
    return array.astype(np.int64)


def checked(
    where: str,
    images: Shaped[np.ndarray, "n ..."] | Streamed,
    labels: Int[np.ndarray, "m"],
    class_names: tuple[str, ...],
) -> Examples:
    """Return images and numbers of classes as examples; `where` says in an error which they are.

    Raises:
      DataError: If there are none, their numbers do not fit, or a label is outside the classes.
    """
    if len(images) != len(labels):
        raise DataError(
            f"{where}: there are {len(images)} images but {len(labels)} labels; give each image "
            "one label."
        )
    if not math.prod(images.shape):
        raise DataError(f"{where}: it is empty; give at least one image.")
    num_classes = len(class_names)
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        from_1 = labels.min() == 1 and labels.max() == num_classes
        looks = " (the labels look as if they were numbered from 1: subtract 1)" if from_1 else ""
        raise DataError(
            f"{where}: the label {outside[0]} is outside the classes 0 to {num_classes - 1}"
            f"{looks}; remove its examples or number the classes of all splits from 0 without gaps."
        )
    return Examples(images, labels.astype(np.int32), class_names)


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
    if not fraction:
        return np.zeros(len(labels), bool)
    found, counts = np.unique(labels, return_counts=True)
    for label, number in zip(found.tolist(), counts.tolist(), strict=True):
        if _share(fraction, number) == number:
            raise DataError(
                f"Holding out a share of {fraction} would leave no training example of class "
                f"{class_names[label]!r}, which has {number}: give more examples, or a "
                "smaller validation_fraction (0 holds out none)."
            )
    return share_of_each(streams.stream("held_out", seed), labels, fraction)


def share_of_each(
    rng: np.random.Generator, strata: Int[np.ndarray, "n"], fraction: float
) -> Bool[np.ndarray, "n"]:
    """Draw a share of each stratum, rounded to at least one example, but never all of them.

    Example:
      >>> strata = np.array([0] * 10 + [1] * 2 + [2])
      >>> chosen = share_of_each(streams.stream("test_split", 0), strata, 0.2)
      >>> np.bincount(strata[chosen], minlength=3).tolist()
      [2, 1, 0]
    """
    chosen = np.zeros(len(strata), bool)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        count = min(_share(fraction, len(members)), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    return chosen


def _share(fraction: float, number: int) -> int:
    return max(1, round(fraction * number))
