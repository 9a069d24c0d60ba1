"""DomainBed's convolutional network for images of MNIST."""

from flax import linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lpa_jax.models.layers import classify, conv, normalize

GROUPS = ((64, 1), (128, 2), (128, 1), (128, 1))
"""The channels and the stride of each convolution."""


class ReluNormGroup(nn.Module):
    """Convolution with bias, relu, and then group normalization in 8 groups of channels.

    Attributes:
      width: Number of output channels, a multiple of 8.
      stride: Stride of the convolution.
      dtype: Data type of the computation.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        """Return the activation, `[B, ceil(H/stride), ceil(W/stride), width]`."""
        x = conv(self.width, stride=self.stride, use_bias=True, dtype=self.dtype, name="conv1")(
            inputs
        )
        norm = nn.GroupNorm(
            8, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm1"
        )
        return norm(nn.relu(x))


class MNISTCNN(nn.Module):
    """Four convolutions with group normalization (Wu & He 2018, arXiv:1803.08494), as in DomainBed.

    For RotatedMNIST and ColoredMNIST, images of 28x28 pixels and 1 or 2 channels; any size and
    number of channels will do. Its modules are `group1` to `group4` (of 64, 128, 128 and 128
    channels, the first at the resolution of the images and the others at half of it), `features`,
    the 128 means over the positions, and `head`.

    *Ours*: kernels begin He-normal by fan out and biases at 0, as in the other networks here, where
    DomainBed has PyTorch's defaults.

    Attributes:
      num_classes: Number of logits.
      mean: What to subtract from the inputs, one number or one for each channel; 0 in DomainBed.
      std: What to divide the centered inputs by, likewise; 1 in DomainBed.
      dtype: Data type of the computation; parameters and logits are float32.
      head: `"linear"`, or `"normalized"`: logits are `30 cos(features, w_c)`, as LDAM and additive
        margins need; see `layers.NormalizedHead`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax.models import MNISTCNN
      >>> model = MNISTCNN(num_classes=2)
      >>> images = jnp.zeros([3, 28, 28, 2])
      >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
      >>> jax.eval_shape(model.apply, variables, images).shape
      (3, 2)

    References:
      Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization, ICLR 2021, arXiv:2007.01434.
    """

    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: DTypeLike = jnp.float32
    head: str = "linear"

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B H W C"], *, train: bool = False
    ) -> Float32[Array, "B K"]:
        """Return the logits, float32 `[B, num_classes]`.

        Args:
          inputs: Images with pixels in [0, 1], floating `[B, H, W, C]`.
          train: Without effect: nothing is drawn, and each image is normalized by itself.

        Raises:
          TypeError: If `inputs` are not floating.
          ValueError: If `inputs` do not fit `mean` and `std`, or there is no such `head`.
        """
        del train
        x = normalize(inputs, self.mean, self.std, self.dtype)
        for number, (width, stride) in enumerate(GROUPS, start=1):
            x = ReluNormGroup(width, stride, self.dtype, name=f"group{number}")(x)
        return classify(x, self.num_classes, self.head)
