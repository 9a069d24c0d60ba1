"""Mixup or CutMix, drawn for each batch."""

import jax

from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import Perturbation
from lpa_jax.transforms.cutmix import cutmix
from lpa_jax.transforms.mixup import mixup


def mixup_cutmix(mixup_alpha: Number, cutmix_alpha: Number, switch: Number = 0.5) -> Perturbation:
    """Send each batch through `cutmix` with a probability, and through `mixup` otherwise.

    Args:
      mixup_alpha: `alpha` of `mixup`, at least 0 (0: no mixing), or a schedule. The paper's: 0.8.
      cutmix_alpha: `alpha` of `cutmix`, likewise. The paper's: 1.0.
      switch: Share of the batches that go through `cutmix`, in [0, 1], or a schedule. The paper's:
        0.5.

    Raises:
      ValueError: If an argument is outside its range, or the inputs are not `[B, H, W, channels]`.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.mixup_cutmix(mixup_alpha=0.8, cutmix_alpha=1.0)
      Perturbation(sites=('inputs', 'labels'))

    References:
      Touvron et al., Training data-efficient image transformers & distillation through attention,
      ICML 2021, arXiv:2012.12877.
    """
    check_number("mixup_alpha", mixup_alpha)
    check_number("cutmix_alpha", cutmix_alpha)
    check_number("switch", switch, 0.0, 1.0)
    mixing, pasting = mixup(mixup_alpha), cutmix(cutmix_alpha)

    def update(value, state, params=None, *, key, step=0, **given):
        given |= {"key": key, "step": step}
        # A key that neither of the two splits off its own, which is the same at both sites.
        pastes = jax.random.bernoulli(jax.random.fold_in(key, 1000), at_step(switch, step))
        return jax.lax.cond(
            pastes,
            lambda: pasting.update(value, state, params, **given),
            # Mixup has no state.
            lambda: (mixing.update(value, mixing.init(value), params, **given)[0], state),
        )

    return pasting._replace(update=update)
