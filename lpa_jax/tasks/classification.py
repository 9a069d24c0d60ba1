"""Classification: one class an example, by softmax."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped
import numpy as np
import optax

from lpa_jax import losses
from lpa_jax.tasks import calibration
from lpa_jax.tasks.task import Metric, Metrics

LOSSES = {
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "softmax_binary_cross_entropy": losses.softmax_binary_cross_entropy,
    "softmax_focal_loss": losses.softmax_focal_loss,
    "generalized_cross_entropy": losses.generalized_cross_entropy,
}
SHOWN = {
    "error": Metric("error %", 100.0),
    "accuracy": Metric("accuracy %", 100.0, maximize=True),
    "nll": Metric("NLL", digits=3),
    "ece": Metric("ECE %", 100.0),
}


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


def softmax_statistic(
    logits: Float[Array, "batch classes"],
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
    """Return the softmax, and 1 for the class with the largest logit."""
    probabilities = jnp.exp(logits - jax.nn.logsumexp(logits, axis=1, keepdims=True))
    largest = jnp.argmax(logits, axis=1)
    return probabilities, jax.nn.one_hot(largest, logits.shape[1], dtype=jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Classification:
    """The task of naming the one class of each example; see `Task` for the methods.

    Its metrics are `"error"` and `"accuracy"` in [0, 1], `"nll"` (mean negative log-likelihood in
    nats, at least 0), `"ece"` (expected calibration error in [0, 1], 15 bins), `"class_accuracy"`,
    C numbers, None for a class without examples; and `"groups"`, for each group with examples the
    mean of its classes' accuracies.

    Attributes:
      losses: By name.
      shown: The metrics that tables show.
      selection: The metric that chooses.

    Example:
      >>> labels = np.array([0, 1, 1])
      >>> logits = jnp.array([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]])
      >>> found = classification.outcomes(logits, jnp.asarray(labels))
      >>> found = Outcomes(*map(np.asarray, found))
      >>> result = classification.metrics(found, labels, num_classes=2, groups={"tail": [1]})
      >>> round(result["accuracy"], 3), round(result["nll"], 3), result["class_accuracy"]
      (0.667, 0.316, [1.0, 0.5])
      >>> round(result["ece"], 3), result["groups"]
      (0.246, {'tail': 0.5})
    """

    losses: Mapping[str, Callable[..., jax.Array]] = dataclasses.field(
        default_factory=lambda: dict(LOSSES)
    )
    shown: Mapping[str, Metric] = dataclasses.field(default_factory=lambda: dict(SHOWN))
    selection: str = "accuracy"

    def class_statistic(
        self, logits: Float[Array, "batch classes"]
    ) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
        """Return `softmax_statistic`."""
        return softmax_statistic(logits)

    def correct(
        self, logits: Float[Array, "batch classes"], labels: Shaped[Array, "batch ..."]
    ) -> Float[Array, "batch"]:
        """Return the share of each example in the class with the largest logit."""
        predicted = jnp.argmax(logits, axis=1)
        if labels.ndim == 1:
            return (labels == predicted).astype(jnp.float32)
        return jnp.take_along_axis(labels, predicted[:, None], axis=1)[:, 0]

    def outcomes(
        self, logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]
    ) -> Outcomes:
        """Return what the logits say of the labels."""
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        nll = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
        return Outcomes(jnp.argmax(logits, axis=1), nll, jnp.exp(jnp.max(log_p, axis=1)))

    def metrics(
        self,
        outcomes: Outcomes,
        labels: Int[np.ndarray, "n"],
        num_classes: int,
        groups: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
    ) -> Metrics:
        """Return the metrics of a split."""
        correct = outcomes.predicted == labels
        by_class = [correct[labels == c] for c in range(num_classes)]
        by_group = {
            name: [float(np.mean(by_class[c])) for c in classes if len(by_class[c])]
            for name, classes in groups.items()
        }
        accuracy = float(np.mean(correct))
        return {
            "error": 1.0 - accuracy,
            "accuracy": accuracy,
            "nll": float(np.mean(outcomes.nll, dtype=np.float64)),
            "ece": calibration.expected_calibration_error(correct, outcomes.confidence),
            "class_accuracy": [float(np.mean(c)) if len(c) else None for c in by_class],
            "groups": {name: float(np.mean(found)) for name, found in by_group.items() if found},
        }

    def details(
        self, outcomes: Outcomes, labels: Int[np.ndarray, "n"], num_classes: int
    ) -> dict[str, object]:
        """Return the confusion matrix, whose rows are true classes, and a reliability diagram."""
        bins = calibration.reliability(outcomes.predicted == labels, outcomes.confidence)
        return {
            "confusion": confusion(outcomes.predicted, labels, num_classes).tolist(),
            "reliability": {name: value.tolist() for name, value in bins._asdict().items()},
        }

    def class_counts(self, labels: Shaped[np.ndarray, "n ..."], num_classes: int) -> list[int]:
        """Return the number of examples of each class.

        Raises:
          ValueError: If an example may be of several classes.
        """
        if labels.ndim > 1:
            raise ValueError(
                f"The task classification takes one class an example, labels [N], not "
                f"{[*labels.shape]}: give such labels, or another config.task."
            )
        return np.bincount(labels, minlength=num_classes).tolist()


classification = Classification()


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
