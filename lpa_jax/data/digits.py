"""Handwritten digits that come with the package: real images without a download (`digits.md`)."""

import pathlib

import numpy as np

from lpa_jax.data.source import checked, Examples, held_out

# A constant of its own: results on the test set compare whatever a run's seed is.
TEST_SEED = 1797
TEST_FRACTION = 0.2
FILE = pathlib.Path(__file__).with_suffix(".npz")


def read(image_size: int | None = None) -> dict[str, Examples]:
    """Return the 1797 images, of which a fifth of each class is the test set.

    Args:
      image_size: Side that they are enlarged to, in three channels, for networks of photographs;
        None for the 8 x 8 pixels in one channel.
    """
    with np.load(FILE, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"].astype(int)
    # Sixteen is white.
    pixels = np.round(images * (255 / 16)).astype(np.uint8)[..., None]
    if image_size is not None:
        from PIL import Image

        size = (image_size, image_size)
        pixels = np.stack([
            np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
            for image in pixels[..., 0]
        ])[..., None].repeat(3, axis=-1)  # fmt: skip
    class_names = tuple(str(digit) for digit in range(10))
    examples = checked("digits", pixels, labels, class_names)
    held = held_out(examples.labels, TEST_FRACTION, TEST_SEED, class_names)
    return {"train": examples.take(~held), "test": examples.take(held)}
