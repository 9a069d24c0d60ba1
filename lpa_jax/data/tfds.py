"""Image sets of tensorflow-datasets that are prepared on disk, read without TensorFlow."""

from collections.abc import Iterator, Sequence
import difflib
import hashlib
import io
import json
import pathlib
import re
from typing import Any

from absl import logging
import numpy as np

from lpa_jax.data import decoding
from lpa_jax.data.errors import DataError
from lpa_jax.data.source import checked, Examples
from lpa_jax.data.streamed import Streamed

# Without a namespace before the name, whose sets are code to be fetched.
NAME = re.compile(r"(?P<name>[a-z]\w*)(/[\w.+-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII)
# Where features.json says of which classes they are.
CLASS_KEYS = {"type", "pythonClassName", "python_class_name"}
NPZ_REMEDY = "or save the images with np.savez and load 'npz:PATH'"


def read(
    name: str, data_dir: str | None, image_size: int | None, part: str = "cover"
) -> dict[str, Examples]:
    """Return the examples of a set that is prepared; nothing is downloaded here.

    Args:
      name: As tensorflow-datasets writes it: `"cifar10"`, `"cifar100:3.*.*"`, `"name/config"`.
      data_dir: Where sets are prepared; None is tensorflow-datasets' own default.
      image_size: Side to scale and crop all images to, which are then read when they are needed;
        or None to leave them as they are.
      part: The part of an image that is scaled, a name in `decoding.PARTS`.

    Returns:
      The splits `train` and `test`, or `validation` where there is no `test`.

    Raises:
      DataError: If the set is unknown, not prepared, damaged, or no set of labeled images.
    """
    tfds = _import(name)
    builder = _open(tfds, name, data_dir)
    if not _has_labeled_images(tfds, builder.info.features):
        raise DataError(
            f"{name!r} has no 8-bit 'image' with a class as its 'label': choose another set, "
            f"{NPZ_REMEDY}."
        )
    height, width, channels = builder.info.features["image"].shape
    if image_size is None and (height is None or width is None):
        raise DataError(f"The images of {name!r} may differ in size: give image_size, such as 64.")
    found = [split for split, info in builder.info.splits.items() if info.num_examples]
    test = "test" if "test" in found else "validation"
    if "train" not in found or test not in found:
        raise DataError(
            f"{name!r} has examples in the splits {', '.join(found) or 'none'}, but 'train' and "
            f"'test' (or 'validation') are needed: choose another set, {NPZ_REMEDY}."
        )
    try:
        # Decoded here: tensorflow-datasets leaves a JPEG of four channels as it is.
        decoders = {"image": tfds.decode.SkipDecoding()}
        sources = builder.as_data_source(["train", test], decoders=decoders)
        if image_size is None:
            pairs = [_decode(source, (height, width, channels)) for source in sources]
        else:
            pairs = [
                _streamed(builder, split, source, image_size, decoding.PARTS[part], channels)
                for split, source in zip(("train", test), sources, strict=True)
            ]
    except ImportError as error:
        raise _lacks_package(name, error) from error
    except NotImplementedError as error:
        raise DataError(
            f"{name!r} is prepared in {builder.data_path} in a format that only TensorFlow reads: "
            f"remove that folder; {_preparation(name, data_dir)}."
        ) from error
    except Exception as error:  # Of any kind: the reader's, the parser's and Pillow's.
        raise DataError(
            f"{name!r} in {builder.data_path} cannot be read ({_reason(error)}): if its files "
            f"are truncated or corrupted, remove that folder; {_preparation(name, data_dir)}."
        ) from error
    class_names = tuple(builder.info.features["label"].names)
    train, test = (
        checked(f"{name!r}, split {split!r}", *pair, class_names)
        for split, pair in zip(("train", test), pairs, strict=True)
    )
    return {"train": train, "test": test}


def _import(name: str) -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise _lacks_package(name, error) from error
    return tensorflow_datasets


def _lacks_package(name: str, error: ImportError) -> DataError:
    extras = "tfds,prepare" if "'tensorflow'" in str(error) else "tfds"
    return DataError(
        f"{name!r} is neither 'digits' nor 'npz:PATH', and as a set of tensorflow-datasets it "
        f"needs a package that is missing ({_reason(error)}): pip install 'lpa_jax[{extras}]'."
    )


def _open(tfds: Any, name: str, data_dir: str | None) -> Any:
    parts = NAME.fullmatch(name)
    if parts is None:
        raise DataError(
            f"{name!r} is no name of a dataset: give 'digits', 'npz:PATH', 'NAME', 'NAME/CONFIG' "
            "or 'NAME:VERSION'."
        )
    _refuse_code(tfds, parts["name"], data_dir)
    verbosity = logging.get_verbosity()
    try:
        # What it would say of folders that are not prepared, the errors below say.
        logging.set_verbosity(logging.ERROR)
        builder = tfds.builder(name, data_dir=data_dir)
        prepared = builder.is_prepared()
    except tfds.core.DatasetNotFoundError as error:
        known = ["digits", "npz:PATH", *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(re.split("[/:]", name)[0], known)
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
        raise DataError(
            f"There is no dataset {name!r}{hint}: give 'digits', 'npz:PATH', or the name of a set "
            "that tensorflow-datasets knows or that is prepared in data_dir."
        ) from error
    except ImportError as error:
        raise _lacks_package(name, error) from error
    except Exception as error:  # Of any kind: parsers, assertions and each set's own code.
        raise DataError(
            f"tensorflow-datasets cannot open {name!r} ({_reason(error)}): give 'digits', "
            "'npz:PATH', 'NAME', 'NAME/CONFIG' or 'NAME:VERSION'."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if not prepared:
        raise DataError(
            f"{name!r} is not prepared in {builder.data_path}: {_preparation(name, data_dir)}."
        )
    return builder


def _refuse_code(tfds: Any, name: str, data_dir: str | None) -> None:
    # tensorflow-datasets imports whatever module a folder names for its features.
    folder = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR, name).expanduser()
    for path in sorted(folder.rglob("features.json")):
        try:
            classes = list(_classes(json.loads(path.read_bytes())))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path} cannot be read ({_reason(error)}): if its files are truncated or "
                f"corrupted, remove that folder; {_preparation(name, data_dir)}."
            ) from error
        for wanted in classes:
            if not str(wanted).startswith("tensorflow_datasets."):
                raise DataError(
                    f"{path} asks for code of {wanted!r}, which is refused: use a set whose "
                    f"features are tensorflow-datasets' own, {NPZ_REMEDY}."
                )


def _classes(node: Any) -> Iterator[Any]:
    """Iterate over the names of classes in what `features.json` holds."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in CLASS_KEYS:
                yield value
            yield from _classes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _classes(value)


def _preparation(name: str, data_dir: str | None) -> str:
    # Not `tfds build`: it needs apache-beam and mlcroissant besides.
    return (
        "preparing needs TensorFlow, so pip install 'lpa_jax[tfds,prepare]' and run python -c "
        f'"import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={data_dir!r}, '
        f"file_format='array_record').download_and_prepare()\", {NPZ_REMEDY}"
    )


def _has_labeled_images(tfds: Any, features: Any) -> bool:
    if not isinstance(features, tfds.features.FeaturesDict):
        return False
    if not {"image", "label"} <= set(features.keys()):
        return False
    image, label = features["image"], features["label"]
    return (
        isinstance(image, tfds.features.Image)
        and image.np_dtype == np.uint8
        and len(image.shape) == 3
        and image.shape[2] in decoding.MODES
        and isinstance(label, tfds.features.ClassLabel)
        and bool(label.num_classes)
    )


class Records:
    """Encoded images of a split that is prepared as ArrayRecord."""

    def __init__(self, source: Any, split: str, sizes: Sequence[int]) -> None:
        """Take the examples, what an error calls their split, and the bytes of each image."""
        self.source, self.split, self.sizes = source, split, np.array(sizes, np.int64)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.sizes)

    def image(self, index: int, /) -> bytes:
        """Return an image as it is stored."""
        return self.source[index]["image"]

    def name(self, index: int, /) -> str:
        """Return what an error calls an image."""
        return f"example {index} of {self.split}"

    def fingerprint(self) -> str:
        """Return a digest of the set's name and version and of the sizes of the images."""
        return hashlib.blake2b(self.split.encode() + self.sizes.tobytes()).hexdigest()[:32]


def _streamed(
    builder: Any, split: str, source: Any, size: int, part: decoding.Part, channels: int
) -> tuple[Streamed, np.ndarray]:
    """Return the images of a split, unread but once for their labels, and these."""
    sizes, labels = [], []
    for example in source:
        sizes.append(len(example["image"]))
        labels.append(example["label"])
    store = Records(source, f"{builder.info.full_name}, {split}", sizes)
    images = Streamed(store, np.arange(len(sizes)), size, part, channels)
    return images, np.array(labels, np.int64)


def _decode(source: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int64)
    for i, example in enumerate(source):
        image = Image.open(io.BytesIO(example["image"])).convert(decoding.MODES[shape[2]])
        images[i] = np.atleast_3d(np.asarray(image))
        labels[i] = example["label"]
    return images, labels


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
