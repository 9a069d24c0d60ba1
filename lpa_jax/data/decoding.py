"""Image files to pixels: which part of an image is taken, and at which size."""

from collections.abc import Callable, Iterator
import contextlib
import io
import math
from typing import Any

from jaxtyping import UInt8
import numpy as np

from lpa_jax.data.errors import DataError

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge of a part of an image, in pixels."""
Part = Callable[[int, int], Box]
"""`(width, height) -> box`: the part of an image of that size that is taken."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's modes by number of channels."""
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
"""What names of image files end with, in lower case."""


def whole(width: int, height: int) -> Box:
    """Return the whole image: it is squashed to a square, as DomainBed does.

    Example:
      >>> whole(300, 200)
      (0.0, 0.0, 300.0, 200.0)
    """
    return 0.0, 0.0, float(width), float(height)


def cover(width: int, height: int) -> Box:
    """Return the largest square at the center.

    Example:
      >>> cover(300, 200)
      (50.0, 0.0, 250.0, 200.0)
    """
    return _center(width, height, min(width, height))


def inner(width: int, height: int) -> Box:
    """Return the square at the center that has 7/8 of the shorter side, as ImageNet is evaluated.

    Example:
      >>> inner(300, 200)
      (62.5, 12.5, 237.5, 187.5)
    """
    return _center(width, height, min(width, height) * 7 / 8)


def _center(width: int, height: int, side: float) -> Box:
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


PARTS: dict[str, Part] = {"cover": cover, "inner": inner, "whole": whole}
"""What evaluation sees of an image, by the name that a configuration gives."""


def random_box(
    rng: np.random.Generator, width: int, height: int, low: float = 0.08, high: float = 1.0
) -> Box:
    """Return a part of random area and shape at a random place (Szegedy et al. 2015).

    The area is uniform in `[low, high]` of the image's, the ratio of width to height log-uniform in
    [3/4, 4/3]; after ten draws that do not fit, the largest part at the center whose ratio does.

    Args:
      rng: Draws the part.
      width: Of the image, in pixels.
      height: Likewise.
      low: Smallest share of the area, in (0, 1].
      high: Largest, in [low, 1].

    Example:
      >>> from lpa_jax.data import streams
      >>> rng = streams.stream("part", 0, 0, 0)
      >>> left, top, right, bottom = random_box(rng, 300, 200)
      >>> 0 <= left < right <= 300 and 0 <= top < bottom <= 200
      True

    References:
      Szegedy et al., Going Deeper with Convolutions, CVPR 2015, arXiv:1409.4842.
    """
    for _ in range(10):
        area = rng.uniform(low, high) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def decode(
    image: Any, size: int, part: Part, *, channels: int = 3, draft: bool = False
) -> UInt8[np.ndarray, "size size channels"]:
    """Return a part of an image, scaled to a square.

    Args:
      image: Pillow's, of any format that it reads, or the bytes of a file.
      size: Side of the result in pixels.
      part: The part of the image that is taken.
      channels: 1 for gray, 3 for RGB or 4 with an opacity, which other images are converted to.
      draft: Whether a JPEG that is much larger than needed is decoded at 1/2, 1/4 or 1/8 of its
        size, which is quicker and changes the pixels a little.

    Raises:
      DataError: If it is no image, damaged, animated, or has more than 8 bits a channel.

    Example:
      >>> from PIL import Image
      >>> decode(Image.new("RGB", (30, 20), (255, 0, 0)), 8, cover)[0, 0].tolist()
      [255, 0, 0]
    """
    from PIL import Image

    mode = MODES[channels]
    with _told(), Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image as opened:
        if getattr(opened, "n_frames", 1) > 1:
            raise DataError("it has several frames: save one of them.")
        if opened.mode.startswith(("I", "F")):
            raise DataError(
                f"its pixels are of Pillow's mode {opened.mode}: save 8 bits a channel."
            )
        width, height = opened.size
        left, top, right, bottom = part(width, height)
        if draft and opened.format == "JPEG":
            wanted = size * width / (right - left), size * height / (bottom - top)
            opened.draft(mode, (math.ceil(wanted[0]), math.ceil(wanted[1])))
            wide, high = opened.size[0] / width, opened.size[1] / height
            left, right, top, bottom = left * wide, right * wide, top * high, bottom * high
        pixels = opened
        if pixels.mode != mode:
            # Palettes may hold an opacity, which only this way is dropped without a warning.
            pixels = pixels.convert("RGBA") if "transparency" in pixels.info else pixels
            pixels = pixels.convert(mode)
        box = (left, top, right, bottom)
        scaled = pixels.resize((size, size), Image.Resampling.BILINEAR, box)
        return np.asarray(scaled).reshape(size, size, channels)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what Pillow raises of a bad file into a `DataError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("it is no image that Pillow reads: replace or remove it.") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"it is too large ({error}): scale it down.") from error
    except Exception as error:  # Of any kind: Pillow's readers raise whatever they meet.
        raise DataError(f"it is damaged ({error}): replace or remove it.") from error
