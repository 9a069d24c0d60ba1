"""ISDA: the covariance of a class's features as a margin."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lpa_jax.core import membership, pgd
from lpa_jax.core.arguments import at_step, check_count, check_number, Number
from lpa_jax.core.perturbation import check_activations, LOGITS, Perturbation, SiteError
from lpa_jax.transforms import _heads


class ISDAState(NamedTuple):
    """State of `isda`: the features of each class seen so far.

    Attributes:
      counts: Number of examples, float32 `[C]`.
      means: Mean of their features, float32 `[C, D]`.
      covariances: Their covariance, float32 `[C, D, D]`, or the diagonal of it, `[C, D]`.
    """

    counts: Float[Array, "classes"]
    means: Float[Array, "classes features"]
    covariances: Float[Array, "classes features ..."]


def isda(
    site: str,
    strength: Number,
    num_classes: int,
    *,
    head: str = "head",
    num_steps: int | None = None,
    diagonal: bool = False,
) -> Perturbation:
    r"""ISDA: implicit semantic data augmentation, the covariance of a class's features as a margin.

    .. math::
        u_{ij} \leftarrow u_{ij} + \frac{\lambda}{2} (w_j - w_{y_i})^T \Sigma_{y_i} (w_j - w_{y_i})

    where `w` are the columns of the head's kernel, through which gradients flow, and the covariance
    of each class, a constant, is that of all features seen so far, those of the present batch among
    them. The cross-entropy of these logits is the paper's upper bound on the
    expected loss of features drawn from `N(a_i, lambda * Sigma)`.

    Args:
      site: Path of the module whose output `[B, D]` the head takes in; it is observed, and stays as
        it is.
      strength: The paper's lambda_0, at least 0, or a schedule; 0.5 in most of the paper.
      num_classes: Number of classes C.
      head: Path of the last, linear module, whose parameter `kernel` is `[D, C]`; a normalized head
        is not linear in the features.
      num_steps: The paper's schedule: the strength rises from 0 over so many steps, those of the
        run. (*Ours*: by step, not by epoch.) None: it is as given.
      diagonal: Keep the diagonals alone: `C * D` numbers instead of `C * D * D`. (The paper's
        experiments on CIFAR keep all.)

    With soft labels an example counts for each of its classes, and its shift is the mixture of
    theirs (*ours*). A perturbation that climbs the loss ahead of the site, such as LPA, sees the
    covariances of the batches before (*ours*): the present features are not computed yet.

    Raises:
      ValueError: If an argument is outside its range. The step raises `SiteError` (a ValueError) if
        the site does not hold `[B, D]`, or the head has no kernel `[D, C]`.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.isda("features", 0.5, num_classes=10)
      Perturbation(sites=('features', 'logits'))

    References:
      Wang et al., Implicit Semantic Data Augmentation for Deep Networks, NeurIPS 2019,
      arXiv:1909.12220; Wang et al., Regularizing Deep Networks with Semantic Data Augmentation,
      TPAMI 2021, arXiv:2007.10538.
    """
    check_number("strength", strength)
    check_count("num_classes", num_classes, low=2)
    check_activations("isda", [site])
    if num_steps is not None:
        check_count("num_steps", num_steps)

    def init(value):
        if value.ndim != 2:
            raise SiteError(
                f"isda needs features [B, D], what the head takes in, but {site!r} holds "
                f"{value.shape}."
            )
        size = value.shape[1]
        spread = (size,) if diagonal else (size, size)
        return ISDAState(
            jnp.zeros(num_classes, jnp.float32),
            jnp.zeros((num_classes, size), jnp.float32),
            jnp.zeros((num_classes, *spread), jnp.float32),
        )

    def update(value, state, params=None, *, labels, weights, site, step=0, axis_name=(), **_):
        members = membership.by_class(labels, weights, num_classes, axis_name)
        if site != LOGITS:
            return value, _observe(state, members, jax.lax.stop_gradient(value))
        kernel = _heads.kernel_of("isda", params, head, (state.means.shape[1], num_classes)).T
        apart = kernel[None] - members.take_class(kernel)[:, None]
        covariances = members.take_class(state.covariances)
        form = "rjd,rd,rjd->rj" if diagonal else "rjd,rde,rje->rj"
        spread = jnp.einsum(form, apart, covariances, apart, precision=jax.lax.Precision.HIGHEST)
        size = at_step(strength, step)
        if num_steps is not None:
            size *= jnp.minimum(jnp.asarray(step, jnp.float32) / num_steps, 1.0)
        return value + members.to_examples(0.5 * size * spread).astype(value.dtype), state

    return Perturbation((site, LOGITS), init, update, needs_gradient=False)


def _observe(
    state: ISDAState, members: membership.Membership, features: Float[Array, "batch features"]
) -> ISDAState:
    """Merge counts, means and covariances of the batch into those of all batches before."""
    real = members.weights[:, None] > 0
    features = jnp.where(real, features.astype(jnp.float32), 0.0)
    means = members.mean(features)
    # Around the mean of the row, not of all: a difference of large squares would have no digits.
    centered = features[:, None] - means[None]
    count = jnp.where(members.counts > 0, members.counts, 1.0)
    full = state.covariances.ndim == 3
    form = "br,brd,bre->rde" if full else "br,brd,brd->rd"
    exact = jax.lax.Precision.HIGHEST
    total = members.summed(jnp.einsum(form, members.shares(), centered, centered, precision=exact))
    covariances = total / pgd.column(count, total)

    before = ISDAState(*(members.take_class(table) for table in state))
    part = members.counts / (before.counts + count)
    between = means - before.means
    outer = between[:, :, None] * between[:, None] if full else between**2
    merged = ISDAState(
        before.counts + members.counts,
        before.means + part[:, None] * between,
        before.covariances
        + pgd.column(part, total) * (covariances - before.covariances)
        + pgd.column(part * (1.0 - part), total) * outer,
    )
    return ISDAState(*(members.put(*tables) for tables in zip(state, merged, strict=True)))
