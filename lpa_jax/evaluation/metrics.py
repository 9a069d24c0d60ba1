"""Top-1 accuracy, by class, by group of classes and over all; likelihood and calibration."""

from collections.abc import Callable, Mapping, Sequence
import functools
import time
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from lpa_jax import data
from lpa_jax.evaluation import calibration

AHEAD = 2
"""Batches that the devices are given before the first of them is finished."""
Predict = Callable[[PyTree, Any, Any, Any], "Outcomes"]
Change = Callable[[Callable[[jax.Array], jax.Array], Any, Any, Any], jax.Array]
"""`(images -> logits, images, labels, numbers of the examples) -> images`, float in [0, 1]."""


class Outcomes(NamedTuple):
    """What a network makes of examples.

    Attributes:
      predicted: The class with the largest logit, int `[N]`.
      nll: `-log p(label)` in nats, float32 `[N]`.
      confidence: Probability of the class predicted, float32 `[N]`.
    """

    predicted: Any
    nll: Any
    confidence: Any


def make_predict(
    apply_fn: Callable[..., Any],
    place: Callable[[Any], Any],
    sharding: NamedSharding,
    change: Change | None = None,
) -> Predict:
    """Return the function `(variables, uint8 images, labels, numbers) -> outcomes`.

    Args:
      apply_fn: `model.apply` of a model that takes `train`; it is called with False.
      place: Puts images, labels and the numbers of the examples where the devices share them.
      sharding: What gives every device the whole: for the variables, and for the outcomes.
      change: What is done to the images first: an attack, such as `attacks.fgsm()`.
    """

    @functools.partial(jax.jit, out_shardings=sharding)
    def predict(variables, images, labels, index):
        variables = jax.lax.with_sharding_constraint(variables, sharding)
        logits_fn = functools.partial(apply_fn, variables, train=False)
        images = data.to_float(images)
        if change is not None:
            images = change(logits_fn, images, labels, index)
        return outcomes(logits_fn(images), labels)

    return lambda variables, *batch: predict(variables, *place(batch))


def outcomes(logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]) -> Outcomes:
    """Return what the logits say of the labels."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return Outcomes(jnp.argmax(logits, axis=1), nll, jnp.exp(jnp.max(log_p, axis=1)))


def wait(array: Any) -> None:
    """Wait for an array so that Ctrl-C is obeyed at once, which the wait of JAX itself delays."""
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
) -> Outcomes:
    """Return the outcomes of all examples, in their order, as NumPy arrays.

    Args:
      predict: From `make_predict`.
      variables: The network's variables.
      examples: At least one example.
      batch_size: Examples a forward pass; the last batch is padded.
      finished: Called for each batch that is finished.
    """
    batches = list(data.eval_batches(len(examples.labels), batch_size))
    found, number = [], 0
    for i, _ in batches:
        found.append(predict(variables, examples.images[i], examples.labels[i], i))
        # The devices go on while the host reads ahead, but not far.
        while number < len(found) - (AHEAD if len(found) < len(batches) else 0):
            wait(found[number].nll)
            finished()
            number += 1
    real = np.concatenate([weights > 0 for _, weights in batches])
    return Outcomes(
        *(
            np.concatenate([np.asarray(part) for part in parts])[real]
            for parts in zip(*found, strict=True)
        )
    )


def evaluate(
    predict: Predict,
    variables: PyTree,
    examples: data.Examples,
    num_classes: int,
    batch_size: int,
    groups: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Judge a network on examples.

    Args:
      predict: From `make_predict`.
      variables: The network's variables.
      examples: At least one example.
      num_classes: Number of classes C.
      batch_size: Examples a forward pass; the last batch is padded.
      groups: Classes of each group, such as `data.class_groups` returns.

    Returns:
      `"accuracy"` in [0, 1], `"nll"` (mean negative log-likelihood in nats, at least 0),
      `"ece"` (expected calibration error in [0, 1], 15 bins), `"class_accuracy"`, C numbers, None
      for a class without examples; and for each group with examples `"accuracy_GROUP"`, the mean
      of its classes' accuracies.
    """
    found = collect(predict, variables, examples, batch_size)
    return summarize(found, examples.labels, num_classes, groups)


def summarize(
    found: Outcomes,
    labels: Int[np.ndarray, "n"],
    num_classes: int,
    groups: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Return what `evaluate` does, from the outcomes.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> labels = np.array([0, 1, 1])
      >>> logits = jnp.array([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]])
      >>> found = Outcomes(*map(np.asarray, outcomes(logits, jnp.asarray(labels))))
      >>> result = summarize(found, labels, num_classes=2, groups={"tail": [1]})
      >>> round(result["accuracy"], 3), round(result["nll"], 3), result["class_accuracy"]
      (0.667, 0.316, [1.0, 0.5])
      >>> round(result["ece"], 3), result["accuracy_tail"]
      (0.246, 0.5)
    """
    correct = found.predicted == labels
    by_class = [correct[labels == c] for c in range(num_classes)]
    by_group = {
        f"accuracy_{name}": [float(np.mean(by_class[c])) for c in classes if len(by_class[c])]
        for name, classes in groups.items()
    }
    return {
        "accuracy": float(np.mean(correct)),
        "nll": float(np.mean(found.nll, dtype=np.float64)),
        "ece": calibration.expected_calibration_error(correct, found.confidence),
        "class_accuracy": [float(np.mean(c)) if len(c) else None for c in by_class],
        **{name: float(np.mean(members)) for name, members in by_group.items() if members},
    }


def confusion(
    predicted: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"], num_classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Return how many examples of each class (rows) were taken for each class (columns).

    Example:
      >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), num_classes=2).tolist()
      [[1, 0], [1, 1]]
    """
    pairs = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
