"""What is installed beside the core: the trainer's packages."""

import importlib.util

TRAIN = (
    "absl",
    "flatbuffers",
    "grain",
    "matplotlib",
    "ml_collections",
    "orbax",
    "PIL",
    "rich",
    "safetensors",
    "scipy",
    "tensorboardX",
)
"""Modules of the packages that the extra `train` in `setup.cfg` names."""


def require_train(what: str) -> None:
    """Raise `ImportError`, which names the remedy, unless the trainer's packages are installed.

    Args:
      what: What needs them.
    """
    absent = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(
            f"{what} needs packages that are not installed ({', '.join(absent)}): "
            "pip install 'lpa_jax[train]'"
        )
