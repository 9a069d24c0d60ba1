"""A small convolutional network for small images."""

from flax import linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lpa_jax.models.layers import batch_norm, classify, conv, normalize


class ConvGroup(nn.Module):
    """Convolution, batch normalization and relu.

    Attributes:
      width: Number of output channels.
      stride: Stride of the convolution.
      dtype: Data type of the computation.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B h w c"]:
        """Return the activation, `[B, H/stride, W/stride, width]`."""
        x = conv(self.width, stride=self.stride, dtype=self.dtype, name="conv1")(inputs)
        return nn.relu(batch_norm(train=train, dtype=self.dtype, name="norm1")(x))


class SmallCNN(nn.Module):
    """Three convolutions with batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167).

    Made to learn scikit-learn's digits, gray images of 8x8 pixels, in seconds on a CPU. Its modules
    are `group1`, `group2`, `group3` (of 1, 2 and 4 times `width` channels at 1, 1/2 and 1/4 of the
    resolution), `features` and `head`.

    Attributes:
      num_classes: Number of logits.
      width: Number of channels of the first group.
      mean: What to subtract from the inputs, one number or one for each channel.
      std: What to divide the centered inputs by, likewise.
      dtype: Data type of the computation; parameters, statistics and logits are float32.
      head: `"linear"`, or `"normalized"`: logits are `30 cos(features, w_c)`, as LDAM and additive
        margins need; see `layers.NormalizedHead`.
      freeze_norm: Whether training too normalizes by the running statistics, and leaves them as
        they are; scales and biases still learn.

    Raises:
      ValueError: If `width` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax.models import SmallCNN
      >>> model = SmallCNN(num_classes=10)
      >>> images = jnp.zeros([2, 8, 8, 1])
      >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
      >>> jax.eval_shape(lambda v: model.apply(v, images, train=False), variables).shape
      (2, 10)
    """

    num_classes: int
    width: int = 32
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: DTypeLike = jnp.float32
    head: str = "linear"
    freeze_norm: bool = False

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, not {self.width}.")
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
        x = normalize(inputs, self.mean, self.std, self.dtype)
        for i in range(3):
            width, stride = 2**i * self.width, 1 if i == 0 else 2
            x = ConvGroup(width, stride, self.dtype, name=f"group{i + 1}")(x, train=train)
        return classify(x, self.num_classes, self.head)
