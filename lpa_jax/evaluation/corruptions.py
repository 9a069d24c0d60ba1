"""Corrupted copies of images: a small set of common corruptions, the same for every network.

*Ours*, after Hendrycks and Dietterich (arXiv:1903.12261): five corruptions that need no files, at
three severities chosen for images of 8 to 64 pixels. The figures are not those of CIFAR-10-C.
"""

from collections.abc import Callable, Mapping

from jaxtyping import Float32, UInt8
import numpy as np
from scipy import ndimage

from lpa_jax.data import streams

Pixels = Float32[np.ndarray, "n height width channels"]
SEVERITIES = (1, 2, 3)
CHUNK = 1000
"""Images in float32 at a time."""


def _gaussian_noise(pixels: Pixels, stddev: float, rng: np.random.Generator) -> Pixels:
    return pixels + stddev * rng.standard_normal(pixels.shape, np.float32)


def _gaussian_blur(pixels: Pixels, sigma: float, _: np.random.Generator) -> Pixels:
    return ndimage.gaussian_filter(pixels, (0, sigma, sigma, 0), mode="nearest")


def _contrast(pixels: Pixels, share: float, _: np.random.Generator) -> Pixels:
    mean = pixels.mean(axis=(1, 2), keepdims=True)
    return mean + share * (pixels - mean)


def _brightness(pixels: Pixels, added: float, _: np.random.Generator) -> Pixels:
    return pixels + added


def _pixelate(pixels: Pixels, block: int, _: np.random.Generator) -> Pixels:
    for axis in (1, 2):
        side = pixels.shape[axis]
        first = np.arange(0, side, block)
        # What the last block lacks at the border it does without.
        sizes = np.diff(first, append=side)
        shape = [-1 if a == axis else 1 for a in range(4)]
        means = np.add.reduceat(pixels, first, axis) / sizes.reshape(shape).astype(np.float32)
        pixels = np.repeat(means, sizes, axis)
    return pixels


CORRUPTIONS: Mapping[str, tuple[Callable[..., Pixels], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.08, 0.16)),
    "gaussian_blur": (_gaussian_blur, (0.5, 0.75, 1.0)),
    "contrast": (_contrast, (0.6, 0.4, 0.2)),
    "brightness": (_brightness, (0.1, 0.2, 0.3)),
    "pixelate": (_pixelate, (2, 3, 4)),
}
"""The strengths: standard deviation, width in pixels, share kept, amount added, side of blocks."""
EVERY = tuple((name, severity) for name in CORRUPTIONS for severity in SEVERITIES)
"""All of them, by name and severity."""


def corrupt(
    images: UInt8[np.ndarray, "n height width channels"], name: str, severity: int, seed: int = 0
) -> UInt8[np.ndarray, "n height width channels"]:
    """Return corrupted copies of images.

    Args:
      images: Pixels, uint8 `[N, H, W, C]`.
      name: One of `CORRUPTIONS`.
      severity: 1, 2 or 3.
      seed: Decides the noise, at least 0.

    Returns:
      Pixels, uint8 `[N, H, W, C]`, rounded and clipped to 0 to 255.

    Raises:
      ValueError: If there is no such corruption or severity.

    Example:
      >>> image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1) * 20
      >>> corrupt(image, "brightness", severity=1).ravel().tolist()
      [26, 46, 66, 86]
      >>> corrupt(image, "pixelate", severity=1).ravel().tolist()
      [30, 30, 30, 30]
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(
            f"There is no corruption {name!r} of severity {severity!r}: give one of "
            f"{', '.join(CORRUPTIONS)}, and one of {', '.join(map(str, SEVERITIES))}."
        )
    change, strengths = CORRUPTIONS[name]
    rng = streams.stream("corruption", seed)
    corrupted = np.empty_like(images)
    for at in range(0, len(images), CHUNK):
        chunk = slice(at, at + CHUNK)
        pixels = images[chunk].astype(np.float32) / 255
        changed = change(pixels, strengths[severity - 1], rng)
        corrupted[chunk] = np.rint(np.clip(changed, 0.0, 1.0) * 255)
    return corrupted
