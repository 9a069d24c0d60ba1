"""A table of methods as people read it: printed, Markdown, LaTeX, JSON and a plot."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from lpa_jax.tables.comparison import Line
from lpa_jax.training import records, report

NOTE = (
    "Test error % of the last epoch, mean ± sample standard deviation over n seeds. The difference "
    "from the first row is paired by seed; p is that of a paired t-test, corrected for the number "
    "of rows by Holm's method. All seeds share one choice of held-out, kept and wrongly labeled "
    "examples: what another choice would change is not in the deviation. LPL, LPG and LPA have a "
    "fixed bound except in rows named varied."
)
PUBLISHED = (
    " Published errors are of WRN-28-10, or on long tails of ResNet-32, and of 200 epochs, unless "
    "they are labeled otherwise."
)
BEST = " “Best” is the test error at the epoch that was best on the validation set."

LEFT = ("method", "published")
SHOWN = (*LEFT, "error", "n", "difference", "p")


def leave(
    workdir: pathlib.Path,
    name: str,
    lines: Sequence[Line],
    about: Mapping[str, Any],
    console: Console,
) -> None:
    """Print a table, and leave it in `workdir` as `table.md`, `.tex`, `.json` and `.png`.

    Args:
      workdir: A directory.
      name: Of the table.
      lines: The rows.
      about: How they came about: `"command"`, `"trials"`, and what `runs.about` tells.
      console: Where to print.

    Raises:
      WriteError: If the directory takes no more.
    """
    header, cells = _cells(lines)
    # What fits a terminal; the files have the rest.
    kept = [i for i, column in enumerate(header) if column in SHOWN]
    shown = Table(title=f"{name}: test error %")
    for i in kept:
        shown.add_column(header[i], justify="left" if header[i] in LEFT else "right")
    for row in cells:
        shown.add_row(*(row[i] for i in kept))
    console.print(shown)
    with records.writing(f"The table in {workdir}"):
        (workdir / "table.md").write_text(
            _markdown(name, header, cells, lines, about), encoding="utf-8"
        )
        (workdir / "table.tex").write_text(_latex(header, cells), encoding="utf-8")
        told = {"table": name, **about, "lines": [line._asdict() for line in lines]}
        records.write_json(workdir / "table.json", told)
        _plot(workdir / "table.png", name, lines)
    report.say(console, f"The table is in {workdir}, as table.md, .tex, .json and .png.")


def _cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows, without columns that would be empty."""
    groups = list(dict.fromkeys(group for line in lines for group in line.groups))
    numbers = ("NLL", "ECE", "validation", "best", "difference", "p")
    header = ["method", "error", "n", *groups, *numbers, "published"]
    rows = [
        [
            line.name,
            _error(line),
            str(line.n),
            *(_number(line.groups.get(group)) for group in groups),
            _number(line.nll, ".3f"),
            _number(line.ece),
            _number(line.validation),
            _number(line.best_validation),
            _number(line.difference, "+.2f"),
            _number(line.p, ".3f"),
            ", ".join(f"{value:.2f} ({paper})" for paper, value in line.published.items()),
        ]
        for line in lines
    ]
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _error(line: Line) -> str:
    if line.error is None:
        return "diverged"
    return f"{line.error:.2f}" + ("" if line.std is None else f" ± {line.std:.2f}")


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _markdown(
    name: str,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    lines: Sequence[Line],
    about: Mapping[str, Any],
) -> str:
    rows = [header, ["---"] * len(header), *cells]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    trials = (
        f"{about['trials']} trials of settings a row" if about["trials"] else "default settings"
    )
    epochs, devices, versions = (
        " and ".join(map(str, about[key])) for key in ("epochs", "devices", "versions")
    )
    commits = " and ".join(commit or "unknown" for commit in about["commits"])
    epochs += " epoch" if epochs == "1" else " epochs"
    told = f"{epochs}, {trials}; {devices}; {versions}; commit {commits or 'unknown'}"
    failures = "".join(f"\n{line.name}: {line.failure}\n" for line in lines if line.failure)
    commands = "\n".join(f"- {line.name}: `{line.command}`" for line in lines)
    note = NOTE + (PUBLISHED if "published" in header else "") + (BEST if "best" in header else "")
    return (
        f"# {name}\n\n{note} {told}.\n\n    {about['command']}\n\n{table}\n{failures}"
        f"\nRow by row:\n\n{commands}\n"
    )


def _latex(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def row(words: Sequence[str]) -> str:
        words = [word.replace("±", r"$\pm$").replace("_", r"\_") for word in words]
        return " & ".join(words) + r" \\"

    return "\n".join(
        (
            "% " + NOTE.replace("±", "+-"),
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            row(header),
            r"\midrule",
            *map(row, cells),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        )
    )


def _plot(path: pathlib.Path, name: str, lines: Sequence[Line]) -> None:
    canvas, (axes,) = report.figure(1, name, columns=1)
    canvas.set_size_inches(7.0, 1.5 + 0.3 * len(lines))
    lines, key = lines[::-1], {}
    for height, line in enumerate(lines):
        if line.error is not None:
            several = "mean ± standard deviation of the seeds"
            key[several if line.n > 1 else "error of one seed"] = axes.errorbar(
                line.error, height, xerr=line.std, fmt="o", color="C0", capsize=3
            )
        for value in line.published.values():
            (key["published"],) = axes.plot(value, height, "x", color="tab:gray")
    first = lines[-1]
    if first.error is not None:
        key[f"mean of {first.name}"] = axes.axvline(
            first.error, color="tab:gray", linestyle=":", linewidth=1
        )
    names = [line.name + ("" if line.error is not None else " (diverged)") for line in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set(xlabel="test error %")
    report.explain(canvas, key)
    canvas.savefig(path, dpi=report.DPI)
