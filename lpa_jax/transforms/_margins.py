"""Margins subtracted from the logit of the true class, for LDAM and additive margin."""

import jax
from jaxtyping import Array

from lpa_jax.core import membership


def with_margins(value: Array, labels: membership.Labels, margins: Array) -> Array:
    """Return `u - margin_y e_y`."""
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, value.shape[1])
    return value - (labels * margins[None]).astype(value.dtype)
