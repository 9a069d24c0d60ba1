"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from lpa_jax.core.step import StepState


class Totals(NamedTuple):
    """Sums over an epoch, kept on the device.

    Attributes:
      steps: Number of steps.
      examples: Number of examples.
      loss: Sum of training losses, of the perturbed objective.
      correct: Number of examples whose logits, before their own perturbation, were right; of mixed
        examples the share that is of the class predicted.
      perturbation: For each site, what is reported of it: `[C]`, summed by example, or summed by
        step where it is a scalar.
    """

    steps: Float[Array, ""]
    examples: Float[Array, ""]
    loss: Float[Array, ""]
    correct: Float[Array, ""]
    perturbation: dict[str, dict[str, Array]]


class TrainState(NamedTuple):
    """A pytree of arrays, and all that a checkpoint holds.

    Attributes:
      step: Number of steps taken.
      variables: `"params"` and the model's other collections.
      opt_state: State of the optimizer.
      perturbation: State of the perturbations, with the class statistics.
      running: Sums over the present epoch so far.
      epoch: Sums over the last finished epoch.
      nonfinite_steps: Number of steps whose loss or update was not finite; they changed nothing
        else.
    """

    step: Int[Array, ""]
    variables: PyTree
    opt_state: PyTree
    perturbation: StepState
    running: Totals
    epoch: Totals
    nonfinite_steps: Int[Array, ""]


def empty_totals(metrics: Any) -> Totals:
    """Return the sums of an epoch that has not begun, for metrics of these shapes."""

    def zero():
        return jnp.zeros((), jnp.float32)

    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), metrics)
    return Totals(zero(), zero(), zero(), zero(), sums)


def add_to_totals(
    totals: Totals,
    loss: Float[Array, ""],
    correct: Float[Array, "batch"],
    metrics: dict[str, dict[str, Array]],
) -> Totals:
    """Add a step to the sums."""
    count = correct.shape[0]

    def weigh(report):
        members = report.get("count", 1.0)
        return {k: v * members if v.ndim and k != "count" else v for k, v in report.items()}

    weighed = {site: weigh(report) for site, report in metrics.items()}
    return Totals(
        totals.steps + 1,
        totals.examples + count,
        totals.loss + loss * count,
        totals.correct + jnp.sum(correct),
        jax.tree.map(jnp.add, totals.perturbation, weighed),
    )


def epoch_means(totals: Totals) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Return the means of an epoch: scalars by name, and the report of each site by class.

    Args:
      totals: Sums over an epoch that has at least one example.

    Returns:
      `"train_loss"`, `"train_accuracy"` and `"SITE/NAME"`, the mean over examples of what is
      reported of a site; and `{site: {name: [C] or scalar}}`, 0 for a class without examples.
    """
    totals = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), totals)
    scalars = {
        "train_loss": float(totals.loss / totals.examples),
        "train_accuracy": float(totals.correct / totals.examples),
    }
    by_class = {}
    for site, sums in totals.perturbation.items():
        count = sums.get("count", totals.steps)
        by_class[site] = {}
        for name, value in sums.items():
            if name == "count":
                continue
            weight = count if value.ndim else totals.steps
            by_class[site][name] = (value / np.maximum(weight, 1e-12)).tolist()
            scalars[f"{site}/{name}"] = float(value.sum() / weight.sum())
    return scalars, by_class
