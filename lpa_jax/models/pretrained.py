"""What a network tells of the pretrained weights that fit it."""

from collections.abc import Mapping
import re
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
"""Of a network's variables, by their paths."""
Names = tuple[tuple[str, str], ...]
"""Names of others, and of ours for the same.

The first of a pair is a regular expression, which must match the whole name of a module or
parameter, with dots between its parts; the second is its path, such as
`r"group\\1/block\\2/conv1"`.
"""

# What PyTorch and Flax call what a layer has.
LEAVES = {
    "weight": "params/{}/scale",
    "bias": "params/{}/bias",
    "running_mean": "batch_stats/{}/mean",
    "running_var": "batch_stats/{}/var",
    "kernel": "params/{}/kernel",
    "scale": "params/{}/scale",
}


class Inputs(NamedTuple):
    """What pretrained weights want as inputs.

    Attributes:
      mean: What was subtracted from pixels in [0, 1], for each channel.
      std: What they were divided by.
      image_size: Side of the images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = 224


IMAGENET = Inputs((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of torchvision's weights, and of most of timm's."""
HALF = Inputs((0.5,) * 3, (0.5,) * 3)
"""Of the vision transformers of Google: pixels in [-1, 1]."""


@runtime_checkable
class Pretrainable(Protocol):
    """A network that pretrained weights fit, as those of this package for real images."""

    def pretrained_variables(self, arrays: Arrays, shapes: Shapes) -> Arrays:
        """Return arrays of others by paths of variables, such as `"params/head/bias"`.

        What has no such path keeps its name, and what is called by its path already stays as it is.
        `renamed` is most of it.

        Args:
          arrays: Those of others, by their names.
          shapes: Of the network's variables, for what depends on the size of images.

        Raises:
          ValueError: If the arrays cannot be brought into these shapes.
        """
        ...

    def pretrained_inputs(self) -> Inputs:
        """Return the inputs that the usual weights want."""
        ...


def renamed(arrays: Mapping[str, np.ndarray], names: Names) -> Arrays:
    r"""Return arrays by paths of variables, with the axes in Flax's order.

    Args:
      arrays: Those of PyTorch by names with dots, or of Flax by names with slashes. What a name
        stands for that `names` lacks keeps it; PyTorch's counts of batches are left out.
      names: Those of modules and parameters.

    Example:
      >>> weights = {"bn1.weight": np.ones(3), "fc.weight": np.ones([5, 3]), "fc.other": np.ones(1)}
      >>> found = renamed(weights, (("bn(.)", r"norm\1"), ("fc", "head")))
      >>> {path: array.shape for path, array in found.items()}
      {'params/norm1/scale': (3,), 'params/head/kernel': (3, 5), 'fc.other': (1,)}
    """
    found = {}
    for name, array in arrays.items():
        # PyTorch's attention has a weight of three projections that is called after no module.
        whole = name.replace("/", ".").removeprefix("params.").replace(".in_proj_", ".in_proj.")
        module, _, leaf = whole.rpartition(".")
        if leaf == "num_batches_tracked":
            continue
        path = _path(module, names)
        if leaf in LEAVES and path:
            path = LEAVES[leaf].format(path)
            if leaf == "weight" and array.ndim > 1:
                # From outputs, inputs, height and width.
                array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
                path = path.removesuffix("scale") + "kernel"
        else:
            path = _path(whole, names)
            path = path and f"params/{path}"
        found[path or name] = array
    return found


def _path(name: str, names: Names) -> str | None:
    for pattern, path in names:
        if match := re.fullmatch(pattern, name):
            return match.expand(path)
    return None
