"""What a run leaves in its directory while it goes: JSON lines, TensorBoard, and its own config."""

import hashlib
import json
import math
import pathlib
from typing import Any

from ml_collections import config_dict
import numpy as np

from lpa_jax.data import DataError, npz
from lpa_jax.training.config import Config, ConfigError, default, flat

# What may differ when a run goes on: more seeds may be asked for, and the place of the computation
# changes nothing but its rounding.
FREE = {"num_seeds", "data_dir", "input", "steps_per_dispatch", "fsdp"}


def claim(workdir: pathlib.Path, config: dict[str, Any], *, write: bool = True) -> None:
    """Make the work directory this configuration's own, or find that it is; `write` may be False.

    Raises:
      ConfigError: If it holds the run of another configuration, or cannot be written.
    """
    path = workdir / "config.json"
    ours = json.loads(json.dumps(config))
    try:
        if path.exists():
            new, old = flat(ours), flat(read_json(path))
            keys = (new | old).keys() - FREE
            differing = sorted(key for key in keys if new.get(key) != old.get(key))
            if differing:
                raise ConfigError(
                    f"{workdir} holds a run of another configuration (it differs in "
                    f"{', '.join(differing)}): give --workdir another directory, or remove it."
                )
        elif write:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, ours)
    except OSError as error:
        raise ConfigError(f"{workdir} cannot serve as work directory: {error}.") from error


def read_config(workdir: pathlib.Path) -> Config:
    """Read the configuration of the run in a work directory.

    Raises:
      ConfigError: If there is no run, or its configuration is damaged or of another version.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run: give --workdir the directory of one.")
    # JSON has no tuples, which Flax modules need of their attributes.
    read = _tuples(read_json(path))
    # What stands under these keys differs from run to run.
    free = ("perturbation", "model.options", "optimizer.options")
    known = {key for key in flat(default().to_dict()) if not key.startswith(free)}
    missing = sorted(known - flat(read).keys())
    if missing:
        raise ConfigError(
            f"{path} has no {', '.join(missing)}: use the version of lpa_jax that wrote it."
        )
    return config_dict.ConfigDict(read)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def keep_labels(path: pathlib.Path, arrays: dict[str, np.ndarray], *, write: bool = True) -> str:
    """Leave the labels of a run in its directory, or find that those there are the same.

    Args:
      path: An npz file.
      arrays: Integers; among them `"labels"`.
      write: Whether to write the file where there is none.

    Returns:
      The SHA-256 of `"labels"`, as little-endian int32, in hexadecimal.

    Raises:
      ConfigError: If the file holds other labels, or is damaged.
    """
    if path.exists():
        try:
            kept = npz.read_arrays(str(path), tuple(arrays), (), "it was not left by a run")
        except DataError as error:
            raise ConfigError(f"{path} is damaged ({error}): remove it and try again.") from error
        if not all(np.array_equal(kept[name], array) for name, array in arrays.items()):
            raise ConfigError(
                f"{path} holds the labels this run began with, which are no longer those that its "
                "data give: restore the data, or give --workdir another directory."
            )
    elif write:
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(path)
    return hashlib.sha256(arrays["labels"].astype("<i4").tobytes()).hexdigest()


def read_json(path: pathlib.Path, *keys: str) -> dict[str, Any]:
    """Read what `write_json` wrote, a dictionary with the keys given.

    Raises:
      ConfigError: If it holds anything else.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict) or not set(keys) <= set(value):
            raise ValueError("something is missing")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it and try again.") from error
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a file whole or not at all; numbers that are not finite become null."""
    _replace(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


class Records:
    """The metrics of one seed, as `metrics.jsonl` and for TensorBoard.

    Args:
      directory: Where they go.
      step: Step the run goes on from; what was recorded after it is taken back, since it will be
        recorded again.
      write: Whether to write anything, or only to keep `rows`.
    """

    def __init__(self, directory: pathlib.Path, step: int, *, write: bool = True):
        self.rows = []
        self._writer = None
        if not write:
            return
        # Its import costs more than all else here, and only a run needs it.
        from tensorboardX import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        self.rows = [row for row in read_rows(self._path) if row["step"] <= step]
        _replace(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Record a row; `row["step"]` says when."""
        row = _finite(row)
        self.rows.append(row)
        if self._writer is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush what TensorBoard has not yet been given."""
        if self._writer is not None:
            self._writer.close()


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`, up to a line cut short by a crash or otherwise damaged."""
    rows = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                if not isinstance(row["step"], int):
                    break
            except (ValueError, TypeError, KeyError):
                break
            rows.append(row)
    return rows
