"""Perturb a network while it learns: optax transforms at sites of the training computation."""

import importlib
import typing

from lpa_jax import losses as losses
from lpa_jax import registry as registry
from lpa_jax import tasks as tasks
from lpa_jax.api import list_sites as list_sites
from lpa_jax.api import value_and_grad as value_and_grad
from lpa_jax.core import splits as splits
from lpa_jax.core.bounds import layer_scale as layer_scale
from lpa_jax.core.perturbation import at as at
from lpa_jax.core.perturbation import chain as chain
from lpa_jax.core.perturbation import Perturbation as Perturbation
from lpa_jax.core.perturbation import SiteError as SiteError
from lpa_jax.core.perturbation import stateless as stateless
from lpa_jax.core.program import tap as tap
from lpa_jax.transforms.adaptive import adaptive as adaptive
from lpa_jax.transforms.additive_margin import additive_margin as additive_margin
from lpa_jax.transforms.adversarial import adversarial as adversarial
from lpa_jax.transforms.asam import asam as asam
from lpa_jax.transforms.coral import coral as coral
from lpa_jax.transforms.cutmix import cutmix as cutmix
from lpa_jax.transforms.cutout import cutout as cutout
from lpa_jax.transforms.dann import dann as dann
from lpa_jax.transforms.disturb_label import disturb_label as disturb_label
from lpa_jax.transforms.domain_mixup import domain_mixup as domain_mixup
from lpa_jax.transforms.drop_path import drop_path as drop_path
from lpa_jax.transforms.dropblock import dropblock as dropblock
from lpa_jax.transforms.dropout import dropout as dropout
from lpa_jax.transforms.drw import drw as drw
from lpa_jax.transforms.elr import elr as elr
from lpa_jax.transforms.gaussian_noise import gaussian_noise as gaussian_noise
from lpa_jax.transforms.gradient_clipping import gradient_clipping as gradient_clipping
from lpa_jax.transforms.gradient_noise import gradient_noise as gradient_noise
from lpa_jax.transforms.group_dro import group_dro as group_dro
from lpa_jax.transforms.irm import irm as irm
from lpa_jax.transforms.isda import isda as isda
from lpa_jax.transforms.label_smoothing import label_smoothing as label_smoothing
from lpa_jax.transforms.ldam import ldam as ldam
from lpa_jax.transforms.logit_adjustment import logit_adjustment as logit_adjustment
from lpa_jax.transforms.lpa import lpa as lpa
from lpa_jax.transforms.lpg import lpg as lpg
from lpa_jax.transforms.lpl import lpl as lpl
from lpa_jax.transforms.manifold_mixup import manifold_mixup as manifold_mixup
from lpa_jax.transforms.mixstyle import mixstyle as mixstyle
from lpa_jax.transforms.mixup import mixup as mixup
from lpa_jax.transforms.mixup_cutmix import mixup_cutmix as mixup_cutmix
from lpa_jax.transforms.mmd import mmd as mmd
from lpa_jax.transforms.reweight import reweight as reweight
from lpa_jax.transforms.rsc import rsc as rsc
from lpa_jax.transforms.sam import sam as sam
from lpa_jax.transforms.shake import shake as shake
from lpa_jax.transforms.vrex import vrex as vrex

# The rest is imported where it is first used: the core does not need it, and the trainer's packages
# may not be installed.
_LAZY = ("data", "evaluation", "methods", "models", "papers", "plots", "tables", "training")
_FUNCTIONS = {
    "evaluate_run": "evaluation.evaluate",
    "load_run": "training.run",
    "train_and_evaluate": "training.loop",
}
if typing.TYPE_CHECKING:
    from lpa_jax import data as data
    from lpa_jax import evaluation as evaluation
    from lpa_jax import methods as methods
    from lpa_jax import models as models
    from lpa_jax import papers as papers
    from lpa_jax import plots as plots
    from lpa_jax import tables as tables
    from lpa_jax import training as training
    from lpa_jax.evaluation.evaluate import evaluate_run as evaluate_run
    from lpa_jax.training.loop import train_and_evaluate as train_and_evaluate
    from lpa_jax.training.run import load_run as load_run
else:
    # Hidden from type checkers, which would otherwise take every misspelled name.
    def __getattr__(name: str) -> typing.Any:
        if name in _LAZY:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _FUNCTIONS:
            return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_FUNCTIONS})


__version__ = "0.2.0"
