"""Networks of the papers, as Flax modules whose paths are the sites of perturbations."""

from collections.abc import Callable, Collection, Sequence
import functools
import inspect
import re
from typing import Any, NamedTuple

from flax import linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lpa_jax.models import efficientnet_lite, imagenet_resnet, vit
from lpa_jax.models.convnext import ConvNeXt as ConvNeXt
from lpa_jax.models.convolution import conv_general_dilated as conv_general_dilated
from lpa_jax.models.efficientnet_lite import EfficientNetLite as EfficientNetLite
from lpa_jax.models.imagenet_resnet import ImageNetResNet as ImageNetResNet
from lpa_jax.models.layers import HEADS
from lpa_jax.models.mnist_cnn import MNISTCNN as MNISTCNN
from lpa_jax.models.preact_resnet import PreActResNet as PreActResNet
from lpa_jax.models.resnet import ResNet as ResNet
from lpa_jax.models.small_cnn import SmallCNN as SmallCNN
from lpa_jax.models.vit import ViT as ViT
from lpa_jax.models.wide_resnet import WideResNet as WideResNet
from lpa_jax.registry import load_object, Registry

PREACT_SIZES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def _wrn(depth: int, widen_factor: int, **common: Any) -> nn.Module:
    return WideResNet(depth=depth, widen_factor=widen_factor, **common)


def _resnet(depth: int, **common: Any) -> nn.Module:
    return ResNet(depth=depth, **common)


def _se_resnet(depth: int, **common: Any) -> nn.Module:
    return ResNet(depth=depth, squeeze_excite=True, **common)


def _preact_resnet(depth: int, **common: Any) -> nn.Module:
    return PreActResNet(stage_sizes=PREACT_SIZES[depth], **common)


def _imagenet_resnet(depth: int, **common: Any) -> nn.Module:
    stage_sizes, bottleneck = imagenet_resnet.STAGES[depth]
    return ImageNetResNet(stage_sizes=stage_sizes, bottleneck=bottleneck, **common)


def _efficientnet_lite(variant: int, **common: Any) -> nn.Module:
    return EfficientNetLite(variant=variant, **common)


def _vit(size: str, patch: int, **common: Any) -> nn.Module:
    width, num_heads = vit.SIZES[size]
    return ViT(patch=patch, width=width, num_heads=num_heads, **common)


def _convnext_t(**common: Any) -> nn.Module:
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), **common)


class Family(NamedTuple):
    """Networks that differ in numbers of their names.

    Attributes:
      make: `make(*numbers, num_classes=, mean=, std=, dtype=, head=, **options)`, a Flax module.
      sizes: What the numbers are, `("depth", "k")`; none for a network without.
      examples: Some names, or all where there are few.
      known: What the first number may be; empty where that is for the network to tell.
    """

    make: Callable[..., nn.Module]
    sizes: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    known: Collection[int] = ()


NETWORKS = Registry(
    "network",
    {
        "wrn": Family(_wrn, ("depth", "k"), ("wrn_16_8", "wrn_28_10")),
        "resnet": Family(_resnet, ("depth",), ("resnet_20", "resnet_32")),
        "se_resnet": Family(_se_resnet, ("depth",), ("se_resnet_110",)),
        "preact_resnet": Family(
            _preact_resnet, ("depth",), ("preact_resnet_18", "preact_resnet_34"), PREACT_SIZES
        ),
        "imagenet_resnet": Family(
            _imagenet_resnet,
            ("depth",),
            ("imagenet_resnet_18", "imagenet_resnet_50"),
            imagenet_resnet.STAGES,
        ),
        "efficientnet_lite": Family(
            _efficientnet_lite,
            ("variant",),
            ("efficientnet_lite_0",),
            efficientnet_lite.VARIANTS,
        ),
        **{
            f"vit_{size}": Family(functools.partial(_vit, size), ("patch",), (f"vit_{size}_16",))
            for size in vit.SIZES
        },
        "convnext_t": Family(_convnext_t),
        "mnist_cnn": Family(MNISTCNN),
        "small_cnn": Family(SmallCNN),
    },
)
"""Families of networks by the first part of their names."""


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
        `"preact_resnet_34"`, `"mnist_cnn"`, `"small_cnn"`; for images of usual size
        `"imagenet_resnet_{18,34,50,101}"`, `"efficientnet_lite_{0,1,2}"`, `"vit_{ti,s,b}_{patch}"`,
        `"convnext_t"`; a name in `NETWORKS`, or `"package.module:Class"`, a
        Flax module or function of your own. That is given those of the arguments below that it
        takes.
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
      >>> create("flax.linen:Dense", num_classes=10, mean=(0.5,), std=(0.25,), features=10).features
      10
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, not {head!r}.")
    common: dict[str, Any] = {"num_classes": num_classes, "dtype": dtype, "head": head}
    common |= {"mean": tuple(mean), "std": tuple(std)}
    if ":" in name:
        return _own(name, load_object(name), common, options)
    first, *sizes = re.split(r"_(?=\d)", name)
    numbers = [int(size) for size in sizes if re.fullmatch(r"0|[1-9]\d*", size)]
    family = NETWORKS.get(first)
    known = family is not None and len(numbers) == len(sizes) == len(family.sizes)
    # Zero is a number of a variant alone.
    if family is None or not known or not _has(family, numbers):
        raise ValueError(f"There is no network {name!r}; the names are {network_names()}.")
    return family.make(*numbers, **common, **options)


def _has(family: Family, numbers: list[int]) -> bool:
    return numbers[0] in family.known if family.known else all(numbers)


def network_names() -> str:
    """Return the names of networks, with examples."""
    words = []
    for name, family in NETWORKS.items():
        pattern = "".join(f"_{{{size}}}" for size in family.sizes)
        told = f" (such as {' and '.join(family.examples)})" if family.examples else ""
        words.append(f"{name}{pattern}{told}")
    return f"{', '.join(words)}, and package.module:Class of your own"


def _own(
    name: str, make: Callable[..., Any], common: dict[str, Any], options: dict[str, Any]
) -> nn.Module:
    """Return a user's own network, given what it takes."""
    if not callable(make):
        raise ValueError(f"{name} must be a Flax Linen module, or return one, not {make!r:.100}.")
    taken = inspect.signature(make).parameters
    if common["head"] != "linear" and "head" not in taken:
        raise ValueError(
            f"{name} takes no head, and model.head is {common['head']!r}: leave it 'linear', or "
            "give the network that attribute."
        )
    made = make(**{key: value for key, value in common.items() if key in taken}, **options)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} must be a Flax Linen module, or return one, not {made!r:.100}.")
    return made
