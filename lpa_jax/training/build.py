"""From a configuration to the parts of a run; nothing else reads the keys of a configuration."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import fnmatch
import functools
import importlib.util
import inspect
import json
import re
from typing import Any, NamedTuple

from absl import logging
from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import optax

import lpa_jax
from lpa_jax import data, models
from lpa_jax.core.step import LossFn, Step
from lpa_jax.models import weight_files
from lpa_jax.models.pretrained import Pretrainable
from lpa_jax.registry import reason
from lpa_jax.tasks import Metric, Task, TASKS
from lpa_jax.training import config as configuration
from lpa_jax.training import method_config, rates, schedules, swad
from lpa_jax.training.config import Config, ConfigError
from lpa_jax.training.network import Network
from lpa_jax.training.writers import MakeWriter, WRITERS

GIVEN = "given: "
"""What the recorded name of a network or a data set begins with that was given as an object."""
TEST = "test"
"""The split on which no choice may depend: it is evaluated at the end, and where others improve."""


class Plan(NamedTuple):
    """How a run is carried out.

    Attributes:
      seeds: Its seeds.
      seeds_together: How many of them are trained in one program, at most.
      epochs: Of each seed.
      steps_per_epoch: Batches of an epoch.
      num_steps: Steps of each seed.
      accumulate: Steps an update of the parameters.
      evaluate_every: Epochs between evaluations.
      evaluate_splits: What is evaluated before the last epoch: all but the training and test sets,
        or some of these.
      checkpoint_every: Steps between checkpoints.
      nonfinite: `"stop"` or `"skip"`.
      ema_decay: Of the average of the weights, or None.
      swad: Of SWAD's average of the weights, or None.
      batch_size: Examples of a step.
      eval_batch_size: Examples of a forward pass in evaluation, at most.
      sampling: How an epoch draws its examples.
      augment: What training images go through, in order.
      augmented: Splits that are evaluated on augmented images.
      readers: Processes that read image files.
      cached: The module whose output is computed once for each image, or None.
      views: Augmented versions of each image whose outputs are kept.
      cache_dir: Where they are kept; None for memory.
      data_seed: Of what is drawn once, for all seeds.
      place: Where training examples are kept.
      steps_per_dispatch: Steps in one call.
      fsdp: Devices that share one copy of the state.
    """

    seeds: range
    seeds_together: int
    epochs: int
    steps_per_epoch: int
    num_steps: int
    accumulate: int
    evaluate_every: int
    evaluate_splits: tuple[str, ...]
    checkpoint_every: int
    nonfinite: Any
    ema_decay: float | None
    swad: swad.Settings | None
    batch_size: int
    eval_batch_size: int
    sampling: str
    augment: tuple[data.Applied, ...]
    augmented: tuple[str, ...]
    readers: int
    cached: str | None
    views: int
    cache_dir: str | None
    data_seed: int
    place: str
    steps_per_dispatch: int
    fsdp: int

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is kept."""
        return self.ema_decay is not None or self.swad is not None


class Parts(NamedTuple):
    """What a run is made of, but the devices and the work directory.

    Attributes:
      config: The configuration, for the records.
      title: Method, data set, network and epochs, in words.
      dataset: The examples, long-tailed or noisily labeled where that was asked for.
      task: What labels mean.
      class_counts: Number of training examples of each class, by the labels that are trained on.
      groups: Classes of each group on a long tail, see `data.class_groups`; else nothing.
      modified: Whether the training set was made long-tailed, or its labels noisy.
      corrections: What corrects for the frequencies of the classes in training.
      network: The network.
      pretrained: Where its first weights come from; None for random ones.
      perturbed: From `lpa_jax.value_and_grad`.
      rate: The learning rate, by updates.
      tx: The optimizer.
      plan: How the run is carried out.
      selection: The split and the metric that select the best epoch.
      writers: What makes the writers of metrics.
      views: Versions of the training images that epochs take by turns; empty for the images alone.
    """

    config: dict[str, Any]
    title: str
    dataset: data.Dataset
    task: Task
    class_counts: list[int]
    groups: dict[str, list[int]]
    modified: bool
    corrections: list[str]
    network: Network
    pretrained: str | None
    perturbed: Step
    rate: optax.Schedule
    tx: optax.GradientTransformation
    plan: Plan
    selection: tuple[str, str]
    writers: Sequence[MakeWriter]
    views: Sequence[np.ndarray] = ()

    @property
    def selection_metric(self) -> Metric:
        """How the metric that selects is read."""
        return self.task.shown[self.selection[1]]


Data = data.Dataset | Mapping[str, Any]


def build(config: Config, *, model: nn.Module | None = None, dataset: Data | None = None) -> Parts:
    """Build what a configuration describes.

    Args:
      config: The configuration.
      model: A network in place of the one that `config.model` names.
      dataset: Examples in place of those that `config.dataset` names: a data set, or sources or
        arrays `(images, labels)` by split.

    Raises:
      ConfigError: If it cannot be built.
      DataError: If the data cannot be read.
    """
    configuration.check(config)
    config, recorded = config.copy_and_resolve_references(), config.to_dict()
    with as_config_error():
        task = TASKS.find(config.task)
    examples, recorded["dataset"] = _dataset(config, dataset)
    # Those of the whole set, of which a part for trials would not tell.
    groups = data.groups_of(examples)
    with as_config_error():
        examples, class_counts, lacking = _limited(config, examples, task)
    plan = _plan(config, examples, task)
    with as_config_error():
        module, named = _network(config, model, examples)
        recorded["model"] |= named
        factors = rates.parse(config.optimizer.rates)
        network = Network(module, factors)
        chain = method_config.perturbation(
            config,
            class_counts,
            examples.mean,
            plan.num_steps,
            len(examples.train),
            _num_domains(examples),
        )
        perturbed = lpa_jax.value_and_grad(
            network.apply,
            chain,
            num_classes=examples.num_classes,
            loss_fn=_loss(task, **config.loss),
            class_statistic=task.class_statistic,
        )
        rate = schedules.learning_rate(
            **config.schedule,
            epochs=config.epochs,
            steps_per_epoch=plan.steps_per_epoch / plan.accumulate,
        )
        tx = schedules.optimizer(
            config.optimizer.name,
            rate,
            config.optimizer.weight_decay,
            dict(config.optimizer.options),
            plan.accumulate,
            config.optimizer.decay,
        )
        tx = rates.scaled(tx, factors)
        if config.model.cached is None and (config.model.views or config.model.cache_dir):
            raise ConfigError(
                "config.model.views and config.model.cache_dir say how the outputs of a module are "
                "kept: name it by config.model.cached, or leave them out."
            )
        if config.model.cached is not None and config.model.pretrained is None:
            raise ConfigError(
                "config.model.cached needs config.model.pretrained: a prefix of random weights has "
                "nothing to keep."
            )
        writers = [_writer(name) for name in config.writers]
        if task.selection not in task.shown:
            raise ConfigError(
                f"The task selects by {task.selection!r}, which is not among the metrics it shows "
                f"({', '.join(task.shown)}): add it to them."
            )
        selection = _selection(config, examples, task)
    if lacking:
        logging.warning("%s", lacking)
    epochs = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''}"
    name = recorded["model"]["name"].removeprefix(GIVEN).partition("(")[0]
    return Parts(
        config=json.loads(json.dumps(recorded)),
        title=f"{config.method} on {examples.name}, {name}, {epochs}",
        dataset=examples,
        task=task,
        class_counts=class_counts,
        groups=groups,
        modified={config.imbalance.kind, config.noise.kind} != {"none"},
        corrections=method_config.corrections(config),
        network=network,
        pretrained=config.model.pretrained,
        perturbed=perturbed,
        rate=rate,
        tx=tx,
        plan=plan,
        selection=selection,
        writers=writers,
    )


def _dataset(config: Config, given: Data | None) -> tuple[data.Dataset, str]:
    """Return the data set, with the changes that were asked for, and the name to record."""
    name = config.dataset
    if given is not None and config.test_domains:
        raise ConfigError(
            "config.test_domains has no effect on data that are given as an object: leave it out, "
            "and give what lpa_jax.data.domainbed.splits returns."
        )
    if given is None:
        if name.startswith(GIVEN):
            raise ConfigError(
                f"The run has data that were given as an object ({name.removeprefix(GIVEN)!r}): "
                "give them again from Python, as in lpa_jax.load_run(workdir, dataset=...)."
            )
        loaded = data.load(
            name,
            data_dir=config.data_dir,
            validation_fraction=config.validation_fraction,
            seed=config.data_seed,
            image_size=config.image_size,
            image_part=config.image_part,
            test_domains=config.test_domains,
        )
    elif isinstance(given, data.Dataset):
        loaded, name = given, f"{GIVEN}{given.name}"
    else:
        loaded = data.make_dataset(
            "given data",
            given,
            validation_fraction=config.validation_fraction,
            seed=config.data_seed,
        )
        name = f"{GIVEN}{loaded.name}"
    if config.cache == "memory":
        loaded = data.cached(loaded)
    imbalance, noise = dict(config.imbalance), dict(config.noise)
    return data.modify(loaded, imbalance, noise, seed=config.data_seed), name


def _limited(
    config: Config, dataset: data.Dataset, task: Task
) -> tuple[data.Dataset, list[int], str]:
    """Return the part of a data set that is asked for, and how many examples each class has.

    Returns:
      The data set; the number of training examples of each class; and, where a class has none, what
      to say of it.
    """

    def absent(counts):
        present = [label for label, count in enumerate(counts) if count]
        return data.missing_classes(range(len(counts)), np.array(present, int), dataset.class_names)

    def counted(dataset):
        return task.class_counts(dataset.train.labels, dataset.num_classes)

    counts = counted(dataset)
    lacking = absent(counts)
    remedy = "give it examples, or leave it out of the class names and number the classes anew"
    if config.limit is not None:
        dataset = data.limited(dataset, config.limit)
        counts = counted(dataset)
        if absent(counts) != lacking:
            lacking, remedy = absent(counts), f"config.limit {config.limit} keeps none, give more"
    if lacking and method_config.needs_every_class(config):
        raise ConfigError(
            f"There is no training example of {lacking}, but config.method {config.method!r} needs "
            f"the number of examples of every class: {remedy}."
        )
    told = f"There is no training example of {lacking}: {remedy}; otherwise it is never learned."
    return dataset, counts, told if lacking else ""


def _num_domains(dataset: data.Dataset) -> int | None:
    """Return one more than the largest number of a training example's domain, if there are any."""
    domains = dataset.train.extra.get(data.DOMAINS)
    return None if domains is None else int(np.max(domains)) + 1


def _plan(config: Config, dataset: data.Dataset, task: Task) -> Plan:
    num_train, shape = len(dataset.train), dataset.train.images.shape
    if num_train < config.batch_size:
        raise ConfigError(
            f"The training set has {num_train} examples, fewer than config.batch_size "
            f"{config.batch_size}: set a smaller one."
        )
    if config.sampling in data.BALANCING and dataset.train.labels.ndim > 1:
        raise ConfigError(
            f"config.sampling {config.sampling!r} draws by the one class of each example, but the "
            "labels are [N, C]: set it to 'uniform'."
        )
    _check_domains(config, dataset)
    augment = _augment(config, shape)
    steps_per_epoch = config.steps_per_epoch or num_train // config.batch_size
    num_steps = config.epochs * steps_per_epoch
    if num_steps >= 2**31:
        raise ConfigError(
            f"config.epochs is {config.epochs}, which makes {num_steps} steps: give fewer than "
            "2**31."
        )
    if config.optimizer.accumulate > num_steps:
        raise ConfigError(
            f"config.optimizer.accumulate is {config.optimizer.accumulate}, more than the run's "
            f"{num_steps} steps: no parameter would ever move."
        )
    evaluated = [len(dataset.splits[split]) for split in dataset.splits if split != "train"]
    return Plan(
        seeds=range(config.seed, config.seed + config.num_seeds),
        seeds_together=config.seeds_together,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        accumulate=config.optimizer.accumulate,
        evaluate_every=config.evaluate_every,
        evaluate_splits=_evaluated(config, dataset),
        checkpoint_every=max(1, round(config.checkpoint_every * steps_per_epoch)),
        nonfinite=config.nonfinite,
        ema_decay=config.optimizer.ema_decay,
        swad=_swad(config, dataset, task),
        batch_size=config.batch_size,
        eval_batch_size=min(config.eval_batch_size, max(evaluated, default=num_train)),
        sampling=config.sampling,
        augment=augment,
        augmented=_augmented(config, dataset, augment),
        readers=config.readers,
        cached=config.model.cached,
        views=config.model.views,
        cache_dir=config.model.cache_dir,
        data_seed=config.data_seed,
        place=config.input,
        steps_per_dispatch=config.steps_per_dispatch,
        fsdp=config.fsdp,
    )


def _check_domains(config: Config, dataset: data.Dataset) -> None:
    if config.sampling != "domains":
        if config.steps_per_epoch is not None:
            raise ConfigError(
                "config.steps_per_epoch needs config.sampling to be 'domains', which draws with "
                "replacement: an epoch of another shows as many examples as there are."
            )
        return
    number = _num_domains(dataset)
    if number is None:
        raise ConfigError(
            "config.sampling 'domains' needs the domain of each training example: take data that "
            "have it, such as config.dataset='domains:PATH', or another sampling."
        )
    present = len(np.unique(dataset.train.extra[data.DOMAINS]))
    if config.batch_size % present:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, but a batch has equally many examples of "
            f"each of {present} domains: give a multiple of {present}."
        )


def held_out(dataset: data.Dataset) -> list[str]:
    """Return the splits that are neither trained nor finally judged on."""
    return [split for split in dataset.splits if split not in ("train", TEST)]


def _evaluated(config: Config, dataset: data.Dataset) -> tuple[str, ...]:
    """Return the splits that are evaluated before the last epoch."""
    splits = held_out(dataset)
    for pattern in config.evaluate_splits:
        if not isinstance(pattern, str) or not fnmatch.filter(splits, pattern):
            raise ConfigError(
                f"config.evaluate_splits has {pattern!r}, which fits none of the splits that are "
                f"evaluated: {', '.join(splits) or 'there are none'}."
            )
    patterns = config.evaluate_splits or ("*",)
    return tuple(
        split for split in splits if any(fnmatch.fnmatchcase(split, one) for one in patterns)
    )


def _validation(config: Config, dataset: data.Dataset) -> tuple[str, ...]:
    """Return the validation splits of the domains that are learned from, or the one there is."""
    if not config.test_domains:
        return ("validation",)
    return tuple(
        split
        for split in held_out(dataset)
        if split.endswith("/out") and not _is_tested(config, split)
    )


def _is_tested(config: Config, split: str) -> bool:
    """Return whether a split is of a test domain."""
    return split.partition("/")[0] in map(data.split_name, config.test_domains)


def _augmented(
    config: Config, dataset: data.Dataset, augment: Sequence[data.Applied]
) -> tuple[str, ...]:
    if not config.augment_validation:
        return ()
    if not augment or config.model.cached is not None:
        raise ConfigError(
            "config.augment_validation has no effect where no image is augmented, or where the "
            "outputs of config.model.cached are kept: leave it out, or set config.augment."
        )
    return ("validation", *_validation(config, dataset))


def _swad(config: Config, dataset: data.Dataset, task: Task) -> swad.Settings | None:
    ratio, converge, tolerance = (
        config.optimizer.swad[key] for key in ("ratio", "converge", "tolerance")
    )
    if ratio is None:
        return None
    if config.optimizer.ema_decay is not None:
        raise ConfigError(
            "config.optimizer.swad.ratio and config.optimizer.ema_decay each ask for an average of "
            "the weights: leave one of them out."
        )
    if tolerance < converge:
        raise ConfigError(
            f"config.optimizer.swad.tolerance is {tolerance}, less than config.optimizer.swad."
            f"converge {converge}: give at least as much."
        )
    if "nll" not in task.shown:
        raise ConfigError(
            "config.optimizer.swad.ratio needs a task with the metric 'nll', by which SWAD judges: "
            f"config.task {config.task!r} shows {', '.join(task.shown)}."
        )
    splits = _validation(config, dataset)
    if not {*splits} <= {*_evaluated(config, dataset)}:
        raise ConfigError(
            "config.optimizer.swad.ratio needs a validation set, by which SWAD judges: set "
            "config.validation_fraction above 0, and evaluate it by config.evaluate_splits."
        )
    return swad.Settings(ratio, converge, tolerance, splits)


def _augment(config: Config, shape: Sequence[int]) -> tuple[data.Applied, ...]:
    """Return the augmentations of images; what has no height and width has none."""
    try:
        augment = data.augmentations(config.augment)
    except ValueError as error:
        raise ConfigError(f"config.augment is {config.augment!r}. {error}") from error
    if len(shape) != 4:
        return ()
    for name, numbers in augment:
        if name == "crop" and max(numbers, default=4) >= min(shape[1:3]):
            raise ConfigError(
                f"config.augment is {config.augment!r}, but crop needs a border below the images' "
                f"side of {min(shape[1:3])} pixels: give a smaller one, as in crop=1, or 'none'."
            )
        if data.AUGMENTATIONS[name].color and shape[3] != 3:
            raise ConfigError(
                f"config.augment is {config.augment!r}, but {name} needs images of 3 channels, not "
                f"{shape[3]}: leave it out."
            )
    return augment


def _network(
    config: Config, given: nn.Module | None, dataset: data.Dataset
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network, and the name and options to record."""
    name = config.model.name
    if given is not None:
        if not isinstance(given, nn.Module):
            raise ConfigError(
                f"The trainer takes a Flax Linen module as its network, not {given!r:.100}; "
                "lpa_jax.value_and_grad takes others, in a loop of your own."
            )
        # Functions among its attributes are shown with their addresses.
        return given, {"name": GIVEN + re.sub(r" at 0x[0-9a-f]+", "", repr(given))}
    if name.startswith(GIVEN):
        raise ConfigError(
            f"The run has a network that was given as an object ({name.removeprefix(GIVEN)!r:.99}):"
            " give it again from Python, as in lpa_jax.load_run(workdir, model=...)."
        )
    options = dict(config.model.options)
    arguments: dict[str, Any] = {"mean": dataset.mean, "std": dataset.std}
    arguments |= {} if config.remat is None else {"remat": config.remat}
    with _options_named(name):
        module: Any = models.create(
            name,
            num_classes=dataset.num_classes,
            dtype=jnp.dtype(config.model.dtype),
            head=config.model.head,
            **(arguments | options),
        )
    if config.model.pretrained is None or not hasattr(module, "mean"):
        return module, {"name": name}
    wanted = {key: options[key] for key in ("mean", "std") if key in options}
    if len(wanted) < 2:
        module = module.clone(**(_scale(config.model.pretrained, module) | wanted))
    # Recorded, so that the run can be loaded where what it began with is no longer there.
    options |= {"mean": module.mean, "std": module.std}
    return module, {"name": name, "options": options}


def _scale(pretrained: str, module: nn.Module) -> dict[str, Any]:
    """Return the mean and deviation of inputs that pretrained weights want, where that is known."""
    if pretrained.startswith("run:"):
        # Imported late: it builds a run, as this does.
        from lpa_jax.training.run import load_run

        inputs: Any = load_run(pretrained.removeprefix("run:")).model
    else:
        inputs = weight_files.inputs_of(pretrained)
        if inputs is None and isinstance(module, Pretrainable):
            inputs = module.pretrained_inputs()
    return {key: getattr(inputs, key) for key in ("mean", "std") if hasattr(inputs, key)}


@contextlib.contextmanager
def as_config_error() -> Iterator[None]:
    """Turn what the builders raise of a wrong argument into a `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # Of any kind: networks, tasks and methods may be the user's own.
        raise ConfigError(
            f"The network, the task or the method cannot be used ({reason(error)}): correct that."
        ) from error


@contextlib.contextmanager
def _options_named(model: str) -> Iterator[None]:
    """Say which option a network does not take."""
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument ('\w+')", str(error))
        if unknown is None:
            raise ConfigError(
                f"{model} cannot be made ({error}): give config.model.options what it takes."
            ) from error
        raise ConfigError(
            f"config.model.options has {unknown[1]}, which {model} does not take: leave it out, or "
            "clear what the configuration's file gives by --config.model.options={}."
        ) from error


def _selection(config: Config, dataset: data.Dataset, task: Task) -> tuple[str, str]:
    """Return the split and the metric that select; the default split need not be there."""
    split, metric = config.selection.split, config.selection.metric or task.selection
    known = [name for name in held_out(dataset) if not _is_tested(config, name)]
    if split not in (*known, configuration.default().selection.split):
        raise ConfigError(
            f"config.selection.split must be one of {', '.join(known) or 'none'}, not {split!r}: a "
            "split of the data, but neither 'train' nor one of a test set or test domain, on which "
            "no choice may depend."
        )
    if metric not in task.shown:
        raise ConfigError(
            f"config.selection.metric must be one of {', '.join(task.shown)}, not {metric!r}."
        )
    return split, metric


def _writer(name: Any) -> MakeWriter:
    if not isinstance(name, str):
        raise ConfigError(f"config.writers must be names of writers, not {name!r}.")
    found = WRITERS.find(name)
    package = getattr(found, "package", None)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"The writer {name!r} of config.writers needs a package: pip install {package}."
        )
    return found


def _loss(task: Task, name: str, **known: float) -> LossFn:
    if name not in task.losses:
        raise ConfigError(f"There is no loss {name!r}; the losses are {', '.join(task.losses)}.")
    loss: Callable[..., Any] = task.losses[name]
    taken = inspect.signature(loss).parameters
    return functools.partial(loss, **{key: known[key] for key in known if key in taken})
