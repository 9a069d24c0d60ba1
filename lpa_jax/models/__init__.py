"""Networks of the papers, as Flax modules whose paths are the sites of perturbations."""

from collections.abc import Sequence
import re
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lpa_jax.models.layers import HEADS
from lpa_jax.models.preact_resnet import PreActResNet as PreActResNet
from lpa_jax.models.resnet import ResNet as ResNet
from lpa_jax.models.small_cnn import SmallCNN as SmallCNN
from lpa_jax.models.wide_resnet import WideResNet as WideResNet


def create(
    name: str,
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
    head: str = "linear",
    **options: Any,
) -> nn.Module:
    """Make a network by name.

    Args:
      name: `"wrn_{depth}_{k}"`, `"resnet_{depth}"`, `"se_resnet_{depth}"`, `"preact_resnet_18"`,
        `"preact_resnet_34"` or `"small_cnn"`.
      num_classes: Number of logits.
      mean: What to subtract from the inputs, one number or one for each channel.
      std: What to divide the centered inputs by, likewise.
      dtype: Data type of the computation; parameters, statistics and logits are float32.
      head: `"linear"`, or `"normalized"`: logits are `30 cos(features, w_c)`, as LDAM and additive
        margins need.
      **options: Further attributes of the network, such as the `width` of `"small_cnn"`.

    Returns:
      The network, to be called with float images `[B, H, W, C]` and `train=`.

    Raises:
      ValueError: If there is no network of that name, none of that depth, or no such head.
      TypeError: If the network has no such option.

    Example:
      >>> from lpa_jax.models import create
      >>> model = create("wrn_16_8", num_classes=10, mean=(0.5,), std=(0.25,))
      >>> model.depth, model.widen_factor
      (16, 8)
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, not {head!r}.")
    common: dict[str, Any] = dict(
        num_classes=num_classes, mean=tuple(mean), std=tuple(std), dtype=dtype, head=head, **options
    )
    family, *sizes = re.split(r"_(?=\d)", name)
    match family, *(int(size) if re.fullmatch(r"[1-9]\d*", size) else size for size in sizes):
        case "wrn", int(depth), int(widen_factor):
            return WideResNet(depth=depth, widen_factor=widen_factor, **common)
        case "resnet", int(depth):
            return ResNet(depth=depth, **common)
        case "se_resnet", int(depth):
            return ResNet(depth=depth, squeeze_excite=True, **common)
        case "preact_resnet", 18:
            return PreActResNet(stage_sizes=(2, 2, 2, 2), **common)
        case "preact_resnet", 34:
            return PreActResNet(stage_sizes=(3, 4, 6, 3), **common)
        case ("small_cnn",):
            return SmallCNN(**common)
    raise ValueError(
        f"There is no network {name!r}; the names are wrn_{{depth}}_{{k}} (such as wrn_16_8 and "
        "wrn_28_10), resnet_{depth} (such as resnet_20), se_resnet_{depth} (such as "
        "se_resnet_110), preact_resnet_18, preact_resnet_34 and small_cnn."
    )
