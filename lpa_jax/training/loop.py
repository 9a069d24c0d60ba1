"""The whole of a run, read from top to bottom."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import itertools
import json
import math
import pathlib
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lpa_jax import data
from lpa_jax.evaluation import metrics
from lpa_jax.training import checkpoints, experiment, mesh, progress, provenance, records, report
from lpa_jax.training import feed as feeds
from lpa_jax.training.config import Config, ConfigError
from lpa_jax.training.state import epoch_means
from lpa_jax.training.step import make_steps

REMEDY = "lower the learning rate or the strength of the perturbation"


class PreemptedError(RuntimeError):
    """The process was asked to stop (SIGTERM); the state has been saved."""


class NonFiniteLossError(RuntimeError):
    """The loss or an update became NaN or infinite; the last good checkpoint is kept."""


def train_and_evaluate(
    config: Config,
    workdir: str | pathlib.Path,
    console: Console | None = None,
    *,
    allow_config_change: bool = False,
) -> dict[str, Any]:
    """Train `num_seeds` networks, judge each at its last epoch, and leave the results in `workdir`.

    A run that was cut off goes on from its last checkpoint and ends as if it had not been.

    Args:
      config: A configuration with the keys of `lpa_jax.training.config.default`.
      workdir: Directory of the run; `summary.json`, `curves.png` and `perturbation.png` are left
        there, `labels.npz` where imbalance or label noise is asked for, and `metrics.jsonl`,
        TensorBoard events and checkpoints for each seed.
      console: Where to print; default the standard output.
      allow_config_change: Whether a run of another configuration may go on with this one, as far
        as its state fits; the change is kept in `config_changes.json` and `summary.json`. Of a
        finished seed only the epochs can be raised: it goes on from its last checkpoint, and its
        result is replaced at the end.

    Returns:
      What `summary.json` holds. Each of its `"seeds"` tells of the sessions it came of: device,
      versions, commit, and the fingerprints of data, code and configuration.

    Raises:
      ConfigError: If the configuration cannot be run, or a seed in `workdir` came of other data,
        other code or another configuration; before anything is written.
      DataError: If the data cannot be read, likewise.
      NonFiniteLossError: If the loss or an update becomes NaN or infinite and `config.nonfinite` is
        `"stop"`, or is so in every step of an epoch; it names where that began.
      PreemptedError: If the process was sent SIGTERM, after the present step has been saved.
      WriteError: If the work directory takes no more, for instance because the disk is full.
    """
    console = console or Console(quiet=jax.process_index() > 0)
    workdir = pathlib.Path(workdir)
    began = time.monotonic()

    # --- Build everything; nothing is written until all of it fits together. ---------------------
    parts = experiment.build(config)
    dataset, steps_per_epoch, num_steps = parts.dataset, parts.steps_per_epoch, parts.num_steps
    num_train, accumulate = len(dataset.train.labels), config.optimizer.accumulate
    devices = mesh.make_mesh(config.batch_size, config.fsdp)
    with experiment.as_config_error():
        feed = feeds.make_feed(
            config.input, dataset.train, config.batch_size, num_steps, devices, config.sampling
        )
        looped = config.steps_per_dispatch > 1
        if looped and not feed.resident:
            raise ConfigError(
                "config.steps_per_dispatch above 1 needs config.input to be 'device'."
            )
        steps = make_steps(
            parts.model.init,
            parts.perturbed,
            parts.tx,
            devices,
            (config.batch_size, *dataset.train.images.shape[1:]),
            feed.take,
            **config.augment,
            looped=looped,
            nonfinite=config.nonfinite,
        )
    place = functools.partial(mesh.put, sharding=mesh.batched(devices))
    predict = metrics.make_predict(parts.model.apply, place, mesh.replicated(devices))
    eval_batch_size = mesh.multiple(devices, parts.eval_batch_size)
    checkpoint_every = max(1, round(config.checkpoint_every * steps_per_epoch))
    # Of several processes, which share the work directory, the first keeps its records.
    first_process = jax.process_index() == 0
    session = provenance.session(config, dataset, devices)
    finished, resumed = provenance.by_first(
        lambda: provenance.standing(
            workdir, config, session, num_steps, allow_change=allow_config_change
        )
    )
    about_data: dict[str, Any] = {"groups": parts.groups} if parts.groups else {}
    labels = None
    if {config.imbalance.kind, config.noise.kind} != {"none"}:
        labels = data.task_labels(dataset)
        sha256 = records.keep_labels(workdir / "labels.npz", labels, write=False)
        about_data |= {"noise_rate": data.noise_rates(dataset), "labels_sha256": sha256}
    # What another configuration cannot take on is refused before anything is written.
    for seed in resumed if allow_config_change else ():
        path = workdir / f"seed{seed}" / "checkpoints"
        with contextlib.closing(checkpoints.Checkpoints(path, read_only=True)) as saved:
            saved.restore(steps.like, steps.shardings)
    config_changes = provenance.by_first(
        lambda: records.claim(workdir, config.to_dict(), allow_change=allow_config_change)
    )
    if labels is not None:
        records.keep_labels(workdir / "labels.npz", labels, write=first_process)

    @functools.cache
    def on_devices(number):
        return mesh.put(np.int32(number), mesh.replicated(devices))

    def judge(variables, examples, show):
        judged = metrics.evaluate(
            functools.partial(show.call, predict),
            variables,
            examples,
            dataset.num_classes,
            eval_batch_size,
            parts.groups,
        )
        if not math.isfinite(judged["nll"]):
            raise NonFiniteLossError(f"The loss of the trained network is not finite: {REMEDY}.")
        return judged

    def stop_if_nonfinite(state, seed, end_of_epoch):
        """Raise `NonFiniteLossError`, where that is the policy or no step of an epoch was left."""
        skip = config.nonfinite == "skip"
        metrics.wait(state.nonfinite_steps)
        left = float(state.running.steps) if end_of_epoch else math.inf
        if not int(state.nonfinite_steps) or (skip and left):
            return
        number = int(state.step) - skip
        with contextlib.closing(feed.open(seed, number)) as batches:
            perturbation = state.perturbation
            # Where the step that failed began.
            began_at = on_devices(int(perturbation.step) - skip)
            state = state._replace(
                step=on_devices(number), perturbation=perturbation._replace(step=began_at)
            )
            finite = steps.diagnose(state, on_devices(seed), *next(batches))
        first = next(name for name, value in finite.items() if not value)
        raise NonFiniteLossError(
            f"Step {number} was not finite, first {first}: {REMEDY}. What was saved before that is "
            f"kept in {workdir}."
        )

    # --- Train each seed; the step is compiled once for all of them. -----------------------------
    results, rows_by_seed, first_step_time, compiled = [], {}, None, set()
    with _preemption() as preempted:
        for seed in range(config.seed, config.seed + config.num_seeds):
            directory = workdir / f"seed{seed}"
            result_path = directory / "result.json"
            if seed in finished:
                results.append(records.read_json(result_path))
                rows_by_seed[seed] = records.read_rows(directory / "metrics.jsonl")
                continue
            if preempted():
                raise PreemptedError(f"SIGTERM came before seed {seed} began.")
            saved = checkpoints.Checkpoints(directory / "checkpoints")
            state = saved.restore(steps.like, steps.shardings)
            name = f"seed {seed}"
            if config.num_seeds > 1:
                name += f" ({seed - config.seed + 1} of {config.num_seeds})"
            first = step = 0 if state is None else int(state.step)
            begin = functools.partial(provenance.begin, directory, session, first)
            sessions = provenance.by_first(begin)
            log = records.Records(directory, first, write=first_process)
            with contextlib.ExitStack() as stack:
                stack.callback(saved.close)
                stack.callback(log.close)
                show = progress.bar(console, name, num_steps, done=first, compiled=compiled)
                show = stack.enter_context(show)
                if state is None:
                    state = show.call(steps.init, jnp.int32(seed))
                batches = stack.enter_context(contextlib.closing(feed.open(seed, first)))
                stops = (steps_per_epoch, checkpoint_every)
                for taken in _dispatches(first, num_steps, config.steps_per_dispatch, *stops):
                    *_, given = itertools.islice(batches, taken)
                    given = (on_devices(seed), on_devices(taken), *given)
                    # Whatever is moved between host and device has been moved by now.
                    with jax.transfer_guard("disallow"):
                        state = show.run(steps.train, state, *given)
                    step += taken
                    show.given(step, state.step)
                    # The step is compiled, and the devices are at work on it.
                    first_step_time = first_step_time or time.time()
                    epoch, rest = divmod(step, steps_per_epoch)
                    stopping = preempted()
                    saving = step % checkpoint_every == 0 or step == num_steps or stopping
                    if saving or rest == 0:
                        stop_if_nonfinite(state, seed, end_of_epoch=rest == 0)
                    if rest == 0:
                        show.finished_to(step)
                        state = show.call(steps.end_epoch, state)
                        row, _ = epoch_means(state.epoch)
                        learning_rate = parts.rate((step - 1) // accumulate)
                        row |= {"learning_rate": float(np.asarray(learning_rate))}
                        if config.nonfinite == "skip":
                            row |= {"nonfinite_steps": int(state.nonfinite_steps)}
                        due = epoch % config.evaluate_every == 0 or step == num_steps
                        if len(dataset.validation.labels) and due:
                            judged = judge(state.variables, dataset.validation, show)
                            row |= _named("validation", judged)
                            if judged["accuracy"] > max(_best_validation(log.rows), default=-1.0):
                                tested = judge(state.variables, dataset.test, show)
                                row |= {"test_accuracy": tested["accuracy"]}
                        log.write({"step": step, "epoch": epoch, **_scalars(row)})
                        show.say(_news(epoch, config.epochs, row))
                    if saving:
                        saved.save(step, state)
                    if stopping:
                        raise PreemptedError(f"SIGTERM came; step {step} is saved in {directory}.")

                # --- Judge the last epoch, whatever came before it. -------------------------------
                means, by_class = epoch_means(state.epoch)
                result = {"seed": seed, "train_accuracy": means["train_accuracy"]}
                if len(dataset.validation.labels):
                    result |= _named("validation", judge(state.variables, dataset.validation, show))
                    if best := _best_validation(log.rows):
                        result |= {report.BEST: best[max(best)]}
                result |= _named("test", judge(state.variables, dataset.test, show))
                result |= {"perturbation": by_class, "sessions": sessions}
            if first_process:
                with records.writing(str(result_path)):
                    records.write_json(result_path, result)
            results.append(result)
            rows_by_seed[seed] = log.rows

    # --- Show what came out. ----------------------------------------------------------------------
    summary_path = workdir / "summary.json"
    if first_step_time is None and summary_path.exists():
        # Nothing was trained: what was is not to be taken for the work of this machine.
        kept = records.read_json(summary_path)
        if kept.get("seeds") == results:
            report.show_table(_title(config, dataset.name), results, console)
            return kept
    summary = {
        "metrics": report.summarize(results),
        "seeds": results,
        "num_train": num_train,
        "num_test": len(dataset.test.labels),
        **about_data,
        "session_seconds": round(time.monotonic() - began, 1),
        "first_step_time": first_step_time,
        "config": json.loads(json.dumps(config.to_dict())),
        "config_changes": config_changes,
    }
    if not first_process:
        return summary
    title = _title(config, dataset.name)
    first = results[0]
    seed_title = f"{title}, seed {first['seed']}"
    with records.writing(f"The summary in {workdir}"):
        records.write_json(summary_path, summary)
        report.plot_curves(workdir / "curves.png", title, rows_by_seed)
        report.plot_perturbation(workdir / "perturbation.png", seed_title, first["perturbation"])
    report.show_table(title, results, console)
    report.say(console, f"Plots, metrics and checkpoints are in {workdir}.")
    return summary


@contextlib.contextmanager
def _preemption() -> Iterator[Callable[[], bool]]:
    """Give a function, to be called in every dispatch, that tells whether SIGTERM has come."""
    if jax.process_count() > 1:
        # It may have come to any of the processes; they agree on the call at which they stop.
        calls = itertools.count()
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    if threading.current_thread() is not threading.main_thread():
        # Signals are the main thread's alone.
        yield lambda: False
        return
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatches(first: int, last: int, most: int, *stops: int) -> Iterator[int]:
    """Part the steps from `first` to `last` into runs of at most `most`, ending at the stops.

    Example:
      >>> list(_dispatches(1, 10, 4, 6))
      [4, 1, 4]
    """
    while first < last:
        taken = min(most, last - first, *(stop - first % stop for stop in stops))
        yield taken
        first += taken


def _title(config: Config, dataset: str) -> str:
    epochs = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''}"
    return f"{config.method} on {dataset}, {config.model.name}, {epochs}"


def _best_validation(rows: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Return for each epoch better than all before it the validation and the test accuracy."""
    return {r["validation_accuracy"]: r["test_accuracy"] for r in rows if "test_accuracy" in r}


def _named(part: str, judged: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}_{name}": value for name, value in judged.items()}


def _scalars(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not isinstance(value, list)}


def _news(epoch: int, epochs: int, row: Mapping[str, Any]) -> str:
    news = f"epoch {epoch} of {epochs}, loss {row['train_loss']:.4f}"
    if "validation_accuracy" in row:
        news += f", validation {100 * row['validation_accuracy']:.2f} %"
    return news
