"""Handwritten digits that come with scikit-learn: real images without a download."""

import importlib.util
import pathlib

import numpy as np

from lpa_jax.data.examples import checked, held_out, Source, take

# A constant of its own: results on the test set compare whatever a run's seed is.
TEST_SEED = 1797
TEST_FRACTION = 0.2
FILE = "datasets/data/digits.csv.gz"


def read() -> Source:
    """Return the 1797 images, 8x8, of which a fifth of each class is the test set."""
    images, labels = _table()
    # Sixteen is white.
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    class_names = tuple(str(digit) for digit in range(10))
    examples = checked("digits", pixels, labels, len(class_names))
    held = held_out(examples.labels, TEST_FRACTION, TEST_SEED, class_names)
    return Source(take(examples, ~held), take(examples, held), class_names)


def _table() -> tuple[np.ndarray, np.ndarray]:
    """Return images, `[1797, 64]` from 0 to 16, and labels."""
    # The file itself, where it is known: to import scikit-learn takes longer than all the rest of
    # a start.
    spec = importlib.util.find_spec("sklearn")
    if spec and spec.origin and (path := pathlib.Path(spec.origin).parent / FILE).exists():
        table = np.loadtxt(path, delimiter=",")
        return table[:, :-1], table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images, labels
