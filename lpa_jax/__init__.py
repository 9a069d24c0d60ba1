"""Perturb a network while it learns: optax transforms at sites of the training computation."""

from lpa_jax import losses as losses
from lpa_jax.api import list_sites as list_sites
from lpa_jax.api import value_and_grad as value_and_grad
from lpa_jax.core.program import tap as tap
from lpa_jax.perturb import splits as splits
from lpa_jax.perturb.activations import adaptive as adaptive
from lpa_jax.perturb.activations import dropblock as dropblock
from lpa_jax.perturb.activations import dropout as dropout
from lpa_jax.perturb.activations import lpa as lpa
from lpa_jax.perturb.activations import shake as shake
from lpa_jax.perturb.bounds import layer_scale as layer_scale
from lpa_jax.perturb.inputs import adversarial as adversarial
from lpa_jax.perturb.inputs import cutmix as cutmix
from lpa_jax.perturb.inputs import cutout as cutout
from lpa_jax.perturb.inputs import gaussian_noise as gaussian_noise
from lpa_jax.perturb.inputs import manifold_mixup as manifold_mixup
from lpa_jax.perturb.inputs import mixup as mixup
from lpa_jax.perturb.labels import disturb_label as disturb_label
from lpa_jax.perturb.labels import label_smoothing as label_smoothing
from lpa_jax.perturb.logit_grads import drw as drw
from lpa_jax.perturb.logit_grads import elr as elr
from lpa_jax.perturb.logit_grads import lpg as lpg
from lpa_jax.perturb.logit_grads import reweight as reweight
from lpa_jax.perturb.logits import additive_margin as additive_margin
from lpa_jax.perturb.logits import isda as isda
from lpa_jax.perturb.logits import ldam as ldam
from lpa_jax.perturb.logits import logit_adjustment as logit_adjustment
from lpa_jax.perturb.logits import lpl as lpl
from lpa_jax.perturb.param_grads import asam as asam
from lpa_jax.perturb.param_grads import gradient_clipping as gradient_clipping
from lpa_jax.perturb.param_grads import gradient_noise as gradient_noise
from lpa_jax.perturb.param_grads import sam as sam
from lpa_jax.perturb.sites import at as at
from lpa_jax.perturb.sites import chain as chain
from lpa_jax.perturb.sites import Perturbation as Perturbation
from lpa_jax.perturb.sites import SiteError as SiteError
from lpa_jax.perturb.sites import stateless as stateless

__version__ = "0.1.0"
