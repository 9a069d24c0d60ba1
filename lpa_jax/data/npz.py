"""Examples in one file that `np.savez` wrote."""

from collections.abc import Sequence
import os
import zipfile
import zlib

import numpy as np

from lpa_jax.data.source import checked, checked_labels, DataError, Examples, missing_classes

KEYS = ("x_train", "y_train", "x_test", "y_test")
# What numpy and zipfile raise on damaged files; RuntimeError: bits that claim encryption,
# MemoryError: shapes that claim more than the file has.
DAMAGE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, MemoryError)


def read(path: str) -> dict[str, Examples]:
    """Return the examples in a file.

    Args:
      path: A file with the arrays `x_train` and `x_test`, uint8 `[N, H, W, C]` or `[N, H, W]`,
        `y_train` and `y_test`, integer `[N]`, and optionally `class_names`, strings `[classes]`;
        without it the classes are 0 to the largest label in `y_train`, which has all of them.

    Raises:
      DataError: If the file is missing, damaged, or holds anything else.
    """
    arrays = read_arrays(path, KEYS, ("class_names",), "save all four keys")
    x_train, x_test = (_images(f"{key} in {path}", arrays[key]) for key in ("x_train", "x_test"))
    y_train, y_test = (
        checked_labels(f"{key} in {path}", arrays[key]) for key in ("y_train", "y_test")
    )
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"x_train in {path} holds images of shape {x_train.shape[1:]}, but x_test of shape "
            f"{x_test.shape[1:]}: save both in one shape."
        )
    class_names = _class_names(path, arrays.get("class_names"), y_train)
    train = checked(f"x_train and y_train in {path}", x_train, y_train, class_names)
    test = checked(f"x_test and y_test in {path}", x_test, y_test, class_names)
    # Names say that there is such a class; a number that is left out says that the count is wrong.
    absent = missing_classes(range(len(class_names)), y_train, class_names)
    if absent and "class_names" not in arrays:
        remedy = "number the classes of all splits from 0 without gaps"
        if len(np.unique(y_train)) == y_train.max() and y_train.min() == 1:
            remedy = (
                "the labels look as if they were numbered from 1, so subtract 1 from y_train and "
                "y_test"
            )
        raise DataError(
            f"y_train in {path} has no example of {absent}: {remedy}, or save class_names for all "
            "of them."
        )
    return {"train": train, "test": test}


def read_arrays(
    path: str, keys: Sequence[str], optional: Sequence[str], remedy: str
) -> dict[str, np.ndarray]:
    """Return arrays of a file; pickled objects are refused, since reading them can run code.

    Args:
      path: The file; `~` is the home directory.
      keys: Arrays that must be there.
      optional: Arrays that may be there; all others are left unread.
      remedy: What to do where one of `keys` is missing, for the error.

    Raises:
      DataError: If the file is missing, damaged, or lacks one of `keys`.
    """
    path = os.path.expanduser(path)
    # No name of a file has a null in it, which isfile says in Python 3.13 only.
    if "\0" in path or not os.path.isfile(path):
        arguments = ", ".join(f"{key}=..." for key in keys)
        raise DataError(f"There is no file {path}: write it with np.savez(path, {arguments}).")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive, or its end is missing")
        # Opened here: numpy leaves the file open where zipfile refuses it.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive.files]
            wanted = [key for key in (*keys, *optional) if key in archive.files]
            arrays = {key: np.asarray(archive[key]) for key in wanted}
            found = ", ".join(archive.files) or "none"
    except DAMAGE as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"{path} holds arrays of Python objects, which are refused because reading them "
                "can run code: save uint8 images, integer labels and class names as strings."
            ) from error
        raise DataError(
            f"{path} is truncated, corrupted or no npz file ({error}): write it again with "
            "np.savez."
        ) from error
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)} (it has {found}): {remedy}.")
    return arrays


def _images(where: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        remedy = "x.astype(np.uint8) if the pixels are 0 to 255"
        if array.dtype.kind == "f":
            remedy = "np.round(255 * x).astype(np.uint8) if the pixels are 0 to 1, " + remedy
        raise DataError(f"{where} has dtype {array.dtype}, not uint8: save {remedy}.")
    if array.ndim not in (3, 4):
        raise DataError(
            f"{where} has shape {array.shape}: reshape it to [N, H, W, C] or [N, H, W]."
        )
    if array.ndim == 3:
        return array[..., None]
    channels = (1, 3, 4)
    if array.shape[1] in channels and array.shape[3] not in channels:
        raise DataError(
            f"{where} has shape {array.shape}, which looks like [N, C, H, W], not [N, H, W, C]: "
            "save np.transpose(x, (0, 2, 3, 1))."
        )
    return array


def _class_names(path: str, names: np.ndarray | None, labels: np.ndarray) -> tuple[str, ...]:
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1:
            raise DataError(f"class_names in {path} is no list of strings: save np.array([...]).")
        return tuple(names.tolist())
    num_classes = 1 + int(labels.max(initial=-1))
    # Such labels are no numbers of classes, and to name each number in between could take forever.
    if num_classes > len(labels):
        raise DataError(
            f"y_train in {path} has the label {num_classes - 1} among {len(labels)} examples: "
            "number the classes from 0 without gaps, or save class_names for all of them."
        )
    return tuple(str(label) for label in range(num_classes))
