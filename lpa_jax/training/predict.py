"""A network on all examples of a split, in batches that the devices share."""

from collections.abc import Callable, Mapping, Sequence
import functools
import time
import types
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import PyTree
import numpy as np

from lpa_jax import data
from lpa_jax.tasks import Task

AHEAD = 2
"""Batches that the devices are given before the first of them is finished."""
Predict = Callable[[PyTree, Any, Any, Any], Any]
"""`(variables, images, labels, numbers of the examples) -> the task's outcomes`."""
Change = Callable[[Callable[[jax.Array], jax.Array], jax.Array, jax.Array], jax.Array]
"""`(images -> losses [B], images, numbers of the examples) -> images`, float."""


def make_predict(
    logits_fn: Callable[[PyTree, jax.Array], jax.Array],
    task: Task,
    place: Callable[[Any], Any],
    sharding: NamedSharding,
    change: Change | None = None,
    loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Predict:
    """Return the function `(variables, images, labels, numbers) -> outcomes`.

    Args:
      logits_fn: The network as it is used: `(variables, float images) -> logits [B, C]`.
      task: What labels mean.
      place: Puts images, labels and the numbers of the examples where the devices share them.
      sharding: What gives every device the whole: for the variables, and for the outcomes.
      change: What is done to the images first: an attack, such as `attacks.fgsm()`.
      loss: What an attack climbs, `(logits, labels) -> [B]`.
    """

    @functools.partial(jax.jit, out_shardings=sharding)
    def predict(variables, images, labels, index):
        variables = jax.lax.with_sharding_constraint(variables, sharding)
        images = data.to_float(images)
        if change is not None and loss is not None:
            images = change(
                lambda moved, loss=loss: loss(logits_fn(variables, moved), labels), images, index
            )
        return task.outcomes(logits_fn(variables, images), labels)

    return lambda variables, *batch: predict(variables, *place(batch))


def wait(tree: Any) -> None:
    """Wait for arrays so that Ctrl-C is obeyed at once, which the wait of JAX itself delays."""
    for array in jax.tree.leaves(tree):
        pause = 1e-4
        while not array.is_ready():
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


def collect(
    predict: Predict,
    variables: PyTree,
    examples: data.Examples,
    batch_size: int,
    finished: Callable[[], None] = lambda: None,
    images: Any = None,
) -> Any:
    """Return the outcomes of all examples, in their order, as NumPy arrays.

    Args:
      predict: From `make_predict`.
      variables: The network's variables.
      examples: At least one example.
      batch_size: Examples a forward pass; the last batch is padded.
      finished: Called for each batch that is finished.
      images: In place of the examples' own; anything that returns images for numbers of them.
    """
    images = examples.images if images is None else images
    batches = list(data.eval_batches(len(examples), batch_size))
    found, number = [], 0
    for i, _ in batches:
        found.append(predict(variables, images[i], examples.labels[i], i))
        # The devices continue while the host reads ahead, but not far.
        while number < len(found) - (AHEAD if len(found) < len(batches) else 0):
            wait(found[number])
            finished()
            number += 1
    real = np.concatenate([weights > 0 for _, weights in batches])
    return jax.tree.map(
        lambda *parts: np.concatenate([np.asarray(part) for part in parts])[real], *found
    )


def evaluate(
    predict: Predict,
    task: Task,
    variables: PyTree,
    examples: data.Examples,
    num_classes: int,
    batch_size: int,
    groups: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
    images: Any = None,
) -> dict[str, Any]:
    """Return the task's metrics of a network on a split.

    Args:
      predict: From `make_predict`.
      task: What labels mean.
      variables: The network's variables.
      examples: At least one example.
      num_classes: Number of classes C.
      batch_size: Examples a forward pass; the last batch is padded.
      groups: Classes of each group, such as `data.class_groups` returns.
      images: As in `collect`.
    """
    found = collect(predict, variables, examples, batch_size, images=images)
    return plain(task.metrics(found, examples.labels, num_classes, groups))


def plain(value: Any) -> Any:
    """Return metrics with arrays, of NumPy or JAX, as the numbers and lists that JSON takes.

    Example:
      >>> plain({"a": np.float32(0.5), "b": np.arange(2)})
      {'a': 0.5, 'b': [0, 1]}
    """
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, jax.Array)) else value
