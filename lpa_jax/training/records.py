"""What a run leaves in its directory while it goes: JSON lines, TensorBoard, and its own config."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
from typing import Any, TextIO

from absl import logging
from ml_collections import config_dict
import numpy as np

from lpa_jax.data import DataError, npz
from lpa_jax.training.config import Config, ConfigError, default, flat

# What may differ when a run goes on: more seeds may be asked for, and the place of the computation
# changes nothing but its rounding.
FREE = {"num_seeds", "data_dir", "input", "steps_per_dispatch", "fsdp"}


class WriteError(RuntimeError):
    """The work directory takes no more, for instance because its disk is full."""


def _is_full(error: Exception) -> bool:
    """Return whether a disk or a quota is full, which errors of libraries tell in words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or "quota" in str(error)


@contextlib.contextmanager
def writing(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn an `OSError`, or one of `errors`, into a `WriteError` that names what was written."""
    try:
        yield
    except (OSError, *errors) as error:
        told = error.strerror if isinstance(error, OSError) else str(error)
        # Of the many words of the libraries the first reason is enough.
        reason = "No space left on device" if "No space left" in str(error) else told
        remedy = "make room" if _is_full(error) else "correct that"
        raise WriteError(
            f"{what} cannot be written ({reason}). What was saved before is kept: {remedy}, and "
            "the same command goes on from there."
        ) from error


@contextlib.contextmanager
def serving(workdir: pathlib.Path) -> Iterator[None]:
    """Turn an `OSError` into a `ConfigError` that the work directory cannot serve as one."""
    if "\0" in str(workdir):
        raise ConfigError(f"{str(workdir)!r} cannot serve as work directory: it has a null in it.")
    try:
        yield
    except OSError as error:
        if _is_full(error):
            # The directory is right, and there may be room in it again.
            with writing(str(workdir)):
                raise
        raise ConfigError(f"{workdir} cannot serve as work directory: {error}.") from error


def config_change(
    workdir: pathlib.Path, config: dict[str, Any], *, allow_change: bool = False
) -> dict[str, Any]:
    """Return how a configuration differs from the one in the work directory, if there is one.

    Returns:
      `{key: [before, after]}`, without the keys that are free to differ.

    Raises:
      ConfigError: If it differs and `allow_change` is false, or the one there is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        return {}
    new, old = flat(json.loads(json.dumps(config))), flat(read_json(path))
    keys = sorted((new | old).keys() - FREE)
    change = {k: [old.get(k), new.get(k)] for k in keys if new.get(k) != old.get(k)}
    if change and not allow_change:
        raise ConfigError(
            f"{workdir} holds a run of another configuration (it differs in "
            f"{', '.join(change)}): give --workdir another directory, remove it, or let "
            "python -m lpa_jax.main go on with this one by --allow_config_change."
        )
    return change


def in_words(change: Mapping[str, Any]) -> str:
    """Return what `config_change` does, in words."""
    return ", ".join(f"{key} from {old!r} to {new!r}" for key, (old, new) in change.items())


def claim(
    workdir: pathlib.Path,
    config: dict[str, Any],
    *,
    allow_change: bool = False,
) -> list[dict[str, Any]]:
    """Make the work directory this configuration's own, or find that it is.

    Args:
      workdir: The directory of the run.
      config: Its configuration.
      allow_change: Whether the run of another configuration may go on with this one. That it did
        is kept in `config_changes.json`.

    Returns:
      The changes so far, in order: for each `{key: [before, after]}`.

    Raises:
      ConfigError: If it holds the run of another configuration, or cannot be written.
      WriteError: If its disk is full.
    """
    path, changes_path = workdir / "config.json", workdir / "config_changes.json"
    changes = []
    with serving(workdir):
        if changes_path.exists():
            changes = read_json(changes_path, "changes")["changes"]
            if not isinstance(changes, list):
                raise ConfigError(f"{changes_path} is damaged: remove it or restore it.")
        change = config_change(workdir, config, allow_change=allow_change)
        if change:
            logging.warning("%s goes on with another configuration: %s.", workdir, in_words(change))
            changes = [*changes, change]
            write_json(changes_path, {"changes": changes})
            write_json(path, config)
        elif not path.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, config)
    return changes


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
        with writing(str(path)):
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
    """Write a file whole or not at all; numbers that are not finite become null.

    Raises:
      OSError: If it cannot be written; what stood there before still does.
    """
    _replace(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w") as file:
            _write_through(file, text)
        partial.replace(path)
    except OSError:
        # What could not be finished must not take the room that is wanted.
        partial.unlink(missing_ok=True)
        raise


def _write_through(file: TextIO, text: str) -> None:
    """Write to the disk itself: what is saved later must not outlive what was recorded before."""
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


class Records:
    """The metrics of one seed, as `metrics.jsonl` and for TensorBoard.

    Args:
      directory: Where they go.
      step: Step the run goes on from; what was recorded after it is taken back, since it will be
        recorded again.
      write: Whether to write anything, or only to keep `rows`.
    """

    def __init__(self, directory: pathlib.Path, step: int, *, write: bool = True):
        self._path = directory / "metrics.jsonl"
        self._writer = None
        # All processes decide by these what is to be computed next.
        self.rows = [row for row in read_rows(self._path) if row["step"] <= step]
        if not write:
            return
        # Its import costs more than all else here, and only a run needs it.
        from tensorboardX import SummaryWriter

        with writing(str(self._path)):
            directory.mkdir(parents=True, exist_ok=True)
            _replace(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Record a row; `row["step"]` says when."""
        row = _finite(row)
        self.rows.append(row)
        if self._writer is None:
            return
        with writing(str(self._path)), self._path.open("a") as file:
            _write_through(file, json.dumps(row) + "\n")
        with writing("TensorBoard's events"):
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush what TensorBoard has not yet been given."""
        if self._writer is not None:
            with writing("TensorBoard's events"):
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
