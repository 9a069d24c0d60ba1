"""Perturbations of the logits `[B, C]`: LPL, logit adjustment, margins, ISDA."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lpa_jax.perturb import classwise, membership, pgd, sites, splits


def lpl(
    epsilon: sites.Number,
    *,
    delta_epsilon: sites.Number = 0.0,
    split: splits.Split | None = None,
    solver: Literal["steps", "rounded_steps", "projected"] = "steps",
    step_size: sites.Number = 0.01,
    steps: int | None = None,
) -> sites.Perturbation:
    r"""LPL, class-level logit perturbation: one perturbation a class.

    .. math::
        d_c \leftarrow d_c + s_c \frac{\alpha}{N_c} \sum_{i : y_i = c}
            \left(\mathrm{softmax}(u_i + d_c) - e_c\right)

    The training loss is then taken at `u_i + d_{y_i}`, with `d` a constant. With another loss than
    cross-entropy, its own gradient takes the place of `softmax - e_c`.

    Args:
      epsilon: The bound, at least 0, or a schedule.
      delta_epsilon: Varied bound: `epsilon + delta_epsilon * split.spread` (eq 13 and 14).
      split: Which classes are pushed out and which pulled in; default `splits.mean_threshold()`.
      solver: `"steps"`, the paper's: class c takes `floor(epsilon_c / step_size)` steps and is not
        projected (as `||p - e_c|| <= sqrt(2)`, `||d_c|| <= sqrt(2) * epsilon_c`).
        `"rounded_steps"`, that of LPL's released code on long tails:
        `max(1, round(epsilon_c / step_size))` steps, but none where the bound or the sign is 0.
        `"projected"`: that many `steps` of length `2 * epsilon_c / steps` along the normalized
        gradient, projected onto the ball of radius `epsilon_c`, as in LPA.
      step_size: Alpha, above 0; not used by `"projected"`.
      steps: `"projected"`: number of steps, default 3. Else: at most that many, default no limit.

    The released code's numbers of steps on CIFAR-10-LT are those of `epsilon=0`,
    `delta_epsilon=1.5`, `step_size=0.15`, `solver="rounded_steps"` and
    `splits.tail(4, class_counts, head_scale=0.6)`; on CIFAR-100-LT those of 27 head classes and
    `head_scale=0.2`. *Ours*: a class whose number rounds to 0 takes one step; that code's index of
    -1 selects the result of the most steps. The metrics of the site tell each class's number of
    `steps`, float32 `[C]`, but with `"projected"`.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.lpl(epsilon=0.5)
      Perturbation(sites=('logits',))

    References:
      Mengyang Li, Fengguang Su, Ou Wu and Ji Zhang, Class-Level Logit Perturbation, TNNLS,
      arXiv:2209.05668; its first version: Logit Perturbation, AAAI 2022.
    """
    planner = classwise.planner(epsilon, delta_epsilon, split)
    sites.check_number("step_size", step_size)
    sites.check_choice("solver", solver, ("steps", "rounded_steps", "projected"))
    if not callable(step_size) and not isinstance(step_size, jax.Array) and step_size == 0:
        raise ValueError("step_size must be above 0.")
    if steps is not None:
        sites.check_count("steps", steps)

    def step_counts(plan, alpha):
        ratio = plan.radius / jnp.where(alpha > 0, alpha, 1.0)
        if solver == "rounded_steps":
            # Off by the rounding of float32, a tie such as 2.5 must still go to the even number.
            ratio = jnp.round(ratio * 2.0**13) / 2.0**13
            counts = jnp.maximum(jnp.round(ratio), 1.0)
        else:
            # A hair above, so that 0.5 / 0.01 makes 50 steps also where it rounds to 49.999996.
            counts = jnp.floor(ratio * (1 + 1e-6))
        moving = (alpha > 0) & (plan.sign != 0) & (plan.radius > 0)
        counts = jnp.where(moving, counts, 0.0)
        return counts if steps is None else jnp.minimum(counts, steps)

    def report(_, stats, step):
        plan = planner.report(stats, step)
        if solver == "projected":
            return plan
        counts = step_counts(classwise.Plan(**plan), sites.at_step(step_size, step))
        return plan | {"steps": counts}

    def update(
        value,
        *,
        labels,
        targets,
        weights,
        class_stats,
        gradient_fn=None,
        site=None,
        step=0,
        axis_name=(),
        **_,
    ):
        gradient_fn = sites.require_gradient("lpl", site, gradient_fn)
        frozen = jax.lax.stop_gradient(value)
        members = membership.by_class(labels, weights, targets.shape[1], axis_name)
        plan = planner.of(members, class_stats, step)
        signs, radii = plan
        zero = jnp.zeros((signs.shape[0], value.shape[1]), jnp.float32)

        def gradient(delta):
            return members.mean(gradient_fn(frozen + members.spread(delta))[1])

        if solver == "projected":
            delta = pgd.ascend(gradient, zero, signs, radii, steps or 3)
        else:
            alpha = sites.at_step(step_size, step)
            counts = step_counts(plan, alpha).astype(jnp.int32)
            stride = signs * alpha

            def body(t, delta):
                length = jnp.where(t < counts, stride, 0.0)
                return delta + pgd.column(length, delta) * gradient(delta)

            delta = pgd.repeat(body, zero, jnp.max(counts))
        return value + jax.lax.stop_gradient(members.spread(delta)).astype(value.dtype)

    return sites.stateless(sites.LOGITS, update, report)


def logit_adjustment(class_counts: Sequence[float], tau: sites.Number = 1.0) -> sites.Perturbation:
    """Add `tau * log(prior)` to the logits in the training loss.

    Args:
      class_counts: Number of training examples of each class, `[C]`, all positive.
      tau: Strength, at least 0, or a schedule.

    Raises:
      ValueError: If a count is not positive, or their number is not that of the classes.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> adjust = lpa_jax.logit_adjustment([30, 10])
      >>> adjust.update(jnp.zeros((1, 2)), adjust.init(None))[0].round(3).tolist()
      [[-0.288, -1.386]]

    References:
      Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv:2007.07314.
    """
    counts = membership.counts_of(class_counts)
    sites.check_number("tau", tau)

    def update(value, *, step=0, **_):
        membership.check_classes(counts, value)
        shift = sites.at_step(tau, step) * jnp.log(counts / jnp.sum(counts))
        return value + shift[None].astype(value.dtype)

    return sites.stateless(sites.LOGITS, update)


def ldam(
    class_counts: Sequence[float], max_margin: sites.Number = 0.5, scale: sites.Number = 30.0
) -> sites.Perturbation:
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
    sites.check_number("max_margin", max_margin)
    sites.check_number("scale", scale)

    def update(value, *, labels, step=0, **_):
        membership.check_classes(counts, value)
        margins = counts**-0.25
        margins = margins / jnp.max(margins) * sites.at_step(max_margin, step)
        return _with_margins(value, labels, sites.at_step(scale, step) * margins)

    return sites.stateless(sites.LOGITS, update)


def additive_margin(margin: sites.Number, scale: sites.Number = 1.0) -> sites.Perturbation:
    r"""Large margin in its additive form: `u - scale * margin e_y`, one margin for all classes.

    The papers take the loss of `scale * (cos - margin e_y)`, which this is where the logits are
    `u = scale * cos`: those of our networks with `head="normalized"`, whose scale is 30. If your
    own head returns plain cosines, multiply them by the scale in the network.

    Args:
      margin: At least 0, in units of `1 / scale` of a logit, or a schedule. The papers' is 0.35, of
        cosines.
      scale: What the network has multiplied cosines by, at least 0: 30 with our normalized head. 1,
        with a linear head, has the margin in the units of the logits.

    Raises:
      ValueError: If an argument is outside its range.

    Example:
      >>> import jax.numpy as jnp, lpa_jax
      >>> large_margin = lpa_jax.additive_margin(0.5)
      >>> labels = jnp.array([1])
      >>> large_margin.update(jnp.zeros((1, 2)), large_margin.init(None), labels=labels)[0]
      Array([[ 0. , -0.5]], dtype=float32)

    References:
      Wang et al., Additive Margin Softmax for Face Verification, 2018, arXiv:1801.05599; Wang et
      al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018, arXiv:1801.09414.
      The large-margin softmax multiplies the angle instead and needs a head of its own: Liu et al.,
      Large-Margin Softmax Loss for Convolutional Neural Networks, ICML 2016, arXiv:1612.02295.
    """
    sites.check_number("margin", margin)
    sites.check_number("scale", scale)

    def update(value, *, labels, step=0, **_):
        size = sites.at_step(scale, step) * sites.at_step(margin, step)
        return _with_margins(value, labels, jnp.full(value.shape[1], size))

    return sites.stateless(sites.LOGITS, update)


def _with_margins(value: Array, labels: membership.Labels, margins: Array) -> Array:
    """Return `u - margin_y e_y`."""
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, value.shape[1])
    return value - (labels * margins[None]).astype(value.dtype)


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
    strength: sites.Number,
    num_classes: int,
    *,
    head: str = "head",
    num_steps: int | None = None,
    diagonal: bool = False,
) -> sites.Perturbation:
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
    sites.check_number("strength", strength)
    sites.check_count("num_classes", num_classes, low=2)
    sites.check_activations("isda", [site])
    if num_steps is not None:
        sites.check_count("num_steps", num_steps)

    def init(value):
        if value.ndim != 2:
            raise sites.SiteError(
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
        if site != sites.LOGITS:
            return value, _observe(state, members, jax.lax.stop_gradient(value))
        kernel = _kernel(params, head, (state.means.shape[1], num_classes)).T
        apart = kernel[None] - members.take_class(kernel)[:, None]
        covariances = members.take_class(state.covariances)
        form = "rjd,rd,rjd->rj" if diagonal else "rjd,rde,rje->rj"
        spread = jnp.einsum(form, apart, covariances, apart, precision=jax.lax.Precision.HIGHEST)
        size = sites.at_step(strength, step)
        if num_steps is not None:
            size *= jnp.minimum(jnp.asarray(step, jnp.float32) / num_steps, 1.0)
        return value + members.spread(0.5 * size * spread).astype(value.dtype), state

    return sites.Perturbation((site, sites.LOGITS), init, update)


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


def _kernel(params: PyTree, head: str, shape: tuple[int, int]) -> Float[Array, "features classes"]:
    """Return the head's kernel, or raise `SiteError`."""
    scope: Any = params
    for name in (*head.split("/"), "kernel"):
        if not isinstance(scope, Mapping) or name not in scope:
            known = ", ".join(map(repr, scope)) if isinstance(scope, Mapping) else "nothing"
            raise sites.SiteError(
                f"isda needs the kernel of the network's last linear module, but the parameters "
                f"have no {head + '/kernel'!r}: where {name!r} was looked for there is {known}. "
                "Name the module, as in head='head'."
            )
        scope = scope[name]
    # What nn.with_partitioning puts around it.
    scope = scope.unbox() if hasattr(scope, "unbox") else scope
    if scope.shape != shape:
        raise sites.SiteError(
            f"isda needs a kernel [features, classes] = {list(shape)}, but that of {head!r} is "
            f"{list(scope.shape)}: the site must be what this module takes in."
        )
    return scope
