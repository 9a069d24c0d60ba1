"""RandAugment: operations drawn for each image, at one magnitude."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color",
    "contrast", "sharpness", "posterize", "solarize", "auto_contrast", "equalize",
)  # fmt: skip
"""The operations by name, in the order of their numbers."""


def rand_augment(
    key: Key[Array, ""],
    images: UInt8[Array, "batch height width 3"] | Float[Array, "batch height width 3"],
    number: int = 2,
    magnitude: float = 9.0,
) -> UInt8[Array, "batch height width 3"] | Float[Array, "batch height width 3"]:
    """Apply operations drawn for each image, with replacement, all of one magnitude.

    The scale of magnitudes is the paper's and timm's, 0 to 10; torchvision's, 0 to 30, has three
    times the number for the same change. See `operation` for what is done at 10. Draws are uniform,
    also whether a shear, shift, turn or enhancement goes one way or the other.

    Args:
      key: A typed PRNG key, `jax.random.key(...)`.
      images: uint8, or float in [0, 1], which is rounded to levels of 8 bits, `[B, H, W, 3]`.
      number: Number of operations, at least 1, static. The paper's on ImageNet: 2.
      magnitude: In [0, 10]. The paper's on ImageNet: 9.

    Returns:
      Images like those given.

    Example:
      >>> import jax
      >>> rand_augment(jax.random.key(0), jax.numpy.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 3)

    References:
      Cubuk et al., RandAugment: Practical Automated Data Augmentation with a Reduced Search Space,
      NeurIPS 2020, arXiv:1909.13719.
    """
    integers = images.dtype == jnp.uint8
    pixels = images if integers else jnp.round(255 * jnp.clip(images, 0, 1)).astype(jnp.uint8)

    def draw(pixels, key):
        which_key, sign_key = jax.random.split(key)
        which = jax.random.randint(which_key, (len(images),), 0, len(OPERATIONS))
        sign = jax.random.rademacher(sign_key, (len(images),), jnp.float32)
        return jax.vmap(operation)(pixels, which, sign * magnitude / 10), None

    pixels, _ = jax.lax.scan(draw, pixels, jax.random.split(key, number))
    return pixels if integers else pixels.astype(images.dtype) / 255


def operation(
    pixels: UInt8[Array, "height width 3"], which: Int[Array, ""], amount: Float[Array, ""]
) -> UInt8[Array, "height width 3"]:
    """Apply an operation to an image, with the levels of Pillow's but for rounding.

    At the amount 1: a shear by 0.3; a shift by 150/331 of the side; a turn by 30 degrees; factors
    of brightness, color, contrast and sharpness of 1.9, at -1 of 0.1; 4 bits left of 8; all levels
    inverted. The rest has no amount. Pixels from outside of the image are black.

    Which one it is differs between the images of a batch, so that each would go through all of
    them: those of a kind are one computation, which changes nothing where another kind is drawn.

    Args:
      pixels: The image, `[H, W, 3]`.
      which: Its place in `OPERATIONS`.
      amount: In [-1, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> pixels = jnp.array([[[0, 100, 255]]], jnp.uint8)
      >>> jax.jit(operation)(pixels, OPERATIONS.index("brightness"), jnp.array(0.5))
      Array([[[  0, 145, 255]]], dtype=uint8)
    """
    chosen = {name: which == place for place, name in enumerate(OPERATIONS)}
    # Fused with what comes next, a pixel would be computed again for each that reads it.
    moved = jax.lax.optimization_barrier(_moved(pixels.astype(jnp.float32), chosen, amount))
    levels = jnp.floor(jnp.clip(_enhanced(moved, chosen, amount), 0, 255)).astype(jnp.uint8)
    return _mapped(jax.lax.optimization_barrier(levels), chosen, jnp.abs(amount))


def _moved(
    pixels: Float[Array, "height width 3"], chosen: dict[str, Array], amount: Float[Array, ""]
) -> Float[Array, "height width 3"]:
    """Shear about the corner, shift, or turn about the center, with linear interpolation."""
    height, width, _ = pixels.shape
    shear_x, shear_y, shift_x, shift_y, turn = (
        jnp.where(chosen[name], most * amount, 0.0)
        for name, most in (
            ("shear_x", 0.3),
            ("shear_y", 0.3),
            ("translate_x", width * 150 / 331),
            ("translate_y", height * 150 / 331),
            ("rotate", math.pi / 6),
        )
    )
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    up, left = y - height / 2, x - width / 2
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    source_y = sin * left + cos * up + height / 2 + shear_y * x + shift_y
    source_x = cos * left - sin * up + width / 2 + shear_x * y + shift_x
    inside = (source_y >= 0) & (source_y < height) & (source_x >= 0) & (source_x < width)

    def sampled(channel):
        places = [source_y - 0.5, source_x - 0.5]
        return jax.scipy.ndimage.map_coordinates(channel, places, order=1, mode="nearest")

    moved = jax.vmap(sampled, in_axes=-1, out_axes=-1)(pixels)
    return jnp.where(inside[..., None], moved, 0.0)


def _enhanced(
    pixels: Float[Array, "height width 3"], chosen: dict[str, Array], amount: Float[Array, ""]
) -> Float[Array, "height width 3"]:
    """Move away from, or to, black, the mean gray, the gray of each pixel or a smoothed image."""
    red, green, blue = jnp.moveaxis(pixels, -1, 0)
    gray = jnp.round(0.299 * red + 0.587 * green + 0.114 * blue)[..., None]
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    squares = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = jnp.round((squares + 4 * pixels[1:-1, 1:-1]) / 13)
    # Of what is none of the four, the pixels themselves: nothing moves.
    other = pixels
    for name, base in (
        ("brightness", 0.0),
        ("color", gray),
        ("contrast", jnp.round(gray.mean())),
        ("sharpness", pixels.at[1:-1, 1:-1].set(inner)),
    ):
        other = jnp.where(chosen[name], base, other)
    return other + (1 + 0.9 * amount) * (pixels - other)


def _mapped(
    pixels: UInt8[Array, "height width 3"], chosen: dict[str, Array], amount: Float[Array, ""]
) -> UInt8[Array, "height width 3"]:
    """Look each level up in a table, of each channel for itself."""
    level = jnp.arange(256)

    def through_table(channel):
        counts = jnp.bincount(channel.ravel(), length=256)
        present = counts > 0
        low, high = jnp.argmax(present), 255 - jnp.argmax(present[::-1])
        step = (channel.size - counts[high]) // 255
        equal = (step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1)
        bits = 8 - jnp.round(4 * amount).astype(int)
        table = level
        for name, levels in (
            ("posterize", level >> (8 - bits) << (8 - bits)),
            ("solarize", jnp.where(level < 256 * (1 - amount), level, 255 - level)),
            ("auto_contrast", (level - low) * 255 // jnp.maximum(high - low, 1)),
            ("equalize", jnp.where(step > 0, equal, level)),
        ):
            table = jnp.where(chosen[name], levels, table)
        # A channel of one level has nothing to spread.
        table = jnp.where(chosen["auto_contrast"] & (low == high), level, table)
        return jnp.clip(table, 0, 255).astype(jnp.uint8)[channel]

    return jax.vmap(through_table, in_axes=-1, out_axes=-1)(pixels)
