"""Pretrained weights of others, fitted to the variables of a network."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax.numpy as jnp
import numpy as np

from lpa_jax.models import weight_files
from lpa_jax.models.pretrained import Arrays, Pretrainable
from lpa_jax.models.weight_files import SOURCES as SOURCES

SHOWN = 3
"""Names of each kind in an error."""
REMEDY = "give the network that they are of, with images of their size"


def load_pretrained(source: str, model: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return variables with the weights of a file.

    No file needs PyTorch, and nothing that a file holds is run. The head stays as it is in
    `variables` if the file has none, or one of other shapes, as of another number of classes.

    Args:
      source: `"safetensors:PATH"` or `"torch:PATH"`, with the names of torchvision or timm;
        `"npz:PATH"`, a vision transformer of AugReg or big_vision; `"pypi:efficientnet-lite0"`, of
        an installed package; or `"KIND:REST"` of a reader that was registered in `SOURCES`, whose
        names may also be the paths of variables, such as `"params/head/bias"`.
      model: The network, which is `Pretrainable`, unless the names are the paths of variables.
      variables: Its variables, as `model.init` returns them.

    Returns:
      A new tree, of the same shapes and dtypes. Positions of a vision transformer are interpolated
      for images of another size.

    Raises:
      ValueError: If the weights cannot be read, or do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, os, tempfile
      >>> from lpa_jax.models import ViT
      >>> from lpa_jax.models.weights import load_pretrained
      >>> model = ViT(patch=4, num_classes=3, width=6, depth=0)
      >>> variables = model.init(jax.random.key(0), jnp.zeros([1, 8, 8, 3]))
      >>> weights = {"cls": np.ones([1, 1, 6]), "pos_embedding": np.ones([1, 4, 6])}
      >>> weights |= {"embedding/kernel": np.ones([4, 4, 3, 6]), "embedding/bias": np.ones(6)}
      >>> weights |= {f"Transformer/encoder_norm/{name}": np.ones(6) for name in ("scale", "bias")}
      >>> path = os.path.join(tempfile.mkdtemp(), "vit.npz")
      >>> np.savez(path, **weights)
      >>> load_pretrained(f"npz:{path}", model, variables)["params"]["embedding"]["bias"]
      Array([1., 1., 1., 1., 1., 1.], dtype=float32)
    """
    return fitted(weight_files.read(source), source, model, variables)


class Fit(NamedTuple):
    """How weights fit the variables of a network.

    Attributes:
      arrays: By paths of variables. The head is that of the variables where the weights have none,
        or one of other shapes.
      classes: Number of classes of the weights' own head; None where they have none.
      missing: Paths of variables that the weights lack.
      left_over: Names of weights that are no variables.
      reshaped: Paths of those of another shape, with that shape and the variable's.
    """

    arrays: dict[str, Any]
    classes: int | None
    missing: list[str]
    left_over: list[str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def compare(arrays: Arrays, source: str, model: Any, variables: Mapping[str, Any]) -> Fit:
    """Return how the arrays of a source fit a network.

    Args:
      arrays: From `weight_files.read(source)`.
      source: What an error calls them.
      model: As of `load_pretrained`.
      variables: Its variables, or their shapes.

    Raises:
      ValueError: If no names are known of such a network, or arrays cannot be its variables.
    """
    known = isinstance(model, Pretrainable)
    if not known and not any(name.startswith("params/") for name in arrays):
        raise ValueError(
            f"No pretrained weights are known for {type(model).__name__}: choose another network, "
            "or give it the methods of lpa_jax.models.pretrained.Pretrainable."
        )
    ours: dict[str, Any] = flatten_dict(variables, sep="/")
    shapes = {path: np.shape(leaf) for path, leaf in ours.items()}
    try:
        found = model.pretrained_variables(arrays, shapes) if known else dict(arrays)
    except ValueError as error:
        raise ValueError(f"{_unfit(source, model)} ({error}): {REMEDY}.") from error
    head = _head_shapes(found)
    if head != _head_shapes(ours):
        found = {path: array for path, array in found.items() if not _of_head(path)}
        found |= {path: leaf for path, leaf in ours.items() if _of_head(path)}
    pairs = {path: (np.shape(found[path]), shapes[path]) for path in ours if path in found}
    return Fit(
        found,
        # Of the bias as of the kernel, it is the last axis.
        next((shape[-1] for shape in head.values() if shape), None),
        missing=[path for path in ours if path not in found],
        left_over=[path for path in found if path not in ours],
        reshaped={path: pair for path, pair in pairs.items() if pair[0] != pair[1]},
    )


def fitted(arrays: Arrays, source: str, model: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Do what `load_pretrained` does, with the arrays that were read from the source."""
    fit = compare(arrays, source, model, variables)
    if told := misfit(fit, source, model):
        raise ValueError(told)
    ours: dict[str, Any] = flatten_dict(variables, sep="/")
    return unflatten_dict(
        {path: jnp.asarray(fit.arrays[path], leaf.dtype) for path, leaf in ours.items()}, sep="/"
    )


def misfit(fit: Fit, source: str, model: Any) -> str:
    """Return a sentence of what does not fit; empty where everything does."""
    apart = [
        ("missing", fit.missing),
        ("left over", fit.left_over),
        ("of another shape", [f"{p} {a} for {b}" for p, (a, b) in fit.reshaped.items()]),
    ]
    counts = [f"{len(paths)} {what} ({_few(paths)})" for what, paths in apart if paths]
    return f"{_unfit(source, model)}, with {', '.join(counts)}: {REMEDY}." if counts else ""


def _unfit(source: str, model: Any) -> str:
    return f"The weights {source} do not fit {type(model).__name__}"


def _of_head(path: str) -> bool:
    return path.startswith("params/head/")


def _head_shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(leaf) for path, leaf in leaves.items() if _of_head(path)}


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
