"""How the rows of a table compare: means, deviations, and paired tests over seeds."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lpa_jax.tables.runs import Outcome
from lpa_jax.training import report

Results = Sequence[Mapping[str, Any]]
ROUNDING = 1e-9
"""Differences that differ by less are equal: by one image of a billion."""


class Line(NamedTuple):
    """A row as it is printed; errors are of the test set, in percent.

    Attributes:
      name: Of the row.
      error: Mean over the seeds; None where there are no results, as for the other numbers.
      std: Sample standard deviation of the error; None for one seed.
      n: Number of seeds.
      errors: Error of each seed.
      nll: Mean negative log-likelihood.
      ece: Mean expected calibration error, in percent.
      groups: Mean error of each group of classes.
      validation: Mean error on the validation set at the last epoch, in percent.
      best_validation: Mean test error at the epoch that was best on the validation set.
      difference: Mean difference of the error from the first row, over the seeds both have.
      p: Of a paired t-test of that difference, corrected by Holm's method for the number of rows;
        None for fewer than two seeds, or where all of them differ by the same.
      published: Error by paper.
      command: What trains it.
      failure: Why there are no results.
    """

    name: str
    error: float | None
    std: float | None
    n: int
    errors: Mapping[int, float]
    nll: float | None
    ece: float | None
    groups: Mapping[str, float]
    validation: float | None
    best_validation: float | None
    difference: float | None
    p: float | None
    published: Mapping[str, float]
    command: str
    failure: str


def compare(outcomes: Mapping[str, Outcome]) -> list[Line]:
    """Compare each row with the first, seed by seed.

    Example:
      >>> from lpa_jax.tables.catalogue import Row
      >>> accuracies = {"erm": (0.8, 0.7, 0.6), "lpa": (0.9, 0.8, 0.71)}
      >>> lines = compare({
      ...     name: Outcome(Row(name), "", {
      ...         "seeds": [
      ...             {"seed": seed, "test_accuracy": accuracy}
      ...             for seed, accuracy in enumerate(row)
      ...         ],
      ...     })
      ...     for name, row in accuracies.items()
      ... })
      >>> round(lines[1].difference, 2), round(lines[1].p, 4)
      (-10.33, 0.001)
    """
    results: dict[str, Results] = {
        name: outcome.summary["seeds"] if outcome.summary else ()
        for name, outcome in outcomes.items()
    }
    first = next(iter(outcomes))
    baseline = _errors(results[first])
    lines: list[Line] = []
    ps: dict[str, float] = {}
    for name, outcome in outcomes.items():
        errors = _errors(results[name])
        shared = [seed for seed in errors if seed in baseline and name != first]
        differences = np.array([errors[seed] - baseline[seed] for seed in shared])
        if len(differences) > 1 and np.ptp(differences) > ROUNDING:
            _, p = stats.ttest_1samp(differences, 0.0)
            ps[name] = float(p)  # pyright: ignore[reportArgumentType]
        values = list(errors.values())
        found = results[name]
        ece = _mean(found, report.CALIBRATION)
        lines.append(
            Line(
                name=name,
                error=statistics.fmean(values) if values else None,
                std=statistics.stdev(values) if len(values) > 1 else None,
                n=len(values),
                errors=errors,
                nll=_mean(found, "test_nll"),
                ece=None if ece is None else 100 * ece,
                groups=_group_errors(found),
                validation=_mean_error(found, "validation_accuracy"),
                best_validation=_mean_error(found, report.BEST),
                difference=float(differences.mean()) if shared else None,
                p=None,
                published=outcome.row.published,
                command=outcome.command,
                failure=outcome.failure,
            )
        )
    corrected = holm(ps)
    return [line._replace(p=corrected.get(line.name)) for line in lines]


def _errors(results: Results) -> dict[int, float]:
    return {result["seed"]: 100 * (1 - result["test_accuracy"]) for result in results}


def _group_errors(results: Results) -> dict[str, float]:
    keys = dict.fromkeys(key for r in results for key in r if key.startswith(report.BY_GROUP))
    errors = {key.removeprefix(report.BY_GROUP): _mean_error(results, key) for key in keys}
    return {group: error for group, error in errors.items() if error is not None}


def _mean_error(results: Results, key: str) -> float | None:
    mean = _mean(results, key)
    return None if mean is None else 100 * (1 - mean)


def _mean(results: Results, key: str) -> float | None:
    values = [result[key] for result in results if key in result]
    return statistics.fmean(values) if values else None


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
