"""Pre-activation residual networks of four groups."""

import functools

from flax import linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lpa_jax.models.layers import classify, conv, Group, normalize, PreActBlock, rematerialized


class PreActResNet(nn.Module):
    """Pre-activation network of Manifold Mixup's experiments (Verma et al. 2019, arXiv:1806.05236).

    The units are those of He et al. 2016 (arXiv:1603.05027). As in the published CIFAR code of
    Manifold Mixup, the stem keeps the resolution and nothing is between the last sum and the
    pooling: no normalization, no relu. Its modules are `stem`, `group1`, ... (of 64, 128, 256 and
    512 channels at 1, 1/2, 1/4 and 1/8 of the resolution; with modules `block0`, ...), `features`
    and `head`.

    Attributes:
      stage_sizes: Number of blocks of each group: (2, 2, 2, 2) for 18 layers, (3, 4, 6, 3) for 34.
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

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax.models import PreActResNet
      >>> model = PreActResNet(stage_sizes=(2, 2, 2, 2), num_classes=10)
      >>> images = jnp.zeros([2, 32, 32, 3])
      >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
      >>> jax.eval_shape(lambda v: model.apply(v, images, train=False), variables).shape
      (2, 10)
    """

    stage_sizes: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: DTypeLike = jnp.float32
    remat: str | None = None
    head: str = "linear"
    freeze_norm: bool = False

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
        x = normalize(inputs, self.mean, self.std, self.dtype)
        x = conv(64, dtype=self.dtype, name="stem")(x)
        for i, num_blocks in enumerate(self.stage_sizes):
            width, stride = 2**i * 64, 1 if i == 0 else 2
            x = Group(block, num_blocks, width, stride, name=f"group{i + 1}")(x, train=train)
        return classify(x, self.num_classes, self.head)
