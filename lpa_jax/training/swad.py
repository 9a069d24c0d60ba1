"""SWAD: an average of the weights over the part of training in which they generalize.

References:
  Cha et al., SWAD: Domain Generalization by Seeking Flat Minima, NeurIPS 2021, arXiv:2102.08604.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree


class Settings(NamedTuple):
    """When the average begins and ends.

    Attributes:
      ratio: How far above the losses at its beginning the loss may be, as a share of them; above 0.
      converge: Losses that decide that it begins, at least 1.
      tolerance: Losses of which one must be low enough, at least `converge`.
      splits: Whose mean loss is taken.
    """

    ratio: float
    converge: int
    tolerance: int
    splits: tuple[str, ...]


class Swad(NamedTuple):
    """What the average is made from: `tolerance + 2` copies of the parameters, float32.

    Steps between two evaluations are a segment, of which the mean of the parameters is kept. T is
    the tolerance.

    Attributes:
      segment: Mean of the parameters over the steps of the open segment.
      steps: Their number.
      closed: Number of closed segments.
      recent: The last closed segments, the newest last, `[T, ...]`.
      losses: The losses at their ends.
      mean: Mean of the segments that were taken in.
      taken: Their number.
      first: Number of the first of them; -1 before it is known.
      threshold: What losses may be at most.
      ended: Whether no more are taken in.
    """

    segment: PyTree
    steps: Int[Array, ""]
    closed: Int[Array, ""]
    recent: PyTree
    losses: Float[Array, "t"]
    mean: PyTree
    taken: Int[Array, ""]
    first: Int[Array, ""]
    threshold: Float[Array, ""]
    ended: Bool[Array, ""]


def init(params: PyTree, settings: Settings) -> Swad:
    """Return the state before the first step."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    size = settings.tolerance
    recent = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), zeros)
    none = jnp.zeros((), jnp.int32)
    return Swad(
        segment=zeros,
        steps=none,
        closed=none,
        recent=recent,
        losses=jnp.zeros(size, jnp.float32),
        mean=jax.tree.map(jnp.copy, zeros),
        taken=none,
        first=none - 1,
        threshold=jnp.zeros((), jnp.float32),
        ended=jnp.zeros((), bool),
    )


def after_step(state: Swad, params: PyTree) -> Swad:
    """Take the parameters after a step into the open segment."""
    return state._replace(segment=_with(state.segment, state.steps, params), steps=state.steps + 1)


def close(state: Swad, loss: Float[Array, ""], settings: Settings) -> Swad:
    """End the open segment, and take in the one that is `tolerance` segments old if it is due.

    The first segment taken in is the first whose loss is the smallest of `converge` in a row that
    begin with it. The threshold is the mean of these losses times `1 + ratio`. Each further segment
    is taken in if one of `tolerance` losses that begin with its own is at most the threshold; with
    the first that is not, the average ends.

    Args:
      state: Before.
      loss: On the validation set, of the parameters as they are.
      settings: Of the average.
    """

    def pushed(recent, segment):
        return jnp.concatenate([recent[1:], segment[None]])

    losses = pushed(state.losses, jnp.asarray(loss, jnp.float32))
    closed = state.closed + 1
    window = losses[settings.tolerance - settings.converge :]
    found = (state.first < 0) & (closed >= settings.converge) & (jnp.argmin(window) == 0)
    state = state._replace(
        segment=jax.tree.map(jnp.zeros_like, state.segment),
        steps=jnp.zeros_like(state.steps),
        closed=closed,
        recent=jax.tree.map(pushed, state.recent, state.segment),
        losses=losses,
        first=jnp.where(found, closed - settings.converge, state.first),
        threshold=jnp.where(found, jnp.mean(window) * (1 + settings.ratio), state.threshold),
    )
    return _take_in(state, 0, settings)


@functools.partial(jax.jit, static_argnames="settings")
def finished(state: Swad, variables: PyTree, settings: Settings) -> tuple[PyTree, Swad]:
    """Return variables with the average in place of their parameters, and what is in it.

    *Ours*: running statistics and other variables are those of the last step.
    """
    mean, state = average(state, settings)
    params = jax.tree.map(lambda mean, old: mean.astype(old.dtype), mean, variables["params"])
    return {**variables, "params": params}, state


def average(state: Swad, settings: Settings) -> tuple[PyTree, Swad]:
    """Return the average at the end of training, and the state with all that is in it.

    The windows of losses that the end cuts short are taken as they are. If nothing was taken in,
    since no loss was followed by higher ones, the average is the last closed segment.
    """
    for place in range(settings.tolerance):
        state = _take_in(state, place, settings)
    mean = jax.tree.map(
        lambda mean, recent: jnp.where(state.taken > 0, mean, recent[-1]), state.mean, state.recent
    )
    return mean, state


def about(state: Swad) -> dict[str, Any]:
    """Return which segments an average is of, counted from 0, for the records."""
    begun = int(state.taken) > 0
    last = int(state.closed) - 1
    return {
        "converged": begun,
        "first": int(state.first) if begun else last,
        "last": int(state.first + state.taken) - 1 if begun else last,
        "closed": int(state.closed),
        "threshold": float(state.threshold) if begun else None,
    }


def _take_in(state: Swad, place: int, settings: Settings) -> Swad:
    """Take in the segment at a place of the recent ones, if it is the next and low enough."""
    number = state.closed - settings.tolerance + place
    due = (state.first >= 0) & (number == state.first + state.taken) & ~state.ended
    low = jnp.min(state.losses[place:]) <= state.threshold
    segment = jax.tree.map(lambda recent: recent[place], state.recent)
    taken = _with(state.mean, state.taken, segment)
    return state._replace(
        mean=jax.tree.map(lambda new, old: jnp.where(due & low, new, old), taken, state.mean),
        taken=state.taken + (due & low),
        ended=state.ended | (due & ~low),
    )


def _with(mean: PyTree, number: Int[Array, ""], new: PyTree) -> PyTree:
    """Return the mean of one more."""
    return jax.tree.map(
        lambda mean, new: mean + (new.astype(jnp.float32) - mean) / (number + 1), mean, new
    )
