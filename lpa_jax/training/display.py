"""What a finished run or evaluation shows: tables for people, and the means over its seeds."""

from collections.abc import Mapping, Sequence
import pathlib
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from lpa_jax import plots
from lpa_jax.tasks import Metric, Task

Results = Sequence[Mapping[str, Any]]
MOST = 6
"""Splits that have columns of their own."""


def summarize(results: Results) -> dict[str, Any]:
    """Return the statistics over seeds of each metric, at the last and at the best epoch.

    Example:
      >>> results = [{"metrics": {"test": {"error": error}}} for error in (0.25, 0.5)]
      >>> summarize(results)["metrics"]["test"]["error"]["mean"]
      0.375
    """
    found = {"metrics": statistics_over([result["metrics"] for result in results])}
    if all("average" in result for result in results):
        found["average"] = statistics_over([result["average"] for result in results])
    if all("best" in result for result in results):
        found["best"] = statistics_over([result["best"]["metrics"] for result in results])
    return found


def statistics_over(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for one) and n of each number of nested metrics.

    Lists, such as the accuracy of each class, are left out.

    Example:
      >>> statistics_over([{"test": {"error": 0.5, "by_class": [0.5]}}])
      {'test': {'error': {'mean': 0.5, 'std': None, 'n': 1}}}
    """
    found: dict[str, Any] = {}
    for name, first in trees[0].items():
        values = [tree[name] for tree in trees if name in tree]
        if isinstance(first, Mapping):
            found[name] = statistics_over(values)
        elif not isinstance(first, list) and None not in values:
            found[name] = mean_and_deviation(values)
    return found


def mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for one value) and n."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def say(console: Console, text: str) -> None:
    """Print a line as it is, however wide: a path may have any signs, and is copied whole."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def columns_of(task: Task) -> dict[str, Metric]:
    """Return the metrics that tables have columns of: beside the error not the accuracy too.

    Example:
      >>> from lpa_jax.tasks import classification
      >>> list(columns_of(classification))
      ['error', 'nll', 'ece']
    """
    redundant = {"accuracy"} if "error" in task.shown else set()
    return {name: metric for name, metric in task.shown.items() if name not in redundant}


def show_run(title: str, results: Results, task: Task, console: Console) -> None:
    """Print a row a seed, and mean and standard deviation beneath."""
    summary = summarize(results)
    if len(results[0]["metrics"]) > MOST:
        _show_splits(title, summary, results, task, console)
        return
    table = Table(title=title, show_footer=len(results) > 1)
    table.add_column("seed", footer="mean ± std")
    columns = [
        (split, name, task.shown[name])
        for split in sorted(results[0]["metrics"], key=lambda split: (split != "test", split))
        for name in ((task.selection, "nll") if split == "test" else (task.selection,))
        if name in task.shown and name in results[0]["metrics"][split]
    ]
    for split, name, metric in columns:
        entry = summary["metrics"][split][name]
        label = f"{split} {metric.label}"
        table.add_column(label, justify="right", footer=in_words(entry, metric))
    for result in results:
        cells = (
            f"{metric.scale * result['metrics'][split][name]:.{metric.digits}f}"
            for split, name, metric in columns
        )
        table.add_row(str(result["seed"]), *cells)
    console.print(table)
    first, metric = task.selection, task.shown[task.selection]
    for told, condition in (
        ("At the epoch that the selection chose", "best"),
        ("Of the average of the weights", "average"),
    ):
        for split in summary.get(condition, {}):
            if split not in ("train", "validation") and first in summary[condition][split]:
                entry = in_words(summary[condition][split][first], metric)
                say(console, f"{told}: {split} {metric.label} {entry}.")
    for split in summary["metrics"]:
        groups = summary["metrics"][split].get("groups")
        if split == "test" and groups:
            _show_groups(f"{split} accuracy % by group of classes", {"": groups}, console)


def _show_splits(
    title: str, summary: Mapping[str, Any], results: Results, task: Task, console: Console
) -> None:
    """Print a row a split, of which there are many where domains are held out."""
    metric = task.shown[task.selection]
    kept = {"last epoch": "metrics", "best epoch": "best", "average of the weights": "average"}
    kept = {told: name for told, name in kept.items() if name in summary}
    over = f", mean ± std of {len(results)} seeds" if len(results) > 1 else ""
    table = Table("split", title=f"{title}: {metric.label}{over}")
    for told in kept:
        table.add_column(told, justify="right")
    for split in summary["metrics"]:
        entries = (summary[name].get(split, {}).get(task.selection) for name in kept.values())
        cells = ["" if entry is None else in_words(entry, metric) for entry in entries]
        if any(cells):
            table.add_row(split, *cells)
    console.print(table)


def in_words(entry: Mapping[str, Any], metric: Metric) -> str:
    """Return mean ± standard deviation as they are shown."""
    return with_deviation(entry["mean"], entry["std"], metric)


def with_deviation(mean: float, std: float | None, metric: Metric) -> str:
    """Return a number as it is shown, with its standard deviation if there is one.

    Example:
      >>> with_deviation(0.1234, 0.01, Metric("error %", 100.0))
      '12.34 ± 1.00'
    """
    deviation = "" if std is None else f" ± {metric.scale * std:.{metric.digits}f}"
    return f"{metric.scale * mean:.{metric.digits}f}{deviation}"


def _show_groups(title: str, groups: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print the accuracy of groups of classes, a column a condition."""
    table, percent = Table("group", title=title), Metric("", 100.0)
    for condition in groups:
        table.add_column(condition or "accuracy %", justify="right")
    for name in next(iter(groups.values())):
        table.add_row(name, *(in_words(groups[condition][name], percent) for condition in groups))
    console.print(table)


def show_evaluation(
    title: str, metrics: Mapping[str, Mapping[str, Any]], task: Task, console: Console
) -> None:
    """Print the metrics of the task in each condition, and the accuracy of groups."""
    first = next(iter(task.shown))
    n = metrics["clean"][first]["n"]
    table = Table("condition", title=f"{title}, {f'mean ± sd of {n} seeds' if n > 1 else '1 seed'}")
    columns = {name: one for name, one in columns_of(task).items() if name in metrics["clean"]}
    for metric in columns.values():
        table.add_column(metric.label, justify="right")
    for condition, entries in metrics.items():
        cells = (in_words(entries[name], metric) for name, metric in columns.items())
        table.add_row(condition, *cells)
    console.print(table)
    # Of attacks and corruptions the file has them.
    shown = [name for name in ("clean", "logit_adjusted") if name in metrics]
    if metrics["clean"].get("groups"):
        groups = {condition: metrics[condition]["groups"] for condition in shown}
        _show_groups("accuracy % by group of classes", groups, console)


def plot_run(
    workdir: pathlib.Path,
    title: str,
    rows_by_seed: Mapping[int, Results],
    first: Mapping[str, Any],
) -> None:
    """Save the curves of all seeds, and what was perturbed in the first."""
    plots.save(plots.curves(title, rows_by_seed), workdir / "curves.png")
    moved = plots.perturbation(f"{title}, seed {first['seed']}", first["perturbation"])
    if moved is not None:
        plots.save(moved, workdir / "perturbation.png")
