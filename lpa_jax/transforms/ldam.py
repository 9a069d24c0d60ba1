"""LDAM: margins that are larger for rare classes."""

from collections.abc import Sequence

import jax.numpy as jnp

from lpa_jax.core import membership
from lpa_jax.core.arguments import at_step, check_number, Number
from lpa_jax.core.perturbation import LOGITS, Perturbation, stateless
from lpa_jax.transforms._margins import with_margins


def ldam(
    class_counts: Sequence[float], max_margin: Number = 0.5, scale: Number = 30.0
) -> Perturbation:
    r"""LDAM: label-distribution-aware margins, `u - scale * margin_y e_y`.

    The margin of class c is proportional to `n_c^{-1/4}`, the largest being `max_margin`. The paper
    takes the loss of `scale * (cos - margin_y e_y)`, which this is where the logits are
    `u = scale * cos`: those of our networks with `head="normalized"`, whose scale is 30. If your
    own head returns plain cosines, multiply them by the scale in the network.

    Args:
      class_counts: Number of training examples of each class, `[C]`, all positive.
      max_margin: Margin of the rarest class, at least 0, in units of `1 / scale` of a logit: of a
        cosine with a normalized head.
      scale: What the network has multiplied cosines by, at least 0. The default is the paper's; use
        1 with a linear head, where margins are in the units of the logits.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> margin = lpa_jax.ldam([16, 1], scale=1.0)
      >>> eye = jnp.eye(2)
      >>> margin.update(jnp.zeros((2, 2)), margin.init(None), labels=eye, targets=eye)[0]
      Array([[-0.25,  0.  ],
             [ 0.  , -0.5 ]], dtype=float32)

    References:
      Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
      2019, arXiv:1906.07413.
    """
    counts = membership.counts_of(class_counts)
    check_number("max_margin", max_margin)
    check_number("scale", scale)

    def update(value, *, labels, step=0, **_):
        membership.check_classes(counts, value)
        margins = counts**-0.25
        margins = margins / jnp.max(margins) * at_step(max_margin, step)
        return with_margins(value, labels, at_step(scale, step) * margins)

    return stateless(LOGITS, update, needs_gradient=False)
