"""DropBlock: square blocks of entries are set to zero."""

import math

import jax
import jax.numpy as jnp

from lpa_jax.core.arguments import at_step, check_count, check_rate, Number
from lpa_jax.core.perturbation import check_activations, Perturbation, stateless


def dropblock(site: str, rate: Number, block_size: int) -> Perturbation:
    """Zero square blocks of each channel, about `rate` of all entries, and rescale the rest.

    Args:
      site: A module path or `"inputs"`; the value is `[B, H, W, channels]`.
      rate: Share of the entries to drop, in [0, 1), or a schedule.
      block_size: Side of the blocks, at least 1 and at most `min(H, W)`; 1 is dropout.

    Raises:
      ValueError: If an argument is outside its range, or the value is not `[B, H, W, channels]`.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.dropblock("group2", rate=0.1, block_size=3)
      Perturbation(sites=('group2',))

    References:
      Ghiasi, Lin and Le, DropBlock: A regularization method for convolutional networks, NeurIPS
      2018, arXiv:1810.12890. *Ours*: rescaled by example rather than by batch, so that examples
      stay independent.
    """
    check_activations("dropblock", [site])
    check_rate("rate", rate)
    check_count("block_size", block_size)

    def update(value, *, key, step=0, **_):
        if value.ndim != 4 or min(value.shape[1:3]) < block_size:
            raise ValueError(
                f"dropblock at {site!r} needs a value [B, H, W, channels] with H and W at least "
                f"block_size {block_size}, not {value.shape}."
            )
        batch, height, width, channels = value.shape
        seeds = (height - block_size + 1, width - block_size + 1)
        gamma = at_step(rate, step) / block_size**2 * height * width / math.prod(seeds)
        centers = jax.random.bernoulli(key, gamma, (batch, *seeds, channels))
        # Each seed is a block's first corner; the pooling window looks back from every entry.
        margin = ((0, 0), (block_size - 1,) * 2, (block_size - 1,) * 2, (0, 0))
        window = (1, block_size, block_size, 1)
        padded = jnp.pad(centers.astype(jnp.float32), margin)
        dropped = jax.lax.reduce_window(
            padded, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "VALID"
        )
        kept = 1.0 - dropped
        share = jnp.mean(kept, axis=(1, 2, 3), keepdims=True)
        scale = kept / jnp.where(share > 0, share, 1.0)
        return value * scale.astype(value.dtype)

    return stateless(site, update, needs_gradient=False)
