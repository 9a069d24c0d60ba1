"""What a network tells of the pretrained weights that fit it."""

from typing import NamedTuple

Names = tuple[tuple[str, str], ...]
"""Names of others, and of ours for the same.

The first of a pair is a regular expression, which must match the whole name of a module or
parameter, with dots between its parts. The second is a path below the parameters, such as
`r"group\\1/block\\2/conv1"`. A path that ends with several names in braces,
`"attention/{query,key,value}"`, takes an array apart along its outputs.
"""


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
