"""One way to every source of examples."""

from typing import NamedTuple

from jaxtyping import Int32, Int64, UInt8
import numpy as np

from lpa_jax.data import digits, npz, tfds
from lpa_jax.data.examples import DataError, Examples, held_out, take


class Dataset(NamedTuple):
    """Examples to train on, to tune on and to test on.

    Attributes:
      name: What was asked for.
      train: Examples to learn from.
      validation: Examples held out of the training data; there may be none.
      test: Examples that no choice may depend on.
      class_names: One name for each class.
      mean: Mean of the training pixels in [0, 1] for each channel.
      std: Their standard deviation, 1 for a constant channel.
      original_labels: Labels of all training examples of the source, int32 `[N]`, as they came.
      train_index: Which of these are in `train`, int64 `[n]`.
      validation_index: Which are in `validation`, int64 `[m]`.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    original_labels: Int32[np.ndarray, "source"]
    train_index: Int64[np.ndarray, "n"]
    validation_index: Int64[np.ndarray, "m"]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load(
    name: str,
    *,
    data_dir: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
) -> Dataset:
    """Load a set of labeled images, and hold out a validation set by class.

    Args:
      name: `"digits"`, scikit-learn's 8x8 images; `"npz:PATH"`, a file with the arrays `x_train`,
        `y_train`, `x_test`, `y_test` (uint8 images `[N, H, W, C]` or `[N, H, W]`, integer labels)
        and optionally `class_names`; or a set of tensorflow-datasets, prepared as ArrayRecord.
      data_dir: Where tensorflow-datasets' sets are; None is its own default.
      validation_fraction: Share of the training examples to hold out, in [0, 1).
      seed: Decides which examples are held out, at least 0; the test set never depends on it.
      image_size: Side of the images of a tensorflow-datasets set, at least 1: each is scaled until
        it covers that square, and cropped to its center. None leaves them as they are.

    Returns:
      The set, with uint8 images `[N, H, W, C]` and int32 labels `[N]`. A class of which
      the source has the name may have no training example, for instance one of the test set alone.

    Raises:
      DataError: If the examples cannot be read or used, or an argument is outside its range.

    Example:
      >>> digits = load("digits")
      >>> digits.num_classes, digits.train.images.shape, digits.test.images.shape
      (10, (1295, 8, 8, 1), (359, 8, 8, 1))
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}: give 0 up to less than 1.")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size is {image_size}: give at least 1.")
    if name == "digits" or name.startswith("npz:"):
        if image_size is not None:
            raise DataError(f"image_size has no effect on {name!r}: leave it out.")
        source = digits.read() if name == "digits" else npz.read(name.removeprefix("npz:"))
    else:
        # A colon may as well stand before the version of a set of tensorflow-datasets.
        kind, colon, rest = name.partition(":")
        if colon and not rest[:1].isdigit() and not rest.startswith("*"):
            raise DataError(
                f"There is no kind of dataset {kind + colon!r}: give 'digits', 'npz:PATH', or the "
                "name of a set of tensorflow-datasets, 'NAME', 'NAME/CONFIG' or 'NAME:VERSION'."
            )
        source = tfds.read(name, data_dir, image_size)
    labels = source.train.labels
    held = held_out(labels, validation_fraction, seed, source.class_names)
    train, validation = take(source.train, ~held), take(source.train, held)
    mean, std = pixel_statistics(train.images)
    return Dataset(
        name,
        train,
        validation,
        source.test,
        source.class_names,
        mean,
        std,
        original_labels=labels,
        train_index=np.flatnonzero(~held),
        validation_index=np.flatnonzero(held),
    )


def pixel_statistics(
    images: UInt8[np.ndarray, "n height width channels"],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean of the pixels in [0, 1] and their deviation, as `Dataset` has them."""
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64) / 255
    # Exact in integers, and without a float64 copy of all pixels as np.std makes.
    squares = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64)
    variance = squares * images.shape[-1] / images.size / 255**2 - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    # A channel that is the same everywhere, opacity for instance, is left as it is.
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())
