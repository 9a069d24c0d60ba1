"""Plots of runs, evaluations and tables, as figures of matplotlib."""

from collections.abc import Mapping, Sequence
import pathlib
import statistics
from typing import Any

import numpy as np

Results = Sequence[Mapping[str, Any]]
DPI = 120
PUSHED = {
    "pushed out (sign above 0.5)": "tab:red",
    "pulled in (sign below -0.5)": "tab:blue",
    "sign varies from step to step": "tab:gray",
    "without a sign": "tab:green",
}
"""Colors of the classes, by the mean of their signs in an epoch."""


def table(
    title: str,
    label: str,
    rows: Sequence[Any],
    spread: str = "mean ± standard deviation of the seeds",
) -> Any:
    """Return the metric of each row of a table with its deviation, and published values.

    Args:
      title: Of the figure.
      label: Of the metric.
      rows: `tables.comparison.RowSummary` of each row, the first of which is marked by a line.
      spread: What the bars are, where there are several numbers.
    """
    canvas, (axes,) = figure(1, title, columns=1)
    canvas.set_size_inches(7.0, 1.5 + 0.3 * len(rows))
    rows, key = rows[::-1], {}
    for height, row in enumerate(rows):
        if row.value is not None:
            key[spread if row.n > 1 else "one seed"] = axes.errorbar(
                row.value, height, xerr=row.std, fmt="o", color="C0", capsize=3
            )
        for value in row.published.values():
            (key["published"],) = axes.plot(value, height, "x", color="tab:gray")
    first = rows[-1]
    if first.value is not None:
        key[f"mean of {first.name}"] = axes.axvline(
            first.value, color="tab:gray", linestyle=":", linewidth=1
        )
    names = [row.name + ("" if row.value is not None else " (failed)") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlabel=label)
    explain(canvas, key)
    return canvas


def save(canvas: Any, path: pathlib.Path) -> None:
    """Save a figure as an image."""
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


def reliability(title: str, results: Results) -> Any:
    """Return the reliability diagram of clean images, seeds pooled, and the accuracy by class.

    Args:
      title: Of the figure.
      results: The `"seeds"` of `evaluate_run`.
    """
    canvas, (left, right) = figure(2, title)
    found = [result["details"]["reliability"] for result in results]
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
    ece = 100 * statistics.fmean(result["metrics"]["clean"]["ece"] for result in results)
    several = len(results) > 1
    pooled = f", mean of {len(results)} seeds; their bins pooled" if several else ""
    left.set(xlabel="confidence", ylabel="accuracy", title=f"ECE {ece:.2f} %{pooled}", xlim=(0, 1))
    left.legend(fontsize="small")
    # A class without examples is None, in every seed alike.
    by_class = np.array([result["metrics"]["clean"]["class_accuracy"] for result in results], float)
    spread = by_class.std(axis=0, ddof=1) if several else None
    right.bar(range(by_class.shape[1]), by_class.mean(axis=0), yerr=spread, capsize=2)
    told = f", mean ± sd of {len(results)} seeds" if several else ""
    right.set(xlabel="class", ylabel="accuracy", title=f"accuracy of each class{told}")
    # What a deviation reaches beyond 1 is shown as well.
    right.set_ylim(0, max(1.02, right.get_ylim()[1]))
    _whole_numbers(right)
    return canvas


def curves(title: str, rows_by_seed: Mapping[int, Results]) -> Any:
    """Return loss and accuracy over the epochs: a color a seed, a style a split.

    Args:
      title: Of the figure.
      rows_by_seed: The rows of `metrics.jsonl` of each seed.
    """
    canvas, (left, right) = figure(2, title)
    key = {}
    for number, (seed, rows) in enumerate(rows_by_seed.items()):
        color = f"C{number}"
        for axes, quantity in ((left, "loss"), (right, "accuracy")):
            for part, style in (("train", "o-"), ("validation", "x--")):
                name = "nll" if part == "validation" and quantity == "loss" else quantity
                found = [(r["epoch"], r["metrics"].get(part, {}).get(name)) for r in rows]
                points = [(epoch, value) for epoch, value in found if value is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=color, markersize=4)
                    (key[part],) = axes.plot([], [], style, color="black", markersize=4)
        (key[f"seed {seed}"],) = right.plot([], [], color=color)
    left.set(xlabel="epoch", ylabel="loss", title="loss (training: with perturbation)")
    right.set(xlabel="epoch", ylabel="accuracy", title="accuracy")
    _whole_numbers(left, right)
    explain(canvas, key)
    return canvas


def perturbation(
    title: str, sites: Mapping[str, Mapping[str, float | Sequence[float]]]
) -> Any | None:
    """Return for each site how far each class was moved in an epoch, colored by its sign.

    Args:
      title: Of the figure.
      sites: For each site what is reported of it. Those with `"relative"` have it, `"norm"` and
        maybe `"sign"` by class, and are shown. Without any the figure is None.
    """
    shown: dict[str, Any] = {k: report for k, report in sites.items() if "relative" in report}
    if not shown:
        return None
    out, in_, varying, unsigned = PUSHED
    canvas, axes = figure(2 * len(shown), title, columns=2)
    key = {}
    for (site, report), pair in zip(
        shown.items(), zip(axes[::2], axes[1::2], strict=True), strict=True
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
    return canvas
