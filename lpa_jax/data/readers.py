"""Readers of data sets by name: the kinds that there are, and `load`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
from typing import Any, NamedTuple

from lpa_jax.data import cifar, digits, domainbed, folder, hugging_face, npz, packed, tfds
from lpa_jax.data.dataset import Dataset, make_dataset
from lpa_jax.data.decoding import PARTS
from lpa_jax.data.source import DataError, Examples, in_memory, joined
from lpa_jax.registry import load_object, reason, Registry


class Options(NamedTuple):
    """What a reader may be told.

    Attributes:
      data_dir: Where prepared sets are; None for the reader's own default.
      image_size: Side that images are resized to; None to leave them as they are, or for 224 where
        they are files.
      part: The part of an image file that evaluation sees, a name in `decoding.PARTS`.
      seed: Draws a test split where the source has none, and the split of each domain.
      test_domains: Those of a set of domains that are not learned from.
    """

    data_dir: str | None = None
    image_size: int | None = None
    part: str = "cover"
    seed: int = 0
    test_domains: tuple[str, ...] = ()


def _digits(rest: str, options: Options) -> dict[str, Examples]:
    if rest:
        raise DataError(f"'digits:{rest}' names more than the digits: give 'digits'.")
    return digits.read(options.image_size)


def _npz(rest: str, options: Options) -> dict[str, Examples]:
    _refuse_size(f"npz:{rest}", options)
    return npz.read(rest)


def _tfds(rest: str, options: Options) -> dict[str, Examples]:
    return tfds.read(rest, options.data_dir, options.image_size, options.part)


def _cifar(rest: str, options: Options) -> dict[str, Examples]:
    _refuse_size(f"cifar:{rest}", options)
    return cifar.read(rest)


def _folder(rest: str, options: Options) -> dict[str, Examples]:
    return folder.read(rest, options.image_size, options.part, options.seed)


def _domains(rest: str, options: Options) -> dict[str, Examples]:
    domains = folder.by_domain(rest, options.image_size, options.part)
    if options.test_domains:
        domainbed.check_counts(domains)
    return _split(domains, options)


def _rotated(rest: str, options: Options) -> dict[str, Examples]:
    if rest == "digits":
        _refuse_size("rotated:digits", options)
        return _split(domainbed.rotated_digits(options.seed), options)
    return _split(domainbed.rotated(_whole(rest, options), options.seed), options)


def _colored(rest: str, options: Options) -> dict[str, Examples]:
    return _split(domainbed.colored(_whole(rest, options), options.seed), options)


def _split(domains: Mapping[str, Examples], options: Options) -> dict[str, Examples]:
    """Return the splits of a set of domains: those of DomainBed if some are to be tested on."""
    if options.test_domains:
        return domainbed.splits(domains, options.test_domains, options.seed)
    return domainbed.together(domains, options.seed)


def _whole(name: str, options: Options) -> Examples:
    """Return all examples of a set, those of its training split first."""
    splits = _read_splits(name, options._replace(test_domains=()))
    return joined([in_memory(source) for source in splits.values()])


def _hugging_face(rest: str, options: Options) -> dict[str, Examples]:
    return hugging_face.read(rest, options.image_size, options.part, options.seed)


def _packed(rest: str, options: Options) -> dict[str, Examples]:
    return packed.read(rest, options.image_size, options.part)


def _refuse_size(name: str, options: Options) -> None:
    if options.image_size is not None:
        raise DataError(f"image_size has no effect on {name!r}: leave it out.")


READERS = Registry(
    "kind of data set",
    {
        "digits": _digits,
        "npz": _npz,
        "cifar": _cifar,
        "folder": _folder,
        "domains": _domains,
        "rotated": _rotated,
        "colored": _colored,
        "hf": _hugging_face,
        "packed": _packed,
        "tfds": _tfds,
    },
    Callable,
)
"""By kind, what reads `"kind:rest"`: `read(rest, options)` returns sources by split."""
OF_DOMAINS: dict[str, Callable[[str], Sequence[str]]] = {
    "domains": folder.domain_names,
    "rotated": lambda _: [*map(str, domainbed.ANGLES)],
    "colored": lambda _: [*domainbed.COLORS],
}
"""Kinds that know the domain of each example and take `Options.test_domains`; by kind, what returns
the names of the domains of `"kind:rest"` in order."""


def domain_names(name: str) -> list[str]:
    """Return the domains of a set by its name, see `load`.

    Raises:
      DataError: If it has none.

    Example:
      >>> domain_names("rotated:digits")
      ['0', '15', '30', '45', '60', '75']
    """
    kind, _, rest = name.partition(":")
    if kind not in OF_DOMAINS:
        kinds = ", ".join(f"{known}:..." for known in OF_DOMAINS)
        raise DataError(
            f"{name!r} has no domains to test on: give a set of domains ({kinds}), or no "
            "test_domains."
        )
    return [*OF_DOMAINS[kind](rest)]


# What was loaded within `loaded_once`, by the arguments of `load`.
_loaded: dict[tuple[Any, ...], Dataset] | None = None


@contextlib.contextmanager
def loaded_once() -> Iterator[None]:
    """Let `load` return one data set for the same arguments, instead of reading it again."""
    global _loaded
    before, _loaded = _loaded, {} if _loaded is None else _loaded
    try:
        yield
    finally:
        _loaded = before


def load(
    name: str,
    *,
    data_dir: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    image_part: str = "cover",
    test_domains: Sequence[str] = (),
) -> Dataset:
    """Load a set of labeled examples, and hold out a validation set, by class where each has one.

    Args:
      name: `"digits"`, 1,797 images of 8x8 pixels, enlarged if there is an `image_size`;
        `"npz:PATH"`, a file with the arrays `x_train`, `y_train`, `x_test`, `y_test` (uint8 images
        `[N, H, W, C]` or `[N, H, W]`, integer labels) and optionally `class_names`; `"cifar:PATH"`,
        the folder of CIFAR-10's or CIFAR-100's binary files; `"tfds:NAME"` or `"NAME"`, a set of
        tensorflow-datasets, prepared as ArrayRecord; `"folder:PATH"` or `"domains:PATH"`, image
        files, which are read when they are needed, see `folder.read` and `folder.by_domain`;
        `"rotated:NAME"` or `"colored:NAME"`, the digits of a set as domains, see
        `domainbed.rotated` and `domainbed.colored`, for instance `"rotated:npz:mnist.npz"`, or
        `"rotated:digits"`, of 12 x 12 pixels;
        `"hf:PATH"`, a set that Hugging Face's `datasets` saved on disk; `"packed:PATH"`, what
        `lpa-jax pack` decoded; `"KIND:REST"` of a reader that was registered in `READERS`; or
        `"package.module:function"`, a function without arguments that returns sources by split.
      data_dir: Where tensorflow-datasets' sets are; None is its own default.
      validation_fraction: Share of the training examples to hold out, in [0, 1); of a source that
        has a validation split of its own nothing is held out.
      seed: Decides which examples are held out, at least 0; the test set never depends on it.
      image_size: Side that images of tensorflow-datasets and image files are scaled to, at least
        1, which are then read when they are needed. None leaves the images of a set of one size as
        they are, and is 224 for files.
      image_part: The part of an image file that evaluation sees: `"cover"`, the largest square at
        the center, `"inner"`, 7/8 of its side, or `"whole"`, squashed to a square.
      test_domains: Names of domains that are not learned from, of a set of domains: its splits are
        then those of `domainbed.splits`, drawn by `seed`. Empty to learn from all, and to hold out
        a fifth of each class of each domain as the test split.

    Returns:
      The set, with uint8 images `[N, H, W, C]` and int32 labels `[N]`. A class of which
      the source has the name may have no training example, for instance one of the test set alone.

    Raises:
      DataError: If the examples cannot be read or used, or an argument is outside its range.

    Example:
      >>> digits = load("digits")
      >>> {split: examples.images.shape for split, examples in digits.splits.items()}
      {'train': (1295, 8, 8, 1), 'validation': (143, 8, 8, 1), 'test': (359, 8, 8, 1)}
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size is {image_size}: give at least 1.")
    if image_part not in PARTS:
        raise DataError(f"image_part must be one of {', '.join(PARTS)}, not {image_part!r}.")
    test_domains = tuple(test_domains)
    arguments = (
        name, data_dir, validation_fraction, seed, image_size, image_part, test_domains,
    )  # fmt: skip
    if _loaded is not None and arguments in _loaded:
        return _loaded[arguments]
    if test_domains:
        domain_names(name)
    splits = _read_splits(name, Options(data_dir, image_size, image_part, seed, test_domains))
    found = make_dataset(name, splits, validation_fraction=validation_fraction, seed=seed)
    if _loaded is not None:
        _loaded[arguments] = found
    return found


def _read_splits(name: str, options: Options) -> Mapping[str, Any]:
    kind, colon, rest = name.partition(":")
    if kind in READERS and (colon or kind == "digits"):
        return _read(name, functools.partial(READERS[kind], rest, options))
    # A colon also comes before the version of a set of tensorflow-datasets.
    if colon and not rest[:1].isdigit() and not rest.startswith("*"):
        return _from_function(name)
    return _tfds(name, options)


def _from_function(name: str) -> Mapping[str, Any]:
    kind, _, rest = name.partition(":")
    kinds = ", ".join(f"'{known}:PATH'" for known in READERS if known not in ("digits", "tfds"))
    told = (
        f"There is no kind of dataset {kind + ':'!r}: give 'digits', {kinds}, the name of a set of "
        "tensorflow-datasets, 'NAME', 'NAME/CONFIG' or 'NAME:VERSION', a function of your own, "
        "'package.module:function', or what a module of yours registers, --import=MODULE"
    )
    if not rest.isidentifier():
        raise DataError(f"{told}.")
    try:
        found: Any = load_object(name)
    except ValueError as error:
        raise DataError(f"{told} ({error})") from error
    return _read(name, found) if callable(found) else found


def _read(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except DataError:
        raise
    except Exception as error:  # Of any kind: it may be the user's own code.
        raise DataError(f"{name!r} cannot be read ({reason(error)}): correct that.") from error
