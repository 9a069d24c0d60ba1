"""What a finished run shows: a table, training curves, and the perturbation of each class."""

from collections.abc import Mapping, Sequence
import pathlib
import statistics
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Results = Sequence[Mapping[str, Any]]
SHOWN = {
    "test_accuracy": ("test accuracy %", 100.0),
    "test_nll": ("test NLL", 1.0),
    "validation_accuracy": ("validation accuracy %", 100.0),
    "train_accuracy": ("train accuracy %", 100.0),
}
CALIBRATION = "test_ece"
BEST = "best_validation_test_accuracy"
BY_GROUP = "test_accuracy_"
DPI = 120
PUSHED = {
    "pushed out (sign above 0.5)": "tab:red",
    "pulled in (sign below -0.5)": "tab:blue",
    "sign varies from step to step": "tab:gray",
    "without a sign": "tab:green",
}
"""Colors of the classes, by the mean of their signs in an epoch."""


def summarize(results: Results) -> dict[str, dict[str, Any]]:
    """Return mean, sample standard deviation (None for one seed) and n of each metric.

    Example:
      >>> summarize([{"test_accuracy": 0.5}, {"test_accuracy": 0.75}])["test_accuracy"]["mean"]
      0.625
    """
    summary = {}
    grouped = (name for name in results[0] if name.startswith(BY_GROUP))
    for name in (*SHOWN, BEST, CALIBRATION, *grouped):
        values = [result[name] for result in results if name in result]
        if values:
            summary[name] = _spread(values)
    return summary


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def say(console: Console, text: str) -> None:
    """Print a line as it is, however wide: a path may have any signs, and is copied whole."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_table(title: str, results: Results, console: Console) -> None:
    """Print a row a seed, and mean and standard deviation beneath."""
    summary = summarize(results)
    table = Table(title=title, show_footer=len(results) > 1)
    table.add_column("seed", footer="mean ± std")
    shown = [name for name in SHOWN if name in summary]
    for name in shown:
        label, scale = SHOWN[name]
        table.add_column(label, justify="right", footer=_with_spread(summary[name], scale))
    for result in results:
        cells = [f"{SHOWN[n][1] * result[n]:.2f}" if n in result else "" for n in shown]
        table.add_row(str(result["seed"]), *cells)
    console.print(table)
    if BEST in summary:
        told = _with_spread(summary[BEST], 100.0)
        console.print(f"At the epoch best on the validation set: test accuracy {told} %.")
    grouped = [name for name in summary if name.startswith(BY_GROUP)]
    if grouped:
        table = Table(title="test accuracy % by group of classes")
        table.add_column("seed")
        for name in grouped:
            table.add_column(name.removeprefix(BY_GROUP), justify="right")
        for result in results:
            table.add_row(str(result["seed"]), *(f"{100 * result[name]:.2f}" for name in grouped))
        console.print(table)


def _with_spread(entry: Mapping[str, Any], scale: float, digits: int = 2) -> str:
    spread = "" if entry["std"] is None else f" ± {scale * entry['std']:.{digits}f}"
    return f"{scale * entry['mean']:.{digits}f}{spread}"


def summarize_conditions(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Return for each condition mean, deviation and n over seeds of each of its scalars.

    Example:
      >>> results = [{"seed": 0, "clean": {"error": 0.1, "class_accuracy": [0.9]}}]
      >>> summarize_conditions(results)["clean"]
      {'error': {'mean': 0.1, 'std': None, 'n': 1}}
    """
    conditions = {
        name: [key for key, value in judged.items() if not isinstance(value, list)]
        for name, judged in results[0].items()
        if isinstance(judged, dict) and "error" in judged
    }
    return {
        name: {key: _spread([result[name][key] for result in results]) for key in keys}
        for name, keys in conditions.items()
    }


def show_evaluation(
    title: str, metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], console: Console
) -> None:
    """Print error, likelihood and calibration in each condition, and the accuracy of groups."""
    n = metrics["clean"]["error"]["n"]
    table = Table("condition", title=f"{title}, {f'mean ± sd of {n} seeds' if n > 1 else '1 seed'}")
    columns = {"error": ("top-1 error %", 100, 2), "nll": ("NLL", 1, 3), "ece": ("ECE %", 100, 2)}
    for label, _, _ in columns.values():
        table.add_column(label, justify="right")
    for condition, entries in metrics.items():
        cells = (_with_spread(entries[key], *rest) for key, (_, *rest) in columns.items())
        table.add_row(condition, *cells)
    console.print(table)
    # Of attacks and corruptions the file has them.
    shown = [name for name in ("clean", "logit_adjusted") if name in metrics]
    groups = [name for name in metrics["clean"] if name.startswith("accuracy_")]
    if groups:
        table = Table("group", title="accuracy % by group of classes")
        for condition in shown:
            table.add_column(condition, justify="right")
        for name in groups:
            cells = (_with_spread(metrics[condition][name], 100) for condition in shown)
            table.add_row(name.removeprefix("accuracy_"), *cells)
        console.print(table)


def plot_evaluation(path: pathlib.Path, title: str, results: Results) -> None:
    """Draw the reliability diagram of clean images, seeds pooled, and the accuracy by class."""
    canvas, (left, right) = figure(2, title)
    found = [result["reliability"] for result in results]
    counts = np.array([bins["examples"] for bins in found])
    filled = counts.sum(axis=0) > 0
    weights = counts[:, filled]
    accuracy, confidence = (
        np.average(np.array([bins[name] for bins in found])[:, filled], axis=0, weights=weights)
        for name in ("accuracy", "confidence")
    )
    centers = (np.arange(counts.shape[1])[filled] + 0.5) / counts.shape[1]
    left.bar(centers, accuracy, width=1 / counts.shape[1], edgecolor="white", label="accuracy")
    left.plot(confidence, accuracy, "o", color="black", markersize=3, label="at mean confidence")
    left.plot([0, 1], [0, 1], "--", color="tab:gray", label="perfect calibration")
    ece = 100 * statistics.fmean(result["clean"]["ece"] for result in results)
    several = len(results) > 1
    pooled = f", mean of {len(results)} seeds; their bins pooled" if several else ""
    left.set(xlabel="confidence", ylabel="accuracy", title=f"ECE {ece:.2f} %{pooled}", xlim=(0, 1))
    left.legend(fontsize="small")
    # A class without examples is None, in every seed alike.
    by_class = np.array([result["clean"]["class_accuracy"] for result in results], float)
    spread = by_class.std(axis=0, ddof=1) if several else None
    right.bar(range(by_class.shape[1]), by_class.mean(axis=0), yerr=spread, capsize=2)
    told = f", mean ± sd of {len(results)} seeds" if several else ""
    right.set(xlabel="class", ylabel="accuracy", title=f"accuracy of each class{told}")
    # What a deviation reaches beyond 1 is shown as well.
    right.set_ylim(0, max(1.02, right.get_ylim()[1]))
    _whole_numbers(right)
    canvas.savefig(path, dpi=DPI)


def plot_curves(path: pathlib.Path, title: str, rows_by_seed: Mapping[int, Results]) -> None:
    """Draw loss and accuracy over the epochs: a color a seed, a style a part of the data."""
    canvas, (left, right) = figure(2, title)
    key = {}
    for number, (seed, rows) in enumerate(rows_by_seed.items()):
        color = f"C{number}"
        for axes, quantity in ((left, "loss"), (right, "accuracy")):
            for part, style in (("train", "o-"), ("validation", "x--")):
                name = "nll" if part == "validation" and quantity == "loss" else quantity
                points = [(r["epoch"], r[f"{part}_{name}"]) for r in rows if f"{part}_{name}" in r]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=color, markersize=4)
                    (key[part],) = axes.plot([], [], style, color="black", markersize=4)
        (key[f"seed {seed}"],) = right.plot([], [], color=color)
    left.set(xlabel="epoch", ylabel="loss", title="loss (training: with perturbation)")
    right.set(xlabel="epoch", ylabel="accuracy", title="accuracy")
    _whole_numbers(left, right)
    explain(canvas, key)
    canvas.savefig(path, dpi=DPI)


def plot_perturbation(
    path: pathlib.Path, title: str, sites: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """Draw for each site how far each class was moved in the last epoch, colored by its sign."""
    sites = {site: report for site, report in sites.items() if "relative" in report}
    if not sites:
        return
    out, in_, varying, unsigned = PUSHED
    canvas, axes = figure(2 * len(sites), title, columns=2)
    key = {}
    for (site, report), pair in zip(
        sites.items(), zip(axes[::2], axes[1::2], strict=True), strict=True
    ):
        signs = np.array(report.get("sign", [np.nan] * len(report["norm"])))
        groups = {
            out: signs > 0.5, in_: signs < -0.5, varying: abs(signs) <= 0.5,
            unsigned: np.isnan(signs),
        }  # fmt: skip
        for quantity, label, one in zip(
            ("norm", "relative"),
            ("perturbation norm", "norm / norm of the value"),
            pair,
            strict=True,
        ):
            heights = np.array(report[quantity])
            # A class that is left alone has no bar to explain.
            for name, group in groups.items():
                classes = np.flatnonzero(group & (heights > 0))
                if len(classes):
                    key[name] = one.bar(classes, heights[classes], color=PUSHED[name])
            one.set(xlabel="class", ylabel=label, title=site, xlim=(-0.6, len(signs) - 0.4))
            _whole_numbers(one)
    explain(canvas, {name: key[name] for name in PUSHED if name in key})
    canvas.savefig(path, dpi=DPI)


def figure(count: int, title: str, columns: int = 2) -> tuple[Any, Any]:
    """Return a figure of matplotlib and its axes, `count` of them or what fills the last row."""
    # Without pyplot there is no window system to ask for and no global state to clean up.
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    made = Figure(figsize=(5.0 * columns, 3.4 * rows), layout="constrained")
    made.suptitle(title)
    return made, made.subplots(rows, columns, squeeze=False).flatten()


def explain(canvas: Any, key: Mapping[str, Any]) -> None:
    """Put a legend beneath the axes of a figure: what is drawn, by name."""
    columns = min(len(key), 6 if canvas.get_figwidth() > 8 else 3)
    canvas.legend(
        key.values(), key.keys(), loc="outside lower center", ncols=columns, fontsize="small"
    )


def _whole_numbers(*axes: Any) -> None:
    """Mark the axis of epochs or classes at whole numbers alone."""
    for one in axes:
        one.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
