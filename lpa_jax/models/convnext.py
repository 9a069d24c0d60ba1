"""ConvNeXt."""

import functools

from flax import linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lpa_jax.models.convolution import conv_general_dilated
from lpa_jax.models.layers import (
    classify_features,
    Group,
    layer_norm,
    normalize,
    rematerialized,
)
from lpa_jax.models.pretrained import Arrays, IMAGENET, Inputs, renamed, Shapes

_INIT = nn.initializers.truncated_normal(0.02)
_conv = functools.partial(nn.Conv, kernel_init=_INIT, conv_general_dilated=conv_general_dilated)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, normalization and a perceptron; scaled, and added to the inputs.

    Attributes:
      width: Number of channels.
      stride: 1; groups are entered by strided convolutions of their own.
      dtype: Data type of the computation.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        """Return the sum, `[B, H, W, C]`, alike in training."""
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_INIT)
        x = _conv(
            self.width,
            (7, 7),
            padding=3,
            feature_group_count=self.width,
            dtype=self.dtype,
            name="depthwise",
        )(inputs)
        x = layer_norm(dtype=self.dtype, name="norm")(x)
        x = nn.gelu(dense(4 * self.width, name="mlp1")(x), approximate=False)
        x = dense(self.width, name="mlp2")(x)
        scale = self.param("layer_scale", nn.initializers.constant(1e-6), (self.width,))
        return inputs + scale.astype(x.dtype) * x


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al. 2022, arXiv:2201.03545).

    Its modules are `stem`, `stem_norm`, `group1`, `downsample2_norm`, `downsample2`, `group2`, ...
    (with modules `block0`, ...; the first at 1/4 of the resolution, the others at half of the one
    before), `features` (the normalized mean over positions) and `head`.

    Attributes:
      stage_sizes: Number of blocks of each group, (3, 3, 9, 3) for ConvNeXt-T.
      widths: Number of channels of each.
      num_classes: Number of logits.
      mean: What to subtract from the inputs, one number or one for each channel.
      std: What to divide the centered inputs by, likewise.
      dtype: Data type of the computation; parameters, statistics and logits are float32.
      remat: What blocks keep for the backward pass instead of everything, to save memory:
        `"nothing_saveable"`, `"dots_saveable"` or `"dots_with_no_batch_dims_saveable"`, policies of
        `jax.checkpoint_policies`.
      head: `"linear"`, or `"normalized"`: logits are `30 cos(features, w_c)`, as LDAM and additive
        margins need; see `layers.NormalizedHead`.
      head_dropout: Share of the features that are dropped in training.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax.models import ConvNeXt
      >>> model = ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), num_classes=7)
      >>> images = jnp.zeros([2, 224, 224, 3])
      >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
      >>> jax.eval_shape(lambda v: model.apply(v, images, train=False), variables).shape
      (2, 7)
    """

    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: DTypeLike = jnp.float32
    remat: str | None = None
    head: str = "linear"
    head_dropout: float = 0.0

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B H W C"], *, train: bool = False
    ) -> Float32[Array, "B K"]:
        """Return the logits, float32 `[B, num_classes]`.

        Args:
          inputs: Images with pixels in [0, 1], floating `[B, H, W, C]`.
          train: Whether to drop features.

        Raises:
          TypeError: If `inputs` are not floating.
          ValueError: If `inputs` do not fit `mean` and `std`.
        """
        block = functools.partial(rematerialized(ConvNeXtBlock, self.remat), dtype=self.dtype)

        def shrink(factor, width, name):
            return _conv(
                width, (factor, factor), factor, padding="VALID", dtype=self.dtype, name=name
            )

        x = normalize(inputs, self.mean, self.std, self.dtype)
        for i, (num_blocks, width) in enumerate(
            zip(self.stage_sizes, self.widths, strict=True), start=1
        ):
            if i == 1:
                x = shrink(4, width, "stem")(x)
                x = layer_norm(dtype=self.dtype, name="stem_norm")(x)
            else:
                x = layer_norm(dtype=self.dtype, name=f"downsample{i}_norm")(x)
                x = shrink(2, width, f"downsample{i}")(x)
            x = Group(block, num_blocks, width, name=f"group{i}")(x, train=train)
        pooled = x.mean(axis=(1, 2), dtype=jnp.float32)
        return classify_features(
            layer_norm(dtype=jnp.float32, name="features")(pooled),
            self.num_classes,
            self.head,
            dropout=self.head_dropout,
            train=train,
        )

    @nn.nowrap
    def pretrained_variables(self, arrays: Arrays, shapes: Shapes) -> Arrays:
        """Return weights of torchvision or timm by paths of variables."""
        names = [
            (r"stem\.0|features\.0\.0", "stem"),
            (r"stem\.1|features\.0\.1", "stem_norm"),
            (r"head\.norm|classifier\.0", "features"),
            (r"head\.fc|classifier\.2", "head"),
        ]
        for i in range(1, len(self.stage_sizes) + 1):
            # torchvision counts what leads to a group too.
            down = rf"(?:stages\.{i - 1}\.downsample|features\.{2 * i - 2})\."
            block = rf"(?:stages\.{i - 1}\.blocks|features\.{2 * i - 1})\.(\d+)\."
            ours = rf"group{i}/block\1/"
            names += [
                (down + "0", f"downsample{i}_norm"),
                (down + "1", f"downsample{i}"),
                (block + r"(?:conv_dw|block\.0)", ours + "depthwise"),
                (block + r"(?:norm|block\.2)", ours + "norm"),
                (block + r"(?:mlp\.fc1|block\.3)", ours + "mlp1"),
                (block + r"(?:mlp\.fc2|block\.5)", ours + "mlp2"),
                (block + r"(?:gamma|layer_scale)", ours + "layer_scale"),
            ]
        found = renamed(arrays, tuple(names))
        # torchvision has two axes for the positions.
        return {p: a.squeeze() if p.endswith("layer_scale") else a for p, a in found.items()}

    @nn.nowrap
    def pretrained_inputs(self) -> Inputs:
        """Return the inputs of torchvision's and timm's weights."""
        return IMAGENET
