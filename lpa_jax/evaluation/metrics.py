"""Top-1 accuracy, by class, by group of classes and over all, and negative log-likelihood."""

from collections.abc import Callable, Mapping, Sequence
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from lpa_jax import data

Outcomes = tuple[Bool[Array, "batch"], Float[Array, "batch"]]
Predict = Callable[[PyTree, Any, Any], Outcomes]


def make_predict(
    apply_fn: Callable[..., Any], place: Callable[[Any], Any], sharding: NamedSharding
) -> Predict:
    """Return the function `(variables, uint8 images, labels) -> outcomes`, in evaluation mode.

    Args:
      apply_fn: `model.apply` of a model that takes `train`.
      place: Puts images and labels where the devices share them.
      sharding: What gives every device the whole: for the variables, and for the outcomes.
    """

    @functools.partial(jax.jit, out_shardings=sharding)
    def predict(variables, images, labels):
        variables = jax.lax.with_sharding_constraint(variables, sharding)
        return outcomes(apply_fn(variables, data.to_float(images), train=False), labels)

    return lambda variables, images, labels: predict(variables, *place((images, labels)))


def outcomes(logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]) -> Outcomes:
    """Return for each example whether it is classified correctly, and `-log p(label)` in nats."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return jnp.argmax(logits, axis=1) == labels, nll


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
      `"class_accuracy"`, C numbers, None for a class without examples; and for each group with
      examples `"accuracy_GROUP"`, the mean of its classes' accuracies.
    """
    batches = list(data.eval_batches(len(examples.labels), batch_size))
    # The devices go on while the host reads; it waits for the last batch alone.
    found = [predict(variables, examples.images[i], examples.labels[i]) for i, _ in batches]
    real = np.concatenate([weights > 0 for _, weights in batches])
    correct, nll = (
        np.concatenate([np.asarray(part) for part in parts])[real]
        for parts in zip(*found, strict=True)
    )
    return summarise(correct, nll, examples.labels, num_classes, groups)


def summarise(
    correct: Bool[np.ndarray, "n"],
    nll: Float[np.ndarray, "n"],
    labels: Int[np.ndarray, "n"],
    num_classes: int,
    groups: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Return what `evaluate` does, from the outcomes.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> labels = np.array([0, 1, 1])
      >>> logits = jnp.array([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]])
      >>> correct, nll = map(np.asarray, outcomes(logits, jnp.asarray(labels)))
      >>> result = summarise(correct, nll, labels, num_classes=2, groups={"tail": [1]})
      >>> round(result["accuracy"], 3), round(result["nll"], 3), result["class_accuracy"]
      (0.667, 0.316, [1.0, 0.5])
      >>> result["accuracy_tail"]
      0.5
    """
    by_class = [correct[labels == c] for c in range(num_classes)]
    by_group = {
        f"accuracy_{name}": [float(np.mean(by_class[c])) for c in classes if len(by_class[c])]
        for name, classes in groups.items()
    }
    return {
        "accuracy": float(np.mean(correct)),
        "nll": float(np.mean(nll, dtype=np.float64)),
        "class_accuracy": [float(np.mean(c)) if len(c) else None for c in by_class],
        **{name: float(np.mean(members)) for name, members in by_group.items() if members},
    }
