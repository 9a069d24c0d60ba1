"""Augmentation of image batches inside a jitted step: every example has its own draws."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

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


def augment(key: Key[Array, ""], images: Images, *, padding: int, flip: bool) -> Images:
    """Crop and mirror at random: with 4 and True, the standard recipe for CIFAR.

    Args:
      key: A typed PRNG key, `jax.random.key(...)`.
      images: uint8 or float, `[B, H, W, C]`.
      padding: Width of the border of zeros that crops reach into, static; 0 for no crops.
      flip: Whether to mirror, static.

    Returns:
      Images like those given.

    Example:
      >>> import jax
      >>> augment(jax.random.key(0), jax.numpy.ones((2, 8, 8, 3)), padding=4, flip=True).shape
      (2, 8, 8, 3)
    """
    crop_key, flip_key = jax.random.split(key)
    if padding:
        images = random_crop(crop_key, images, padding)
    return random_flip(flip_key, images) if flip else images


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
