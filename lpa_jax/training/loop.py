"""The whole of a run, read from top to bottom: its seeds group after group, and their results."""

from collections.abc import Mapping, Sequence
import pathlib
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax.sharding import Mesh
from rich.console import Console

from lpa_jax import data, memory
from lpa_jax.training import display, files, fit, identity, prefix, provenance
from lpa_jax.training.build import build, Data, Parts
from lpa_jax.training.config import Config, ConfigError
from lpa_jax.training.metric_log import read_rows
from lpa_jax.training.preemption import preemption
from lpa_jax.training.writers import MakeWriter


def train_and_evaluate(
    config: Config,
    workdir: str | pathlib.Path,
    console: Console | None = None,
    *,
    model: nn.Module | None = None,
    dataset: Data | None = None,
    writers: Sequence[MakeWriter] = (),
    allow_config_change: bool = False,
) -> dict[str, Any]:
    """Train `num_seeds` networks, evaluate each at its last epoch, and save the results.

    Rerunning it resumes an interrupted run, with the same results as if it had not been.

    Args:
      config: A configuration with the keys of `lpa_jax.training.config.default`.
      workdir: Directory of the run; `summary.json`, `curves.png` and `perturbation.png` are saved
        there, `labels.npz` where imbalance or label noise is asked for, and `metrics.jsonl`,
        TensorBoard events and checkpoints for each seed.
      console: Where to print; default the standard output.
      model: A Flax Linen module of your own, in place of `config.model`: it takes float inputs
        `[B, ...]`, and `train` if it has such an argument, and returns logits `[B, C]`. An
        interrupted run is resumed with the same one, as told by its `repr`.
      dataset: Examples of your own, in place of `config.dataset`: a `data.Dataset`, or sources or
        arrays `(images, labels)` by split, `{"train": ..., "test": ...}`.
      writers: What makes writers of metrics beside those that `config.writers` names; see
        `writers.Writer`.
      allow_config_change: Whether a run of another configuration may continue with this one, as far
        as its state fits; the change is kept in `config_changes.json` and `summary.json`. Of a
        finished seed only the epochs can be raised: it continues from its last checkpoint, and its
        result is replaced at the end.

    Returns:
      What `summary.json` holds: `"metrics"`, for each split the mean, the standard deviation and n
      over seeds of each metric at the last epoch; `"best"`, the same at the epoch that the
      selection chose; and `"seeds"`, each with its metrics and the sessions that made it:
      device, versions, commit, and the fingerprints of data, code and configuration.

    Raises:
      ConfigError: If the configuration cannot be run, or a seed in `workdir` was made with other
        data, other code or another configuration; before anything is written.
      DataError: If the data cannot be read, likewise.
      NonFiniteLossError: If the loss or an update becomes NaN or infinite and `config.nonfinite` is
        `"stop"`, or is so in every step of an epoch; it names where that began.
      PreemptedError: If the process was sent SIGTERM, after the present step has been saved.
      WriteError: If the work directory takes no more, for instance because the disk is full.
    """
    if not isinstance(writers, (list, tuple)) or not all(map(callable, writers)):
        raise ConfigError(
            f"writers must be what makes writers, such as their classes, not {writers!r:.100}; "
            "config.writers takes their names."
        )
    parts = build(config, model=model, dataset=dataset)
    return train(
        parts._replace(writers=[*parts.writers, *writers]),
        workdir,
        console,
        allow_config_change=allow_config_change,
    )


def train(
    parts: Parts,
    workdir: str | pathlib.Path,
    console: Console | None = None,
    *,
    allow_config_change: bool = False,
) -> dict[str, Any]:
    """Do what `train_and_evaluate` does, with the parts of a run from `build`."""
    console = console or Console(quiet=jax.process_index() > 0)
    workdir = pathlib.Path(workdir)
    began = time.monotonic()
    trained = train_seeds(parts, workdir, console, allow_config_change=allow_config_change)
    results, first_step_time = trained.results, trained.first_step_time
    summary_path = workdir / "summary.json"
    if first_step_time is None and summary_path.exists():
        # Nothing was trained: what was is not to be taken for the work of this machine.
        kept = files.read_json(summary_path)
        if kept.get("seeds") == results:
            display.show_run(parts.title, results, parts.task, console)
            return kept
    summary = {
        **display.summarize(results),
        "seeds": results,
        "num_examples": {split: len(found) for split, found in parts.dataset.splits.items()},
        **trained.about_data,
        "session_seconds": round(time.monotonic() - began, 1),
        "first_step_time": first_step_time,
        "config": parts.config,
        "config_changes": trained.config_changes,
    }
    if jax.process_index() == 0:
        with files.writing(f"The summary in {workdir}"):
            files.write_json(summary_path, summary)
            display.plot_run(workdir, parts.title, trained.rows, results[0])
        display.show_run(parts.title, results, parts.task, console)
        display.say(console, f"Plots, metrics and checkpoints are in {workdir}.")
    return summary


class Trained(NamedTuple):
    """What the seeds of a run have come to.

    Attributes:
      results: Of each seed, in order.
      rows: What was recorded of each epoch, by seed.
      first_step_time: When the first step here began, in seconds since the epoch; None if all seeds
        were finished before.
      about_data: `"groups"`, `"noise_rate"` and `"labels_sha256"`, where they were modified.
      config_changes: With what other configurations the run was continued.
    """

    results: list[dict[str, Any]]
    rows: dict[int, list[dict[str, Any]]]
    first_step_time: float | None
    about_data: dict[str, Any]
    config_changes: list[dict[str, Any]]


def train_seeds(
    parts: Parts,
    workdir: pathlib.Path,
    console: Console,
    *,
    allow_config_change: bool = False,
) -> Trained:
    """Train the seeds of a run that are not finished, and return what all have come to.

    After `claim`, several processes may do so in one directory, each with seeds of its own.
    """
    if isinstance(parts.dataset.train.images, data.Streamed):
        # Decoded images come to lie between what steps take and free, so that ever more is kept.
        memory.stop_keeping_memory()
    # --- Nothing is written until all of it fits together. ---------------------------------------
    devices = fit.make_devices(parts)
    session = provenance.session(parts.config, parts.dataset, devices)
    finished, resumed = provenance.by_first(
        lambda: identity.find_seeds(
            workdir,
            parts.config,
            parts.plan.seeds,
            session,
            parts.plan.num_steps,
            allow_change=allow_config_change,
        )
    )
    # Nothing is traced only to read results.
    left = [seed for seed in parts.plan.seeds if seed not in finished]
    used, compiled = ready(parts, devices, console) if left else (parts, None)
    first = dict.fromkeys(left, 0)
    # What another configuration cannot continue is refused before anything is written; and seeds
    # that are trained together begin at the same step.
    if compiled is not None and (allow_config_change or parts.plan.seeds_together > 1):
        for seed in resumed:
            first[seed] = fit.saved_step(workdir / f"seed{seed}", compiled.steps)
    about_data, config_changes = claim(parts, workdir, allow_config_change=allow_config_change)
    first_process = jax.process_index() == 0

    # --- Train the others; the step is compiled once for all of them. ----------------------------
    results, rows, first_step_time = {}, {}, None
    for seed in finished:
        results[seed] = files.read_json(workdir / f"seed{seed}" / "result.json")
        rows[seed] = read_rows(workdir / f"seed{seed}" / "metrics.jsonl")
    with preemption() as preempted:
        fits = [
            fit.Fit(used, compiled, seeds, workdir, session, console, preempted)
            for seeds in in_groups(first, parts.plan.seeds_together)
            if compiled is not None
        ]
        for one in fits:
            if preempted():
                raise fit.PreemptedError(f"SIGTERM came before {fit.in_words(one.seeds)} began.")
            for seed, result in one.run().items():
                results[seed] = result
                if first_process:
                    path = workdir / f"seed{seed}" / "result.json"
                    with files.writing(str(path)):
                        files.write_json(path, result)
            rows |= one.rows
            first_step_time = first_step_time or one.first_step_time
    ordered = {seed: results[seed] for seed in parts.plan.seeds}
    rows = {seed: rows[seed] for seed in ordered}
    return Trained([*ordered.values()], rows, first_step_time, about_data, config_changes)


def ready(parts: Parts, devices: Mesh, console: Console) -> tuple[Parts, fit.Compiled]:
    """Return the parts as they are trained, behind a prefix if one is cached, and their functions.

    Raises:
      ConfigError: If they cannot be used together.
    """
    if parts.plan.cached is None:
        return parts, fit.compile_parts(parts, devices)
    weights = fit.read_weights(parts)
    used = prefix.without_prefix(parts, fit.pretrained_variables(parts, weights), console)
    return used, fit.compile_parts(used, devices, weights)


def in_groups(steps: Mapping[int, int], most: int) -> list[list[int]]:
    """Divide seeds into groups of at most so many that are at the same step, in order.

    Args:
      steps: The step that each seed is at.
      most: Seeds of a group.

    Example:
      >>> in_groups({0: 0, 1: 20, 2: 0, 3: 0}, 2)
      [[0, 2], [1], [3]]
    """
    found: list[list[int]] = []
    for seed, step in steps.items():
        alike = (group for group in found if steps[group[0]] == step and len(group) < most)
        group = next(alike, None)
        if group is None:
            found.append([seed])
        else:
            group.append(seed)
    return found


def claim(
    parts: Parts, workdir: pathlib.Path, *, allow_config_change: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make the work directory this run's own, or find that it is.

    Returns:
      What is recorded of the data, and the changes of the configuration so far; see `Trained`.
    """
    about_data: dict[str, Any] = {"groups": parts.groups} if parts.groups else {}
    labels = data.training_labels(parts.dataset) if parts.modified else None
    path = workdir / "labels.npz"
    if labels is not None:
        sha256 = identity.save_labels(path, labels, write=False)
        about_data |= {"noise_rate": data.noise_rates(parts.dataset), "labels_sha256": sha256}
    config_changes = provenance.by_first(
        lambda: identity.claim(workdir, parts.config, allow_change=allow_config_change)
    )
    # Of several processes, which share the work directory, the first keeps its records.
    if labels is not None:
        identity.save_labels(path, labels, write=jax.process_index() == 0)
    return about_data, config_changes
