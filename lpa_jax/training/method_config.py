"""Methods in a configuration: the arguments they have there, and the chain that they make."""

from collections.abc import Iterable, Mapping, Sequence
import inspect
from typing import Any

from ml_collections import config_dict

import lpa_jax
from lpa_jax import data, methods
from lpa_jax.core import splits
from lpa_jax.methods import FACTS, METHODS
from lpa_jax.training.config import Config, ConfigError, no_key

# Arguments that depend on the network besides: which parameters SAM moves.
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


def choose(config: Config, argument: str, smoke: Mapping[str, Any], dataset: str = "") -> Config:
    """Complete a configuration by the argument of its file, `"method=lpa+lpl,smoke"`.

    Args:
      config: The configuration for plain training.
      argument: What follows the colon of `--config=FILE:ARGUMENT`.
      smoke: Keys, dotted where nested, that make a run of seconds.
      dataset: Whose defaults methods have, where their rows have some of its own.

    Raises:
      ConfigError: If the argument or the method is unknown.

    Example:
      >>> from lpa_jax.training import config
      >>> config = choose(config.default(), "method=lpl+sam", smoke={}, dataset="cifar100")
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
    config.perturbation = {name: arguments_of(name, dataset) for name in names}
    for name in names:
        config.update_from_flattened_dict(dict(METHODS[name].settings))
    return config


def arguments_of(name: str, dataset: str = "") -> dict[str, Any]:
    """Return every argument of a method that a configuration can set, with its value.

    What is in `methods.FACTS`, such as the class counts of LDAM, comes from the training set and
    the run.
    """
    method = _known(name)
    known = {**method.defaults, **method.by_dataset.get(dataset, {})}
    arguments = {}
    for parameter in inspect.signature(method.factory).parameters.values():
        if parameter.name in (*FACTS, *UNSET):
            continue
        if parameter.name == "split":
            value: Any = dict(SPLIT) | dict(known.get("split", {}))
        elif parameter.name in known:
            value = known[parameter.name]
        elif parameter.default is inspect.Parameter.empty:
            raise ConfigError(
                f"There is no setting for the method {name!r}: add its {parameter.name!r} to the "
                "defaults of its row in lpa_jax.methods.METHODS."
            )
        elif parameter.default is None:
            kind = {"step_size": float, "bounds": tuple}.get(parameter.name, int)
            value = config_dict.placeholder(kind)
        else:
            value = parameter.default
        arguments[parameter.name] = value
    return arguments


def _known(name: str) -> methods.Method:
    if name not in METHODS:
        told = METHODS.unknown(name).replace("Known: ", "The methods are erm, ")
        raise ConfigError(
            f"{told.removesuffix('.')}, several of them joined by '+', and what a module of yours "
            "registers, --import=MODULE."
        )
    return METHODS[name]


def needs_every_class(config: Config) -> bool:
    """Return whether a transform uses how many training examples each class has."""
    return any(
        "class_counts" in inspect.signature(_known(name).factory).parameters
        or arguments.get("split", {}).get("name") == "tail"
        for name, arguments in config.perturbation.items()
    )


def corrections(config: Config) -> list[str]:
    """Return what corrects for the frequencies of the classes in training: methods and sampling."""
    found = methods.corrections(config.method.split("+"))
    balancing = config.sampling in data.BALANCING
    return found + ([f"config.sampling={config.sampling}"] if balancing else [])


def perturbation(
    config: Config,
    class_counts: list[int],
    mean: Sequence[float],
    num_steps: int,
    num_examples: int,
    num_domains: int | None = None,
) -> tuple[lpa_jax.Perturbation, ...]:
    """Build the chain of a configuration, in the order in which `method` names its transforms.

    Args:
      config: The configuration.
      class_counts: Number of training examples of each class.
      mean: Of the training images, a number for each channel.
      num_steps: Number of steps of the run.
      num_examples: Number of training examples.
      num_domains: Number of their domains; None where these are not known.

    Raises:
      ConfigError: If class frequencies would be corrected more than once, by the sampling or by
        transforms, or a transform needs domains that are not known.
      ValueError: If an argument is outside its range.
    """
    names = [] if config.method == "erm" else config.method.split("+")
    if set(names) != set(config.perturbation):
        raise ConfigError(
            f"config.method is {config.method!r}, but config.perturbation describes "
            f"{'+'.join(config.perturbation) or 'erm'}: choose the method after the colon of "
            "--config, as in FILE.py:method=lpa."
        )
    if config.model.head != "linear" and "isda" in names:
        raise ConfigError(
            f"isda needs a linear head, whose kernel's columns its formula is of, but "
            f"config.model.head is {config.model.head!r}: set it to 'linear', or leave out isda. "
            "(ldam and additive_margin set 'normalized'; with a linear head, set their scale to 1.)"
        )
    correcting = methods.corrections(names)
    if correcting and config.sampling in data.BALANCING:
        named = " and ".join(correcting)
        raise ConfigError(
            f"config.sampling {config.sampling!r} draws all classes equally often, and {named} in "
            "config.method would correct for their frequencies once more: take one of the two, "
            f"config.sampling='uniform' or a method without {named}."
        )
    if len(correcting) > 1:
        raise ConfigError(
            f"{' and '.join(correcting)} in config.method would each correct for the frequencies "
            "of the classes: name one of them."
        )
    needing = [
        name
        for name in names
        if "num_domains" in inspect.signature(_known(name).factory).parameters
    ]
    if needing and num_domains is None:
        raise ConfigError(
            f"For {' and '.join(needing)} in config.method the domain of each training example "
            "must be known: take data that have it, such as config.dataset='domains:PATH', or "
            "another method."
        )
    task = {
        "class_counts": class_counts,
        "mean": tuple(mean),
        "num_classes": len(class_counts),
        "num_domains": num_domains,
        "num_examples": num_examples,
        "num_steps": num_steps,
    }
    return lpa_jax.chain(*(_transform(name, config.perturbation[name], task) for name in names))


def _transform(name: str, config: Config, task: Mapping[str, Any]) -> lpa_jax.Perturbation:
    method, arguments = _known(name), dict(config)
    taken = inspect.signature(method.factory).parameters
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
    for key in method.shares:
        if not 0 <= arguments[key] <= 1:
            raise ConfigError(
                f"config.perturbation.{name}.{key} must be a share of the run, between 0 and 1, "
                f"not {arguments[key]!r}."
            )
    return method.make(task, **arguments)


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
