"""Normal noise added to a value."""

import jax

from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import PARAM_GRADS, Perturbation, SiteError, stateless


def gaussian_noise(site: str, stddev: Number) -> Perturbation:
    """Add independent normal noise.

    Args:
      site: Any site whose value is one array: `"inputs"`, a module path, `"logits"`,
        `"logit_grads"`.
      stddev: Standard deviation in the units of the value, at least 0, or a schedule.

    Raises:
      ValueError: If `stddev` is negative or not a number.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.gaussian_noise("inputs", stddev=0.05)
      Perturbation(sites=('inputs',))
    """
    if site == PARAM_GRADS:
        raise SiteError(
            "gaussian_noise needs a value that is one array; for 'param_grads' place "
            "optax.add_noise there."
        )
    check_number("stddev", stddev)

    def update(value, *, key, step=0, **_):
        noise = jax.random.normal(key, value.shape, value.dtype)
        return value + noise * at_step(stddev, step).astype(value.dtype)

    return stateless(site, update, needs_gradient=False)
