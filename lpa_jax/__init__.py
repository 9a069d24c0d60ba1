"""Perturb a network while it learns: optax transforms at sites of the training computation."""

from lpa_jax import losses as losses
from lpa_jax import methods as methods
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
from lpa_jax.transforms.cutmix import cutmix as cutmix
from lpa_jax.transforms.cutout import cutout as cutout
from lpa_jax.transforms.disturb_label import disturb_label as disturb_label
from lpa_jax.transforms.drop_path import drop_path as drop_path
from lpa_jax.transforms.dropblock import dropblock as dropblock
from lpa_jax.transforms.dropout import dropout as dropout
from lpa_jax.transforms.drw import drw as drw
from lpa_jax.transforms.elr import elr as elr
from lpa_jax.transforms.gaussian_noise import gaussian_noise as gaussian_noise
from lpa_jax.transforms.gradient_clipping import gradient_clipping as gradient_clipping
from lpa_jax.transforms.gradient_noise import gradient_noise as gradient_noise
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
from lpa_jax.transforms.reweight import reweight as reweight
from lpa_jax.transforms.sam import sam as sam
from lpa_jax.transforms.shake import shake as shake

__version__ = "0.1.0"
