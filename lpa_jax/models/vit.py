"""Vision transformers."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32
import numpy as np

from lpa_jax.models.convolution import conv_general_dilated
from lpa_jax.models.layers import classify_features, layer_norm, normalize, rematerialized
from lpa_jax.models.pretrained import Arrays, HALF, Inputs, renamed, Shapes

SIZES = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}
"""Widths, and numbers of heads."""
PARTS = ("query", "key", "value")
_BLOCK = r"(?:blocks\.|encoder\.layers\.encoder_layer_|Transformer\.encoderblock_)(\d+)\."
_ATTENTION = _BLOCK + r"(?:attn|self_attention|MultiHeadDotProductAttention_\d)\."
NAMES = (
    (r"cls_token|class_token|cls", "class_token"),
    (
        r"pos_embed|encoder\.pos_embedding|Transformer\.posembed_input\.pos_embedding",
        "positions",
    ),
    (r"pos_embedding", "patch_positions"),
    (r"patch_embed\.proj|conv_proj|embedding", "embedding"),
    (_BLOCK + r"(?:norm1|ln_1|LayerNorm_0)", r"block\1/norm1"),
    (_BLOCK + r"(?:norm2|ln_2|LayerNorm_[12])", r"block\1/norm2"),
    (_ATTENTION + r"(?:qkv|in_proj)", r"block\1/attention/qkv"),
    (_ATTENTION + r"(query|key|value)", r"block\1/attention/\2"),
    (_ATTENTION + r"(?:proj|out_proj|out)", r"block\1/attention/out"),
    (_BLOCK + r"(?:mlp\.(?:fc1|0|linear_1)|MlpBlock_\d\.Dense_0)", r"block\1/mlp1"),
    (_BLOCK + r"(?:mlp\.(?:fc2|3|linear_2)|MlpBlock_\d\.Dense_1)", r"block\1/mlp2"),
    (r"norm|encoder\.ln|Transformer\.encoder_norm", "features"),
    (r"head|heads\.head", "head"),
)
"""Of timm, torchvision, and the files of AugReg and big_vision."""


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each of normalized inputs and added to them.

    Attributes:
      num_heads: Number of heads of the attention.
      dtype: Data type of the computation.
    """

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "B T C"], train: bool) -> Float[Array, "B T C"]:
        """Return the sums, `[B, T, C]`, alike in training."""
        width = inputs.shape[-1]
        x = layer_norm(dtype=self.dtype, name="norm1")(inputs)
        x = inputs + nn.MultiHeadDotProductAttention(
            self.num_heads, dtype=self.dtype, force_fp32_for_softmax=True, name="attention"
        )(x)
        y = layer_norm(dtype=self.dtype, name="norm2")(x)
        y = _dense(4 * width, self.dtype, "mlp1")(y)
        return x + _dense(width, self.dtype, "mlp2")(nn.gelu(y, approximate=False))


class ViT(nn.Module):
    """Vision transformer with a class token (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Its modules are `embedding`, `block0`, `block1`, ..., or `blocks` with `scan`, `features` (the
    normalized class token) and `head`. Positions are learned, for images of one size; pretrained
    ones are interpolated for another.

    Attributes:
      patch: Side of the patches.
      num_classes: Number of logits.
      width: Entries of a token.
      depth: Number of blocks.
      num_heads: Number of heads of each attention, which divides the width.
      scan: Whether one block runs in a loop on stacked parameters, which compiles sooner.
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
      >>> from lpa_jax.models import ViT
      >>> model = ViT(patch=16, num_classes=7, width=192, num_heads=3)
      >>> images = jnp.zeros([2, 224, 224, 3])
      >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
      >>> jax.eval_shape(lambda v: model.apply(v, images, train=False), variables).shape
      (2, 7)
    """

    patch: int
    num_classes: int
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    scan: bool = False
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
          ValueError: If `inputs` do not fit `mean` and `std`, or are not made of whole patches.
        """
        x = normalize(inputs, self.mean, self.std, self.dtype)
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"Images of {x.shape[1]}x{x.shape[2]} pixels are not made of whole patches: give "
                f"multiples of {self.patch}."
            )
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
            name="embedding",
        )(x).reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        tokens = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([tokens, x], axis=1)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), shape).astype(x.dtype)
        block = rematerialized(TransformerBlock, self.remat)
        if self.scan:
            x, _ = nn.scan(
                lambda block, x, _: (block(x, train), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )(block(self.num_heads, self.dtype, name="blocks"), x, None)
        else:
            for i in range(self.depth):
                x = block(self.num_heads, self.dtype, name=f"block{i}")(x, train)
        features = layer_norm(dtype=jnp.float32, name="features")(x[:, 0])
        return classify_features(
            features, self.num_classes, self.head, dropout=self.head_dropout, train=train
        )

    @nn.nowrap
    def pretrained_variables(self, arrays: Arrays, shapes: Shapes) -> Arrays:
        """Return weights of timm, torchvision, AugReg or big_vision by paths of variables.

        Raises:
          ValueError: If positions are to be interpolated, but are those of no square grid.
        """
        found = {}
        for path, array in renamed(arrays, NAMES).items():
            if "/attention/qkv/" in path:
                for part, piece in zip(PARTS, np.split(array, 3, axis=-1), strict=True):
                    shape = (*piece.shape[:-1], self.num_heads, -1)
                    found[path.replace("qkv", part)] = piece.reshape(shape)
            elif path.endswith("/attention/out/kernel") and array.ndim == 2:
                found[path] = array.reshape(self.num_heads, -1, array.shape[-1])
            elif path == "params/patch_positions":
                # big_vision gives the class token no position.
                found["params/positions"] = np.pad(array, ((0, 0), (1, 0), (0, 0)))
            else:
                found[path] = array
        if "params/positions" in found:
            number = shapes["params/positions"][1]
            found["params/positions"] = _for_tokens(found["params/positions"], number)
        if not self.scan:
            return found
        stacks: dict[str, list[np.ndarray]] = {}
        for i in range(self.depth):
            for path in [path for path in found if path.startswith(f"params/block{i}/")]:
                stacked = path.replace(f"/block{i}/", "/blocks/")
                stacks.setdefault(stacked, []).append(found.pop(path))
        return found | {path: np.stack(pieces) for path, pieces in stacks.items()}

    @nn.nowrap
    def pretrained_inputs(self) -> Inputs:
        """Return the inputs of AugReg's weights; torchvision's want `pretrained.IMAGENET`."""
        return HALF


def _for_tokens(positions: np.ndarray, number: int) -> np.ndarray:
    """Return positions of a class token and a square grid, interpolated for another grid.

    The class token keeps its own. The grid is resized as an image, by a cubic kernel, which is
    widened where it gets smaller.
    """
    if positions.ndim != 3 or positions.shape[1] == number:
        return positions
    sizes = positions.shape[1] - 1, number - 1
    before, after = (math.isqrt(max(size, 0)) for size in sizes)
    if 0 in (before, after) or (before**2, after**2) != sizes:
        raise ValueError(
            f"the positions of {sizes[0]} patches cannot be interpolated for {sizes[1]}, since "
            "both must be those of a square grid"
        )
    grid = jnp.asarray(positions[:, 1:], jnp.float32).reshape(before, before, -1)
    resized = jax.image.resize(grid, (after, after, grid.shape[-1]), "bicubic")
    patches = np.asarray(resized).reshape(1, after**2, -1)
    return np.concatenate([positions[:, :1], patches], axis=1)


def _dense(features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)
