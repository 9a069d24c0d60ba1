"""The training of a seed, or of several together: steps, evaluations, checkpoints, and the end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import itertools
import math
import pathlib
import statistics
import time
from typing import Any, NamedTuple, NoReturn

from absl import logging
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
import numpy as np
from rich.console import Console

from lpa_jax import data
from lpa_jax.data import streams
from lpa_jax.models import weight_files
from lpa_jax.tasks.task import is_better
from lpa_jax.training import checkpoints, mesh, pretrained, progress, provenance, rates, swad
from lpa_jax.training import feed as feeds
from lpa_jax.training import predict as prediction
from lpa_jax.training.build import as_config_error, held_out, Parts, TEST
from lpa_jax.training.config import ConfigError
from lpa_jax.training.metric_log import MetricLog
from lpa_jax.training.network import FROZEN
from lpa_jax.training.state import epoch_means, TrainState
from lpa_jax.training.step import make_steps, make_together, Steps, Together

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
      together: `together(count)` returns those for so many seeds, see `step.make_together`.
      predict: The network in evaluation, see `predict.make_predict`.
      eval_batch_size: Examples of a forward pass.
      done: The functions that were called, for the progress bar.
      weights: Pretrained ones that each seed begins with, or None.
    """

    devices: Mesh
    feed: feeds.Feed
    steps: Steps
    together: Callable[[int], Together]
    predict: prediction.Predict
    eval_batch_size: int
    done: set[Any]
    weights: pretrained.Weights | None


def make_devices(parts: Parts) -> Mesh:
    """Return the mesh of devices that share the batches of a run.

    Raises:
      ConfigError: If they cannot share one.
    """
    with as_config_error():
        return mesh.make_mesh(parts.plan.batch_size, parts.plan.fsdp)


def compile_parts(
    parts: Parts, devices: Mesh, weights: pretrained.Weights | None = None
) -> Compiled:
    """Set up the functions of a run; nothing is compiled before it is called.

    Args:
      parts: What the run is made of.
      devices: The mesh.
      weights: From `read_weights`; None to read them here, if the run has any.

    Raises:
      ConfigError: If the steps cannot be traced.
    """
    plan = parts.plan
    _check_together(parts, devices)
    if parts.pretrained is not None:
        weights = weights or read_weights(parts)
        # Before anything is traced or written.
        pretrained_variables(parts, weights)
    with as_config_error():
        feed = feeds.make_feed(
            plan.place,
            parts.dataset.train,
            plan.batch_size,
            plan.num_steps,
            devices,
            plan.sampling,
            steps_per_epoch=plan.steps_per_epoch if plan.sampling == "domains" else None,
            augment=plan.augment,
            readers=plan.readers,
            views=parts.views,
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
            augment=feed.augment,
            looped=looped,
            nonfinite=plan.nonfinite,
            ema_decay=plan.ema_decay,
            swad=plan.swad,
        )
    place = functools.partial(mesh.put, sharding=mesh.batched(devices))
    predict = prediction.make_predict(
        parts.network.logits, parts.task, place, mesh.replicated(devices)
    )
    with as_config_error():
        _try(parts, steps.like)
        _check_frozen(parts, steps.like)
    return Compiled(
        devices,
        feed,
        steps,
        # Kept, so that each number of seeds is compiled once.
        functools.cache(functools.partial(make_together, steps, feed.axes)),
        predict,
        mesh.multiple(devices, plan.eval_batch_size),
        set(),
        weights,
    )


def _check_together(parts: Parts, devices: Mesh) -> None:
    """Raise `ConfigError` if seeds are to be trained together where they cannot be."""
    if parts.plan.seeds_together == 1:
        return
    if devices.size > 1:
        raise ConfigError(
            f"config.seeds_together above 1 needs one device: set it to 1, or show the run one of "
            f"the {devices.size} devices, for instance by CUDA_VISIBLE_DEVICES=0."
        )
    for make in parts.writers:
        if getattr(make, "alone", False):
            raise ConfigError(
                "config.seeds_together above 1 needs writers that can be open for several seeds at "
                f"once, and {getattr(make, '__name__', make)} cannot: set it to 1, or leave that "
                "one out of config.writers."
            )


def _try(parts: Parts, like: TrainState) -> None:
    """Raise `ConfigError` unless the evaluation works, shown on equal logits of a few examples."""
    examples, num_classes = parts.dataset.train.take(np.arange(2)), parts.dataset.num_classes
    inputs = data.to_float(jnp.asarray(examples.images[:]))
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


def _check_frozen(parts: Parts, like: TrainState) -> None:
    """Raise `ConfigError` if factors of learning rates fit nothing, or nothing would learn."""
    network = parts.network
    params = network.whole(like.variables)["params"]
    if odd := rates.unknown(params, network.factors):
        raise ConfigError(
            f"config.optimizer.rates has {odd[0]!r}, which is no module of the network: its first "
            f"modules are {', '.join(params)}."
        )
    if not jax.tree.leaves(like.variables["params"]):
        raise ConfigError("config.optimizer.rates freezes the whole network: leave a part of it.")
    still = like.variables.get(FROZEN, {})
    moving = like.variables.get("batch_stats", {})
    shared = {path[:-1] for path in flatten_dict(still)} & {p[:-1] for p in flatten_dict(moving)}
    if shared and not getattr(network.module, "freeze_norm", False):
        logging.warning(
            "%s is frozen, but its running statistics are not: config.model.options.freeze_norm="
            "True leaves them as they are, where the network has that option.",
            "/".join(min(shared)),
        )


def read_weights(parts: Parts) -> pretrained.Weights:
    """Read the pretrained weights of a run.

    Raises:
      ConfigError: If it has none, or they cannot be read.
    """
    if parts.pretrained is None:
        raise ConfigError("config.model.pretrained names no weights.")
    with as_config_error():
        return pretrained.Weights(parts.pretrained, weight_files.read(parts.pretrained))


def pretrained_variables(parts: Parts, weights: pretrained.Weights) -> PyTree:
    """Return the variables of a run's network with its weights, and zeros for what they lack.

    Raises:
      ConfigError: If they do not fit.
    """
    inputs = data.to_float(jnp.asarray(parts.dataset.train.images[:1]))
    with as_config_error():
        shapes = jax.eval_shape(parts.network.init, jax.random.key(0), inputs)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        return weights.fitted(parts.network, zeros)


def restore(saved: checkpoints.Checkpoints, steps: Steps) -> TrainState | None:
    """Return the newest state of a seed that can be read; None if there is none."""
    restored = saved.restore(steps.like.items(), steps.shardings.items())
    return None if restored is None else TrainState.of_items(restored)


def saved_step(directory: pathlib.Path, steps: Steps) -> int:
    """Return the step of the newest state of a seed that can be read, and change nothing.

    Args:
      directory: Of the seed.
      steps: From `compile_parts`.

    Returns:
      The step; 0 if none was saved.

    Raises:
      CheckpointError: If none that was saved can be read.
    """
    path = directory / "checkpoints"
    with contextlib.closing(checkpoints.Checkpoints(path, read_only=True)) as saved:
        state = restore(saved, steps)
    return 0 if state is None else int(state.step)


def in_words(seeds: Sequence[int]) -> str:
    """Return the name of a group of seeds.

    Example:
      >>> in_words([3]), in_words([0, 2])
      ('seed 3', 'seeds 0, 2')
    """
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


class Member(NamedTuple):
    """What is kept of one seed while it trains.

    Attributes:
      seed: The seed.
      directory: Of its records.
      saved: Its checkpoints.
      log: Its metrics.
      sessions: That made it, in order.
    """

    seed: int
    directory: pathlib.Path
    saved: checkpoints.Checkpoints
    log: MetricLog
    sessions: list[provenance.Session]


class Fit:
    """The training of a seed, or of several together that are at the same step.

    Together, their states and batches are stacked along a first axis. What is recorded, saved and
    evaluated is the state of one seed after another.
    """

    def __init__(
        self,
        parts: Parts,
        compiled: Compiled,
        seeds: Sequence[int],
        workdir: pathlib.Path,
        session: provenance.Session,
        console: Console,
        preempted: Callable[[], bool],
    ):
        self.parts, self.plan, self.compiled, self.steps = (
            parts, parts.plan, compiled, compiled.steps
        )  # fmt: skip
        self.seeds, self.workdir, self.session = tuple(seeds), workdir, session
        self.together = compiled.together(len(seeds))
        self.console, self.preempted = console, preempted
        self.first_step_time: float | None = None
        self.members: list[Member] = []
        # By seed, and whether of the average: the last step that was evaluated, and its metrics.
        self.evaluated: dict[tuple[int, bool], tuple[int, dict[str, Any]]] = {}

    @property
    def rows(self) -> dict[int, list[dict[str, Any]]]:
        """What was recorded of each epoch, by seed."""
        return {one.seed: one.log.rows for one in self.members}

    def run(self) -> dict[int, dict[str, Any]]:
        """Train to the end, from the last checkpoints, and return the results by seed."""
        with contextlib.ExitStack() as stack:
            states, first = [], 0
            for seed in self.seeds:
                directory = self.workdir / f"seed{seed}"
                saved = checkpoints.Checkpoints(directory / "checkpoints")
                stack.callback(saved.close)
                states.append(restore(saved, self.steps))
                first = 0 if states[-1] is None else int(states[-1].step)
                begin = functools.partial(provenance.begin, directory, self.session, first)
                sessions = provenance.by_first(begin)
                first_process = jax.process_index() == 0
                log = MetricLog(directory, first, self.parts.writers, write=first_process)
                stack.callback(log.close)
                self.members.append(Member(seed, directory, saved, log, sessions))
            plan, name = self.plan, in_words(self.seeds)
            if len(plan.seeds) > 1:
                places = ", ".join(str(seed - plan.seeds[0] + 1) for seed in self.seeds)
                name += f" ({places} of {len(plan.seeds)})"
            shown = progress.bar(
                self.console, name, plan.num_steps, done=first, compiled=self.compiled.done
            )
            self.show = stack.enter_context(shown)
            for i, seed in enumerate(self.seeds):
                if states[i] is None:
                    states[i] = self.show.call(self.steps.init, jnp.int32(seed))
                    if (weights := self.compiled.weights) is not None:
                        network, shardings = self.parts.network, self.steps.shardings
                        states[i] = pretrained.begin(weights, network, states[i], shardings)
            state = self.together.stack(states)
            # Those of several seeds are in it as copies.
            del states
            state = self._train(state, first)
            return {one.seed: self._result(one, own) for one, own in self._each(state)}

    def _each(self, state: TrainState) -> Iterator[tuple[Member, TrainState]]:
        """Give each seed with its own state."""
        for i, one in enumerate(self.members):
            yield one, self.together.of(state, i)

    def _train(self, state: TrainState, step: int) -> TrainState:
        plan, show, together = self.plan, self.show, self.together
        stops = (plan.steps_per_epoch, plan.checkpoint_every)
        seed, *others = self.seeds
        seeds = self.seeds if others else seed
        with contextlib.closing(self.compiled.feed.open(seeds, step)) as batches:
            for taken in _dispatches(step, plan.num_steps, plan.steps_per_dispatch, *stops):
                *_, given = itertools.islice(batches, taken)
                given = (self._on_devices(seeds), self._on_devices(taken), *given)
                # Whatever is moved between host and device has been moved by now.
                with jax.transfer_guard("disallow"):
                    state = show.run(together.train, state, *given)
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
                    state = show.call(together.end_epoch, state)
                    state = self._record(state, step, epoch)
                if saving:
                    self._save(state, step)
                if stopping:
                    where = ", ".join(str(one.directory) for one in self.members)
                    raise PreemptedError(f"SIGTERM came; step {step} is saved in {where}.")
        return state

    def _record(self, state: TrainState, step: int, epoch: int) -> TrainState:
        """Record an epoch, and return the state, whose segment ends where it was evaluated."""
        losses = []
        for one, own in self._each(state):
            row = self._row(one, own, step, epoch)
            one.log.write(row)
            if self.plan.swad is not None and self._is_evaluated(step, epoch):
                found = [row["metrics"][split]["nll"] for split in self.plan.swad.splits]
                losses.append(statistics.fmean(found))
            whose = f"seed {one.seed}, " if len(self.seeds) > 1 else ""
            self.show.say(whose + _news(epoch, self.plan.epochs, row))
        if losses:
            placed = mesh.put(np.array(losses, np.float32), mesh.replicated(self.compiled.devices))
            state = self.show.call(self.together.end_segment, state, placed)
        return state

    def _is_evaluated(self, step: int, epoch: int) -> bool:
        return epoch % self.plan.evaluate_every == 0 or step == self.plan.num_steps

    def _save(self, state: TrainState, step: int) -> None:
        for one, own in self._each(state):
            one.saved.save(step, own.items())

    def _row(self, one: Member, state: TrainState, step: int, epoch: int) -> dict[str, Any]:
        """Return what is recorded of an epoch; where it is the best so far, of the test set too."""
        plan, means = self.plan, epoch_means(state.epoch)
        learning_rate = float(np.asarray(self.parts.rate((step - 1) // plan.accumulate)))
        row: dict[str, Any] = {"step": step, "epoch": epoch, "learning_rate": learning_rate}
        if plan.nonfinite == "skip":
            row["nonfinite_steps"] = int(state.nonfinite_steps)
        row |= {"metrics": {"train": means.train}, "sites": means.sites}
        if not self._is_evaluated(step, epoch):
            return row
        last = step == plan.num_steps
        chosen = held_out(self.parts.dataset) if last else plan.evaluate_splits
        found = self._evaluate(one, step, state.variables, chosen)
        if state.ema is not None and chosen:
            row["average"] = _scalars(self._evaluate(one, step, state.ema, chosen, average=True))
        split, metric = self.parts.selection
        if split in found and split in plan.evaluate_splits:
            best = best_row(one.log.rows)
            before = None if best is None else best["metrics"][split][metric]
            if is_better(self.parts.selection_metric, found[split][metric], before):
                row["best"] = True
                found |= self._evaluate(one, step, state.variables, [TEST])
        row["metrics"] |= _scalars(found)
        return row

    def _result(self, one: Member, state: TrainState) -> dict[str, Any]:
        """Return the result: that of the last epoch, whatever came before it."""
        means = epoch_means(state.epoch)
        evaluated = [split for split in self.parts.dataset.splits if split != "train"]
        step, metrics = int(state.step), {"train": means.train}
        metrics |= self._evaluate(one, step, state.variables, evaluated)
        result: dict[str, Any] = {"seed": one.seed, "metrics": metrics}
        if state.ema is not None:
            result["average"] = self._evaluate(one, step, state.ema, evaluated, average=True)
        if state.swad is not None and self.plan.swad is not None:
            variables, taken = swad.finished(state.swad, state.variables, self.plan.swad)
            result["average"] = self._evaluate(one, step, variables, evaluated, average=True)
            result["segments"] = swad.about(taken)
        if best := best_row(one.log.rows):
            result["best"] = {"epoch": best["epoch"], "metrics": best["metrics"]}
        return result | {"perturbation": means.by_class, "sessions": one.sessions}

    def _evaluate(
        self,
        one: Member,
        step: int,
        variables: PyTree,
        splits: Sequence[str],
        *,
        average: bool = False,
    ) -> dict[str, Any]:
        """Return the metrics of each split, for those that there are, computed once at a step."""
        splits = [split for split in splits if split in self.parts.dataset.splits]
        known = self.evaluated.get((one.seed, average))
        if known is None or known[0] != step:
            known = step, {}
        self.evaluated[one.seed, average] = known
        found = known[1]
        for split in splits:
            if split in found:
                continue
            examples, images = self.parts.dataset.splits[split], None
            if split in self.plan.augmented:
                drawn = int(streams.stream("validation", one.seed, step).integers(2**31))
                images = feeds.Augmented(examples.images, self.plan.augment, drawn)
            found[split] = prediction.evaluate(
                functools.partial(self.show.call, self.compiled.predict),
                self.parts.task,
                variables,
                examples,
                self.parts.dataset.num_classes,
                self.compiled.eval_batch_size,
                self.parts.groups,
                images,
            )
            for name, value in found[split].items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise NonFiniteLossError(
                        f"The metric {name!r} of the split {split!r}{self._whose(one)} is not "
                        f"finite: {REMEDY}."
                    )
        return {split: found[split] for split in splits}

    def _stop_if_nonfinite(self, state: TrainState, *, end_of_epoch: bool) -> None:
        """Raise `NonFiniteLossError`, where that is the policy or no step of an epoch was left."""
        prediction.wait(state.nonfinite_steps)
        counts, left = np.atleast_1d(state.nonfinite_steps, state.running.steps)
        failed = counts > 0
        if self.plan.nonfinite == "skip":
            failed &= end_of_epoch & (left == 0)
        for i in np.flatnonzero(failed):
            self._stop(self.members[i], self.together.of(state, int(i)))

    def _stop(self, one: Member, state: TrainState) -> NoReturn:
        """Raise `NonFiniteLossError` for a seed, with what was not finite in its last step."""
        skip = self.plan.nonfinite == "skip"
        number = int(state.step) - skip
        with contextlib.closing(self.compiled.feed.open(one.seed, number)) as batches:
            perturbation = state.perturbation
            # Where the step that failed began.
            began_at = self._on_devices(int(perturbation.step) - skip)
            state = state._replace(
                step=self._on_devices(number), perturbation=perturbation._replace(step=began_at)
            )
            finite = self.steps.diagnose(state, self._on_devices(one.seed), *next(batches))
        first = next(name for name, value in finite.items() if not value)
        raise NonFiniteLossError(
            f"Step {number}{self._whose(one)} was not finite, first {first}: {REMEDY}. What was "
            f"saved before that is kept in {self.workdir}."
        )

    def _whose(self, one: Member) -> str:
        return f" of seed {one.seed}" if len(self.members) > 1 else ""

    def _on_devices(self, numbers: int | tuple[int, ...]) -> jax.Array:
        return _on_devices(self.compiled.devices, numbers)


@functools.cache
def _on_devices(devices: Mesh, numbers: int | tuple[int, ...]) -> jax.Array:
    return mesh.put(np.array(numbers, np.int32), mesh.replicated(devices))


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
