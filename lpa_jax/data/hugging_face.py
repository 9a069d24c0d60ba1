"""Image sets of Hugging Face's `datasets` that are saved on disk."""

from collections.abc import Mapping
import hashlib
import os
from typing import Any

import numpy as np

from lpa_jax.data import decoding
from lpa_jax.data.errors import DataError
from lpa_jax.data.folder import SIZE, split_by_class
from lpa_jax.data.source import checked, Examples
from lpa_jax.data.streamed import Streamed


class Rows:
    """Encoded images of a split, in a column of a table."""

    def __init__(self, path: str, split: str | None, column: str) -> None:
        """Take the folder, the split, None where there are none, and the column of images."""
        self.path, self.split, self.column = path, split, column
        self._open()

    def _open(self) -> None:
        import datasets  # pyright: ignore[reportMissingImports]

        found = datasets.load_from_disk(self.path)
        table: Any = found if self.split is None else found[self.split]
        # As rows of Arrow, whose images are not decoded.
        self.table = table.with_format("arrow", columns=[self.column])

    def __getstate__(self) -> dict[str, Any]:
        """Return what is sent to another process: where the table is, but not the table."""
        return {name: value for name, value in self.__dict__.items() if name != "table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the table again."""
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.table)

    def image(self, index: int, /) -> bytes:
        """Return an image as it is stored, in the table or in a file that it names."""
        image = self.table[index].column(self.column)[0].as_py()
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()

    def name(self, index: int, /) -> str:
        """Return what an error calls an image."""
        return f"example {index} of {self.split or 'all'} in {self.path}"

    def fingerprint(self) -> str:
        """Return a digest of the table's own fingerprint."""
        about = f"{self.table._fingerprint} {self.column} {len(self.table)}"
        return hashlib.blake2b(about.encode(), digest_size=16).hexdigest()


def read(path: str, image_size: int | None, part: str, seed: int) -> dict[str, Examples]:
    """Return the examples of a set that `save_to_disk` wrote; nothing is downloaded here.

    Args:
      path: Its folder, with one column of images and one of classes.
      image_size: Side that images are scaled to; None for 224.
      part: The part of an image that evaluation sees, a name in `decoding.PARTS`.
      seed: Draws the test split where there is none.

    Returns:
      Its splits. Of a set with one split a fifth of each class becomes the test split.

    Raises:
      DataError: If the package is missing, the folder cannot be read, or it is no set of images
        with one class each.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"'hf:{path}' needs the package datasets ({error}): pip install 'lpa_jax[hf]'."
        ) from error
    if not os.path.isdir(os.path.expanduser(path)):
        raise DataError(f"There is no folder {path}: write it with Dataset.save_to_disk.")
    try:
        found = datasets.load_from_disk(os.path.expanduser(path))
    except Exception as error:  # Of any kind: pyarrow's and the package's own.
        raise DataError(
            f"{path} cannot be read ({error}): write it again with Dataset.save_to_disk."
        ) from error
    tables = found if isinstance(found, Mapping) else {None: found}
    splits = {
        split: _examples(datasets, path, split, table, image_size, part)
        for split, table in tables.items()
    }
    if len(splits) == 1:
        (whole,) = splits.values()
        return split_by_class(whole, whole.labels, seed)
    return {str(split): examples for split, examples in splits.items()}


def _examples(
    datasets: Any, path: str, split: str | None, table: Any, image_size: int | None, part: str
) -> Examples:
    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    labels = [
        name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)
    ]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{path} has {len(images)} columns of images and {len(labels)} of classes: give it one "
            "of each, with cast_column and remove_columns."
        )
    numbers = np.asarray(table[labels[0]], np.int64)
    class_names = tuple(table.features[labels[0]].names)
    size = SIZE if image_size is None else image_size
    store = Rows(os.path.realpath(os.path.expanduser(path)), split, images[0])
    streamed = Streamed(store, np.arange(len(numbers)), size, decoding.PARTS[part])
    return checked(f"The split {split or 'all'} of {path}", streamed, numbers, class_names)
