"""Which run a work directory holds, and whether new results may be pooled with it."""

from collections.abc import Mapping, Sequence
import hashlib
import json
import pathlib
import types
from typing import Any

from absl import logging
from ml_collections import config_dict
import numpy as np

from lpa_jax.data import DataError, Dataset, npz
from lpa_jax.training.config import Config, ConfigError, default, flat, FREE, OPEN
from lpa_jax.training.files import read_json, serving, write_json, writing
from lpa_jax.training.provenance import FINGERPRINTS, of_config, recorded, Session


def config_change(
    workdir: pathlib.Path, config: Mapping[str, Any], *, allow_change: bool = False
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
            f"{', '.join(change)}): give --workdir another directory, remove it, or continue the "
            "run with this configuration by --allow_config_change."
        )
    return change


def in_words(change: Mapping[str, Any]) -> str:
    """Return what `config_change` does, in words."""
    return ", ".join(f"{key} from {old!r} to {new!r}" for key, (old, new) in change.items())


def claim(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    *,
    allow_change: bool = False,
) -> list[dict[str, Any]]:
    """Make the work directory this configuration's own, or find that it is.

    Args:
      workdir: The directory of the run.
      config: Its configuration.
      allow_change: Whether the run of another configuration may continue with this one. That it did
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
            logging.warning(
                "%s continues with another configuration: %s.", workdir, in_words(change)
            )
            changes = [*changes, change]
            write_json(changes_path, {"changes": changes})
            write_json(path, config)
        elif not path.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, config)
    return changes


def read_config(
    workdir: str | pathlib.Path, changes: Mapping[str, Any] = types.MappingProxyType({})
) -> Config:
    """Read the configuration of the run in a work directory.

    Args:
      workdir: Directory of the run.
      changes: Keys that are set anew, of those that are free to differ; `eval_batch_size` is one of
        them here.

    Raises:
      ConfigError: If there is no run, or its configuration is damaged or of another version.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run: give --workdir the directory of one.")
    # JSON has no tuples, which Flax modules need of their attributes.
    read = tuples(read_json(path))
    known = {key for key in flat(default().to_dict()) if not key.startswith(OPEN)}
    missing = sorted(known - flat(read).keys())
    if missing:
        raise ConfigError(
            f"{path} has no {', '.join(missing)}: it was written by another version of lpa_jax, "
            "such as 0.1. Use that version, or train again."
        )
    config = config_dict.ConfigDict(read)
    for key, value in changes.items():
        if key not in FREE | {"eval_batch_size"}:
            raise ConfigError(
                f"config.{key} cannot be changed for a run that was trained: change "
                f"{', '.join(sorted(FREE | {'eval_batch_size'}))}, or train again."
            )
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"config.{key} cannot be {value!r} ({error}).") from error
    return config


def tuples(value: Any) -> Any:
    """Return what JSON gave with tuples for its lists."""
    if isinstance(value, dict):
        return {key: tuples(entry) for key, entry in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def find_seeds(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    seeds: Sequence[int],
    ours: Session,
    num_steps: int,
    *,
    allow_change: bool = False,
) -> tuple[list[int], list[int]]:
    """Find how far each seed of a run is, and that it can be pooled with what is made now.

    Nothing is written. Of a finished seed whose configuration is allowed to change, only the epochs
    can be raised; it then continues from its last checkpoint.

    Args:
      workdir: Directory of the run.
      config: Its configuration.
      seeds: Its seeds.
      ours: From `session`, or the `fingerprints` alone.
      num_steps: Steps of the whole run.
      allow_change: Whether the run of another configuration may continue with this one.

    Returns:
      The seeds that are finished, and those that resume from a checkpoint.

    Raises:
      ConfigError: If a seed was made with other data, other code, or another configuration that
        was not allowed to change, does not record what made it, or has taken more steps than these.
    """
    finished, resumed = [], []
    with serving(workdir):
        change = config_change(workdir, config, allow_change=allow_change)
        allowed = allow_change or (workdir / "config.json").exists()
        for seed in seeds:
            directory, ended = workdir / f"seed{seed}", False
            found = (directory / "checkpoints").glob("*")
            last_step = max((int(path.name) for path in found if path.name.isdigit()), default=0)
            result_path = directory / "result.json"
            if result_path.exists():
                last = recorded(result_path, "seed", "metrics", "perturbation")
                before = {**config, "epochs": last["epochs"]}
                longer = ours["epochs"] > last["epochs"]
                longer = longer and of_config(before) == last["configuration"]
                _refuse(directory, last, ours, change, allowed and longer and last_step > 0)
                ended = last["configuration"] == ours["configuration"]
            elif not last_step:
                continue
            if not ended:
                _refuse(directory, recorded(directory / "sessions.json"), ours, change, allowed)
            if last_step > num_steps:
                raise ConfigError(
                    f"{directory} has taken {last_step} steps, but this configuration has "
                    f"{num_steps}: give config.epochs more."
                )
            (finished if ended else resumed).append(seed)
    return finished, resumed


def _refuse(
    directory: pathlib.Path,
    old: Session,
    new: Session,
    change: Mapping[str, Any],
    config_may_differ: bool,
) -> None:
    """Raise `ConfigError`, which names all that differs, if a seed may not be pooled."""
    differing = [name for name in FINGERPRINTS if old.get(name) != new[name]]
    if not differing or (config_may_differ and differing == ["configuration"]):
        return
    told = []
    for name in differing:
        was, here = (f"{made.get(name)}"[:8] for made in (old, new))
        if name == "configuration" and change:
            told.append(f"another configuration ({in_words(change)})")
        elif name == "configuration":
            told.append(f"another configuration (fingerprint {was} instead of {here})")
        else:
            commits = [made.get("commit") for made in (old, new)]
            if name == "code" and any(commits):
                was, here = (
                    f"{fingerprint} at commit {made or 'unknown'}"
                    for fingerprint, made in zip((was, here), commits, strict=True)
                )
            told.append(f"other {name} (fingerprint {was} instead of {here})")
    hints = {
        "data": "Or restore the data.",
        "code": "Or use the code it was made with: a git worktree fixed at one commit lets a long "
        "measurement continue while the code changes.",
        "configuration": "Of a finished seed only config.epochs can be changed, to more, with "
        "--allow_config_change and its checkpoints.",
    }
    kept = {"configuration"} if config_may_differ else set()
    hinted = [hints[name] for name in differing if name not in kept]
    raise ConfigError(
        f"{directory} was made with {' and '.join(told)}. Results of both are not pooled: give "
        f"--workdir another directory, or remove {directory}. {' '.join(hinted)}"
    )


def check_evaluable(directories: Sequence[pathlib.Path], dataset: Dataset) -> None:
    """Raise `ConfigError` unless seeds were made with these data, and all with the same code.

    Args:
      directories: Of the seeds.
      dataset: What they are to be evaluated on.
    """
    made = [recorded(directory / "sessions.json") for directory in directories]
    fingerprint = dataset.fingerprint()
    for directory, last in zip(directories, made, strict=True):
        wanted = {**made[0], "data": fingerprint, "configuration": last["configuration"]}
        _refuse(directory, last, wanted, {}, True)


def save_labels(path: pathlib.Path, arrays: dict[str, np.ndarray], *, write: bool = True) -> str:
    """Save the labels of a run in its directory, or find that those there are the same.

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
