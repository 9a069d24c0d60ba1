"""Images that were decoded once: arrays on disk, of which only what is asked for is read."""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from lpa_jax.data import decoding
from lpa_jax.data.dataset import Dataset
from lpa_jax.data.errors import DataError
from lpa_jax.data.source import checked, Examples
from lpa_jax.data.streamed import Streamed, unreadable

ABOUT = "pack.json"
"""The file that tells what a folder holds."""
CHUNK = 256
"""Images that are decoded at once."""


class Pixels:
    """Decoded images in a file of NumPy's."""

    def __init__(self, path: str, fingerprint: str) -> None:
        """Take the file, and the fingerprint that was recorded with it."""
        self.path, self._recorded = path, fingerprint
        self._open()

    def _open(self) -> None:
        try:
            self.pixels = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} is damaged ({error}): pack the set again.") from error

    def __getstate__(self) -> dict[str, str]:
        """Return what is sent to another process: where the pixels are, but none of them."""
        return {"path": self.path, "_recorded": self._recorded}

    def __setstate__(self, state: dict[str, str]) -> None:
        """Open the file again."""
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pixels)

    def image(self, index: int, /) -> Any:
        """Return an image."""
        from PIL import Image

        pixels = self.pixels[index]
        return Image.fromarray(np.asarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))

    def name(self, index: int, /) -> str:
        """Return what an error calls an image."""
        return f"image {index} of {self.path}"

    def fingerprint(self) -> str:
        """Return the fingerprint of what was packed."""
        return self._recorded


def write(dataset: Dataset, directory: pathlib.Path, finished: Callable[[int], None]) -> None:
    """Decode the images of all splits and write them, whole or not at all.

    Args:
      dataset: A set as `load` returns it, without a validation set that was held out.
      directory: What to make; it must not be there.
      finished: Called with the number of images that are written.

    Raises:
      DataError: If the directory is there, or images cannot be read; it names them and tells how
        many. Nothing is kept.
      OSError: If it cannot be written.
    """
    if directory.exists():
        raise DataError(f"{directory} is there already: give another directory, or remove it.")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        about: dict[str, Any] = {"class_names": dataset.class_names, "splits": {}}
        bad: list[str] = []
        for split, examples in dataset.splits.items():
            about["splits"][split] = _write_split(partial / split, examples, finished, bad)
        if bad:
            raise DataError(unreadable(bad, sum(map(len, dataset.splits.values()))))
        (partial / ABOUT).write_text(json.dumps(about))
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_split(
    directory: pathlib.Path, examples: Examples, finished: Callable[[int], None], bad: list[str]
) -> dict[str, Any]:
    directory.mkdir(parents=True)
    images = examples.images
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.dtype != np.uint8:
        raise DataError(
            f"Square uint8 images are packed, [N, S, S, C], not {images.dtype} "
            f"{[*images.shape]}: give files of images, or use the set as it is."
        )
    file = np.lib.format.open_memmap(
        directory / "images.npy", "w+", dtype=np.uint8, shape=images.shape
    )
    for first in range(0, len(images), CHUNK):
        rows = np.arange(first, min(first + CHUNK, len(images)))
        if isinstance(images, Streamed):
            bad += images.read_into(file[first : first + len(rows)], rows)
        else:
            file[rows] = images[rows]
        finished(len(rows))
    file.flush()
    np.save(directory / "labels.npy", examples.labels)
    for name, array in examples.extra.items():
        np.save(directory / f"extra.{name}.npy", array)
    return {"fingerprint": examples.fingerprint(), "extra": list(examples.extra)}


def read(path: str, image_size: int | None, part: str) -> dict[str, Examples]:
    """Return the examples of a folder that `lpa-jax pack` wrote.

    Args:
      path: The folder; `~` is the home directory.
      image_size: Side that images are scaled to; None to leave them as they were packed.
      part: The part of an image that evaluation sees, a name in `decoding.PARTS`.

    Raises:
      DataError: If it is no such folder, or damaged.
    """
    root = pathlib.Path(path).expanduser()
    try:
        about = json.loads((root / ABOUT).read_bytes())
        names = tuple(map(str, about["class_names"]))
        splits = {str(split): dict(entry) for split, entry in about["splits"].items()}
        return {
            split: _examples(root / split, names, entry, image_size, part)
            for split, entry in splits.items()
        }
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no folder that lpa-jax pack wrote, or it is damaged ({error}): pack the "
            "set again."
        ) from error


def _examples(
    folder: pathlib.Path,
    names: tuple[str, ...],
    about: dict[str, Any],
    image_size: int | None,
    part: str,
) -> Examples:
    store = Pixels(os.fspath(folder.resolve() / "images.npy"), str(about["fingerprint"]))
    side, channels = store.pixels.shape[2:]
    size = side if image_size is None else image_size
    images = Streamed(store, np.arange(len(store)), size, decoding.PARTS[part], channels)
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    extra = {
        str(name): np.load(folder / f"extra.{name}.npy", allow_pickle=False)
        for name in about["extra"]
    }
    found = checked(str(folder), images, labels.astype(np.int64), names)
    return dataclasses.replace(found, extra=extra)
