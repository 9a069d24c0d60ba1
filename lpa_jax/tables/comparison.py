"""How the rows of a table compare: means, deviations, and paired tests over seeds."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lpa_jax.tables.runs import RowResult
from lpa_jax.tasks import Metric
from lpa_jax.training.build import TEST

Results = Sequence[Mapping[str, Any]]
ROUNDING = 1e-9
"""Differences that differ by less are equal: by one image of a billion."""


class RowSummary(NamedTuple):
    """A row as it is printed, in the units of the table: of errors percent.

    Attributes:
      name: Of the row.
      value: Mean over the seeds of the metric that is compared, on the test set; None where there
        are no results, as for the other numbers.
      std: Sample standard deviation of it; None for one seed.
      n: Number of seeds.
      values: The metric of each seed.
      metrics: Means of the other metrics that the task shows, in their units.
      groups: Mean error of each group of classes, in percent.
      validation: Mean of the metric on the validation set at the last epoch.
      best: Mean of the metric at the epoch that the selection chose.
      average: Mean of the metric of the averaged weights.
      difference: Mean difference from the first row, over the seeds both have.
      p: Of a paired t-test of that difference, corrected by Holm's method for the number of rows;
        None for fewer than two seeds, or where all of them differ by the same.
      published: Published value by paper.
      command: What trains it.
      failure: Why there are no results.
    """

    name: str
    value: float | None
    std: float | None
    n: int
    values: Mapping[int, float]
    metrics: Mapping[str, float]
    groups: Mapping[str, float]
    validation: float | None
    best: float | None
    average: float | None
    difference: float | None
    p: float | None
    published: Mapping[str, float]
    command: str
    failure: str


def compare(rows: Mapping[str, RowResult]) -> list[RowSummary]:
    """Compare each row with the first, seed by seed, by the first metric that its task shows.

    Example:
      >>> from lpa_jax.tables.catalogue import Row
      >>> errors = {"erm": (0.2, 0.3, 0.4), "lpa": (0.1, 0.2, 0.29)}
      >>> rows = compare({
      ...     name: RowResult(Row(name), "", {
      ...         "seeds": [
      ...             {"seed": seed, "metrics": {"test": {"error": error}}}
      ...             for seed, error in enumerate(found)
      ...         ],
      ...     })
      ...     for name, found in errors.items()
      ... })
      >>> round(rows[1].difference, 2), round(rows[1].p, 4)
      (-10.33, 0.001)
    """
    results: dict[str, Results] = {
        name: row.summary["seeds"] if row.summary else () for name, row in rows.items()
    }
    first = next(iter(rows))
    task = rows[first].task
    compared, metric = next(iter(task.shown.items()))
    baseline = _by_seed(results[first], compared, metric)
    summaries: list[RowSummary] = []
    ps: dict[str, float] = {}
    for name, row in rows.items():
        found = results[name]
        values = _by_seed(found, compared, metric)
        shared = [seed for seed in values if seed in baseline and name != first]
        differences = np.array([values[seed] - baseline[seed] for seed in shared])
        if len(differences) > 1 and np.ptp(differences) > ROUNDING:
            _, p = stats.ttest_1samp(differences, 0.0)
            ps[name] = float(p)  # pyright: ignore[reportArgumentType]
        numbers = list(values.values())
        others = {
            other: _mean(found, shown, "metrics", TEST, other)
            for other, shown in task.shown.items()
            if other != compared
        }
        summaries.append(
            RowSummary(
                name=name,
                value=statistics.fmean(numbers) if numbers else None,
                std=statistics.stdev(numbers) if len(numbers) > 1 else None,
                n=len(numbers),
                values=values,
                metrics={other: mean for other, mean in others.items() if mean is not None},
                groups=_group_errors(found),
                validation=_mean(found, metric, "metrics", "validation", compared),
                best=_mean(found, metric, "best", "metrics", TEST, compared),
                average=_mean(found, metric, "average", TEST, compared),
                difference=float(differences.mean()) if shared else None,
                p=None,
                published=row.row.published,
                command=row.command,
                failure=row.failure,
            )
        )
    corrected = holm(ps)
    return [summary._replace(p=corrected.get(summary.name)) for summary in summaries]


def _by_seed(results: Results, name: str, metric: Metric) -> dict[int, float]:
    return {result["seed"]: metric.scale * result["metrics"][TEST][name] for result in results}


def _group_errors(results: Results) -> dict[str, float]:
    groups = dict.fromkeys(
        group for result in results for group in result["metrics"][TEST].get("groups", ())
    )
    percent = Metric("", 100.0)
    means = {group: _mean(results, percent, "metrics", TEST, "groups", group) for group in groups}
    return {group: 100.0 - mean for group, mean in means.items() if mean is not None}


def _mean(results: Results, metric: Metric, *path: str) -> float | None:
    """Return the mean over the seeds that have a number at a path, in the units of a metric."""
    values = []
    for result in results:
        value: Any = result
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            values.append(value)
    return metric.scale * statistics.fmean(values) if values else None


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number, by Holm's step-down method.

    Example:
      >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
      {'a': 0.03, 'c': 0.06, 'b': 0.06}

    References:
      Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
      Statistics 6 (1979).
    """
    corrected, highest = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[name]))
        corrected[name] = highest
    return corrected
