"""Folders of image files: a folder for each class, within one for each split or domain."""

from collections.abc import Sequence
import hashlib
import os
import pathlib

from absl import logging
import numpy as np

from lpa_jax.data import decoding, streams
from lpa_jax.data.errors import DataError
from lpa_jax.data.source import Examples, share_of_each
from lpa_jax.data.streamed import Streamed

SIZE = 224
"""Side that images are scaled to where none is given."""
TEST_SHARE = 0.2
"""Of each class of a folder without splits."""
SPLITS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
"""Names of the folder of each split."""
DOMAINS = "domains"
"""Name under which methods get the number of the domain of each example."""


class Files:
    """Image files under a folder.

    Their list, with sizes in bytes, is what tells one set from another: it is read at once, and the
    files when they are asked for.
    """

    def __init__(self, root: str, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Take the paths of files below `root`, and their sizes in bytes."""
        self.root = os.fsencode(root)
        # A name of a file may hold any bytes.
        self.names = np.array([os.fsencode(name) for name in names])
        self.sizes = np.array(sizes, np.int64)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.names)

    def path(self, index: int) -> bytes:
        """Return the path of a file."""
        return os.path.join(self.root, bytes(self.names[index]))

    def image(self, index: int, /) -> bytes:
        """Return what a file holds."""
        with open(self.path(index), "rb") as file:
            return file.read()

    def name(self, index: int, /) -> str:
        """Return the path of a file, for an error."""
        return os.fsdecode(self.path(index)).encode(errors="replace").decode()

    def fingerprint(self) -> str:
        """Return a digest of names and sizes, wherever the folder is."""
        digest = hashlib.blake2b(b"\0".join(self.names.tolist()), digest_size=16)
        digest.update(self.sizes)
        return digest.hexdigest()


def read(path: str, image_size: int | None, part: str, seed: int) -> dict[str, Examples]:
    """Return the images in a folder by split.

    Args:
      path: A folder with `train/CLASS/IMAGE` and `val`, `test` or both likewise; or with
        `CLASS/IMAGE` alone, of which a fifth of each class, drawn by `seed`, is the test split.
        `~` is the home directory. Instead of its classes, the folder of a split other than `train`
        may hold its images, with a list beside it, `val.txt` for `val`: in each line the name of a
        file and its class, by name or by number.
      image_size: Side that images are scaled to; None for 224.
      part: The part of an image that evaluation sees, a name in `decoding.PARTS`.
      seed: Draws the test split where there is none.

    Raises:
      DataError: If the folder is missing, a class is empty or not in all splits, or a list is
        wrong.
    """
    root = _folder(path)
    found = {
        split: [name for name in names if (root / name).is_dir()] for split, names in SPLITS.items()
    }
    if twice := [names for names in found.values() if len(names) > 1]:
        raise DataError(
            f"{root} has the folders {' and '.join(twice[0])}, which are one split: keep one."
        )
    names = {split: folders[0] for split, folders in found.items() if folders}
    if "train" not in names:
        classes = _subfolders(root)
        _some(root, classes, "give folders of images, one for each class")
        files = [_images(root, name) for name in classes]
        whole = _examples(root, files, _labels(files), classes, image_size, part)
        return split_by_class(whole, whole.labels, seed)
    if len(names) == 1:
        raise DataError(f"{root} has train, but neither val nor test: add one of them.")
    classes = _subfolders(root / names["train"])
    _some(root / names["train"], classes, "give folders of images, one for each class")
    listed = {}
    for split, name in names.items():
        folder = root / name
        if split != "train" and not _subfolders(folder):
            listed[split] = _listed(folder, root / f"{name}.txt", classes)
            continue
        if (other := _subfolders(folder)) != classes:
            odd = sorted({*other} ^ {*classes})
            lacking, having = (name, names["train"]) if odd[0] in classes else (
                names["train"], name
            )  # fmt: skip
            raise DataError(
                f"{root} has the class {odd[0]!r} in {having}, but not in {lacking}: give all "
                "splits the same folders."
            )
        listed[split] = [_images(folder, name) for name in classes]
    return {
        split: _examples(root / names[split], files, _labels(files), classes, image_size, part)
        for split, files in listed.items()
    }


def domain_names(path: str) -> list[str]:
    """Return the names of the folders of domains, in order.

    Raises:
      DataError: If there are none.
    """
    root = _folder(path)
    domains = _subfolders(root)
    _some(root, domains, "give folders of domains, each with folders of classes")
    return domains


def by_domain(path: str, image_size: int | None, part: str) -> dict[str, Examples]:
    """Return the images of each domain, `DOMAIN/CLASS/IMAGE`, whole, by the name of its folder.

    Domains, classes and images are in the order of their names, which is that of DomainBed.

    Args:
      path: As in `read`, and so are the other arguments.
      image_size: Likewise.
      part: Likewise.

    Raises:
      DataError: If a folder is missing or empty, or the classes of two domains differ.
    """
    root, domains = _folder(path), domain_names(path)
    classes = _subfolders(root / domains[0])
    for domain in domains:
        folders = _subfolders(root / domain)
        _some(root / domain, folders, "give folders of images, one for each class")
        if odd := sorted({*folders} ^ {*classes}):
            raise DataError(
                f"{root} has the class {odd[0]!r} in one of {domains[0]} and {domain} alone: give "
                "all domains the same folders."
            )
    groups = [_images(root, f"{domain}/{name}") for domain in domains for name in classes]
    group = np.repeat(np.arange(len(groups)), [len(files) for files in groups])
    number, labels = np.divmod(group, len(classes))
    # Of one store, so that the domains can be joined.
    whole = _examples(root, groups, labels, classes, image_size, part)
    return {domain: whole.take(number == i) for i, domain in enumerate(domains)}


def split_by_class(whole: Examples, strata: np.ndarray, seed: int) -> dict[str, Examples]:
    """Return `"train"` and `"test"`, a fifth of each stratum and at least one where it has two."""
    test = share_of_each(streams.stream("test_split", seed), strata, TEST_SHARE)
    return {"train": whole.take(~test), "test": whole.take(test)}


Listed = tuple[str, int]
"""Path of a file below the root, and its size in bytes."""


def _folder(path: str) -> pathlib.Path:
    root = pathlib.Path(path).expanduser()
    if not path or "\0" in path or not root.is_dir():
        raise DataError(f"There is no folder {path!r}: give one with folders of images.")
    return root


def _entries(folder: pathlib.Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if not entry.name.startswith(".")),
                key=lambda entry: entry.name,
            )
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): correct that.") from error


def _subfolders(folder: pathlib.Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def _some(folder: pathlib.Path, found: Sequence[str], remedy: str) -> None:
    if not found:
        raise DataError(f"{folder} has no folders: {remedy}.")


def _images(root: pathlib.Path, name: str) -> list[Listed]:
    """Return the image files of a class."""
    files, others = [], []
    for entry in _entries(root / name):
        if entry.name.lower().endswith(decoding.EXTENSIONS):
            if not entry.is_file():
                raise DataError(
                    f"{root / name / entry.name} has the name of an image, but is no file, or a "
                    "link to none: replace or remove it."
                )
            files.append((f"{name}/{entry.name}", entry.stat().st_size))
        else:
            others.append(entry.name)
    if others:
        logging.warning(
            "%s: %d files are left out, since their names are none of images: %s.",
            root / name, len(others), ", ".join(others[:3]),
        )  # fmt: skip
    if not files:
        raise DataError(
            f"{root / name} has no image ({', '.join(decoding.EXTENSIONS)}): add some, or remove "
            "the folder."
        )
    _not_empty(root, files)
    return files


def _not_empty(root: pathlib.Path, files: Sequence[Listed]) -> None:
    if empty := [name for name, size in files if not size]:
        raise DataError(
            f"{len(empty)} of {len(files)} files in {root} are empty, such as {empty[0]}: replace "
            "or remove them."
        )


def _listed(folder: pathlib.Path, path: pathlib.Path, classes: Sequence[str]) -> list[list[Listed]]:
    """Return the files of each class that a list names."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{folder} has no folders of classes, and the list {path} cannot be read ({error}): "
            "give it folders like those of train, or a list with the class of each file."
        ) from error
    sizes = {entry.name: entry.stat().st_size for entry in _entries(folder) if entry.is_file()}
    found: list[list[Listed]] = [[] for _ in classes]
    numbers = {name: label for label, name in enumerate(classes)}
    for number, line in enumerate(filter(str.strip, lines), 1):
        name, _, label = line.strip().rpartition(" ")
        known = numbers.get(label, int(label) if label.isdecimal() else len(classes))
        if name not in sizes or known >= len(classes):
            raise DataError(
                f"Line {number} of {path} is {line!r:.80}: give the name of a file in {folder} and "
                f"a class, by name or by a number from 0 to {len(classes) - 1}."
            )
        found[known].append((name, sizes.pop(name)))
    if sizes:
        raise DataError(
            f"{path} does not name {len(sizes)} files in {folder}, such as {min(sizes)}: add them, "
            "each once, or remove the files."
        )
    _not_empty(folder, [file for files in found for file in files])
    return found


def _examples(
    root: pathlib.Path,
    groups: Sequence[Sequence[Listed]],
    labels: np.ndarray,
    classes: Sequence[str],
    image_size: int | None,
    part: str,
) -> Examples:
    names, sizes = zip(*(file for files in groups for file in files), strict=True)
    size = SIZE if image_size is None else image_size
    files = Files(str(root.resolve()), names, sizes)
    images = Streamed(files, np.arange(len(files)), size, decoding.PARTS[part])
    return Examples(images, labels.astype(np.int32), tuple(classes))


def _labels(by_class: Sequence[Sequence[Listed]]) -> np.ndarray:
    return np.repeat(np.arange(len(by_class)), [len(files) for files in by_class])
