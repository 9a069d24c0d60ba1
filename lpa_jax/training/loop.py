"""The whole of a run, read from top to bottom."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import importlib.metadata
import inspect
import itertools
import json
import math
import pathlib
import platform
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lpa_jax
from lpa_jax import data, losses, models
from lpa_jax.evaluation import metrics
from lpa_jax.perturb.engine import LossFn
from lpa_jax.training import checkpoints, mesh, records, report, schedules
from lpa_jax.training import config as configuration
from lpa_jax.training import feed as feeds
from lpa_jax.training.config import Config, ConfigError
from lpa_jax.training.state import epoch_means
from lpa_jax.training.step import make_steps

REMEDY = "lower the learning rate or the strength of the perturbation"
LOSSES = {
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "softmax_binary_cross_entropy": losses.softmax_binary_cross_entropy,
    "softmax_focal_loss": losses.softmax_focal_loss,
    "generalized_cross_entropy": losses.generalized_cross_entropy,
}


class PreemptedError(RuntimeError):
    """The process was asked to stop (SIGTERM); the state has been saved."""


class NonFiniteLossError(RuntimeError):
    """The loss or an update became NaN or infinite; the last good checkpoint is kept."""


def train_and_evaluate(
    config: Config, workdir: str | pathlib.Path, console: Console | None = None
) -> dict[str, Any]:
    """Train `num_seeds` networks, judge each at its last epoch, and leave the results in `workdir`.

    A run that was cut off goes on from its last checkpoint and ends as if it had not been.

    Args:
      config: A configuration with the keys of `lpa_jax.training.config.default`.
      workdir: Directory of the run; `summary.json`, `curves.png` and `perturbation.png` are left
        there, `labels.npz` where imbalance or label noise is asked for, and `metrics.jsonl`,
        TensorBoard events and checkpoints for each seed.
      console: Where to print; default the standard output.

    Returns:
      What `summary.json` holds.

    Raises:
      ConfigError: If the configuration cannot be run, before anything is written.
      DataError: If the data cannot be read, likewise.
      NonFiniteLossError: If the loss or an update becomes NaN or infinite and `config.nonfinite` is
        `"stop"`, or is so in every step of an epoch; it names where that began.
      PreemptedError: If the process was sent SIGTERM, after the present step has been saved.
    """
    console = console or Console(quiet=jax.process_index() > 0)
    workdir = pathlib.Path(workdir)
    began = time.monotonic()

    # --- Build everything; nothing is written until all of it fits together. ---------------------
    configuration.check(config)
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        validation_fraction=config.validation_fraction,
        seed=config.data_seed,
        image_size=config.image_size,
    )
    imbalance, noise = dict(config.imbalance), dict(config.noise)
    dataset = data.make_task(dataset, imbalance, noise, seed=config.data_seed)
    if config.limit is not None:
        dataset = data.limited(dataset, config.limit)
    num_train = len(dataset.train.labels)
    if num_train < config.batch_size:
        raise ConfigError(
            f"The training set has {num_train} examples, fewer than config.batch_size "
            f"{config.batch_size}: set a smaller one."
        )
    side = min(dataset.train.images.shape[1:3])
    if config.augment.padding >= side:
        raise ConfigError(
            f"config.augment.padding must be below the images' side of {side} pixels, not "
            f"{config.augment.padding}."
        )
    steps_per_epoch = num_train // config.batch_size
    num_steps = config.epochs * steps_per_epoch
    class_counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes).tolist()
    groups = data.groups_of(dataset)
    devices = mesh.make_mesh(config.batch_size, config.fsdp)
    with _as_config_error():
        model = models.create(
            config.model.name,
            num_classes=dataset.num_classes,
            mean=dataset.mean,
            std=dataset.std,
            dtype=jnp.dtype(config.model.dtype),
            **({} if config.remat is None else {"remat": config.remat}),
            **config.model.options,
        )
        perturbed = lpa_jax.value_and_grad(
            model.apply,
            configuration.perturbation(config, class_counts, dataset.mean, num_steps),
            num_classes=dataset.num_classes,
            loss_fn=_loss_named(**config.loss),
        )
        accumulate = config.optimizer.accumulate
        if accumulate > num_steps:
            raise ConfigError(
                f"config.optimizer.accumulate is {accumulate}, more than the run's {num_steps} "
                "steps: no parameter would ever move."
            )
        rate = schedules.learning_rate(
            **config.schedule, epochs=config.epochs, steps_per_epoch=steps_per_epoch / accumulate
        )
        tx = schedules.optimizer(
            config.optimizer.name,
            rate,
            config.optimizer.weight_decay,
            dict(config.optimizer.options),
            accumulate,
        )
        feed = feeds.make_feed(
            config.input, dataset.train, config.batch_size, num_steps, devices, config.sampling
        )
        looped = config.steps_per_dispatch > 1
        if looped and not feed.resident:
            raise ConfigError(
                "config.steps_per_dispatch above 1 needs config.input to be 'device'."
            )
        steps = make_steps(
            model.init,
            perturbed,
            tx,
            devices,
            (config.batch_size, *dataset.train.images.shape[1:]),
            feed.take,
            **config.augment,
            looped=looped,
            nonfinite=config.nonfinite,
        )
    place = functools.partial(mesh.put, sharding=mesh.batched(devices))
    predict = metrics.make_predict(model.apply, place, mesh.replicated(devices))
    most = max(len(dataset.validation.labels), len(dataset.test.labels))
    eval_batch_size = -(-min(config.eval_batch_size, most) // devices.size) * devices.size
    checkpoint_every = max(1, round(config.checkpoint_every * steps_per_epoch))
    # Of several processes, which share the work directory, the first keeps its records.
    first_process = jax.process_index() == 0
    records.claim(workdir, config.to_dict(), write=first_process)
    about_data: dict[str, Any] = {"groups": groups} if groups else {}
    if {imbalance["kind"], noise["kind"]} != {"none"}:
        labels = data.task_labels(dataset)
        sha256 = records.keep_labels(workdir / "labels.npz", labels, write=first_process)
        about_data |= {"noise_rate": data.noise_rates(dataset), "labels_sha256": sha256}

    @functools.cache
    def on_devices(number):
        return mesh.put(np.int32(number), mesh.replicated(devices))

    def judge(variables, examples):
        judged = metrics.evaluate(
            predict, variables, examples, dataset.num_classes, eval_batch_size, groups
        )
        if not math.isfinite(judged["nll"]):
            raise NonFiniteLossError(f"The loss of the trained network is not finite: {REMEDY}.")
        return judged

    def stop_if_nonfinite(state, seed, end_of_epoch):
        """Raise `NonFiniteLossError`, where that is the policy or no step of an epoch was left."""
        skip = config.nonfinite == "skip"
        left = float(state.running.steps) if end_of_epoch else math.inf
        if not int(state.nonfinite_steps) or (skip and left):
            return
        number = int(state.step) - skip
        with contextlib.closing(feed.open(seed, number)) as batches:
            state = state._replace(step=on_devices(number))
            finite = steps.diagnose(state, on_devices(seed), *next(batches))
        first = next(name for name, value in finite.items() if not value)
        raise NonFiniteLossError(
            f"Step {number} was not finite, first {first}: {REMEDY}. What was saved before that is "
            f"kept in {workdir}."
        )

    # --- Train each seed; the step is compiled once for all of them. -----------------------------
    results, rows_by_seed, first_step_time = [], {}, None
    with _preemption() as preempted:
        for seed in range(config.seed, config.seed + config.num_seeds):
            directory = workdir / f"seed{seed}"
            result_path = directory / "result.json"
            if result_path.exists():
                results.append(
                    records.read_json(result_path, "seed", "test_accuracy", "perturbation")
                )
                rows_by_seed[seed] = records.read_rows(directory / "metrics.jsonl")
                continue
            if preempted():
                raise PreemptedError(f"SIGTERM came before seed {seed} began.")
            saved = checkpoints.Checkpoints(directory / "checkpoints")
            state = saved.restore(steps.like, steps.shardings)
            state = steps.init(jnp.int32(seed)) if state is None else state
            first = step = int(state.step)
            log = records.Records(directory, first, write=first_process)
            with contextlib.ExitStack() as stack:
                stack.callback(saved.close)
                stack.callback(log.close)
                show = stack.enter_context(_progress(console, f"seed {seed}", first, num_steps))
                batches = stack.enter_context(contextlib.closing(feed.open(seed, first)))
                stops = (steps_per_epoch, checkpoint_every)
                for taken in _dispatches(first, num_steps, config.steps_per_dispatch, *stops):
                    *_, given = itertools.islice(batches, taken)
                    given = (on_devices(seed), on_devices(taken), *given)
                    # Whatever is moved between host and device has been moved by now.
                    with jax.transfer_guard("disallow"):
                        state = steps.train(state, *given)
                    step += taken
                    # The step is compiled, and the devices are at work on it.
                    first_step_time = first_step_time or time.time()
                    epoch, rest = divmod(step, steps_per_epoch)
                    stopping = preempted()
                    saving = step % checkpoint_every == 0 or step == num_steps or stopping
                    if saving or rest == 0:
                        stop_if_nonfinite(state, seed, end_of_epoch=rest == 0)
                    if rest == 0:
                        state = steps.end_epoch(state)
                        row, _ = epoch_means(state.epoch)
                        row |= {"learning_rate": float(np.asarray(rate((step - 1) // accumulate)))}
                        if config.nonfinite == "skip":
                            row |= {"nonfinite_steps": int(state.nonfinite_steps)}
                        if len(dataset.validation.labels) and epoch % config.evaluate_every == 0:
                            row |= _named("validation", judge(state.variables, dataset.validation))
                        log.write({"step": step, "epoch": epoch, **_scalars(row)})
                        show(step, f"epoch {epoch}", row)
                    if saving:
                        saved.save(step, state)
                    if stopping:
                        raise PreemptedError(f"SIGTERM came; step {step} is saved in {directory}.")
                    show(step)

                # --- Judge the last epoch, whatever came before it. -------------------------------
                means, by_class = epoch_means(state.epoch)
                result = {"seed": seed, "train_accuracy": means["train_accuracy"]}
                if len(dataset.validation.labels):
                    result |= _named("validation", judge(state.variables, dataset.validation))
                result |= _named("test", judge(state.variables, dataset.test))
                result |= {"perturbation": by_class}
            if first_process:
                records.write_json(result_path, result)
            results.append(result)
            rows_by_seed[seed] = log.rows

    # --- Show what came out. ----------------------------------------------------------------------
    summary = {
        "metrics": report.summarise(results),
        "seeds": results,
        "num_train": num_train,
        "num_test": len(dataset.test.labels),
        **about_data,
        "session_seconds": round(time.monotonic() - began, 1),
        "first_step_time": first_step_time,
        "device": f"{devices.size} x {jax.devices()[0].device_kind}",
        "versions": _versions(),
        "config": json.loads(json.dumps(config.to_dict())),
    }
    if not first_process:
        return summary
    records.write_json(workdir / "summary.json", summary)
    title = f"{config.method} on {dataset.name}, {config.model.name}, {config.epochs} epochs"
    report.plot_curves(workdir / "curves.png", title, rows_by_seed)
    first = results[0]
    seed_title = f"{title}, seed {first['seed']}"
    report.plot_perturbation(workdir / "perturbation.png", seed_title, first["perturbation"])
    report.show_table(title, results, console)
    console.print(f"Plots, metrics and checkpoints are in {workdir}.")
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


@contextlib.contextmanager
def _as_config_error() -> Iterator[None]:
    """Turn what the builders raise of a wrong argument into a `ConfigError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _loss_named(name: str, **known: float) -> LossFn:
    if name not in LOSSES:
        raise ConfigError(f"There is no loss {name!r}; the losses are {', '.join(LOSSES)}.")
    loss = LOSSES[name]
    taken = inspect.signature(loss).parameters
    return functools.partial(loss, **{key: known[key] for key in known if key in taken})


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


def _named(part: str, judged: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}_{name}": value for name, value in judged.items()}


def _scalars(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not isinstance(value, list)}


def _versions() -> dict[str, str]:
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"lpa_jax": lpa_jax.__version__, "python": platform.python_version()} | versions


@contextlib.contextmanager
def _progress(console: Console, name: str, first: int, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar with rate and time left; without a terminal, a line an epoch."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[news]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=first, rate="", news="")
        began = time.monotonic()

        def show(step, epoch=None, row=None):
            rate = (step - first) / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=step, rate=f"{rate:.1f} steps/s")
            if row is None:
                return
            parts = [epoch, f"loss {row['train_loss']:.4f}"]
            if "validation_accuracy" in row:
                parts.append(f"validation {100 * row['validation_accuracy']:.2f} %")
            bar.update(task, news=", ".join(parts))
            if not console.is_terminal:
                console.print(f"{name}: {', '.join(parts)}, {rate:.1f} steps/s", highlight=False)

        yield show
