"""The algorithms of domain generalization, and what DomainBed draws for each.

An algorithm of your own, registered before a table names it, is used like these:

    ALGORITHMS.register("Mine", Algorithm("my_method"))
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lpa_jax.data.domainbed import seed_hash
from lpa_jax.registry import Registry

Draw = Callable[[np.random.RandomState], float]

MNIST = ("RotatedMNIST", "ColoredMNIST")
"""Sets with numbers of their own; so has `DomainNet`."""
DIGITS = "rotated digits"
"""Ours, which takes the learning rate of these and the batches of most."""
STEPS = 5001
"""Of DomainBed's runs, in which it counts."""


class Hyperparameter(NamedTuple):
    """A number that a method or its training depends on.

    Attributes:
      default: Its value in draw 0.
      draw: Takes a generator and returns its value in any other draw.
      key: Of the configuration, dotted. A value that counts steps is set there as a share of the
        run, where `counts` says so.
      counts: Whether it counts steps, of `STEPS`.
    """

    default: float
    draw: Draw
    key: str
    counts: bool = False


class Algorithm(NamedTuple):
    """What a row of a table of domain generalization trains by.

    Attributes:
      method: Transforms of `lpa_jax.methods.METHODS`, joined by `+`; `"erm"` for none.
      numbers: What is drawn for it beside the numbers of all, by DomainBed's name, which seeds the
        draw.
      changes: Keys of the configuration, dotted, that it sets.
      by_set: What differs of these on some sets, by their names.
      average: Whether the average of the weights is judged, in place of the last ones.
    """

    method: str
    numbers: Mapping[str, Hyperparameter] = {}
    changes: Mapping[str, Any] = {}
    by_set: Mapping[str, Mapping[str, Any]] = {}
    average: bool = False


def _uniform(low: float, high: float) -> Draw:
    return lambda rng: float(rng.uniform(low, high))


def _power(base: float, low: float, high: float, whole: bool = False) -> Draw:
    def draw(rng):
        value = base ** rng.uniform(low, high)
        return int(value) if whole else float(value)

    return draw


def _one_of(*values: float) -> Draw:
    return lambda rng: values[rng.choice(len(values))]


def _always(value: float) -> Draw:
    return lambda _: value


def _matching(name: str) -> Algorithm:
    gamma = Hyperparameter(1.0, _power(10, -1, 1), f"perturbation.{name}.gamma")
    return Algorithm(name, {"mmd_gamma": gamma})


def _annealed(name: str, penalty_weight: float) -> Algorithm:
    weight = f"perturbation.{name}.penalty_weight"
    steps = f"perturbation.{name}.anneal_steps"
    return Algorithm(
        name,
        {
            f"{name}_lambda": Hyperparameter(penalty_weight, _power(10, -1, 5), weight),
            f"{name}_penalty_anneal_iters": Hyperparameter(
                500, _power(10, 0, 4, whole=True), steps, counts=True
            ),
        },
    )


def _positive(name: str, epsilon: float, low: float, high: float) -> Algorithm:
    """Return a method of ours that pushes all classes out, as the LPA paper does for this task."""
    drawn = Hyperparameter(epsilon, _power(10, low, high), f"perturbation.{name}.epsilon")
    changes = {f"perturbation.{name}.split.name": "all_positive"}
    return Algorithm(name, {f"{name}_epsilon": drawn}, changes)


def _at_features() -> Algorithm:
    lpa = _positive("lpa", 0.1, -2, 0)
    return lpa._replace(changes={**lpa.changes, "perturbation.lpa.site": "features"})


ALGORITHMS: Registry[Algorithm] = Registry(
    "algorithm",
    {
        "ERM": Algorithm("erm"),
        "Mixup": Algorithm(
            "domain_mixup",
            {
                "mixup_alpha": Hyperparameter(
                    0.2, _power(10, -1, 1), "perturbation.domain_mixup.alpha"
                )
            },
        ),
        # Ours: the draws of Mixup.
        "ManifoldMixup": Algorithm(
            "manifold_mixup",
            {
                "manifold_mixup_alpha": Hyperparameter(
                    0.2, _power(10, -1, 1), "perturbation.manifold_mixup.alpha"
                )
            },
        ),
        "MixStyle": Algorithm("mixstyle"),
        "RSC": Algorithm(
            "rsc",
            {
                "rsc_f_drop_factor": Hyperparameter(
                    1 / 3, _uniform(0, 0.5), "perturbation.rsc.features"
                ),
                "rsc_b_drop_factor": Hyperparameter(
                    1 / 3, _uniform(0, 0.5), "perturbation.rsc.batch"
                ),
            },
        ),
        "CORAL": _matching("coral"),
        "MMD": _matching("mmd"),
        "IRM": _annealed("irm", 100.0),
        "VREx": _annealed("vrex", 10.0),
        "DANN": Algorithm(
            "dann",
            {
                "lambda": Hyperparameter(1.0, _power(10, -2, 2), "perturbation.dann.strength"),
                "weight_decay_d": Hyperparameter(
                    0.0, _power(10, -6, -2), "perturbation.dann.weight_decay"
                ),
                "d_steps_per_g_step": Hyperparameter(
                    1, _power(2, 0, 3, whole=True), "perturbation.dann.discriminator_steps"
                ),
                "grad_penalty": Hyperparameter(
                    0.0, _power(10, -2, 1), "perturbation.dann.grad_penalty"
                ),
                "beta1": Hyperparameter(0.5, _one_of(0.0, 0.5), "perturbation.dann.beta1"),
                "mlp_width": Hyperparameter(
                    256, _power(2, 6, 10, whole=True), "perturbation.dann.width"
                ),
                "mlp_depth": Hyperparameter(3, _one_of(3, 4, 5), "perturbation.dann.depth"),
                "mlp_dropout": Hyperparameter(
                    0.0, _one_of(0.0, 0.1, 0.5), "perturbation.dann.dropout"
                ),
            },
        ),
        "GroupDRO": Algorithm(
            "group_dro",
            {
                "groupdro_eta": Hyperparameter(
                    1e-2, _power(10, -3, -1), "perturbation.group_dro.eta"
                )
            },
        ),
        "SAM": Algorithm(
            "sam",
            {"rho": Hyperparameter(0.05, _one_of(0.01, 0.02, 0.05, 0.1), "perturbation.sam.rho")},
        ),
        "SWAD": Algorithm(
            "erm",
            changes={"optimizer.swad.ratio": 0.3},
            by_set={"VLCS": {"optimizer.swad.ratio": 0.2}},
            average=True,
        ),
        "EMA": Algorithm("erm", changes={"optimizer.ema_decay": 0.99}, average=True),
        # Ours: the ranges, since the papers give none for this task.
        "LPA": _positive("lpa", 0.1, -2, 0),
        "LPL": _positive("lpl", 0.4, -1.3, 0.6),
        "LPG": _positive("lpg", 0.1, -2, 0),
        "LPA_features": _at_features(),
    },
    Algorithm,
)
"""By name; several are joined by `+`, as in `"LPA+SWAD"`, and more can be registered."""


def find(name: str) -> Algorithm:
    """Return an algorithm, or several in one.

    Raises:
      ValueError: If one is unknown, or two of them average the weights.

    Example:
      >>> find("LPA+SWAD").method, find("LPA+SWAD").average
      ('lpa', True)
    """
    parts = [ALGORITHMS.find(part) for part in name.split("+")]
    averages = [part.average for part in parts]
    if sum(averages) > 1:
        raise ValueError(f"{name!r} would average the weights twice: name one average.")
    methods = [part.method for part in parts if part.method != "erm"]

    def merged(fields: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        return {key: value for field in fields for key, value in field.items()}

    return Algorithm(
        "+".join(methods) or "erm",
        merged(part.numbers for part in parts),
        merged(part.changes for part in parts),
        merged(part.by_set for part in parts),
        any(averages),
    )


def hyperparameters(algorithm: str, dataset: str) -> dict[str, Hyperparameter]:
    """Return what is searched of an algorithm on a set, by DomainBed's names, which seed the draws.

    Args:
      algorithm: A name in `ALGORITHMS`, or several joined by `+`.
      dataset: A name of DomainBed's, or any other, which is drawn for as most of them.

    Raises:
      ValueError: If there is no such algorithm.

    Example:
      >>> list(hyperparameters("IRM", "PACS"))
      ['resnet_dropout', 'irm_lambda', 'irm_penalty_anneal_iters', 'lr', 'weight_decay',
       'batch_size']
    """
    mnist = dataset in MNIST
    largest = 9 if mnist else 5 if dataset == "DomainNet" else 5.5
    rate = (
        Hyperparameter(1e-3, _power(10, -4.5, -2.5), "schedule.learning_rate")
        if mnist or dataset == DIGITS
        else Hyperparameter(5e-5, _power(10, -5, -3.5), "schedule.learning_rate")
    )
    decay = Hyperparameter(
        0.0, _always(0.0) if mnist else _power(10, -6, -2), "optimizer.weight_decay"
    )
    found = {
        "resnet_dropout": Hyperparameter(0.0, _one_of(0.0, 0.1, 0.5), "perturbation.dropout.rate"),
        **find(algorithm).numbers,
        "lr": rate,
        "weight_decay": decay,
        "batch_size": Hyperparameter(
            64 if mnist else 32, _power(2, 3, largest, whole=True), "batch_size"
        ),
    }
    if "DANN" in algorithm.split("+"):
        # Its numbers for the network, which come after those of the others, and so count.
        discriminator = rate._replace(key="perturbation.dann.learning_rate")
        found |= {"lr_g": rate, "lr_d": discriminator, "weight_decay_g": decay}
    return found


def draw(algorithm: str, dataset: str, hparams_seed: int, trial_seed: int) -> dict[str, Any]:
    """Return the hyper-parameters of a draw.

    Each has a generator of its own, seeded by its name, the draw and the trial: the rule of
    DomainBed since 2021, by which a trial has other draws than the next.

    Args:
      algorithm: As in `hyperparameters`.
      dataset: Likewise.
      hparams_seed: Number of the draw, at least 0; 0 is the defaults.
      trial_seed: Of the trial, at least 0.

    Returns:
      Values by name. The batch size is that of each domain.

    Raises:
      ValueError: If there is no such algorithm.

    Example:
      >>> draw("ERM", "PACS", 0, 0)
      {'resnet_dropout': 0.0, 'lr': 5e-05, 'weight_decay': 0.0, 'batch_size': 32}
      >>> for number in (1, 2, 3):
      ...     drawn = draw("ERM", "PACS", number, 0)
      ...     print(f"{drawn['lr']:.10e} {drawn['weight_decay']:.10e}", drawn["batch_size"],
      ...           drawn["resnet_dropout"])
      2.7028930742e-05 4.4832883882e-04 39 0.5
      5.6841898471e-05 5.1002235340e-03 25 0.5
      6.8017368412e-05 1.0469495887e-05 34 0.0

    References:
      Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization, ICLR 2021, arXiv:2007.01434,
      appendix D.
    """
    found = hyperparameters(algorithm, dataset)
    if hparams_seed == 0:
        return {name: one.default for name, one in found.items()}
    seed = seed_hash(hparams_seed, trial_seed)
    return {
        name: one.draw(np.random.RandomState(seed_hash(seed, name))) for name, one in found.items()
    }


def changes(
    algorithm: str, dataset: str, drawn: Mapping[str, Any], num_domains: int
) -> dict[str, Any]:
    """Return what hyper-parameters are in a configuration.

    Args:
      algorithm: As in `hyperparameters`.
      dataset: Likewise.
      drawn: Values by DomainBed's name, from `draw`.
      num_domains: Of those that are learned from, each with as many examples in a batch.

    Returns:
      Values by dotted key. A number of steps is a share of the run, at most 1.

    Example:
      >>> changes("IRM", "PACS", draw("IRM", "PACS", 0, 0), num_domains=3)["batch_size"]
      96
    """
    found = {}
    for name, one in hyperparameters(algorithm, dataset).items():
        value = drawn[name]
        if one.counts:
            value = min(1.0, value / STEPS)
        elif name == "batch_size":
            value *= num_domains
        found[one.key] = value
    return found
