"""A run's networks evaluated again: on clean, attacked and corrupted images, from checkpoints."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import pathlib
import statistics
import types
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

import lpa_jax
from lpa_jax import data, plots
from lpa_jax.core import checks
from lpa_jax.evaluation import attacks, corruptions
from lpa_jax.training import display, files, mesh, predict, progress, run
from lpa_jax.training.build import as_config_error, Data, Parts, TEST
from lpa_jax.training.config import ConfigError

ATTACKS = {"fgsm": attacks.fgsm(), "pgd": attacks.pgd()}
COST = {"fgsm": 4, "pgd": 61}
"""Forward passes that a batch costs, where it is not one; a gradient counts as three."""


class Condition(NamedTuple):
    """A condition in which networks are evaluated.

    Attributes:
      name: Of the condition.
      predict: How the networks are run in it.
      examples: Makes the examples: corrupted ones of all conditions would fill the memory.
      averaged: Whether the networks are the averages of the weights.
    """

    name: str
    predict: predict.Predict
    examples: Callable[[], data.Examples]
    averaged: bool = False


def evaluate_run(
    workdir: str | pathlib.Path,
    *,
    seeds: Sequence[int] | None = None,
    split: str = TEST,
    attack: bool = False,
    corrupt: bool = False,
    logit_adjustment: float | None = None,
    model: nn.Module | None = None,
    dataset: Data | None = None,
    parts: Parts | None = None,
    changes: Mapping[str, Any] = types.MappingProxyType({}),
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate the last readable checkpoint of each seed of a run, finished or not.

    Nothing of the run itself is changed.

    Args:
      workdir: Directory of the run. `evaluation.json` and, of a task that has one, the reliability
        diagram `evaluation.png` are saved there, with the name of the split in theirs where it is
        not the test set.
      seeds: Which seeds; None for all that have a checkpoint.
      split: Name of a split, such as `"test"` or `"validation"`.
      attack: Whether to attack the networks as well, by FGSM and PGD-20 of radius 8/255 on pixels
        in [0, 1].
      corrupt: Whether to evaluate them on corrupted images as well, see `evaluation.corruptions`.
      logit_adjustment: Tau, at least 0: evaluate them as well with `tau * log(prior)` subtracted
        from the logits, the prior being the share of each class in the training labels; for a run
        that has not corrected for it in training, by its sampling or its method.
      model: The network of a run that was given one as an object.
      dataset: The data of a run that was given them as an object.
      parts: What the run was made of, if that is known already.
      changes: Keys of the configuration to set anew, such as `{"eval_batch_size": 100}`.
      console: Where to print; default the standard output.

    Returns:
      What `evaluation.json` holds: under `"metrics"`, for each condition (`"clean"`, `"average"`
      where the run averaged its weights, `"logit_adjusted"`, `"fgsm"`, `"pgd"`,
      `"gaussian_noise_1"`, ..., `"corruptions"`, the mean of these) mean, standard deviation and n
      over seeds of the task's metrics; and under `"seeds"` the same for each seed, with its step,
      and what the task tells besides of clean images.

    Raises:
      ConfigError: If there is no such run, seed or split, an argument is outside its range, or the
        seeds were made with other data than there are now, or of different code.
      DataError: If the data cannot be read.
      CheckpointError: If a seed has checkpoints, but none that can be read.
      WriteError: If the directory takes no more.

    References:
      Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv:2007.07314 (equation
      9, post hoc).
    """
    console = console or Console()
    workdir = pathlib.Path(workdir)
    if parts is None:
        parts = run.load_parts(workdir, model=model, dataset=dataset, changes=changes)
    if logit_adjustment is not None:
        check_adjustable(parts)
    if split not in parts.dataset.splits:
        raise ConfigError(
            f"The run in {workdir} has no split {split!r}: it has "
            f"{', '.join(parts.dataset.splits)}."
        )
    examples = parts.dataset.splits[split]
    devices = mesh.make_mesh(jax.device_count())
    networks = run.load_networks(parts, workdir, seeds, devices)
    results: list[dict[str, Any]] = [
        {"seed": seed, "step": found.step, "metrics": {}} for seed, found in networks.items()
    ]
    for result in results:
        if result["step"] < parts.plan.num_steps:
            display.say(
                console,
                f"Seed {result['seed']} is at step {result['step']} of {parts.plan.num_steps}.",
            )

    batch_size = mesh.multiple(devices, parts.plan.eval_batch_size)
    conditions = _conditions(parts, devices, examples, attack, corrupt, logit_adjustment)
    batches = len(networks) * math.ceil(len(examples) / batch_size)
    work = batches * sum(COST.get(condition.name, 1) for condition in conditions)
    first, metric = next(iter(parts.task.shown.items()))
    with progress.bar(console, "", batches * len(conditions), unit="batch", work=work) as bar:
        for number, condition in enumerate(conditions, 1):
            bar.begin(f"{condition.name} ({number} of {len(conditions)})")
            shown = condition.examples()
            for result, network in zip(results, networks.values(), strict=True):
                found = predict.collect(
                    functools.partial(bar.run, condition.predict),
                    network.average if condition.averaged else network.variables,
                    shown,
                    batch_size,
                    functools.partial(bar.finished, work=COST.get(condition.name, 1)),
                )
                about = (found, shown.labels, parts.dataset.num_classes)
                result["metrics"][condition.name] = predict.plain(
                    parts.task.metrics(*about, parts.groups)
                )
                if condition.name == "clean":
                    result["details"] = predict.plain(parts.task.details(*about))
            means = (result["metrics"][condition.name][first] for result in results)
            bar.say(
                f"{metric.label} {display.with_deviation(statistics.fmean(means), None, metric)}"
            )
    if corrupt:
        for result in results:
            result["metrics"]["corruptions"] = _mean_over_corruptions(result["metrics"])

    evaluation = {
        "split": split,
        "num_examples": len(examples),
        "logit_adjustment": logit_adjustment,
        "metrics": display.statistics_over([result["metrics"] for result in results]),
        "seeds": results,
    }
    # Names of splits may have slashes: art_painting/in.
    stem = "evaluation" if split == TEST else f"evaluation_{split.replace('/', '_')}"
    title = f"{parts.title}, {len(examples)} {split} examples"
    plotted = "reliability" in results[0]["details"]
    with files.writing(f"The evaluation in {workdir}"):
        files.write_json(workdir / f"{stem}.json", evaluation)
        if plotted:
            plots.save(plots.reliability(title, results), workdir / f"{stem}.png")
    display.show_evaluation(title, evaluation["metrics"], parts.task, console)
    told = f"Metrics {'and a plot ' if plotted else ''}are in {workdir / stem}.json"
    display.say(console, f"{told}{' and .png' if plotted else ''}.")
    return evaluation


def check_adjustable(parts: Parts) -> None:
    """Raise `ConfigError` if training corrects for class frequencies, as is done post hoc."""
    if parts.corrections:
        raise ConfigError(
            f"{' and '.join(parts.corrections)} has corrected the run for the frequencies of its "
            "classes, and logit adjustment post hoc would do so once more: take one of the two, "
            "leave out --logit_adjustment or give a run without."
        )


def _conditions(
    parts: Parts,
    devices: Mesh,
    examples: data.Examples,
    attack: bool,
    corrupt: bool,
    tau: float | None,
) -> list[Condition]:
    images = examples.images
    if (attack or corrupt) and (images.dtype != "uint8" or images.ndim != 4):
        raise ConfigError(
            f"Attacks and corruptions are of images, uint8 [N, H, W, C], but these are "
            f"{images.dtype} {[*images.shape]}: leave --attacks and --corruptions out."
        )
    place = functools.partial(mesh.put, sharding=mesh.batched(devices))
    make = functools.partial(
        predict.make_predict, task=parts.task, place=place, sharding=mesh.replicated(devices)
    )
    logits_fn = parts.network.logits
    clean = make(logits_fn)
    conditions = [Condition("clean", clean, lambda: examples)]
    if parts.plan.averages:
        conditions.append(Condition("average", clean, lambda: examples, averaged=True))
    if tau is not None:
        adjusted = make(_adjusted(logits_fn, parts.class_counts, tau))
        conditions.append(Condition("logit_adjusted", adjusted, lambda: examples))
    loss = next(iter(parts.task.losses.values()))

    def label_loss(logits, labels):
        return loss(logits, checks.soft(labels, parts.dataset.num_classes))

    for name, change in ATTACKS.items() if attack else ():
        attacked = make(logits_fn, change=change, loss=label_loss)
        conditions.append(Condition(name, attacked, lambda: examples))

    def corrupted(name, severity):
        images = corruptions.corrupt(examples.images[:], name, severity)
        return dataclasses.replace(examples, images=images)

    for name, severity in corruptions.EVERY if corrupt else ():
        made = functools.partial(corrupted, name, severity)
        conditions.append(Condition(f"{name}_{severity}", clean, made))
    return conditions


def _adjusted(logits_fn: Any, class_counts: Sequence[int], tau: float) -> Any:
    """Return `logits_fn` with `tau * log(prior)` subtracted."""
    with as_config_error():
        adjustment = lpa_jax.logit_adjustment(class_counts, tau)
    zeros = jnp.zeros((1, len(class_counts)), jnp.float32)
    shift, _ = adjustment.update(zeros, adjustment.init(zeros))
    return lambda variables, images: logits_fn(variables, images) - shift


def _mean_over_corruptions(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean of each number over all corruptions and severities."""
    found = display.statistics_over(
        [metrics[f"{n}_{severity}"] for n, severity in corruptions.EVERY]
    )

    def means(tree):
        return {
            name: value["mean"] if "mean" in value else means(value) for name, value in tree.items()
        }

    return means(found)
