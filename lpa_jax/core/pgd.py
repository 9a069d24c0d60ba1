"""Projected gradient steps on many perturbations at once, one a row."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree, Shaped
import optax

UNROLL = 8
"""Loops of up to so many steps are unrolled: in them XLA convolves several times slower on CPUs."""

Rows = Float[Array, "rows ..."]
PerRow = Float[Array, "rows"]


def column(
    per_row: Shaped[Array, "rows"], like: Shaped[ArrayLike, "rows ..."]
) -> Shaped[Array, "rows ..."]:
    """Reshape `[R]` so that it broadcasts against `like`, `[R, ...]`."""
    return per_row.reshape(per_row.shape + (1,) * (jnp.ndim(like) - 1))


def norms(rows: Rows) -> PerRow:
    """Return the l2 norm of each row, in float32."""
    size, scaled = _scale(rows)
    return size * _length(scaled)


def tree_norm(tree: PyTree) -> Float[Array, ""]:
    """Return the l2 norm of all arrays of a tree together, in float32."""
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    largest = optax.tree.norm(tree, ord=jnp.inf)
    safe = jnp.where(largest > 0, largest, 1.0)
    return largest * optax.tree.norm(jax.tree.map(lambda leaf: leaf / safe, tree))


def unit(rows: Rows) -> Rows:
    """Scale each row to l2 norm 1, in float32; a row of zeros stays zero.

    Example:
      >>> import jax.numpy as jnp
      >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
      Array([[0.6, 0.8],
             [0. , 0. ]], dtype=float32)
    """
    _, scaled = _scale(rows)
    return scaled / column(_nonzero(_length(scaled)), rows)


def _scale(rows: Rows) -> tuple[PerRow, Rows]:
    """Return a size of each row, near its largest entry, and the row in units of it.

    The squares of small numbers underflow, and those of large ones overflow. So does the reciprocal
    of a size at either end of what float32 can hold, which is why it stays away from them.
    """
    rows = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(rows).reshape(rows.shape[0], -1), axis=1, initial=0.0)
    size = jnp.clip(largest, 2.0**-100, 2.0**100)
    return size, rows / column(size, rows)


def _nonzero(lengths: PerRow) -> PerRow:
    """Return what to divide by: 1 for a row of which, in units of its size, nothing is left."""
    return jnp.where(lengths > 2.0**-20, lengths, 1.0)


def _length(rows: Rows) -> PerRow:
    return jnp.sqrt(jnp.sum(rows.reshape(rows.shape[0], -1) ** 2, axis=1))


def project(rows: Rows, radii: PerRow) -> Rows:
    """Project each row onto the l2 ball of its radius; exactly 0 where the radius is 0."""
    size, scaled = _scale(rows)
    length = _length(scaled)
    inside = column(size * length <= radii, rows)
    return jnp.where(inside, rows, column(radii / _nonzero(length), rows) * scaled)


def repeat(
    body: Callable[[Int[Array, ""], Rows], Rows], start: Rows, steps: int | Int[Array, ""]
) -> Rows:
    """Apply `body(t, rows)` for `t` from 0 to `steps - 1`, unrolled where that is cheaper."""
    if isinstance(steps, int) and steps <= UNROLL:
        for t in range(steps):
            start = body(jnp.asarray(t), start)
        return start
    return jax.lax.fori_loop(0, steps, body, start)


def ascend(
    gradient: Callable[[Rows], Rows],
    zero: Rows,
    signs: PerRow,
    radii: PerRow,
    steps: int,
    *,
    normalized: bool = True,
    floor: PerRow | float = 0.0,
) -> Rows:
    """Take projected steps `d <- Proj(d + s * kappa * dir(d))`, `kappa = 2 * radius / steps`.

    Args:
      gradient: Maps the perturbations `[R, ...]` to their gradients `[R, ...]`.
      zero: Where to start, which is what `gradient` is first given: zeros, float32 `[R, ...]`.
      signs: +1 to ascend, -1 to descend, 0 to stay, `[R]`.
      radii: Radii of the l2 balls, `[R]`, at least 0.
      steps: Number of steps T, at least 1.
      normalized: Whether `dir` is the gradient scaled to l2 norm 1, or the gradient. (A gradient
        shorter than 1e-36 is none.)
      floor: A gradient no longer than this is rounding noise and has no direction: the row of a
        `normalized` ascent then stays where it is. At least 0; `[R]` or one for all.

    Returns:
      Perturbations within their balls, float32 `[R, ...]`.

    Example:
      >>> import jax.numpy as jnp
      >>> uphill = lambda d: jnp.ones_like(d)
      >>> signs, radii = jnp.array([1.0, -1.0]), jnp.array([0.5, 0.2])
      >>> ascend(uphill, jnp.zeros((2, 1)), signs, radii, steps=3).tolist()
      [[0.5], [-0.2]]
    """
    stride = signs * (2.0 / steps)

    # In units of the radius, so that a step and its square are of a size that float32 can hold.
    def climb(within, uphill):
        pace = stride
        if normalized:
            size, scaled = _scale(uphill)
            length = _length(scaled)
            pace = jnp.where(size * length > floor, stride / _nonzero(length) / size, 0.0)
        return within + column(pace, within) * uphill

    def into_ball(moved):
        if not normalized:
            return project(moved, jnp.ones_like(radii))
        # No longer than 3, and so without a scale of its own.
        return moved / column(jnp.maximum(_length(moved), 1.0), moved)

    def body(_, within):
        return into_ball(climb(within, gradient(column(radii, within) * within)))

    within = climb(zero, gradient(zero))
    # The first of several normalized steps ends within the ball.
    if steps == 1 or not normalized:
        within = into_ball(within)
    within = repeat(body, within, steps - 1)
    return column(radii, within) * within


def climb_within(
    gradient: Callable[[Rows], Rows],
    values: Rows,
    start: Rows,
    radius: ArrayLike,
    stride: ArrayLike,
    steps: int,
    norm: Literal["linf", "l2"],
    bounds: tuple[float, float] | list[float] | None,
) -> Rows:
    """Take projected steps uphill in a ball around the values: the inner part of FGSM and PGD.

    Args:
      gradient: Maps values `[R, ...]` to the gradients at them.
      values: Centers of the balls, `[R, ...]`.
      start: First perturbations, float32 `[R, ...]`, within ball and bounds.
      radius: Radius of the balls, at least 0.
      stride: Length of a step, at least 0.
      steps: Number of steps, at least 1.
      norm: `"linf"`, steps along the sign of the gradient, or `"l2"`, along the gradient.
      bounds: Range of the values moved, or None.

    Returns:
      Perturbations, float32 `[R, ...]`.

    Example:
      >>> import jax.numpy as jnp
      >>> uphill = lambda x: jnp.ones_like(x)
      >>> values, start = jnp.array([[0.5, 0.9]]), jnp.zeros((1, 2))
      >>> climb_within(uphill, values, start, 0.3, 0.2, 2, "linf", (0.0, 1.0)).round(3)
      Array([[0.3, 0.1]], dtype=float32)
    """

    def moved(delta):
        new = values + delta.astype(values.dtype)
        return new if bounds is None else jnp.clip(new, *bounds)

    def body(_, delta):
        uphill = gradient(moved(delta)).astype(jnp.float32)
        if norm == "linf":
            delta = jnp.clip(delta + stride * jnp.sign(uphill), jnp.negative(radius), radius)
        else:
            delta = project(delta + stride * unit(uphill), jnp.full(len(delta), radius))
        return (moved(delta) - values).astype(jnp.float32)

    return repeat(body, start, steps)


def stretch(mean: Rows, signs: PerRow, radii: PerRow) -> Rows:
    """Return the exact maximizer (sign +1) or minimizer (-1) of `||mean + d||`, `||d|| <= radius`.

    A minimizer stops at the origin: its length is `min(radius, ||mean||)`.
    """
    length = jnp.where(signs > 0, radii, jnp.minimum(radii, norms(mean)))
    return column(signs * length, mean) * unit(mean)
