"""Top-1 accuracy, by class and over all, and negative log-likelihood."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from lpa_jax import data

Predict = Callable[[PyTree, Any], Array]


def make_predict(
    apply_fn: Callable[..., Any], sharding: NamedSharding, out_shardings: NamedSharding
) -> Predict:
    """Return the jitted function `(variables, uint8 images) -> logits`, in evaluation mode.

    Images are split over the devices as `sharding` says, logits are left as `out_shardings` says.
    """

    @functools.partial(jax.jit, out_shardings=out_shardings)
    def predict(variables, images):
        variables = jax.lax.with_sharding_constraint(variables, out_shardings)
        images = jax.lax.with_sharding_constraint(images, sharding)
        return apply_fn(variables, data.to_float(images), train=False)

    return predict


def evaluate(
    predict: Predict, variables: PyTree, examples: data.Examples, num_classes: int, batch_size: int
) -> dict[str, Any]:
    """Judge a network on examples.

    Args:
      predict: From `make_predict`.
      variables: The network's variables.
      examples: At least one example.
      num_classes: Number of classes C.
      batch_size: Examples a forward pass; the last batch is padded.

    Returns:
      `"accuracy"` in [0, 1], `"nll"` (mean negative log-likelihood in nats, at least 0), and
      `"class_accuracy"`, C numbers, None for a class without examples.
    """
    # The devices go on while the host waits for nothing but the last batch.
    batches = list(data.eval_batches(len(examples.labels), batch_size))
    logits = [predict(variables, examples.images[indices]) for indices, _ in batches]
    rows = [np.asarray(x)[weights > 0] for x, (_, weights) in zip(logits, batches, strict=True)]
    return metrics(np.concatenate(rows), examples.labels, num_classes)


def metrics(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"], num_classes: int
) -> dict[str, Any]:
    """Return what `evaluate` does, from logits.

    Example:
      >>> import numpy as np
      >>> logits = np.array([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]])
      >>> result = metrics(logits, np.array([0, 1, 1]), num_classes=2)
      >>> round(result["accuracy"], 3), round(result["nll"], 3), result["class_accuracy"]
      (0.667, 0.316, [1.0, 0.5])
    """
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)), np.float64)
    correct = np.argmax(logits, axis=1) == labels
    by_class = [correct[labels == c] for c in range(num_classes)]
    return {
        "accuracy": float(np.mean(correct)),
        "nll": float(-np.mean(log_p[np.arange(len(labels)), labels])),
        "class_accuracy": [float(np.mean(c)) if len(c) else None for c in by_class],
    }
