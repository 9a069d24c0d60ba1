"""A data set: named splits, the names of the classes, and what networks are normalized by."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import re
from typing import Any

from jaxtyping import Int, Shaped
import numpy as np

from lpa_jax.data.source import DataError, Examples, held_out, in_memory, Source
from lpa_jax.data.streamed import Streamed


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Named splits of examples.

    Attributes:
      name: What was asked for.
      splits: Examples by name: `"train"` to learn from, `"validation"`, if there is any, to choose
        by, `"test"` that no choice may depend on; and others, which are evaluated as well.
      class_names: One name for each class.
      mean: Mean of the training pixels in [0, 1] for each channel.
      std: Their standard deviation, 1 for a constant channel.
      source_labels: Labels of all training examples of the source, `[N]`, as they came: those of
        `"train"` and `"validation"` before anything was left out or changed.
      index: Which of these are in the splits `"train"` and `"validation"`, int64 `[n]`.
    """

    name: str
    splits: Mapping[str, Examples]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source_labels: Shaped[np.ndarray, "source ..."]
    index: Mapping[str, Int[np.ndarray, "m"]]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def train(self) -> Examples:
        """The training examples."""
        return self.splits["train"]

    def fingerprint(self) -> str:
        """Return a digest of all that training and evaluation see.

        Example:
          >>> from lpa_jax import data
          >>> data.load("digits").fingerprint() == data.load("digits").fingerprint()
          True
        """
        # Mean and deviation are of the whole source, of which `train` may be a part.
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.class_names, self.mean, self.std]).encode())
        for name, examples in sorted(self.splits.items()):
            digest.update(f"{name} {examples.fingerprint()}".encode())
        return digest.hexdigest()

    def replace(self, **changes: Any) -> "Dataset":
        """Return a copy with other attributes."""
        return dataclasses.replace(self, **changes)


def make_dataset(
    name: str,
    splits: "Mapping[str, Source | tuple[Any, Any]]",
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Make a data set of sources or arrays by split.

    Args:
      name: Of the set.
      splits: A source, or `(images, labels)`, for `"train"`, for `"test"` or other names to
        evaluate, and for `"validation"`, unless it is to be held out of the training examples.
      validation_fraction: As in `load`.
      seed: As in `load`.

    Raises:
      DataError: If there is no training split, the splits differ in their classes or shapes, or an
        argument is outside its range.

    Example:
      >>> images, labels = np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4
      >>> made = make_dataset("mine", {"train": (images, labels), "test": (images, labels)})
      >>> {split: len(examples) for split, examples in made.splits.items()}
      {'train': 36, 'validation': 4, 'test': 40}
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}: give 0 up to less than 1.")
    if not isinstance(splits, Mapping) or "train" not in splits or len(splits) < 2:
        raise DataError(
            f"The data set {name!r} must give sources by the names of its splits, 'train' and "
            f"'test' at least, not {splits!r:.100}."
        )
    plain = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)
    if odd := [split for split in splits if not plain.fullmatch(str(split))]:
        raise DataError(
            f"{name!r} has the split {odd[0]!r}: name splits by letters, digits, _, - and /."
        )
    found = {
        str(split): in_memory(source, f"The split {split!r}") for split, source in splits.items()
    }
    train = found["train"]
    for split, examples in found.items():
        for told, of in (
            ("images of shape", lambda one: one.images.shape[1:]),
            (
                "type of images",
                lambda one: "uint8" if one.images.dtype == np.uint8 else "float",
            ),
            ("labels of shape", lambda one: one.labels.shape[1:]),
        ):
            if of(examples) != of(train):
                raise DataError(
                    f"The splits 'train' and {split!r} of {name!r} differ in their {told} "
                    f"({of(train)} and {of(examples)}): give both the same."
                )
    class_names = max((examples.class_names for examples in found.values()), key=len)
    if any(examples.class_names != class_names[: len(examples.class_names)]
           for examples in found.values()):  # fmt: skip
        raise DataError(f"The splits of {name!r} differ in their class names: give all the same.")
    index = {"train": np.arange(len(train))}
    if validation_fraction and "validation" not in found:
        # What may be of several classes is drawn from as a whole.
        strata = train.labels if train.labels.ndim == 1 else np.zeros(len(train), np.int32)
        held = held_out(strata, validation_fraction, seed, class_names)
        index = {"train": np.flatnonzero(~held), "validation": np.flatnonzero(held)}
        others = {split: examples for split, examples in found.items() if split != "train"}
        found = {split: train.take(chosen) for split, chosen in index.items()} | others
    mean, std = pixel_statistics(found["train"].images)
    return Dataset(name, found, class_names, mean, std, train.labels, index)


def cached(dataset: Dataset) -> Dataset:
    """Return a data set whose images are in memory, read whole where they were in files.

    Raises:
      DataError: If some cannot be read; it names them and tells how many.
    """

    def read(examples):
        images = examples.images
        whole = images[:] if isinstance(images, Streamed) else images
        return dataclasses.replace(examples, images=whole)

    return dataset.replace(
        splits={split: read(examples) for split, examples in dataset.splits.items()}
    )


MEASURED = 1000
"""Images that stay in files of which mean and deviation are measured, at most."""


def pixel_statistics(
    images: Shaped[np.ndarray, "n ..."] | Streamed,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of the last axis, of pixels in units of 255.

    *Ours*: of images that stay in files, those of a thousand that are evenly spaced among them.
    """
    if isinstance(images, Streamed):
        number = min(MEASURED, len(images))
        images = images[np.linspace(0, len(images) - 1, number).astype(int)]
    if images.dtype != np.uint8:
        flat = images.reshape(-1, images.shape[-1]).astype(np.float64)
        mean, std = flat.mean(axis=0), flat.std(axis=0)
    else:
        flat = images.reshape(-1, images.shape[-1])
        mean = flat.mean(axis=0, dtype=np.float64) / 255
        # Exact in integers, and without a float64 copy of all pixels as np.std makes.
        squares = np.einsum("nc,nc->c", flat, flat, dtype=np.int64)
        std = np.sqrt(np.maximum(squares / len(flat) / 255**2 - mean**2, 0))
    # A channel that is the same everywhere, opacity for instance, is left as it is.
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())
