"""What a run is made of: the keys of a configuration, their defaults, and methods by name."""

from collections.abc import Iterable, Mapping, Sequence
import difflib
import inspect
import math
from typing import Any

from ml_collections import config_dict

import lpa_jax
from lpa_jax.core import splits
from lpa_jax.data import batching, long_tail, tasks
from lpa_jax.methods import corrections, FACTS, METHODS

# Those that depend on the network besides: which parameters SAM moves.
UNSET = ("mask",)
SPLIT = {
    "name": "mean_threshold",
    "statistic": "confidence",
    "window": "ema",
    "tau": 0.5,
    "num_head": 1,
    "head_scale": 1.0,
    "inverted": False,
}
# For each kind of imbalance and noise, the key that it needs; the other keys must be left out.
KINDS = {
    "imbalance": {"none": None} | dict.fromkeys(long_tail.PROFILES, "ratio"),
    "noise": {"none": None} | dict.fromkeys(tasks.NOISES, "rate") | {"human": "path"},
}


# An ml_collections ConfigDict, whose own annotations give every key the union of all types.
Config = Any


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the remedy."""


def default() -> Config:
    """Return every key of a configuration with its default.

    Example:
      >>> default().schedule.name
      'piecewise'
    """
    return config_dict.ConfigDict(
        {
            # Examples: "digits", "npz:PATH", or a tensorflow-datasets name, prepared in data_dir.
            "dataset": "digits",
            "data_dir": config_dict.placeholder(str),
            # Side that images of differing size are resized to.
            "image_size": config_dict.placeholder(int),
            # Use at most that many examples of each split: for trials, not for results.
            "limit": config_dict.placeholder(int),
            # Share of the training examples held out for tuning, by class.
            "validation_fraction": 0.1,
            # Training sets made long-tailed: "exponential" or "step", with the ratio of the largest
            # class to the smallest.
            "imbalance": {"kind": "none", "ratio": config_dict.placeholder(float)},
            # Wrong labels in training and validation: "symmetric_inclusive", "symmetric_exclusive"
            # or "asymmetric" with a rate in [0, 1], or "human": the array `key` of an npz file.
            "noise": {
                "kind": "none",
                "rate": config_dict.placeholder(float),
                "path": config_dict.placeholder(str),
                "key": "labels",
            },
            # How an epoch draws its examples: "uniform" (each once), "class_balanced" or
            # "class_aware".
            "sampling": "uniform",
            # The standard CIFAR augmentation: crops from zero padding, and horizontal flips.
            "augment": {"padding": 4, "flip": True},
            # A name that lpa_jax.models.create knows, the type it computes in, and its last module:
            # "linear", or "normalized" for logits of 30 times a cosine.
            "model": {"name": "wrn_28_10", "dtype": "float32", "head": "linear", "options": {}},
            # What blocks keep for the backward pass instead of everything: "nothing_saveable", ...
            "remat": config_dict.placeholder(str),
            # "softmax_cross_entropy", "softmax_binary_cross_entropy", "softmax_focal_loss" (which
            # takes gamma) or "generalized_cross_entropy" (which takes q).
            "loss": {"name": "softmax_cross_entropy", "gamma": 2.0, "q": 0.7},
            # What was asked for by name, and what that means.
            "method": "erm",
            "perturbation": {},
            # An optimizer of optax or optax.contrib; weight decay is added to the gradient, as in
            # the papers. Options of it are set by name; where these two are None, sgd has momentum
            # 0.9 and Nesterov's, and other optimizers have their own defaults.
            "optimizer": {
                "name": "sgd",
                "weight_decay": 5e-4,
                "options": {
                    "momentum": config_dict.placeholder(float),
                    "nesterov": config_dict.placeholder(bool),
                },
                # Steps whose gradients are averaged before the parameters move; what is left over
                # at the end of the run moves nothing.
                "accumulate": 1,
            },
            # Of the learning rate: "piecewise" (times factor at each boundary), "cosine" to 0, or
            # "constant"; each after a linear warm-up.
            "schedule": {
                "name": "piecewise",
                "learning_rate": 0.1,
                "warmup_epochs": 0.0,
                "boundaries": (100.0, 150.0),
                "factor": 0.1,
            },
            "epochs": 200,
            "batch_size": 128,
            "eval_batch_size": 500,
            # Where training images wait: in the memory of the "device" or the "host", or "auto".
            "input": "auto",
            # Taken without word from the host; above 1 they run in a loop, which suits GPU and TPU.
            "steps_per_dispatch": 1,
            # What a step does whose loss or update is NaN or infinite: "stop" the run, or "skip".
            "nonfinite": "stop",
            # Devices that share one copy of parameters and states: fully sharded data parallel.
            "fsdp": 1,
            # Which examples are held out, which are kept and which labels are wrong, the same for
            # all seeds.
            "data_seed": 0,
            # Seeds seed, seed + 1, ... each draw their own parameters, batches and perturbations.
            "seed": 0,
            "num_seeds": 1,
            # In epochs.
            "evaluate_every": 1,
            "checkpoint_every": 1.0,
        }
    )


def choose(
    config: Config,
    argument: str,
    smoke: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
) -> Config:
    """Complete a configuration by the argument of its file, `"method=lpa+lpl,smoke"`.

    Args:
      config: The configuration for plain training.
      argument: What stands after the colon of `--config=FILE:ARGUMENT`.
      smoke: Keys, dotted where nested, that make a run of seconds.
      methods: What differs on this data from the defaults of each method's row.

    Raises:
      ConfigError: If the argument or the method is unknown.

    Example:
      >>> config = choose(default(), "method=lpl+sam", smoke={}, methods={"sam": {"rho": 0.1}})
      >>> config.perturbation.lpl.epsilon, config.perturbation.sam.rho
      (0.4, 0.1)
    """
    words = [word for word in argument.split(",") if word]
    if len(set(words)) < len(words) or sum(word.startswith("method=") for word in words) > 1:
        raise ConfigError(f"The configuration's argument says something twice: {argument!r}.")
    method = "erm"
    for word in words:
        if word == "smoke":
            config.update_from_flattened_dict(dict(smoke))
        elif word.startswith("method="):
            method = word.removeprefix("method=")
        else:
            raise ConfigError(
                f"The configuration takes 'method=NAME' and 'smoke' after its colon, not {word!r}."
            )
    names = [] if method == "erm" else method.split("+")
    if len(set(names)) < len(names):
        raise ConfigError(f"The method {method!r} names a transform twice.")
    config.method = method
    config.perturbation = {name: arguments_of(name, methods.get(name, {})) for name in names}
    for name in names:
        config.update_from_flattened_dict(dict(METHODS[name].settings))
    return config


def arguments_of(name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of a method that a configuration can set, with its value.

    What is known goes before the defaults of the method's row. What is in `methods.FACTS`, such as
    the class counts of LDAM, comes from the training set and the run.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(
            f"There is no method {name!r}; {hint}The methods are erm, {', '.join(METHODS)}, "
            "and several of them joined by '+'."
        )
    known = {**METHODS[name].defaults, **known}
    arguments = {}
    for parameter in inspect.signature(METHODS[name].factory).parameters.values():
        if parameter.name in (*FACTS, *UNSET):
            continue
        if parameter.name == "split":
            value: Any = dict(SPLIT) | dict(known.get("split", {}))
        elif parameter.name in known:
            value = known[parameter.name]
        elif parameter.default is inspect.Parameter.empty:
            raise ConfigError(
                f"This configuration has no setting for {name!r}: add its {parameter.name!r} to "
                "row of lpa_jax/methods.py."
            )
        elif parameter.default is None:
            kind = {"step_size": float, "bounds": tuple}.get(parameter.name, int)
            value = config_dict.placeholder(kind)
        else:
            value = parameter.default
        arguments[parameter.name] = value
    return arguments


def needs_every_class(config: Config) -> bool:
    """Return whether a transform uses how many training examples each class has."""
    return any(
        "class_counts" in inspect.signature(METHODS[name].factory).parameters
        or arguments.get("split", {}).get("name") == "tail"
        for name, arguments in config.perturbation.items()
    )


def perturbation(
    config: Config, class_counts: list[int], mean: Sequence[float], num_steps: int
) -> tuple[lpa_jax.Perturbation, ...]:
    """Build the chain of a configuration, in the order in which `method` names its transforms.

    Args:
      config: The configuration.
      class_counts: Number of training examples of each class.
      mean: Of the training images, a number for each channel.
      num_steps: Number of steps of the run.

    Raises:
      ConfigError: If class frequencies would be corrected more than once, by the sampling or by
        transforms.
      ValueError: If an argument is outside its range.
    """
    names = [] if config.method == "erm" else config.method.split("+")
    if set(names) != set(config.perturbation):
        raise ConfigError(
            f"config.method is {config.method!r}, but config.perturbation describes "
            f"{'+'.join(config.perturbation) or 'erm'}: choose the method after the colon of "
            "--config, as in FILE.py:method=lpa."
        )
    corrected = corrections(names)
    if corrected and config.sampling != "uniform":
        named = " and ".join(corrected)
        raise ConfigError(
            f"config.sampling {config.sampling!r} draws all classes equally often, and {named} in "
            "config.method would correct for their frequencies once more: take one of the two, "
            f"config.sampling='uniform' or a method without {named}."
        )
    if len(corrected) > 1:
        raise ConfigError(
            f"{' and '.join(corrected)} in config.method would each correct for the frequencies "
            "of the classes: name one of them."
        )
    task = {
        "class_counts": class_counts,
        "mean": tuple(mean),
        "num_classes": len(class_counts),
        "num_examples": sum(class_counts),
        "num_steps": num_steps,
    }
    return lpa_jax.chain(*(_transform(name, config.perturbation[name], task) for name in names))


def _transform(name: str, config: Config, task: Mapping[str, Any]) -> lpa_jax.Perturbation:
    factory = METHODS[name].factory
    arguments = dict(config)
    taken = inspect.signature(factory).parameters
    _refuse_unknown(f"perturbation.{name}.", arguments, taken)
    for key, parameter in taken.items():
        if parameter.default is inspect.Parameter.empty and key not in {*arguments, *FACTS}:
            raise ConfigError(
                f"config.perturbation.{name} lacks {key}: leave the others as they are, and set "
                f"one by --config.perturbation.{name}.KEY=VALUE."
            )
    if "split" in arguments:
        arguments["split"] = _split(
            arguments["split"], task["class_counts"], f"perturbation.{name}."
        )
    for key in METHODS[name].shares:
        if not 0 <= arguments[key] <= 1:
            raise ConfigError(
                f"config.perturbation.{name}.{key} must be a share of the run, between 0 and 1, "
                f"not {arguments[key]!r}."
            )
    return METHODS[name].make(task, **arguments)


def _refuse_unknown(prefix: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = [key for key in known if key not in (*FACTS, *UNSET)]
    for name in sorted(set(given) - set(known)):
        raise ConfigError(no_key(prefix, name, known))


def _split(config: Config, class_counts: list[int], prefix: str) -> splits.Split:
    names = ("mean_threshold", "threshold", "tail", "all_positive", "all_negative")
    name = config.name
    if name not in names:
        raise ConfigError(f"There is no split {name!r}; the splits are {', '.join(names)}.")
    factory = getattr(splits, name)
    _refuse_unknown(f"{prefix}split.", config, SPLIT)
    known = {**SPLIT, **config, "class_counts": class_counts}
    split = factory(**{key: known[key] for key in inspect.signature(factory).parameters})
    return splits.inverted(split) if known["inverted"] else split


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the entries of nested dictionaries by dotted names.

    Example:
      >>> flat({"model": {"name": "wrn_28_10", "options": {}}, "epochs": 3})
      {'model.name': 'wrn_28_10', 'model.options': {}, 'epochs': 3}
    """
    entries: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        entries |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return entries


def _check_keys(config: Config, like: Config, prefix: str = "") -> None:
    """Raise `ConfigError` unless `config` has the keys of `like` and values of their types."""
    for key in like:
        name, kind = f"config.{prefix}{key}", like.get_type(key)
        if key not in config:
            raise ConfigError(f"{name} is missing: begin with lpa_jax.training.config.default().")
        value = config[key]
        if isinstance(like[key], config_dict.ConfigDict):
            if not isinstance(value, config_dict.ConfigDict):
                raise ConfigError(f"{name} must be a dictionary, not {value!r}.")
            # What has no entries by default takes any.
            if like[key]:
                _check_keys(value, like[key], f"{prefix}{key}.")
            continue
        kinds = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool)
        if wrong and not (value is None and like[key] is None):
            raise ConfigError(f"{name} must be of type {kind.__name__}, not {value!r}.")
    unknown = sorted(set(config) - set(like))
    if unknown:
        raise ConfigError(no_key(prefix, unknown[0], like))


def no_key(prefix: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for a key that is not among those known under a prefix.

    Example:
      >>> no_key("model.", "nam", ["name", "dtype"])
      'There is no config.model.nam: did you mean config.model.name?'
      >>> no_key("", "learning_rate", ["epochs", "schedule"])
      'There is no config.learning_rate: did you mean config.schedule.learning_rate?'
      >>> no_key("model.", "x", ["name", "dtype"])
      'There is no config.model.x: the keys there are dtype and name.'
    """
    close = [f"{prefix}{key}" for key in difflib.get_close_matches(name, list(known), n=1)]
    if not prefix:
        close += [key for key in flat(default().to_dict()) if key.endswith(f".{name}")]
    if prefix == "perturbation.":
        hint = f"choose the method after the colon of --config, as in FILE.py:method={name}."
    elif close:
        hint = f"did you mean config.{close[0]}?"
    else:
        *others, last = sorted(known)
        hint = f"the keys there are {' and '.join(filter(None, (', '.join(others), last)))}."
    return f"There is no config.{prefix}{name}: {hint}"


def absent(config: Config, key: str) -> str | None:
    """Say which part of a dotted key a configuration does not have, if any but the last.

    Example:
      >>> absent(default(), "modle.name")
      'There is no config.modle: did you mean config.model?'
      >>> absent(default(), "model.nam")
    """
    names = key.split(".")
    for i, name in enumerate(names[:-1]):
        prefix = "".join(f"{above}." for above in names[:i])
        if name not in config:
            return no_key(prefix, name, config)
        config = config[name]
        if not isinstance(config, config_dict.ConfigDict):
            return f"config.{prefix}{name} has no keys of its own: set config.{prefix}{name}."
    return None


def check(config: Config) -> None:
    """Raise `ConfigError` unless every key is there, and every number in its range."""
    like = default()
    # Those of the optimizer that is named, whichever it is.
    like.optimizer.options = config_dict.ConfigDict()
    _check_keys(config, like)
    for key, value in flat(config.to_dict()).items():
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ConfigError(f"config.{key} must be finite, not {value!r}.")
    names = ("epochs", "batch_size", "eval_batch_size", "num_seeds", "evaluate_every", "limit",
             "steps_per_dispatch", "fsdp")  # fmt: skip
    positive = {name: config[name] for name in names}
    positive["optimizer.accumulate"] = config.optimizer.accumulate
    for key, value in positive.items():
        if value is not None and value < 1:
            raise ConfigError(f"config.{key} must be at least 1, not {value!r}.")
    not_negative = {
        "seed": config.seed,
        "data_seed": config.data_seed,
        "augment.padding": config.augment.padding,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "schedule.learning_rate": config.schedule.learning_rate,
        "schedule.warmup_epochs": config.schedule.warmup_epochs,
        "schedule.factor": config.schedule.factor,
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"config.{key} must be at least 0, not {value!r}.")
    boundaries = config.schedule.boundaries
    numbers = all(isinstance(epoch, (int, float)) and epoch >= 0 for epoch in boundaries)
    if not numbers or list(boundaries) != sorted(boundaries):
        raise ConfigError(
            f"config.schedule.boundaries must be epochs from 0 in order, not {boundaries!r}."
        )
    if config.seed + config.num_seeds > 2**31:
        raise ConfigError(f"config.seed must be below 2**31, not {config.seed!r}.")
    if not 0 < config.checkpoint_every < math.inf:
        raise ConfigError(
            f"config.checkpoint_every must be above 0 epochs, not {config.checkpoint_every!r}."
        )
    if config.nonfinite not in ("stop", "skip"):
        raise ConfigError(f"config.nonfinite must be stop or skip, not {config.nonfinite!r}.")
    for key, kinds in KINDS.items():
        _check_kind(key, config[key], kinds)
    if config.sampling not in batching.SAMPLINGS:
        raise ConfigError(
            f"config.sampling must be one of {', '.join(batching.SAMPLINGS)}, not "
            f"{config.sampling!r}."
        )
    if config.model.dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"config.model.dtype must be float32 or bfloat16, not {config.model.dtype!r}."
        )
    if config.model.head != "linear" and "isda" in config.perturbation:
        raise ConfigError(
            f"isda needs a linear head, whose kernel's columns its formula is of, but "
            f"config.model.head is {config.model.head!r}: set it to 'linear', or leave out isda. "
            "(ldam and additive_margin set 'normalized'; with a linear head, set their scale to 1.)"
        )


def _check_kind(key: str, config: Config, kinds: Mapping[str, str | None]) -> None:
    if config.kind not in kinds:
        raise ConfigError(
            f"config.{key}.kind must be one of {', '.join(kinds)}, not {config.kind!r}."
        )
    needed = kinds[config.kind]
    if needed is not None and config[needed] is None:
        raise ConfigError(f"config.{key}.kind {config.kind!r} needs config.{key}.{needed}.")
    for name in {*kinds.values(), None} - {needed, None}:
        if config[name] is not None:
            raise ConfigError(
                f"config.{key}.{name} has no effect where config.{key}.kind is {config.kind!r}: "
                "leave it out, or choose another kind."
            )
