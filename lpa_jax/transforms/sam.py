"""SAM: the gradient at parameters moved uphill."""

from lpa_jax.core.arguments import Number
from lpa_jax.core.perturbation import Perturbation
from lpa_jax.transforms._sharpness_aware import Mask, sharpness_aware


def sam(rho: Number, mask: Mask = None) -> Perturbation:
    r"""SAM: take the gradient at `w + rho * g / ||g||` in place of that at `w`.

    At the moved parameters the whole chain is run again, with the same random draws.

    Args:
      rho: Radius, at least 0, or a schedule.
      mask: Which parameters move, as `optax.masked` takes it: booleans in a tree like the
        parameters or a prefix of it, or a function from parameters to such a tree; None for all.
        The norm is that of their gradient alone.

    Raises:
      ValueError: If `rho` is negative or not a number. The step raises `SiteError` if the mask does
        not fit the parameters, and behind `optax.masked` or `optax.partition`, which hide
        parameters from it.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> sharp = lpa_jax.sam(rho=0.5)
      >>> loss_and_gradient = lambda w: (0.5 * w**2, w)
      >>> w = jnp.array(2.0)
      >>> float(sharp.update(w, sharp.init(w), w, gradient_fn=loss_and_gradient)[0])
      2.5

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR
      2021, arXiv:2010.01412.
    """
    return sharpness_aware("sam", rho, mask, lambda weight: 1.0)
