"""What a training run carries from step to step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from lpa_jax.core.step import StepState
from lpa_jax.training.swad import Swad


class Totals(NamedTuple):
    """Sums over an epoch, kept on the device.

    Attributes:
      steps: Number of steps.
      examples: Number of examples.
      loss: Sum of training losses, of the perturbed objective.
      correct: Number of examples whose logits, before their own perturbation, were right, as the
        task counts them; of mixed examples the share that is of the class predicted.
      perturbation: For each site, what is reported of it: `[C]`, summed by example, or summed by
        step where it is a scalar.
    """

    steps: Float[Array, ""]
    examples: Float[Array, ""]
    loss: Float[Array, ""]
    correct: Float[Array, ""]
    perturbation: dict[str, dict[str, Array]]


class TrainState(NamedTuple):
    """A tree of arrays, and all that a checkpoint holds.

    Attributes:
      step: Number of steps taken.
      variables: `"params"` and the model's other collections.
      opt_state: State of the optimizer.
      perturbation: State of the perturbations, with the class statistics.
      running: Sums over the present epoch so far.
      epoch: Sums over the last finished epoch.
      nonfinite_steps: Number of steps whose loss or update was not finite; they changed nothing
        else.
      ema: Average of the variables over the steps, weighted by age; None where none is kept.
      swad: What SWAD's average of the parameters is made from; None where none is kept.
    """

    step: Int[Array, ""]
    variables: PyTree
    opt_state: PyTree
    perturbation: StepState
    running: Totals
    epoch: Totals
    nonfinite_steps: Int[Array, ""]
    ema: PyTree | None = None
    swad: Swad | None = None

    def items(self) -> dict[str, Any]:
        """Return what is saved, each under a name of its own."""
        rest = self._replace(step=None, variables=None, ema=None, swad=None)
        saved = {"progress": {"step": self.step}, "variables": self.variables, "training": rest}
        averages = {"ema": self.ema, "swad": self.swad}
        return saved | {name: kept for name, kept in averages.items() if kept is not None}

    @classmethod
    def of_items(cls, items: Mapping[str, Any]) -> "TrainState":
        """Return the state of which `items` are, the inverse of that."""
        return items["training"]._replace(
            step=items["progress"]["step"],
            variables=items["variables"],
            ema=items.get("ema"),
            swad=items.get("swad"),
        )


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

    def weigh(numbers):
        members = numbers.get("count", 1.0)
        return {k: v * members if v.ndim and k != "count" else v for k, v in numbers.items()}

    weighed = {site: weigh(numbers) for site, numbers in metrics.items()}
    return Totals(
        totals.steps + 1,
        totals.examples + count,
        totals.loss + loss * count,
        totals.correct + jnp.sum(correct),
        jax.tree.map(jnp.add, totals.perturbation, weighed),
    )


class EpochMeans(NamedTuple):
    """The means of an epoch.

    Attributes:
      train: `"loss"` and `"accuracy"`.
      sites: Of each site, the mean over examples of each number that is reported of it.
      by_class: Of each site, each of these numbers by class, `[C]`, 0 for a class without examples.
    """

    train: dict[str, float]
    sites: dict[str, dict[str, float]]
    by_class: dict[str, dict[str, Any]]


def epoch_means(totals: Totals) -> EpochMeans:
    """Return the means of an epoch.

    Args:
      totals: Sums over an epoch that has at least one example.
    """
    totals = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), totals)
    train = {
        "loss": float(totals.loss / totals.examples),
        "accuracy": float(totals.correct / totals.examples),
    }
    sites, by_class = {}, {}
    for site, sums in totals.perturbation.items():
        count = sums.get("count", totals.steps)
        by_class[site], sites[site] = {}, {}
        for name, value in sums.items():
            if name == "count":
                continue
            weight = count if value.ndim else totals.steps
            by_class[site][name] = (value / np.maximum(weight, 1e-12)).tolist()
            sites[site][name] = float(value.sum() / weight.sum())
    return EpochMeans(train, sites, by_class)
