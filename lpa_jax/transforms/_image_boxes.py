"""Boxes of pixels, for CutMix and Cutout."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def image_size(name: str, value: Array) -> tuple[int, int]:
    if value.ndim != 4:
        raise ValueError(f"{name} needs inputs [B, H, W, channels], not {value.shape}.")
    return value.shape[1], value.shape[2]


def box(
    value: Float[Array, "B H W C"], center: Float[Array, "boxes 2"], size: Float[Array, "2"]
) -> Bool[Array, "boxes H W 1"]:
    """Return which pixels lie in a box: from half its size before its center to half beyond."""

    def within(axis):
        places = jnp.arange(value.shape[1 + axis], dtype=jnp.float32)
        offset = places[None] - center[:, axis, None]
        return (offset >= -size[axis] / 2) & (offset < size[axis] / 2)

    return (within(0)[:, :, None] & within(1)[:, None])[..., None]
