"""A wrapper: only the site where a perturbation matters most is perturbed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lpa_jax.core import membership
from lpa_jax.core.arguments import check_count
from lpa_jax.core.perturbation import Perturbation


class AdaptiveState(NamedTuple):
    """State of `adaptive`.

    Attributes:
      inner: State of the perturbation.
      chosen: Index of the site perturbed, int32 scalar.
      scores: `sum_c |loss change of class c|` at each site when last measured, float32 `[sites]`.
    """

    inner: Any
    chosen: Int[Array, ""]
    scores: Float[Array, "sites"]


def adaptive(perturbation: Perturbation, every: int) -> Perturbation:
    """Perturb only the site where it matters most: `argmax_l sum_c |loss change|` (LPA eq 13).

    Every `every`-th step measures each site alone, against no perturbation, and is itself trained
    without one: a perturbation at an earlier site would change the scores of the later ones. It
    costs each site its own perturbation and two more passes through the network's tail; the other
    steps cost the chosen site alone.

    Args:
      perturbation: A perturbation of at least two sites that have a gradient, `lpa` for instance.
      every: Number of steps from one measurement to the next, at least 2; step 0 is the first.

    Returns:
      The perturbation of one site at a time.

    Raises:
      ValueError: If there are fewer than two sites, or `every` is less than 2.

    Example:
      >>> import lpa_jax
      >>> lpa_jax.adaptive(lpa_jax.lpa(("group2", "group3"), epsilon=0.2), every=100)
      Perturbation(sites=('group2', 'group3'))
    """
    names = perturbation.sites
    check_count("every", every, low=2)
    if len(names) < 2:
        raise ValueError(f"adaptive chooses among several sites; {perturbation} has one.")

    def init(value):
        start = (jnp.zeros((), jnp.int32), jnp.zeros(len(names), jnp.float32))
        return AdaptiveState(perturbation.init(value), *start)

    def update(
        value,
        state,
        params=None,
        *,
        site,
        step,
        labels,
        targets,
        weights,
        gradient_fn,
        axis_name=(),
        **extra,
    ):
        index = names.index(site)
        measuring = step % every == 0
        chosen = jnp.where(measuring, state.chosen, jnp.argmax(state.scores)).astype(jnp.int32)
        mine = ~measuring & (chosen == index)

        def run():
            return perturbation.update(
                value,
                state.inner,
                params,
                site=site,
                step=step,
                labels=labels,
                targets=targets,
                weights=weights,
                gradient_fn=gradient_fn,
                axis_name=axis_name,
                **extra,
            )

        def score(new):
            change = gradient_fn(new)[0] - gradient_fn(value)[0]
            members = membership.by_class(labels, weights, targets.shape[1], axis_name)
            return jnp.sum(jnp.abs(members.mean(change)))

        new, inner = jax.lax.cond(measuring | mine, run, lambda: (value, state.inner))
        frozen = jax.lax.stop_gradient(new)
        measured = jax.lax.cond(measuring, lambda: score(frozen), lambda: state.scores[index])
        new = jnp.where(mine, new, value)
        return new, AdaptiveState(inner, chosen, state.scores.at[index].set(measured))

    return Perturbation(
        names,
        init,
        update,
        perturbation.report,
        class_level=perturbation.class_level,
        needs_gradient=True,
    )
