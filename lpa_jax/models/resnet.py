"""Residual networks for CIFAR, with or without squeeze-and-excitation."""

import functools

from flax import linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lpa_jax.models.layers import (
    batch_norm,
    blocks_per_group,
    classify,
    conv,
    Group,
    normalize,
    rematerialized,
)


class SqueezeExcite(nn.Module):
    """Scaling of each channel by a gate (Hu et al. 2018, arXiv:1709.01507).

    The two layers of the gate have no bias, which the paper found to serve residual networks best.

    Attributes:
      reduction: Channels per hidden unit of the gate.
      dtype: Data type of the computation.
    """

    reduction: int = 16
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Return the scaled inputs."""
        channels = inputs.shape[-1]
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        gate = inputs.mean(axis=(1, 2), keepdims=True)
        gate = nn.relu(dense(channels // self.reduction, name="squeeze")(gate))
        return inputs * nn.sigmoid(dense(channels, name="excite")(gate))


class BasicBlock(nn.Module):
    """Basic residual block, conv-norm-relu-conv-norm, then relu of the sum (He et al. 2015).

    Where the shape changes, the shortcut skips pixels and appends channels of zeros (the paper's
    option A).

    Attributes:
      width: Number of output channels.
      stride: Stride of the first convolution.
      squeeze_excite: Whether gates scale the residual.
      dtype: Data type of the computation.
    """

    width: int
    stride: int = 1
    squeeze_excite: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        """Return the activated sum, `[B, H/stride, W/stride, width]`."""
        x = conv(self.width, stride=self.stride, dtype=self.dtype, name="conv1")(inputs)
        x = nn.relu(batch_norm(train=train, dtype=self.dtype, name="norm1")(x))
        x = conv(self.width, dtype=self.dtype, name="conv2")(x)
        x = batch_norm(train=train, dtype=self.dtype, name="norm2")(x)
        if self.squeeze_excite:
            x = SqueezeExcite(dtype=self.dtype, name="squeeze_excite")(x)
        shortcut = inputs[:, :: self.stride, :: self.stride]
        zeros = self.width - inputs.shape[-1]
        return nn.relu(x + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, zeros))))


class ResNet(nn.Module):
    """Residual network for CIFAR (He et al. 2015, arXiv:1512.03385, section 4.2).

    Its modules are `stem`, `stem_norm`, `group1`, `group2`, `group3` (of 16, 32 and 64 channels at
    1, 1/2 and 1/4 of the resolution; with modules `block0`, `block1`, ...), `features` and
    `head`.

    Attributes:
      depth: Number of convolutions and the head, 6n+2: 20, 32, 110, ...
      num_classes: Number of logits.
      squeeze_excite: Whether gates of reduction 16 scale each residual (Hu et al. 2018,
        arXiv:1709.01507).
      mean: What to subtract from the inputs, one number or one for each channel.
      std: What to divide the centered inputs by, likewise.
      dtype: Data type of the computation; parameters, statistics and logits are float32.
      remat: What blocks keep for the backward pass instead of everything, to save memory:
        `"nothing_saveable"`, `"dots_saveable"` or `"dots_with_no_batch_dims_saveable"`, policies of
        `jax.checkpoint_policies`.
      head: `"linear"`, or `"normalized"`: logits are `30 cos(features, w_c)`, as LDAM and additive
        margins need; see `layers.NormalizedHead`.
      freeze_norm: Whether training too normalizes by the running statistics, and leaves them as
        they are; scales and biases still learn.

    Raises:
      ValueError: If `depth` is not 6n+2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax.models import ResNet
      >>> model = ResNet(depth=20, num_classes=10)
      >>> images = jnp.zeros([2, 32, 32, 3])
      >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
      >>> jax.eval_shape(lambda v: model.apply(v, images, train=False), variables).shape
      (2, 10)
    """

    depth: int
    num_classes: int
    squeeze_excite: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: DTypeLike = jnp.float32
    remat: str | None = None
    head: str = "linear"
    freeze_norm: bool = False

    def __post_init__(self):
        blocks_per_group(self.depth, 2)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B H W C"], *, train: bool = False
    ) -> Float32[Array, "B K"]:
        """Return the logits, float32 `[B, num_classes]`.

        Args:
          inputs: Images with pixels in [0, 1], floating `[B, H, W, C]`.
          train: Whether to normalize by the statistics of the batch, which updates the collection
            `batch_stats`.

        Raises:
          TypeError: If `inputs` are not floating.
          ValueError: If `inputs` do not fit `mean` and `std`.
        """
        train = train and not self.freeze_norm
        block = functools.partial(
            rematerialized(BasicBlock, self.remat),
            squeeze_excite=self.squeeze_excite,
            dtype=self.dtype,
        )
        num_blocks = blocks_per_group(self.depth, 2)
        x = normalize(inputs, self.mean, self.std, self.dtype)
        x = conv(16, dtype=self.dtype, name="stem")(x)
        x = nn.relu(batch_norm(train=train, dtype=self.dtype, name="stem_norm")(x))
        for i in range(3):
            width, stride = 2**i * 16, 1 if i == 0 else 2
            x = Group(block, num_blocks, width, stride, name=f"group{i + 1}")(x, train=train)
        return classify(x, self.num_classes, self.head)
