"""What a configuration describes: examples, a network, its perturbation, and an optimizer."""

from collections.abc import Iterator
import contextlib
import functools
import inspect
import re
from typing import NamedTuple

from absl import logging
from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import optax

import lpa_jax
from lpa_jax import data, losses, models
from lpa_jax.core.step import LossFn, Step
from lpa_jax.training import config as configuration
from lpa_jax.training import schedules
from lpa_jax.training.config import Config, ConfigError

LOSSES = {
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "softmax_binary_cross_entropy": losses.softmax_binary_cross_entropy,
    "softmax_focal_loss": losses.softmax_focal_loss,
    "generalized_cross_entropy": losses.generalized_cross_entropy,
}


class Experiment(NamedTuple):
    """All of a run but the devices, and where it leaves what it finds.

    Attributes:
      dataset: The examples, long-tailed or noisily labeled where that was asked for.
      class_counts: Number of training examples of each class, by the labels that are trained on.
      groups: Classes of each group on a long tail, see `data.class_groups`; else nothing.
      model: The network, in Flax.
      perturbed: From `lpa_jax.value_and_grad`.
      rate: The learning rate, by updates.
      tx: The optimizer.
      steps_per_epoch: Full batches of an epoch.
      num_steps: Steps of the whole run.
      eval_batch_size: Examples to evaluate at a time, at most.
    """

    dataset: data.Dataset
    class_counts: list[int]
    groups: dict[str, list[int]]
    model: nn.Module
    perturbed: Step
    rate: optax.Schedule
    tx: optax.GradientTransformation
    steps_per_epoch: int
    num_steps: int
    eval_batch_size: int


def build(config: Config) -> Experiment:
    """Build what a configuration describes.

    Raises:
      ConfigError: If it cannot be built.
      DataError: If the data cannot be read.
    """
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
    # Those of the task, of which a part for trials would not tell.
    groups = data.groups_of(dataset)
    absent = _absent(dataset)
    remedy = "give it examples, or leave it out of the class names and number the classes anew"
    if config.limit is not None:
        dataset = data.limited(dataset, config.limit)
        if _absent(dataset) != absent:
            absent, remedy = _absent(dataset), f"config.limit {config.limit} keeps none, give more"
    if absent and configuration.needs_every_class(config):
        raise ConfigError(
            f"There is no training example of {absent}, but config.method {config.method!r} needs "
            f"the number of examples of every class: {remedy}."
        )
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
    if num_steps >= 2**31:
        raise ConfigError(
            f"config.epochs is {config.epochs}, which makes {num_steps} steps: give fewer than "
            "2**31."
        )
    class_counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes).tolist()
    with as_config_error(), _options_named(config.model.name):
        model = models.create(
            config.model.name,
            num_classes=dataset.num_classes,
            mean=dataset.mean,
            std=dataset.std,
            dtype=jnp.dtype(config.model.dtype),
            head=config.model.head,
            **({} if config.remat is None else {"remat": config.remat}),
            **config.model.options,
        )
    with as_config_error():
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
    if absent:
        logging.warning(
            "There is no training example of %s: %s; otherwise it is never learned.", absent, remedy
        )
    return Experiment(
        dataset=dataset,
        class_counts=class_counts,
        groups=groups,
        model=model,
        perturbed=perturbed,
        rate=rate,
        tx=tx,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        eval_batch_size=min(
            config.eval_batch_size, max(len(dataset.validation.labels), len(dataset.test.labels))
        ),
    )


def _absent(dataset: data.Dataset) -> str:
    classes = range(dataset.num_classes)
    return data.missing_classes(classes, dataset.train.labels, dataset.class_names)


@contextlib.contextmanager
def as_config_error() -> Iterator[None]:
    """Turn what the builders raise of a wrong argument into a `ConfigError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


@contextlib.contextmanager
def _options_named(model: str) -> Iterator[None]:
    """Say which option a network does not take."""
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument ('\w+')", str(error))
        if unknown is None:
            raise
        raise ConfigError(
            f"config.model.options has {unknown[1]}, which {model} does not take: leave it out, or "
            "clear what the configuration's file gives by --config.model.options={}."
        ) from error


def _loss_named(name: str, **known: float) -> LossFn:
    if name not in LOSSES:
        raise ConfigError(f"There is no loss {name!r}; the losses are {', '.join(LOSSES)}.")
    loss = LOSSES[name]
    taken = inspect.signature(loss).parameters
    return functools.partial(loss, **{key: known[key] for key in known if key in taken})
