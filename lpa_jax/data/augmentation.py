"""Augmentation of image batches inside a jitted step: every example has its own draws."""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from lpa_jax.data.rand_augment import rand_augment
from lpa_jax.registry import Registry

Images = UInt8[Array, "batch height width channels"] | Float[Array, "batch height width channels"]


def random_crop(key: Key[Array, ""], images: Images, padding: int = 4) -> Images:
    """Cut each image at a random place out of itself with a border of zeros.

    Args:
      key: A typed PRNG key, `jax.random.key(...)`.
      images: uint8 or float, `[B, H, W, C]`.
      padding: Width of the border in pixels, at least 0, static.

    Returns:
      Images like those given.

    Example:
      >>> import jax
      >>> random_crop(jax.random.key(0), jax.numpy.ones((2, 8, 8, 3)), padding=2).shape
      (2, 8, 8, 3)
    """
    batch, *window = images.shape
    border = (padding, padding)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), window)

    return jax.vmap(crop)(padded, corners)


def random_flip(key: Key[Array, ""], images: Images) -> Images:
    """Mirror each image left to right with probability one half.

    Args:
      key: A typed PRNG key, `jax.random.key(...)`.
      images: uint8 or float, `[B, H, W, C]`.

    Returns:
      Images like those given.

    Example:
      >>> import jax
      >>> random_flip(jax.random.key(0), jax.numpy.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 3)
    """
    flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def resized_crop(
    key: Key[Array, ""], images: Images, low: float = 0.08, high: float = 1.0
) -> Float[Array, "batch height width channels"]:
    """Scale a random part of each image to the size of the whole.

    The area is uniform in `[low, high]` of the image's, the ratio of width to height log-uniform in
    [3/4, 4/3], as `decoding.random_part` draws them of image files, which this leaves to that. What
    would reach beyond the image is cut down to it.

    Args:
      key: A typed PRNG key, `jax.random.key(...)`.
      images: uint8 or float, `[B, H, W, C]`.
      low: Smallest share of the area, in (0, 1].
      high: Largest, in [low, 1].

    Returns:
      Images of the same shape, as `to_float` returns them.

    Example:
      >>> import jax
      >>> resized_crop(jax.random.key(0), jax.numpy.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 3)

    References:
      Szegedy et al., Going Deeper with Convolutions, CVPR 2015, arXiv:1409.4842.
    """
    images = to_float(images)
    batch, height, width, channels = images.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (batch,), minval=low, maxval=high) * height * width
    bound = math.log(4 / 3)
    ratio = jnp.exp(jax.random.uniform(ratio_key, (batch,), minval=-bound, maxval=bound))
    side = jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1)
    side = jnp.minimum(side, jnp.array([height, width], jnp.float32))
    room = jnp.array([height, width], jnp.float32) - side
    corner = room * jax.random.uniform(place_key, (batch, 2))
    scale = jnp.array([height, width], jnp.float32) / side

    def cut(image, scale, corner):
        return jax.image.scale_and_translate(
            image, (height, width, channels), (0, 1), scale, -corner * scale, "linear"
        )

    return jax.vmap(cut)(images, scale, corner)


def color_jitter(
    key: Key[Array, ""],
    images: Images,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
) -> Float[Array, "batch height width 3"]:
    """Change brightness, contrast, saturation and hue of each image at random, in this order.

    The first three blend, by a factor uniform in `1 - x` to `1 + x`, with black, with the mean gray
    and with the gray of each pixel; hue turns by a share of the circle uniform in `-hue` to `hue`.

    Args:
      key: A typed PRNG key, `jax.random.key(...)`.
      images: uint8 or float in [0, 1], `[B, H, W, 3]`.
      brightness: At least 0.
      contrast: At least 0.
      saturation: At least 0.
      hue: In [0, 0.5].

    Returns:
      Images in [0, 1].

    Example:
      >>> import jax
      >>> color_jitter(jax.random.key(0), jax.numpy.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 3)
    """
    images = to_float(images)
    keys = jax.random.split(key, 4)

    def draw(key, low, high):
        return jax.random.uniform(key, (len(images), 1, 1, 1), minval=low, maxval=high)

    def blend(image, other, factor):
        return jnp.clip(factor * image + (1 - factor) * other, 0, 1)

    for key, amount, other in (
        (keys[0], brightness, jnp.zeros_like),
        (keys[1], contrast, lambda x: _gray(x).mean(axis=(1, 2, 3), keepdims=True)),
        (keys[2], saturation, _gray),
    ):
        if amount:
            factor = draw(key, max(0.0, 1 - amount), 1 + amount)
            images = blend(images, other(images), factor)
    return _turned(images, draw(keys[3], -hue, hue)) if hue else images


def _gray(images: Float[Array, "batch h w 3"]) -> Float[Array, "batch h w 1"]:
    """Return the luma of ITU-R BT.601."""
    return images @ jnp.array([[0.299], [0.587], [0.114]], images.dtype)


def _turned(
    images: Float[Array, "batch h w 3"], turn: Float[Array, "batch 1 1 1"]
) -> Float[Array, "batch h w 3"]:
    """Turn the hue of the HSV model; value and saturation stay."""
    high, low = images.max(axis=-1), images.min(axis=-1)
    spread = jnp.where(high > low, high - low, 1.0)
    red, green, blue = jnp.moveaxis(images, -1, 0)
    hue = jnp.where(
        high == red,
        (green - blue) / spread,
        jnp.where(high == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    hue = hue + 6 * turn[..., 0]
    # The channel n has the value v - v s max(0, min(k, 4 - k, 1)), k = n + hue in sixths.
    k = (jnp.array([5.0, 3.0, 1.0]) + hue[..., None]) % 6
    lowered = jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
    return high[..., None] - (high - low)[..., None] * lowered


def grayscale(
    key: Key[Array, ""], images: Images, rate: float = 0.1
) -> Float[Array, "batch height width 3"]:
    """Take the colors from each image with a probability.

    Args:
      key: A typed PRNG key, `jax.random.key(...)`.
      images: uint8 or float in [0, 1], `[B, H, W, 3]`.
      rate: The probability, in [0, 1].

    Example:
      >>> import jax
      >>> key, pixels = jax.random.key(0), jax.numpy.array([[[[1.0, 0.5, 0.0]]]])
      >>> image = grayscale(key, pixels, rate=1.0)
      >>> bool((image == image[..., :1]).all())
      True
    """
    images = to_float(images)
    chosen = jax.random.bernoulli(key, rate, (len(images), 1, 1, 1))
    return jnp.where(chosen, _gray(images), images)


def random_erasing(key: Key[Array, ""], images: Images, rate: float = 0.25) -> Images:
    """Set a random rectangle of each image to zeros with a probability (Zhong et al. 2020).

    Its area is uniform in 2 % to a third of the image's, its ratio log-uniform in 0.3 to 1/0.3.
    *Ours*: what would reach beyond the image is cut off; the paper draws again.

    Args:
      key: A typed PRNG key, `jax.random.key(...)`.
      images: uint8 or float, `[B, H, W, C]`.
      rate: The probability, in [0, 1].

    Returns:
      Images like those given.

    Example:
      >>> import jax
      >>> random_erasing(jax.random.key(0), jax.numpy.ones((2, 8, 8, 3)), 1.0).min()
      Array(0., dtype=float32)

    References:
      Zhong et al., Random Erasing Data Augmentation, AAAI 2020, arXiv:1708.04896.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 4)
    area = jax.random.uniform(keys[0], (batch,), minval=0.02, maxval=1 / 3) * height * width
    bound = math.log(1 / 0.3)
    ratio = jnp.exp(jax.random.uniform(keys[1], (batch,), minval=-bound, maxval=bound))
    side = jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1)
    room = jnp.maximum(jnp.array([height, width]) - side, 0)
    corner = room * jax.random.uniform(keys[2], (batch, 2))

    def within(axis, number):
        place = jnp.arange(number)[None] + 0.5
        return (place >= corner[:, axis, None]) & (place < (corner + side)[:, axis, None])

    rectangle = within(0, height)[:, :, None] & within(1, width)[:, None, :]
    chosen = jax.random.bernoulli(keys[3], rate, (batch, 1, 1))
    return jnp.where((rectangle & chosen)[..., None], jnp.zeros((), images.dtype), images)


class Augmentation(NamedTuple):
    """A random change of images, by its name in a configuration.

    Attributes:
      change: `change(key, images, *numbers) -> images`.
      least: Smallest value of each number.
      most: Largest value of each number.
      color: Whether it needs three channels.
    """

    change: Callable[..., Any]
    least: tuple[float, ...] = ()
    most: tuple[float, ...] = ()
    color: bool = False


AUGMENTATIONS = Registry(
    "augmentation",
    {
        "crop": Augmentation(random_crop, (1,), (math.inf,)),
        "flip": Augmentation(random_flip),
        "resized_crop": Augmentation(resized_crop, (1e-3, 1e-3), (1.0, 1.0)),
        "color_jitter": Augmentation(
            color_jitter, (0.0,) * 4, (math.inf, math.inf, math.inf, 0.5), color=True
        ),
        "grayscale": Augmentation(grayscale, (0.0,), (1.0,), color=True),
        "random_erasing": Augmentation(random_erasing, (0.0,), (1.0,)),
        "rand_augment": Augmentation(rand_augment, (1, 0.0), (100, 10.0), color=True),
    },
    Augmentation,
)
"""Augmentations by name."""

PRESETS = {
    "none": "",
    "cifar": "crop=4+flip",
    "imagenet": "resized_crop=0.08,1+flip",
    "imagenet_strong": "resized_crop=0.08,1+flip+rand_augment=2,9+random_erasing=0.25",
    "domainbed": "resized_crop=0.7,1+flip+color_jitter=0.3,0.3,0.3,0.3+grayscale=0.1",
}
"""Usual lists of augmentations, by the name of where they are usual."""


class Applied(NamedTuple):
    """An augmentation and its numbers."""

    name: str
    numbers: tuple[float, ...]


def augmentations(text: str) -> tuple[Applied, ...]:
    """Return what a configuration's list of augmentations names.

    Args:
      text: A name in `PRESETS`, or names in `AUGMENTATIONS` joined by `+`, each with numbers after
        `=`, of which those that are left out are the function's defaults.

    Raises:
      ValueError: If there is no such augmentation, or a number is outside of its range.

    Example:
      >>> augmentations("cifar")
      (Applied(name='crop', numbers=(4,)), Applied(name='flip', numbers=()))
    """
    found = []
    for part in filter(None, PRESETS.get(text, text).split("+")):
        name, _, given = part.partition("=")
        if name not in AUGMENTATIONS:
            raise ValueError(
                f"There is no augmentation {name!r}: give {', '.join(PRESETS)}, or some of "
                f"{', '.join(AUGMENTATIONS)} joined by +."
            )
        entry = AUGMENTATIONS[name]
        try:
            numbers = tuple(map(_number, filter(None, given.split(","))))
        except ValueError:
            raise ValueError(
                f"{part!r} needs numbers after =, such as {PRESETS['cifar']}."
            ) from None
        most = len(entry.least)
        if len(numbers) > most:
            raise ValueError(f"{part!r} has {len(numbers)} numbers: {name} takes {most} at most.")
        for number, low, high in zip(numbers, entry.least, entry.most, strict=False):
            if not low <= number <= high:
                raise ValueError(f"{part!r} has the number {number:g}: give {low:g} to {high:g}.")
        counted = {"crop": "pixels", "rand_augment": "operations"}.get(name)
        if counted and any(number % 1 for number in numbers[:1]):
            raise ValueError(f"{part!r} has no whole number of {counted}: give one.")
        if name == "resized_crop" and list(numbers) != sorted(numbers):
            raise ValueError(f"{part!r} has its smallest share above its largest: change places.")
        found.append(Applied(name, numbers))
    return tuple(found)


def _number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


def augment(key: Key[Array, ""], images: Images, changes: Sequence[Applied]) -> Images:
    """Apply augmentations in order.

    Args:
      key: A typed PRNG key, `jax.random.key(...)`.
      images: uint8 or float, `[B, H, W, C]`.
      changes: From `augmentations`.

    Returns:
      Images of that shape, uint8 or float.

    Example:
      >>> import jax
      >>> images = jax.numpy.ones((2, 8, 8, 3))
      >>> augment(jax.random.key(0), images, augmentations("cifar")).shape
      (2, 8, 8, 3)
    """
    keys = jax.random.split(key, max(1, len(changes)))
    for key, (name, numbers) in zip(keys, changes, strict=False):
        images = AUGMENTATIONS[name].change(key, images, *numbers)
    return images


def to_float(images: UInt8[Array, "*shape"] | Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return pixels of 0 to 255 as float32 in [0, 1]; floats stay as they are.

    Args:
      images: uint8 or float of any shape.

    Example:
      >>> import jax.numpy as jnp
      >>> to_float(jnp.array([0, 51, 255], jnp.uint8)).round(3)
      Array([0. , 0.2, 1. ], dtype=float32)
    """
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
