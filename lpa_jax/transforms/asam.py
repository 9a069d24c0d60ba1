"""ASAM: SAM in units of the parameters."""

import jax.numpy as jnp

from lpa_jax.core.arguments import check_number, Number
from lpa_jax.core.perturbation import Perturbation
from lpa_jax.transforms._sharpness_aware import Mask, sharpness_aware


def asam(rho: Number, eta: float = 0.01, mask: Mask = None) -> Perturbation:
    r"""ASAM: SAM in units of the parameters, `w + rho * T^2 g / ||T g||`, `T = |w| + eta`.

    Args:
      rho: Radius, at least 0, or a schedule. The paper's: 0.5 to 2, ten times SAM's.
      eta: Added to `|w|` for stability, at least 0.
      mask: Which parameters move, as in `sam`.

    Raises:
      ValueError: If `rho` or `eta` is negative or not a number.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.asam(rho=0.5)
      Perturbation(sites=('param_grads',))

    References:
      Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
      Neural Networks, ICML 2021, arXiv:2102.11600. *Ours*: every parameter is scaled, as in the
      paper's text; its code leaves biases unscaled.
    """
    check_number("eta", eta)
    return sharpness_aware("asam", rho, mask, lambda weight: jnp.abs(weight) + eta)
