"""Handwritten digits that come with the package: real images without a download (`digits.md`)."""

import pathlib

import numpy as np

from lpa_jax.data.source import checked, Examples, held_out

# A constant of its own: results on the test set compare whatever a run's seed is.
TEST_SEED = 1797
TEST_FRACTION = 0.2
FILE = pathlib.Path(__file__).with_suffix(".npz")


def read() -> dict[str, Examples]:
    """Return the 1797 images, 8x8, of which a fifth of each class is the test set."""
    with np.load(FILE, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"].astype(int)
    # Sixteen is white.
    pixels = np.round(images * (255 / 16)).astype(np.uint8)[..., None]
    class_names = tuple(str(digit) for digit in range(10))
    examples = checked("digits", pixels, labels, class_names)
    held = held_out(examples.labels, TEST_FRACTION, TEST_SEED, class_names)
    return {"train": examples.take(~held), "test": examples.take(held)}
