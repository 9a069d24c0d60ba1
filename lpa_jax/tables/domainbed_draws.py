"""The hyper-parameters that DomainBed searches: the default and the random draw of each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lpa_jax.data.domainbed import seed_hash
from lpa_jax.registry import Registry

Draw = Callable[[np.random.RandomState], float]

SMALL = ("RotatedMNIST", "ColoredMNIST")
"""Sets with numbers of their own; so has `DomainNet`."""


class Hyperparameter(NamedTuple):
    """A number that a method or its training depends on.

    Attributes:
      default: Its value in draw 0.
      draw: Takes a generator and returns its value in any other draw.
    """

    default: float
    draw: Draw


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


DROPOUT = Hyperparameter(0.0, _one_of(0.0, 0.1, 0.5))
WEIGHT_DECAY = Hyperparameter(0.0, _power(10, -6, -2))
MATCHING = {"mmd_gamma": Hyperparameter(1.0, _power(10, -1, 1))}

ALGORITHMS: Registry[Mapping[str, Hyperparameter]] = Registry(
    "algorithm with draws",
    {
        "ERM": {},
        "SWAD": {},
        "MixStyle": {},
        "Mixup": {"mixup_alpha": Hyperparameter(0.2, _power(10, -1, 1))},
        "CORAL": MATCHING,
        "MMD": MATCHING,
        "RSC": {
            "rsc_f_drop_factor": Hyperparameter(1 / 3, _uniform(0, 0.5)),
            "rsc_b_drop_factor": Hyperparameter(1 / 3, _uniform(0, 0.5)),
        },
        "GroupDRO": {"groupdro_eta": Hyperparameter(1e-2, _power(10, -3, -1))},
        "IRM": {
            "irm_lambda": Hyperparameter(100.0, _power(10, -1, 5)),
            "irm_penalty_anneal_iters": Hyperparameter(500, _power(10, 0, 4, whole=True)),
        },
        "VREx": {
            "vrex_lambda": Hyperparameter(10.0, _power(10, -1, 5)),
            "vrex_penalty_anneal_iters": Hyperparameter(500, _power(10, 0, 4, whole=True)),
        },
        "DANN": {
            "lambda": Hyperparameter(1.0, _power(10, -2, 2)),
            "weight_decay_d": WEIGHT_DECAY,
            "d_steps_per_g_step": Hyperparameter(1, _power(2, 0, 3, whole=True)),
            "grad_penalty": Hyperparameter(0.0, _power(10, -2, 1)),
            "beta1": Hyperparameter(0.5, _one_of(0.0, 0.5)),
            "mlp_width": Hyperparameter(256, _power(2, 6, 10, whole=True)),
            "mlp_depth": Hyperparameter(3, _one_of(3, 4, 5)),
            "mlp_dropout": DROPOUT,
        },
        "SAM": {"rho": Hyperparameter(0.05, _one_of(0.01, 0.02, 0.05, 0.1))},
    },
    Mapping,
)
"""By algorithm, what it has beside the numbers of all; more can be registered."""


def hyperparameters(algorithm: str, dataset: str) -> dict[str, Hyperparameter]:
    """Return what is searched of an algorithm on a set, by DomainBed's names, which seed the draws.

    Args:
      algorithm: A name in `ALGORITHMS`.
      dataset: A name of DomainBed's, or any other, which is drawn for as most of them.

    Raises:
      ValueError: If there is no such algorithm.

    Example:
      >>> list(hyperparameters("IRM", "PACS"))
      ['resnet_dropout', 'irm_lambda', 'irm_penalty_anneal_iters', 'lr', 'weight_decay',
       'batch_size']
    """
    small = dataset in SMALL
    rate = (
        Hyperparameter(1e-3, _power(10, -4.5, -2.5))
        if small
        else Hyperparameter(5e-5, _power(10, -5, -3.5))
    )
    decay = Hyperparameter(0.0, _always(0.0)) if small else WEIGHT_DECAY
    largest = 9 if small else 5 if dataset == "DomainNet" else 5.5
    batch = Hyperparameter(64 if small else 32, _power(2, 3, largest, whole=True))
    found = {
        "resnet_dropout": DROPOUT,
        **ALGORITHMS.find(algorithm),
        "lr": rate,
        "weight_decay": decay,
        "batch_size": batch,
    }
    if algorithm == "DANN":
        found |= {"lr_g": rate, "lr_d": rate, "weight_decay_g": decay}
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
