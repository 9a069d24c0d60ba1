"""Wide residual networks."""

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
    PreActBlock,
    rematerialized,
)


class WideResNet(nn.Module):
    """Wide residual network WRN-depth-k (Zagoruyko & Komodakis 2016, arXiv:1605.07146).

    Its modules are `stem`, `group1`, `group2`, `group3` (of k * 16, 32 and 64 channels at 1, 1/2
    and 1/4 of the resolution; with modules `block0`, `block1`, ...), `norm`, `features` and
    `head`. There is no dropout.

    Attributes:
      depth: Number of convolutions of the deepest path and the head, 6n+4.
      widen_factor: The paper's k.
      num_classes: Number of logits.
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
      ValueError: If `depth` is not 6n+4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax.models import WideResNet
      >>> model = WideResNet(depth=16, widen_factor=8, num_classes=10)
      >>> images = jnp.zeros([2, 32, 32, 3])
      >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
      >>> jax.eval_shape(lambda v: model.apply(v, images, train=False), variables).shape
      (2, 10)
    """

    depth: int
    widen_factor: int
    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: DTypeLike = jnp.float32
    remat: str | None = None
    head: str = "linear"
    freeze_norm: bool = False

    def __post_init__(self):
        blocks_per_group(self.depth, 4)
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
        block = functools.partial(rematerialized(PreActBlock, self.remat), dtype=self.dtype)
        num_blocks = blocks_per_group(self.depth, 4)
        x = normalize(inputs, self.mean, self.std, self.dtype)
        x = conv(16, dtype=self.dtype, name="stem")(x)
        for i in range(3):
            width, stride = 2**i * 16 * self.widen_factor, 1 if i == 0 else 2
            x = Group(block, num_blocks, width, stride, name=f"group{i + 1}")(x, train=train)
        x = nn.relu(batch_norm(train=train, dtype=self.dtype, name="norm")(x))
        return classify(x, self.num_classes, self.head)
