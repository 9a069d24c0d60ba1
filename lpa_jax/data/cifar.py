"""CIFAR-10 and CIFAR-100 in the binary files that their authors release."""

import pathlib

import numpy as np

from lpa_jax.data.errors import DataError
from lpa_jax.data.source import checked, Examples

PIXELS = 3 * 32 * 32
# By the file that tells which set it is: files of both splits, the file of the names of classes,
# and the bytes before the pixels, of which the last is the label.
SETS = {
    "test_batch.bin": (
        [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], "batches.meta.txt", 1,
    ),
    "test.bin": (["train.bin"], ["test.bin"], "fine_label_names.txt", 2),
}  # fmt: skip


def read(path: str) -> dict[str, Examples]:
    """Return the examples of a folder of CIFAR's "binary version", CIFAR-100 by its fine labels.

    Args:
      path: The folder `cifar-10-batches-bin` or `cifar-100-binary`; `~` is the home directory.

    Returns:
      The splits `train` and `test`, uint8 images `[N, 32, 32, 3]`.

    Raises:
      DataError: If a file is missing or its length is wrong.
    """
    root = pathlib.Path(path).expanduser()
    known = [name for name in SETS if "\0" not in path and (root / name).is_file()]
    if not known:
        raise DataError(
            f"{path} has neither {' nor '.join(SETS)}: unpack cifar-10-binary.tar.gz or "
            "cifar-100-binary.tar.gz and give the folder."
        )
    train, test, names, before = SETS[known[0]]
    class_names = tuple(filter(None, _read(root / names).decode("ascii", "replace").split()))
    return {
        split: _examples(root, files, class_names, before)
        for split, files in (("train", train), ("test", test))
    }


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): unpack the archive again."
        ) from error


def _examples(
    root: pathlib.Path, files: list[str], class_names: tuple[str, ...], before: int
) -> Examples:
    rows = []
    for name in files:
        content = np.frombuffer(_read(root / name), np.uint8)
        if not content.size or content.size % (before + PIXELS):
            raise DataError(
                f"{root / name} has {content.size} bytes, which is no multiple of "
                f"{before + PIXELS}: it is damaged or of another format; unpack the archive again."
            )
        rows.append(content.reshape(-1, before + PIXELS))
    whole = np.concatenate(rows)
    pixels = whole[:, before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = whole[:, before - 1].astype(np.int64)
    return checked(str(root), np.ascontiguousarray(pixels), labels, class_names)
