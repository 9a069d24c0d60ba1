"""Labels, weights and examples as a step is given them: checked, and put into one form."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import core
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped
import numpy as np

IGNORE = -1
"""The integer label of an example that does not count: its weight is 0."""


def are_classes(labels: Any) -> bool:
    """Return whether labels are integers, and not a distribution over the classes."""
    return bool(jnp.issubdtype(labels.dtype, jnp.integer))


def shape_of(value: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of an array."""
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def batch_of(inputs: PyTree) -> int:
    """Return the number of examples.

    Raises:
      ValueError: If the inputs hold no array, or arrays that do not agree in their first axis.
    """
    if any(not hasattr(leaf, "dtype") for leaf in jax.tree.leaves(inputs)):
        raise ValueError("The inputs must be an array, or a tree of arrays: use numpy.asarray.")
    shapes = [leaf.shape for leaf in jax.tree.leaves(inputs)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"The first axis of all inputs must be that of the batch, but their shapes are "
            f"{shapes}; what is the same for all examples is a keyword argument."
        )
    if not shapes[0][0]:
        raise ValueError(f"The batch is empty: the shapes of the inputs are {shapes}.")
    return shapes[0][0]


def merged(apply_kwargs: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the network, given in a mapping and by their names."""
    if twice := set(apply_kwargs or {}).intersection(more):
        raise ValueError(f"Keyword arguments are given twice, in apply_kwargs too: {twice}.")
    return {**(apply_kwargs or {}), **more}


def divided(
    kwargs: Mapping[str, Any], per_example: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return keyword arguments that are the same for all examples, and those of each example."""
    if missing := set(per_example).difference(kwargs):
        raise ValueError(
            f"per_example names {missing}, which are not among the keyword arguments {[*kwargs]}; "
            "give None where there is no such value."
        )
    given = {name: value for name, value in kwargs.items() if name in per_example}
    return {name: value for name, value in kwargs.items() if name not in given}, given


def check_labels(labels: Any, batch: int, num_classes: int) -> None:
    """Raise `ValueError` unless the labels fit; values are checked where they are known."""
    if not hasattr(labels, "dtype"):
        raise ValueError(f"labels must be an array, not {type(labels).__name__}: numpy.asarray.")
    if are_classes(labels):
        if labels.shape[:1] != (batch,):
            raise ValueError(f"Integer labels must have shape ({batch},), not {labels.shape}.")
        if labels.size and _known(labels):
            # Not by jax: within a jit its operations are traced, on constants too.
            low, high = np.asarray(labels).min(), np.asarray(labels).max()
            if low < IGNORE or high >= num_classes:
                raise ValueError(
                    f"Labels must lie in [0, {num_classes}), or be {IGNORE} for an example that "
                    f"does not count, but range from {low} to {high}."
                )
    elif labels.shape[:1] != (batch,) or labels.shape[1:][-1:] != (num_classes,):
        raise ValueError(
            f"Labels must be integers [{batch}] or floats [{batch}, {num_classes}], not "
            f"{labels.dtype} {labels.shape}."
        )


def check_logits(shape: tuple[int, ...], rows: tuple[int, ...], num_classes: int) -> None:
    """Raise `ValueError` unless logits of a shape are those of as many labels."""
    one_hot = shape == rows and len(rows) > 1 and shape[-1] == num_classes
    if one_hot:
        raise ValueError(
            f"Labels {rows} of integers, for logits {shape}: one-hot labels must be floats. (Of "
            f"one logit at each of {num_classes} positions the shape is {(*rows, 1)}.)"
        )
    if shape == (*rows, num_classes) or (num_classes == 2 and shape in (rows, (*rows, 1))):
        return
    if shape[-1:] != (num_classes,) or len(shape) < 2:
        one = ", or one logit [batch] or [batch, 1]" if num_classes == 2 else ""
        raise ValueError(
            f"The network returns {shape}, but num_classes is {num_classes}: its output must be "
            f"logits [batch, num_classes]{one}, or logits at each position, [batch, "
            "positions, num_classes]."
        )
    raise ValueError(
        f"The network returns {shape}: integer labels must have shape {shape[:-1]}, not {rows}, "
        f"and soft labels {shape}."
    )


def named_extra(extra: Mapping[str, Any] | None, taken: Sequence[str]) -> dict[str, Any]:
    """Return the `extra` of a step as a dictionary.

    Raises:
      ValueError: If it is no mapping from names to arrays, or a name is one of those taken.
    """
    if extra is None:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(name, str) for name in extra):
        raise ValueError(
            f"extra must be a mapping from names to arrays [batch, ...], as in "
            f"extra={{'examples': array}}, not {extra!r:.200}."
        )
    if both := sorted(set(extra).intersection(taken)):
        raise ValueError(
            f"extra names {', '.join(both)}, which every perturbation is given already: choose "
            f"another name than {', '.join(taken)}."
        )
    return dict(extra)


def for_each_label(name: str, values: Any, shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Return an array of `extra` with an entry for each label.

    Raises:
      ValueError: If it does not begin with the axes of the labels, or with that of the batch.
    """
    if not hasattr(values, "shape") or values.shape[:1] != shape[:1]:
        found = f"shape {values.shape}" if hasattr(values, "shape") else repr(values)
        raise ValueError(
            f"extra[{name!r}] must be an array with an entry for each example, of shape "
            f"({shape[0]}, ...), not {found:.200}."
        )
    values = jnp.asarray(values)
    if values.shape[: len(shape)] == shape:
        return values
    # One for each example, whose positions share it.
    spread = values.reshape(shape[:1] + (1,) * (len(shape) - 1) + values.shape[1:])
    return jnp.broadcast_to(spread, shape + values.shape[1:])


def check_weights(weights: Any, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Return weights as float32, one for each label; a weight that is not allowed is NaN.

    Raises:
      ValueError: If the shape is another one, or values that are known are not allowed.
    """
    array = jnp.asarray(weights, jnp.float32)
    if array.shape not in (shape, shape[:1]):
        raise ValueError(f"weights must have shape {shape}, not {array.shape}.")
    if _known(weights) and not (np.isfinite(weights) & (np.asarray(weights) >= 0)).all():
        raise ValueError(
            f"weights must be finite and at least 0, the weight of an example to leave out, but "
            f"are {weights}."
        )
    array = array.reshape(array.shape + (1,) * (len(shape) - array.ndim))
    return jnp.broadcast_to(jnp.where(array >= 0, array, jnp.nan), shape)


def soft(labels: Shaped[Array, "rows ..."], num_classes: int) -> Float[Array, "rows classes"]:
    """Return labels as targets; a class that does not exist makes them NaN."""
    if labels.ndim > 1:
        return labels.astype(jnp.float32)
    known = (labels >= 0) & (labels < num_classes)
    targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    # A label whose value was not known when the step was traced: the loss is NaN, not 0.
    return jnp.where(known[:, None], targets, jnp.nan)


def all_finite(tree: PyTree) -> Array:
    """Return whether no number in a tree is NaN or infinite."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in numbers] or [jnp.array(True)]).all()


def _known(array: Any) -> bool:
    """Return whether the values of an array can be looked at."""
    return not isinstance(array, core.Tracer) and getattr(array, "is_fully_addressable", True)
