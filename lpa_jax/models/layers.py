"""Pieces that several networks share."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lpa_jax.models.convolution import conv_general_dilated

HEADS = ("linear", "normalized")
SCALE = 30.0
"""Of the cosines that a normalized head makes logits of."""
POLICIES = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")


def normalize(
    inputs: Float[Array, "B H W C"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: DTypeLike,
) -> Float[Array, "B H W C"]:
    """Return `(inputs - mean) / std`, computed in float32 and cast to `dtype`.

    Raises:
      TypeError: If `inputs` are not floating (bytes would not lie in [0, 1]).
      ValueError: If `inputs` are not `[B, H, W, C]`, or look like `[B, C, H, W]` (1, 3 or 4 entries
        on axis 1, but neither on the last axis nor in `mean`), or `mean` and `std` do not have one
        number, or one for each of the channels.
    """
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(f"Images must be floats in [0, 1], not {inputs.dtype}; divide by 255.")
    if inputs.ndim != 4:
        raise ValueError(f"Images must have the shape [B, H, W, C], not {inputs.shape}.")
    channels = (1, 3, 4)
    last = inputs.shape[-1]
    if inputs.shape[1] in channels and last not in channels and len(mean) != last:
        raise ValueError(
            f"Images of shape {inputs.shape} look like [B, C, H, W], not [B, H, W, C]: give "
            "jnp.transpose(images, (0, 2, 3, 1))."
        )
    # Broadcasting would otherwise turn gray images into images of len(mean) channels.
    if not {len(mean), len(std)} <= {1, inputs.shape[-1]}:
        raise ValueError(
            f"mean {mean} and std {std} must have one number, or one for each of the "
            f"{inputs.shape[-1]} channels."
        )
    centered = inputs.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)
    return (centered / jnp.asarray(std, jnp.float32)).astype(dtype)


def conv(
    features: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: str | int | None = None,
    depthwise: bool = False,
    use_bias: bool = False,
    dtype: DTypeLike,
    name: str,
) -> nn.Conv:
    """Return a convolution, He-normal by fan out, padded by half its kernel."""
    # What a depthwise kernel's channel reaches is as many outputs as it takes in; Flax's fan out
    # would count those of all channels.
    fan = "fan_in" if depthwise else "fan_out"
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        # "SAME" shifts a strided kernel by one pixel against the strided shortcut beside it.
        padding=kernel // 2 if padding is None else padding,
        feature_group_count=features if depthwise else 1,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, fan, "normal"),
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def batch_norm(
    *,
    train: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    dtype: DTypeLike,
    name: str,
) -> nn.BatchNorm:
    """Return a batch normalization whose parameters and statistics are float32."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=momentum, epsilon=epsilon, dtype=dtype, name=name
    )


def layer_norm(*, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """Return a layer normalization whose parameters and statistics are float32."""
    # Pretrained transformers have channels of thousands, which the difference of two means of
    # squares would lose the variance of.
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


class Average(nn.Module):
    """The mean over the positions, a module so that what the head takes in is a site."""

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float32[Array, "B C"]:
        """Return the mean of each channel, float32 `[B, C]`."""
        if inputs.dtype == jnp.bfloat16:
            # The values stay. Without it, XLA on a CPU fuses convolutions with the mean, and jaxlib
            # 0.12 then returns NaN.
            inputs = jax.lax.reduce_precision(inputs.astype(jnp.float32), 8, 7)
        return inputs.mean(axis=(1, 2), dtype=jnp.float32)


class NormalizedHead(nn.Module):
    """Logits `30 cos(features, w_c)`, with `w_c` the columns of `kernel`; there is no bias.

    The head of LDAM (Cao et al. 2019, arXiv:1906.07413) and of CosFace (Wang et al. 2018,
    arXiv:1801.09414), whose margins are of cosines. The scale is part of the logits, so that their
    softmax is the network's confidence. Features of zeros have logits of 0.

    Attributes:
      num_classes: Number of logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, features: Float[Array, "B C"]) -> Float32[Array, "B K"]:
        """Return the logits in [-30, 30], float32 `[B, num_classes]`."""
        shape = (features.shape[1], self.num_classes)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        return SCALE * _unit(features.astype(jnp.float32), 1) @ _unit(kernel, 0)


def _unit(vectors: Float32[Array, "N M"], axis: int) -> Float32[Array, "N M"]:
    """Scale to l2 norm 1; zeros stay, with a finite gradient."""
    squares = jnp.sum(vectors**2, axis=axis, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.where(squares > 1e-24, squares, 1.0))


def classify(
    activation: Float[Array, "B H W C"], num_classes: int, head: str = "linear", **options: Any
) -> Float32[Array, "B K"]:
    """Average over positions (`features`) and apply the module `head`, all in float32.

    Args:
      activation: Output of the last group.
      num_classes: Number of logits K.
      head: `"linear"`, or `"normalized"` for a `NormalizedHead`.
      **options: As of `classify_features`.

    Raises:
      ValueError: If there is no such head.
    """
    return classify_features(Average(name="features")(activation), num_classes, head, **options)


def classify_features(
    features: Float32[Array, "B C"],
    num_classes: int,
    head: str = "linear",
    *,
    dropout: float = 0.0,
    train: bool = False,
) -> Float32[Array, "B K"]:
    """Apply the module `head` in float32.

    Args:
      features: What the head takes in.
      num_classes: Number of logits K.
      head: `"linear"`, or `"normalized"` for a `NormalizedHead`.
      dropout: Share of the features that are dropped in training, by the random numbers
        `"dropout"`.
      train: Whether they are.

    Raises:
      ValueError: If there is no such head.
    """
    if dropout:
        features = nn.Dropout(dropout, deterministic=not train, name="head_dropout")(features)
    if head == "normalized":
        return NormalizedHead(num_classes, name="head")(features)
    if head != "linear":
        raise ValueError(f"head must be one of {', '.join(HEADS)}, not {head!r}.")
    return nn.Dense(num_classes, dtype=jnp.float32, name="head")(features)


def blocks_per_group(depth: int, other_layers: int) -> int:
    """Return n, the blocks of two layers in each of three groups, for `depth = 6n + other_layers`.

    Raises:
      ValueError: If there is no such n.
    """
    blocks, rest = divmod(depth - other_layers, 6)
    if rest or blocks < 1:
        nearest = sorted({6 * max(n, 1) + other_layers for n in (blocks, blocks + 1)})
        raise ValueError(
            f"The depth must be 6n+{other_layers} with n at least 1, not {depth}; "
            f"nearest: {' and '.join(map(str, nearest))}."
        )
    return blocks


def rematerialized(block: type[nn.Module], policy: str | None) -> type[nn.Module]:
    """Return a block that keeps for the backward pass only what a policy says, and recomputes.

    Args:
      block: A module called with inputs and `train`.
      policy: Name of a policy in `jax.checkpoint_policies`, such as `"nothing_saveable"`, or None
        for a block that keeps everything.

    Raises:
      ValueError: If there is no policy of that name.
    """
    if policy is None:
        return block
    if policy not in POLICIES:
        raise ValueError(f"remat must be one of {', '.join(POLICIES)}, not {policy!r}.")
    # The arguments are the module, its inputs and train.
    return nn.remat(block, policy=getattr(jax.checkpoint_policies, policy), static_argnums=(2,))


class PreActBlock(nn.Module):
    """Basic pre-activation block, norm-relu-conv twice (He et al. 2016, arXiv:1603.05027).

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.

    Attributes:
      width: Number of output channels.
      stride: Stride of the first convolution.
      dtype: Data type of the computation.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        """Return the sum of the shortcut and the residual, `[B, H/stride, W/stride, width]`."""
        active = nn.relu(batch_norm(train=train, dtype=self.dtype, name="norm1")(inputs))
        x = conv(self.width, stride=self.stride, dtype=self.dtype, name="conv1")(active)
        x = nn.relu(batch_norm(train=train, dtype=self.dtype, name="norm2")(x))
        x = conv(self.width, dtype=self.dtype, name="conv2")(x)
        if x.shape == inputs.shape:
            return x + inputs
        shortcut = conv(self.width, kernel=1, stride=self.stride, dtype=self.dtype, name="shortcut")
        return x + shortcut(active)


class Group(nn.Module):
    """Blocks `block0`, `block1`, ... of one width, of which the first takes the stride.

    Attributes:
      block: Makes a block, `block(width=, stride=, name=)`, to be called with inputs and `train`.
      num_blocks: Number of blocks.
      width: Number of output channels.
      stride: Stride of the group.
    """

    block: Callable[..., nn.Module]
    num_blocks: int
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B h w c"]:
        """Return the output of the last block, `[B, H/stride, W/stride, width]`."""
        x = inputs
        for i in range(self.num_blocks):
            stride = self.stride if i == 0 else 1
            x = self.block(width=self.width, stride=stride, name=f"block{i}")(x, train)
        return x
