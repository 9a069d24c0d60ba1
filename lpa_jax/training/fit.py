"""The training of one seed: its steps, its evaluations, its checkpoints, and where it stops."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import itertools
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
import numpy as np
from rich.console import Console

from lpa_jax import data
from lpa_jax.tasks.task import is_better
from lpa_jax.training import checkpoints, mesh, progress, provenance
from lpa_jax.training import feed as feeds
from lpa_jax.training import predict as prediction
from lpa_jax.training.build import as_config_error, Parts, TEST
from lpa_jax.training.config import ConfigError
from lpa_jax.training.metric_log import MetricLog
from lpa_jax.training.state import epoch_means, TrainState
from lpa_jax.training.step import make_steps, Steps

REMEDY = "lower the learning rate or the strength of the perturbation"


class PreemptedError(RuntimeError):
    """The process was asked to stop (SIGTERM); the state has been saved."""


class NonFiniteLossError(RuntimeError):
    """The loss or an update became NaN or infinite; the last good checkpoint is kept."""


class Compiled(NamedTuple):
    """What all seeds of a run share on the devices.

    Attributes:
      devices: The mesh.
      feed: Hands the steps their batches.
      steps: The jitted functions of the loop.
      predict: The network in evaluation, see `predict.make_predict`.
      eval_batch_size: Examples of a forward pass.
      done: The functions that were called, for the progress bar.
    """

    devices: Mesh
    feed: feeds.Feed
    steps: Steps
    predict: prediction.Predict
    eval_batch_size: int
    done: set[Any]


def make_devices(parts: Parts) -> Mesh:
    """Return the mesh of devices that share the batches of a run.

    Raises:
      ConfigError: If they cannot share one.
    """
    with as_config_error():
        return mesh.make_mesh(parts.plan.batch_size, parts.plan.fsdp)


def compile_parts(parts: Parts, devices: Mesh) -> Compiled:
    """Set up the functions of a run; nothing is compiled before it is called.

    Raises:
      ConfigError: If the steps cannot be traced.
    """
    plan = parts.plan
    with as_config_error():
        feed = feeds.make_feed(
            plan.place,
            parts.dataset.train,
            plan.batch_size,
            plan.num_steps,
            devices,
            plan.sampling,
        )
        looped = plan.steps_per_dispatch > 1
        if looped and not feed.resident:
            raise ConfigError(
                "config.steps_per_dispatch above 1 needs config.input to be 'device'."
            )
        steps = make_steps(
            parts.network,
            parts.task,
            parts.perturbed,
            parts.tx,
            devices,
            feed.like,
            feed.take,
            padding=plan.padding,
            flip=plan.flip,
            looped=looped,
            nonfinite=plan.nonfinite,
            ema_decay=plan.ema_decay,
        )
    place = functools.partial(mesh.put, sharding=mesh.batched(devices))
    predict = prediction.make_predict(
        parts.network.logits, parts.task, place, mesh.replicated(devices)
    )
    with as_config_error():
        _try(parts, steps.like)
    return Compiled(
        devices, feed, steps, predict, mesh.multiple(devices, plan.eval_batch_size), set()
    )


def _try(parts: Parts, like: TrainState) -> None:
    """Raise `ConfigError` unless the evaluation works, shown on equal logits of a few examples."""
    examples, num_classes = parts.dataset.train.take(np.arange(2)), parts.dataset.num_classes
    inputs = data.to_float(jnp.asarray(examples.images))
    logits = jax.eval_shape(parts.network.logits, like.variables, inputs)
    if logits.shape != (2, num_classes):
        raise ConfigError(
            f"The network returns {logits.shape} for 2 examples of {num_classes} classes: the "
            "trainer needs logits [batch, classes]."
        )
    zeros, labels = jnp.zeros(logits.shape), jnp.asarray(examples.labels)
    if (shape := jnp.shape(parts.task.correct(zeros, labels))) != (2,):
        raise ConfigError(
            f"The task's correct() must return a number for each of 2 examples, not {shape}."
        )
    outcomes = parts.task.outcomes(zeros, labels)
    outcomes = jax.tree.map(np.asarray, outcomes)
    found = prediction.plain(
        parts.task.metrics(outcomes, examples.labels, num_classes, parts.groups)
    )
    for name in {*parts.task.shown, parts.selection[1]}:
        number = found.get(name) if isinstance(found, dict) else None
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ConfigError(
                f"The task shows the metric {name!r}: let its metrics() return a number for it, in "
                f"a dictionary, not {number!r:.100}."
            )


def restore(saved: checkpoints.Checkpoints, steps: Steps) -> TrainState | None:
    """Return the newest state of a seed that can be read; None if there is none."""
    restored = saved.restore(steps.like.items(), steps.shardings.items())
    return None if restored is None else TrainState.of_items(restored)


class Fit:
    """The training of one seed."""

    def __init__(
        self,
        parts: Parts,
        compiled: Compiled,
        seed: int,
        directory: pathlib.Path,
        session: provenance.Session,
        console: Console,
        preempted: Callable[[], bool],
    ):
        self.parts, self.plan, self.compiled, self.steps = (
            parts, parts.plan, compiled, compiled.steps
        )  # fmt: skip
        self.seed, self.directory, self.session = seed, directory, session
        self.console, self.preempted = console, preempted
        self.first_step_time: float | None = None
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Train to the end, from the last checkpoint, and return the result."""
        plan = self.plan
        with contextlib.ExitStack() as stack:
            saved = checkpoints.Checkpoints(self.directory / "checkpoints")
            stack.callback(saved.close)
            state = restore(saved, self.steps)
            first = 0 if state is None else int(state.step)
            begin = functools.partial(provenance.begin, self.directory, self.session, first)
            sessions = provenance.by_first(begin)
            first_process = jax.process_index() == 0
            log = MetricLog(self.directory, first, self.parts.writers, write=first_process)
            stack.callback(log.close)
            name = f"seed {self.seed}"
            if len(plan.seeds) > 1:
                name += f" ({self.seed - plan.seeds[0] + 1} of {len(plan.seeds)})"
            shown = progress.bar(
                self.console, name, plan.num_steps, done=first, compiled=self.compiled.done
            )
            self.show, self.rows = stack.enter_context(shown), log.rows
            if state is None:
                state = self.show.call(self.steps.init, jnp.int32(self.seed))
            state = self._train(state, first, saved, log)
            return self._result(state, sessions)

    def _train(
        self, state: TrainState, step: int, saved: checkpoints.Checkpoints, log: MetricLog
    ) -> TrainState:
        plan, show, steps = self.plan, self.show, self.steps
        stops = (plan.steps_per_epoch, plan.checkpoint_every)
        with contextlib.closing(self.compiled.feed.open(self.seed, step)) as batches:
            for taken in _dispatches(step, plan.num_steps, plan.steps_per_dispatch, *stops):
                *_, given = itertools.islice(batches, taken)
                given = (self._on_devices(self.seed), self._on_devices(taken), *given)
                # Whatever is moved between host and device has been moved by now.
                with jax.transfer_guard("disallow"):
                    state = show.run(steps.train, state, *given)
                step += taken
                show.given(step, state.step)
                # The step is compiled, and the devices are at work on it.
                self.first_step_time = self.first_step_time or time.time()
                epoch, rest = divmod(step, plan.steps_per_epoch)
                stopping = self.preempted()
                saving = step % plan.checkpoint_every == 0 or step == plan.num_steps or stopping
                if saving or rest == 0:
                    self._stop_if_nonfinite(state, end_of_epoch=rest == 0)
                if rest == 0:
                    show.finished_to(step)
                    state = show.call(steps.end_epoch, state)
                    row = self._row(state, step, epoch)
                    log.write(row)
                    show.say(_news(epoch, plan.epochs, row))
                if saving:
                    saved.save(step, state.items())
                if stopping:
                    raise PreemptedError(f"SIGTERM came; step {step} is saved in {self.directory}.")
        return state

    def _row(self, state: TrainState, step: int, epoch: int) -> dict[str, Any]:
        """Return what is recorded of an epoch; where it is the best so far, of the test set too."""
        plan, means = self.plan, epoch_means(state.epoch)
        learning_rate = float(np.asarray(self.parts.rate((step - 1) // plan.accumulate)))
        row: dict[str, Any] = {"step": step, "epoch": epoch, "learning_rate": learning_rate}
        if plan.nonfinite == "skip":
            row["nonfinite_steps"] = int(state.nonfinite_steps)
        row |= {"metrics": {"train": means.train}, "sites": means.sites}
        if epoch % plan.evaluate_every and step < plan.num_steps:
            return row
        chosen = [split for split in self.parts.dataset.splits if split not in ("train", TEST)]
        found = self._evaluate(state.variables, chosen)
        if state.ema is not None and chosen:
            row["ema"] = _scalars(self._evaluate(state.ema, chosen))
        split, metric = self.parts.selection
        if split in found:
            best = best_row(self.rows)
            before = None if best is None else best["metrics"][split][metric]
            if is_better(self.parts.selection_metric, found[split][metric], before):
                row["best"], found = True, found | self._evaluate(state.variables, [TEST])
        row["metrics"] |= _scalars(found)
        return row

    def _result(self, state: TrainState, sessions: list[provenance.Session]) -> dict[str, Any]:
        """Return the result: that of the last epoch, whatever came before it."""
        means = epoch_means(state.epoch)
        evaluated = [split for split in self.parts.dataset.splits if split != "train"]
        metrics = {"train": means.train} | self._evaluate(state.variables, evaluated)
        result: dict[str, Any] = {"seed": self.seed, "metrics": metrics}
        if state.ema is not None:
            result["ema"] = self._evaluate(state.ema, evaluated)
        if best := best_row(self.rows):
            result["best"] = {"epoch": best["epoch"], "metrics": best["metrics"]}
        return result | {"perturbation": means.by_class, "sessions": sessions}

    def _evaluate(self, variables: PyTree, splits: Sequence[str]) -> dict[str, Any]:
        """Return the metrics of each split, for those that there are."""
        found = {}
        for split in splits:
            if split not in self.parts.dataset.splits:
                continue
            found[split] = prediction.evaluate(
                functools.partial(self.show.call, self.compiled.predict),
                self.parts.task,
                variables,
                self.parts.dataset.splits[split],
                self.parts.dataset.num_classes,
                self.compiled.eval_batch_size,
                self.parts.groups,
            )
            for name, value in found[split].items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise NonFiniteLossError(
                        f"The metric {name!r} of the split {split!r} is not finite: {REMEDY}."
                    )
        return found

    def _stop_if_nonfinite(self, state: TrainState, *, end_of_epoch: bool) -> None:
        """Raise `NonFiniteLossError`, where that is the policy or no step of an epoch was left."""
        skip = self.plan.nonfinite == "skip"
        prediction.wait(state.nonfinite_steps)
        left = float(state.running.steps) if end_of_epoch else math.inf
        if not int(state.nonfinite_steps) or (skip and left):
            return
        number = int(state.step) - skip
        with contextlib.closing(self.compiled.feed.open(self.seed, number)) as batches:
            perturbation = state.perturbation
            # Where the step that failed began.
            began_at = self._on_devices(int(perturbation.step) - skip)
            state = state._replace(
                step=self._on_devices(number), perturbation=perturbation._replace(step=began_at)
            )
            finite = self.steps.diagnose(state, self._on_devices(self.seed), *next(batches))
        first = next(name for name, value in finite.items() if not value)
        raise NonFiniteLossError(
            f"Step {number} was not finite, first {first}: {REMEDY}. What was saved before that is "
            f"kept in {self.directory.parent}."
        )

    def _on_devices(self, number: int) -> jax.Array:
        return _on_devices(self.compiled.devices, number)


@functools.cache
def _on_devices(devices: Mesh, number: int) -> jax.Array:
    return mesh.put(np.int32(number), mesh.replicated(devices))


def best_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row of the epoch that the selection chose: the last to improve on those before."""
    return next((row for row in reversed(rows) if row.get("best")), None)


def _dispatches(first: int, last: int, most: int, *stops: int) -> Iterator[int]:
    """Divide the steps from `first` to `last` into runs of at most `most`, ending at the stops.

    Example:
      >>> list(_dispatches(1, 10, 4, 6))
      [4, 1, 4]
    """
    while first < last:
        taken = min(most, last - first, *(stop - first % stop for stop in stops))
        yield taken
        first += taken


def _scalars(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested metrics without those that are lists."""
    return {
        name: _scalars(value) if isinstance(value, Mapping) else value
        for name, value in found.items()
        if not isinstance(value, list)
    }


def _news(epoch: int, epochs: int, row: Mapping[str, Any]) -> str:
    news = f"epoch {epoch} of {epochs}, loss {row['metrics']['train']['loss']:.4f}"
    accuracy = row["metrics"].get("validation", {}).get("accuracy")
    return news if accuracy is None else f"{news}, validation {100 * accuracy:.2f} %"
