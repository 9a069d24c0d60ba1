"""A run's networks judged again: on clean, attacked and corrupted images, from its checkpoints."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import pathlib
import statistics
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
from rich.console import Console

import lpa_jax
from lpa_jax import data, methods
from lpa_jax.evaluation import attacks, calibration, corruptions, metrics
from lpa_jax.training import checkpoints, experiment, mesh, progress, provenance, records, report
from lpa_jax.training.config import Config, ConfigError
from lpa_jax.training.experiment import Experiment
from lpa_jax.training.state import TrainState
from lpa_jax.training.step import make_steps, Steps

Part = Literal["test", "validation"]
ATTACKS = {"fgsm": attacks.fgsm(), "pgd": attacks.pgd()}
COST = {"fgsm": 4, "pgd": 61}
"""Forward passes that a batch costs, where it is not one; a gradient counts as three."""


def evaluate_run(
    workdir: str | pathlib.Path,
    *,
    seeds: Sequence[int] | None = None,
    part: Part = "test",
    attack: bool = False,
    corrupt: bool = False,
    logit_adjustment: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Judge the last readable checkpoint of each seed of a run, finished or not.

    Nothing of the run itself is changed.

    Args:
      workdir: Directory of the run. `evaluation.json` and `evaluation.png` are left there, with
        `_validation` in their names for that part.
      seeds: Which seeds; None for all that have a checkpoint.
      part: `"test"` or `"validation"`.
      attack: Whether to attack the networks as well, by FGSM and PGD-20 of radius 8/255 on pixels
        in [0, 1].
      corrupt: Whether to judge them on corrupted images as well, see `evaluation.corruptions`.
      logit_adjustment: Tau, at least 0: judge them as well with `tau * log(prior)` subtracted from
        the logits, the prior being the share of each class in the training labels; for a run that
        has not corrected for it in training, by its sampling or its method.
      console: Where to print; default the standard output.

    Returns:
      What `evaluation.json` holds: under `"metrics"`, for each condition (`"clean"`,
      `"logit_adjusted"`, `"fgsm"`, `"pgd"`, `"gaussian_noise_1"`, ..., `"corruptions"`, the mean
      of these) mean, standard deviation and n over seeds of `"error"`, `"accuracy"`, `"nll"`,
      `"ece"` and the accuracy of groups; and under `"seeds"` the same for each seed, with its step,
      the accuracy of each class, and of clean images the confusion matrix (rows are true classes)
      and the bins of the reliability diagram.

    Raises:
      ConfigError: If there is no such run, seed or part, an argument is outside its range, or the
        seeds came of other data than there are now, or of different code.
      DataError: If the data cannot be read.
      CheckpointError: If a seed has checkpoints, but none that can be read.
      WriteError: If the directory takes no more.

    References:
      Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv:2007.07314 (equation
      9, post hoc).
    """
    console = console or Console()
    workdir = pathlib.Path(workdir)
    config = records.read_config(workdir)
    if logit_adjustment is not None:
        check_adjustable(config)
    parts = _rebuild(config, workdir)
    dataset = parts.dataset
    examples = dataset.test if part == "test" else dataset.validation
    if not len(examples.labels):
        raise ConfigError(f"The run in {workdir} held out no validation images: use --part=test.")
    devices = mesh.make_mesh(jax.device_count())
    networks = _restore(config, parts, devices, workdir, seeds)
    results: list[dict[str, Any]] = [
        {"seed": seed, "step": step} for seed, (step, _) in networks.items()
    ]
    for result in results:
        if result["step"] < parts.num_steps:
            report.say(
                console,
                f"Seed {result['seed']} stands at step {result['step']} of {parts.num_steps}.",
            )

    batch_size = mesh.multiple(devices, parts.eval_batch_size)
    conditions = _conditions(parts, devices, examples, attack, corrupt, logit_adjustment)
    batches = len(networks) * math.ceil(len(examples.labels) / batch_size)
    work = batches * sum(COST.get(name, 1) for name, _, _ in conditions)
    total = batches * len(conditions)
    with progress.bar(console, "", total, unit="batch", work=work) as bar:
        for number, (name, predict, given) in enumerate(conditions, 1):
            bar.begin(f"{name} ({number} of {len(conditions)})")
            shown = given()
            for result, (_, variables) in zip(results, networks.values(), strict=True):
                found = metrics.collect(
                    functools.partial(bar.run, predict),
                    variables,
                    shown,
                    batch_size,
                    functools.partial(bar.finished, work=COST.get(name, 1)),
                )
                judged = metrics.summarize(found, shown.labels, dataset.num_classes, parts.groups)
                result[name] = {"error": 1.0 - judged["accuracy"], **judged}
                if name == "clean":
                    predicted, labels = found.predicted, shown.labels
                    matrix = metrics.confusion(predicted, labels, dataset.num_classes)
                    bins = calibration.reliability(predicted == labels, found.confidence)
                    result["confusion"] = matrix.tolist()
                    result["reliability"] = {k: v.tolist() for k, v in bins._asdict().items()}
            error = statistics.fmean(result[name]["error"] for result in results)
            bar.say(f"error {100 * error:.2f} %")
    if corrupt:
        for result in results:
            result["corruptions"] = _mean(result)

    evaluation = {
        "part": part,
        "num_examples": len(examples.labels),
        "logit_adjustment": logit_adjustment,
        "metrics": report.summarize_conditions(results),
        "seeds": results,
    }
    stem = "evaluation" if part == "test" else f"evaluation_{part}"
    title = f"{config.method} on {dataset.name}, {len(examples.labels)} {part} images"
    with records.writing(f"The evaluation in {workdir}"):
        records.write_json(workdir / f"{stem}.json", evaluation)
        report.plot_evaluation(workdir / f"{stem}.png", title, results)
    report.show_evaluation(title, evaluation["metrics"], console)
    report.say(console, f"Figures and a plot are in {workdir / stem}.json and .png.")
    return evaluation


def check_adjustable(config: Config) -> None:
    """Raise `ConfigError` if training corrects for class frequencies, as is done post hoc."""
    done = methods.corrections(config.method.split("+"))
    if config.sampling != "uniform":
        done.append(f"config.sampling={config.sampling}")
    if done:
        raise ConfigError(
            f"{' and '.join(done)} has corrected the run for the frequencies of its classes, and "
            "logit adjustment post hoc would do so once more: take one of the two, leave out "
            "--logit_adjustment or give a run without."
        )


def _rebuild(config: Config, workdir: pathlib.Path) -> Experiment:
    """Build what the run was made of, and find that the data are still the same."""
    with experiment.as_config_error():
        parts = experiment.build(config)
    kept = workdir / "labels.npz"
    if kept.exists():
        records.keep_labels(kept, data.task_labels(parts.dataset), write=False)
    return parts


def _restore(
    config: Config,
    parts: Experiment,
    devices: Mesh,
    workdir: pathlib.Path,
    seeds: Sequence[int] | None,
) -> dict[int, tuple[int, PyTree]]:
    """Return the step and the variables of each seed."""
    shape = (config.batch_size, *parts.dataset.train.images.shape[1:])
    with experiment.as_config_error():
        # Only the structure of the state is wanted, for which no batch is ever taken.
        steps = make_steps(
            parts.model.init,
            parts.perturbed,
            parts.tx,
            devices,
            shape,
            lambda _, *batch: batch,
            **config.augment,
        )
    present = {
        int(path.parent.name.removeprefix("seed")): path
        for path in workdir.glob("seed*/checkpoints")
        if path.parent.name.removeprefix("seed").isdigit()
    }
    networks = {}
    for seed in sorted(present) if seeds is None else dict.fromkeys(seeds):
        state = None
        if seed in present:
            state = _newest(present[seed], steps)
        if state is not None:
            networks[seed] = int(state.step), state.variables
        elif seeds is not None:
            raise ConfigError(
                f"{workdir} has no checkpoint of seed {seed}: it has those of "
                f"{', '.join(map(str, sorted(present))) or 'none'}."
            )
    if not networks:
        raise ConfigError(f"{workdir} has no checkpoint yet: wait for the first one.")
    provenance.check_judged([present[seed].parent for seed in networks], parts.dataset)
    return networks


def _newest(directory: pathlib.Path, steps: Steps) -> TrainState | None:
    while True:
        before = {path.name for path in directory.iterdir()}
        saved = checkpoints.Checkpoints(directory, read_only=True)
        try:
            return saved.restore(steps.like, steps.shardings)
        except checkpoints.CheckpointError:
            # A run that goes on deletes what is old, for it has saved newer ones.
            if {path.name for path in directory.iterdir()} == before:
                raise
        finally:
            saved.close()


def _conditions(
    parts: Experiment,
    devices: Mesh,
    examples: data.Examples,
    attack: bool,
    corrupt: bool,
    tau: float | None,
) -> list[tuple[str, metrics.Predict, Callable[[], data.Examples]]]:
    """Return the name of each condition, how the networks are run in it, and what gives the images.

    Corrupted images are made one condition at a time: all at once would fill the memory.
    """
    place = functools.partial(mesh.put, sharding=mesh.batched(devices))
    make = functools.partial(metrics.make_predict, place=place, sharding=mesh.replicated(devices))
    apply_fn = parts.model.apply
    predict = make(apply_fn)
    adjusted = None if tau is None else make(_adjusted(apply_fn, parts.class_counts, tau))

    def corrupted(name, severity):
        return examples._replace(images=corruptions.corrupt(examples.images, name, severity))

    conditions = [("clean", predict, lambda: examples)]
    if adjusted is not None:
        conditions.append(("logit_adjusted", adjusted, lambda: examples))
    for name, change in ATTACKS.items() if attack else ():
        conditions.append((name, make(apply_fn, change=change), lambda: examples))
    for name in corruptions.CORRUPTIONS if corrupt else ():
        for severity in corruptions.SEVERITIES:
            made = functools.partial(corrupted, name, severity)
            conditions.append((f"{name}_{severity}", predict, made))
    return conditions


def _adjusted(apply_fn: Any, class_counts: Sequence[int], tau: float) -> Any:
    """Return `apply_fn` with `tau * log(prior)` subtracted from the logits."""
    with experiment.as_config_error():
        adjustment = lpa_jax.logit_adjustment(class_counts, tau)
    zeros = jnp.zeros((1, len(class_counts)), jnp.float32)
    shift, _ = adjustment.update(zeros, adjustment.init(zeros))

    def adjusted(variables, images, **kwargs):
        return apply_fn(variables, images, **kwargs) - shift

    return adjusted


def _mean(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean of the scalars over all corruptions and severities."""
    corrupted = [
        result[f"{name}_{severity}"]
        for name in corruptions.CORRUPTIONS
        for severity in corruptions.SEVERITIES
    ]
    scalars = [name for name, value in corrupted[0].items() if not isinstance(value, list)]
    return {name: statistics.fmean(judged[name] for judged in corrupted) for name in scalars}
