"""What a finished run shows: a table, training curves, and the perturbation of each class."""

from collections.abc import Mapping, Sequence
import pathlib
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

Results = Sequence[Mapping[str, Any]]
SHOWN = {
    "test_accuracy": ("test accuracy %", 100.0),
    "test_nll": ("test NLL", 1.0),
    "validation_accuracy": ("validation accuracy %", 100.0),
    "train_accuracy": ("train accuracy %", 100.0),
}
BY_GROUP = "test_accuracy_"


def summarise(results: Results) -> dict[str, dict[str, Any]]:
    """Return mean, sample standard deviation (None for one seed) and n of each metric.

    Example:
      >>> summarise([{"test_accuracy": 0.5}, {"test_accuracy": 0.75}])["test_accuracy"]["mean"]
      0.625
    """
    summary = {}
    for name in (*SHOWN, *(name for name in results[0] if name.startswith(BY_GROUP))):
        values = [result[name] for result in results if name in result]
        if values:
            summary[name] = {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "n": len(values),
            }
    return summary


def show_table(title: str, results: Results, console: Console) -> None:
    """Print a row a seed, and mean and standard deviation beneath."""
    summary = summarise(results)
    table = Table(title=title, show_footer=len(results) > 1)
    table.add_column("seed", footer="mean ± std")
    shown = [name for name in SHOWN if name in summary]
    for name in shown:
        entry, (label, scale) = summary[name], SHOWN[name]
        spread = "" if entry["std"] is None else f" ± {scale * entry['std']:.2f}"
        table.add_column(label, justify="right", footer=f"{scale * entry['mean']:.2f}{spread}")
    for result in results:
        cells = [f"{SHOWN[name][1] * result[name]:.2f}" for name in shown]
        table.add_row(str(result["seed"]), *cells)
    console.print(table)
    grouped = [name for name in summary if name.startswith(BY_GROUP)]
    if grouped:
        table = Table(title="test accuracy % by group of classes")
        table.add_column("seed")
        for name in grouped:
            table.add_column(name.removeprefix(BY_GROUP), justify="right")
        for result in results:
            table.add_row(str(result["seed"]), *(f"{100 * result[name]:.2f}" for name in grouped))
        console.print(table)


def plot_curves(path: pathlib.Path, title: str, rows_by_seed: Mapping[int, Results]) -> None:
    """Draw loss and accuracy over the epochs, a line a seed."""
    figure, (left, right) = _figure(2, title)
    for seed, rows in rows_by_seed.items():
        for axes, quantity in ((left, "loss"), (right, "accuracy")):
            for part, style in (("train", "-"), ("validation", "--")):
                name = "nll" if part == "validation" and quantity == "loss" else quantity
                points = [(r["epoch"], r[f"{part}_{name}"]) for r in rows if f"{part}_{name}" in r]
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=f"{part}, seed {seed}")
    left.set(xlabel="epoch", ylabel="loss (training: of the perturbed objective)")
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend(fontsize="small")
    _save(figure, path)


def plot_perturbation(
    path: pathlib.Path, title: str, sites: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """Draw for each site how far each class was moved in the last epoch, coloured by its sign."""
    sites = {site: report for site, report in sites.items() if "relative" in report}
    if not sites:
        return
    colours = {1: "tab:red", 0: "tab:gray", -1: "tab:blue"}
    figure, axes = _figure(2 * len(sites), title, columns=2)
    for (site, report), (norms, changes) in zip(
        sites.items(), zip(axes[::2], axes[1::2], strict=True), strict=True
    ):
        classes = range(len(report["norm"]))
        signs = [round(sign) for sign in report.get("sign", [0] * len(classes))]
        bars = {"color": [colours[sign] for sign in signs]}
        norms.bar(classes, report["norm"], **bars)
        norms.set(xlabel="class", ylabel="perturbation norm", title=f"{site} (sign + red, - blue)")
        changes.bar(classes, report["relative"], **bars)
        changes.set(xlabel="class", ylabel="norm / norm of the value", title=site)
    _save(figure, path)


def _figure(count: int, title: str, columns: int = 2) -> tuple[Any, Any]:
    # Without pyplot there is no window system to ask for and no global state to clean up.
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(5.0 * columns, 3.4 * rows), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _save(figure: Any, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=120)
