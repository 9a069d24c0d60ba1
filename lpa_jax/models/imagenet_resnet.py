"""Residual networks for ImageNet, with the names and numbers of torchvision's."""

import functools

from flax import linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lpa_jax.models.layers import batch_norm, classify, conv, Group, normalize, rematerialized
from lpa_jax.models.pretrained import Arrays, IMAGENET, Inputs, renamed, Shapes

STAGES = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}
"""Numbers of blocks by depth, and whether they are bottlenecks."""
_THEIRS, _OURS = r"layer(\d)\.(\d+)\.", r"group\1/block\2/"
NAMES = (
    (r"conv1", "stem"),
    (r"bn1", "stem_norm"),
    (_THEIRS + r"conv(\d)", _OURS + r"conv\3"),
    (_THEIRS + r"bn(\d)", _OURS + r"norm\3"),
    (_THEIRS + r"downsample\.0", _OURS + "shortcut"),
    (_THEIRS + r"downsample\.1", _OURS + "shortcut_norm"),
    (r"fc", "head"),
)
"""Of torchvision and timm."""


class ImageNetBlock(nn.Module):
    """Residual block with batch normalization, then relu of the sum (He et al. 2015).

    Where the shape changes, the shortcut is a 1x1 convolution with a normalization (the paper's
    option B). A bottleneck takes its stride at the 3x3 convolution, known as version 1.5.

    Attributes:
      width: Number of channels of the 3x3 convolutions.
      stride: Stride of the first of them.
      bottleneck: Whether there is one 3x3 convolution between two 1x1, the last of 4 times the
        width, instead of two 3x3.
      dtype: Data type of the computation.
    """

    width: int
    stride: int = 1
    bottleneck: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        """Return the activated sum, `[B, H/stride, W/stride, width]`, or 4 times the width."""
        # Of each convolution: kernel, stride, width.
        layers = [(3, self.stride, self.width), (3, 1, self.width)]
        if self.bottleneck:
            layers = [(1, 1, self.width), layers[0], (1, 1, 4 * self.width)]
        x = inputs
        for i, (kernel, stride, width) in enumerate(layers, start=1):
            x = x if i == 1 else nn.relu(x)
            x = conv(width, kernel=kernel, stride=stride, dtype=self.dtype, name=f"conv{i}")(x)
            x = batch_norm(train=train, dtype=self.dtype, name=f"norm{i}")(x)
        shortcut = inputs
        if x.shape != inputs.shape:
            width, stride = x.shape[-1], self.stride
            shortcut = conv(width, kernel=1, stride=stride, dtype=self.dtype, name="shortcut")(
                inputs
            )
            shortcut = batch_norm(train=train, dtype=self.dtype, name="shortcut_norm")(shortcut)
        return nn.relu(x + shortcut)


class ImageNetResNet(nn.Module):
    """Residual network for ImageNet (He et al. 2015, arXiv:1512.03385, section 4.1).

    Its modules are `stem`, `stem_norm`, `group1`, ... (with modules `block0`, `block1`, ...; the
    first at 1/4 of the resolution, the others at half of the one before), `features` and `head`.

    Attributes:
      stage_sizes: Number of blocks of each group; `STAGES` has those of the paper.
      num_classes: Number of logits.
      bottleneck: Whether blocks are bottlenecks, as from 50 layers on.
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

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax.models import ImageNetResNet
      >>> model = ImageNetResNet(stage_sizes=(3, 4, 6, 3), bottleneck=True, num_classes=7)
      >>> images = jnp.zeros([2, 224, 224, 3])
      >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
      >>> jax.eval_shape(lambda v: model.apply(v, images, train=False), variables).shape
      (2, 7)
    """

    stage_sizes: tuple[int, ...]
    num_classes: int
    bottleneck: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: DTypeLike = jnp.float32
    remat: str | None = None
    head: str = "linear"
    head_dropout: float = 0.0
    freeze_norm: bool = False

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
        block = functools.partial(
            rematerialized(ImageNetBlock, self.remat), bottleneck=self.bottleneck, dtype=self.dtype
        )
        by_batch = train and not self.freeze_norm
        x = normalize(inputs, self.mean, self.std, self.dtype)
        x = conv(64, kernel=7, stride=2, dtype=self.dtype, name="stem")(x)
        x = nn.relu(batch_norm(train=by_batch, dtype=self.dtype, name="stem_norm")(x))
        pads = ((1, 1), (1, 1))
        x = nn.max_pool(x, (3, 3), (2, 2), pads)  # pyright: ignore[reportArgumentType]
        for i, num_blocks in enumerate(self.stage_sizes):
            width, stride = 2**i * 64, 1 if i == 0 else 2
            x = Group(block, num_blocks, width, stride, name=f"group{i + 1}")(x, train=by_batch)
        return classify(x, self.num_classes, self.head, dropout=self.head_dropout, train=train)

    @nn.nowrap
    def pretrained_variables(self, arrays: Arrays, shapes: Shapes) -> Arrays:
        """Return weights of torchvision or timm by paths of variables."""
        return renamed(arrays, NAMES)

    @nn.nowrap
    def pretrained_inputs(self) -> Inputs:
        """Return the inputs of torchvision's weights."""
        return IMAGENET
