"""A convolution that is quicker than XLA's on a CPU."""

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

Padding = str | Sequence[tuple[int, int]]
IMAGES = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))
ENTRIES = 2**14
"""Of an image, from which products are quicker than XLA's own kernel gradient."""


def conv_general_dilated(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> Float[Array, "..."]:
    """Return `jax.lax.conv_general_dilated` of the same arguments, quicker on CPUs.

    The gradient by the kernel is, for each of its rows, a product of the shifted images with the
    gradient of the output. XLA computes it as a convolution by a kernel as large as the image,
    which on a CPU takes several times as long where images are large. Here it is computed as those
    products, for images without groups that have at least 16,384 entries each, or for kernels of
    one position.

    Where each channel has a kernel of its own, as in the blocks of EfficientNet and ConvNeXt, the
    convolution and its gradients are sums of shifted images: many times quicker than XLA's.

    Both hold on a CPU alone, for float32 images `[B, H, W, C]`. Everything else is left to XLA, and
    the program for other platforms is that of `jax.lax.conv_general_dilated`, except for what XLA
    removes.

    Results agree to rounding. All of JAX's transformations work, in any order. Give it to a layer
    of Flax: `nn.Conv(64, (3, 3), conv_general_dilated=lpa_jax.models.conv_general_dilated)`.

    Args:
      lhs: Images.
      rhs: The kernel.
      window_strides: As of `jax.lax.conv_general_dilated`, and so are all that follow.
      padding: `"SAME"`, `"VALID"`, or a pair for each axis.
      lhs_dilation: Of the images.
      rhs_dilation: Of the kernel.
      dimension_numbers: Which axes are which.
      feature_group_count: Number of groups of channels.
      **options: Such as `precision`.

    Example:
      >>> from flax import linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax.models import conv_general_dilated
      >>> layer = nn.Conv(4, (3, 3), conv_general_dilated=conv_general_dilated)
      >>> images = jnp.ones([2, 32, 32, 3])
      >>> variables = layer.init(jax.random.key(0), images)
      >>> grads = jax.grad(lambda v: layer.apply(v, images).sum())(variables)
      >>> grads["params"]["kernel"].shape
      (3, 3, 3, 4)
    """
    settings = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        **options,
    }

    def plain(lhs, rhs):
        return lax.conv_general_dilated(lhs, rhs, **settings)

    quick = (
        lhs.ndim == rhs.ndim == 4
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == IMAGES
        and lhs.dtype == rhs.dtype == jnp.float32
        and options.get("batch_group_count", 1) == 1
        and {1}.issuperset(lhs_dilation or ())
    )
    large = math.prod(rhs.shape[:2]) == 1 or math.prod(lhs.shape[1:]) >= ENTRIES
    by_channel = feature_group_count == lhs.shape[-1] == rhs.shape[-1] > 1
    if not quick or not (by_channel or (feature_group_count == 1 and large)):
        return plain(lhs, rhs)
    dilation = (1, 1) if rhs_dilation is None else rhs_dilation
    if isinstance(padding, str):
        window = [(k - 1) * d + 1 for k, d in zip(rhs.shape, dilation, strict=False)]
        pads = lax.padtype_to_pads(lhs.shape[1:3], window, window_strides, padding)
    else:
        pads = padding
    shape = jax.eval_shape(plain, lhs, rhs).shape
    if 0 in (*lhs.shape, *shape):
        return plain(lhs, rhs)
    geometry = _Geometry(tuple(window_strides), tuple(pads), tuple(dilation), shape)

    def on_cpu(compute):
        return lambda lhs, rhs: lax.platform_dependent(
            lhs, rhs, cpu=functools.partial(compute, geometry), default=plain
        )

    # The same function thrice: its value, and what is linear in the tangent of each argument, whose
    # transpose is the gradient.
    if by_channel:
        value, by_lhs, by_rhs = map(on_cpu, (_gathered, _scattered, _by_rows))
    else:
        products = functools.partial(_products, precision=options.get("precision"))
        value, by_lhs, by_rhs = plain, plain, on_cpu(products)

    @jax.custom_jvp
    def conv(lhs, rhs):
        return value(lhs, rhs)

    def jvp(primals, tangents):
        lhs, rhs = primals
        of_lhs, of_rhs = tangents
        out = conv(lhs, rhs)
        terms = []
        if not isinstance(of_lhs, SymbolicZero):
            terms.append(by_lhs(of_lhs, rhs))
        if not isinstance(of_rhs, SymbolicZero):
            terms.append(by_rhs(lhs, of_rhs))
        return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)

    conv.defjvp(jvp, symbolic_zeros=True)
    return conv(lhs, rhs)


class _Geometry(NamedTuple):
    """Strides, padding and dilation of the two axes of images, and the shape of the result."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    shape: tuple[int, ...]

    def padded(self, images):
        """Return images with their border."""
        border = [(0, 0, 0), *((*pad, 0) for pad in self.pads), (0, 0, 0)]
        return lax.pad(images, jnp.zeros((), images.dtype), border)

    def met(self, images, axis, place, at=None):
        """Return what a row or column of the kernel meets, along that axis of padded images.

        Args:
          images: Padded.
          axis: 1 for rows of the kernel, 2 for columns.
          place: Number of the row or column.
          at: Which axis of `images` it is, if another.
        """
        first, stride = place * self.dilation[axis - 1], self.strides[axis - 1]
        last = first + (self.shape[axis] - 1) * stride + 1
        return lax.slice_in_dim(images, first, last, stride, axis if at is None else at)


# Recomputed in the backward pass: the shifted images are as many as the kernel's positions.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _products(geometry, lhs, rhs, precision=None):
    """Convolve by a sum of products, the transpose of which is the gradient by the kernel."""
    batch, height, width, features = geometry.shape
    rows, columns, channels, _ = rhs.shape
    padded = geometry.padded(lhs)
    # What a row of the kernel meets, side by side along the channels.
    met = jnp.concatenate([geometry.met(padded, 2, j) for j in range(columns)], axis=-1)
    # One kernel for each example, so that the transpose sums over the examples once.
    kernels = jnp.broadcast_to(
        rhs.reshape(1, rows, columns * channels, features),
        (batch, rows, columns * channels, features),
    )
    terms = [
        jnp.einsum(
            "bkm,bmn->bkn",
            geometry.met(met, 1, i).reshape(batch, height * width, -1),
            piece[:, 0],
            precision=precision,
        )
        for i, piece in enumerate(lax.split(kernels, (1,) * rows, 1))
    ]
    return sum(terms[1:], terms[0]).reshape(geometry.shape)


def _gathered(geometry, lhs, rhs):
    """Convolve each channel by a sum of shifted images."""
    padded = geometry.padded(lhs)
    terms = [
        geometry.met(geometry.met(padded, 1, i), 2, j) * rhs[i, j, 0]
        for i, j in np.ndindex(*rhs.shape[:2])
    ]
    # Apart from what follows: within a reduction XLA would compute the sums entry by entry.
    return lax.optimization_barrier(sum(terms[1:], terms[0]))


def _scattered(geometry, lhs, rhs):
    """Do the same by adding each image to the places that see it.

    Transposed, it is a sum of shifted images again; the transpose of `_gathered` is one of padded
    images, which takes a CPU several times as long.
    """
    reach = [(k - 1) * d for k, d in zip(rhs.shape, geometry.dilation, strict=False)]
    # Along each axis the images of all places of the kernel, whatever the stride.
    number = [
        max(size + pad[0], (out - 1) * stride + 1) + more
        for size, pad, out, stride, more in zip(
            lhs.shape[1:3], geometry.pads, geometry.shape[1:3], geometry.strides, reach,
            strict=True,
        )
    ]  # fmt: skip
    terms, lhs = [], lax.optimization_barrier(lhs)
    for places in np.ndindex(*rhs.shape[:2]):
        border = []
        for axis, place in enumerate(places):
            before = geometry.pads[axis][0] + reach[axis] - place * geometry.dilation[axis]
            border.append((before, number[axis] - lhs.shape[1 + axis] - before, 0))
        border = [(0, 0, 0), *border, (0, 0, 0)]
        terms.append(lax.pad(lhs * rhs[*places, 0], jnp.zeros((), lhs.dtype), border))
    found = sum(terms[1:], terms[0])
    for axis, stride in enumerate(geometry.strides, start=1):
        last = reach[axis - 1] + (geometry.shape[axis] - 1) * stride + 1
        found = lax.slice_in_dim(found, reach[axis - 1], last, stride, axis)
    return found


def _by_rows(geometry, lhs, rhs):
    """Do the same row by row of the result.

    Transposed, it adds up the gradient by the kernel in an array that has the width of the result,
    and so stays within the processor's cache.
    """
    batch, height, width, channels = geometry.shape
    padded = geometry.padded(lhs)
    rows, columns = rhs.shape[:2]
    window = (1, (rows - 1) * geometry.dilation[0] + 1, *padded.shape[2:])
    kernel = jnp.broadcast_to(rhs, (rows, columns, width, channels))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def row(number, padded, kernel):
        first = number % height * geometry.strides[0]
        here = lax.dynamic_slice(padded, (number // height, first, 0, 0), window)[0]
        here = here[:: geometry.dilation[0]]
        met = jnp.stack([geometry.met(here, 2, j, at=1) for j in range(columns)], axis=1)
        return jnp.sum(met * kernel, axis=(0, 1))

    numbers = jnp.arange(batch * height)
    _, found = lax.scan(lambda _, number: (None, row(number, padded, kernel)), None, numbers)
    return found.reshape(geometry.shape)
