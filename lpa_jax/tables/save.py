"""A table of methods as people read it: printed, Markdown, LaTeX, JSON and a plot."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from lpa_jax import plots
from lpa_jax.tables.comparison import RowSummary
from lpa_jax.tasks import classification, Task
from lpa_jax.training import files
from lpa_jax.training.build import TEST
from lpa_jax.training.display import columns_of, say, with_deviation

NOTE = (
    "of the last epoch, mean ± sample standard deviation over n seeds. The difference "
    "from the first row is paired by seed; p is that of a paired t-test, corrected for the number "
    "of rows by Holm's method. All seeds share one choice of held-out, kept and wrongly labeled "
    "examples: what another choice would change is not in the deviation. LPL, LPG and LPA have a "
    "fixed bound except in rows named varied."
)
PUBLISHED = (
    " Published errors are of WRN-28-10, or on long tails of ResNet-32, and of 200 epochs, unless "
    "they are labeled otherwise."
)
BEST = (
    " “Best” is the metric at the epoch that the selection chose, by default on the validation set."
)
LEFT = ("method", "published")


def save_table(
    workdir: pathlib.Path,
    name: str,
    rows: Sequence[RowSummary],
    about: Mapping[str, Any],
    console: Console,
    task: Task = classification,
) -> None:
    """Print a table, and save it in `workdir` as `table.md`, `.tex`, `.json` and `.png`.

    Args:
      workdir: A directory.
      name: Of the table.
      rows: The rows.
      about: How they came about: `"command"`, `"trials"`, and what `runs.about` tells.
      console: Where to print.
      task: Whose metrics they are.

    Raises:
      WriteError: If the directory takes no more.
    """
    compared, metric = next(iter(task.shown.items()))
    label = f"{TEST} {metric.label}"
    header, cells = _cells(rows, task)
    # What fits a terminal; the files have the rest.
    shown = (*LEFT, compared, "n", "difference", "p")
    kept = [i for i, column in enumerate(header) if column in shown]
    table = Table(title=f"{name}: {label}")
    for i in kept:
        table.add_column(header[i], justify="left" if header[i] in LEFT else "right")
    for row in cells:
        table.add_row(*(row[i] for i in kept))
    console.print(table)
    with files.writing(f"The table in {workdir}"):
        (workdir / "table.md").write_text(
            _page(name, label, header, cells, rows, about), encoding="utf-8"
        )
        (workdir / "table.tex").write_text(latex(_note(label), header, cells), encoding="utf-8")
        told = {"table": name, "metric": label, **about, "rows": [row._asdict() for row in rows]}
        files.write_json(workdir / "table.json", told)
        plots.save(plots.table(name, label, rows), workdir / "table.png")
    say(console, f"The table is in {workdir}, as table.md, .tex, .json and .png.")


def _cells(rows: Sequence[RowSummary], task: Task) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows, without columns that would be empty."""
    (compared, metric), *others = columns_of(task).items()
    groups = list(dict.fromkeys(group for row in rows for group in row.groups))
    numbers = ("validation", "best", "average", "difference", "p")
    labels = [shown.label.removesuffix(" %") for _, shown in others]
    header = ["method", compared, "n", *groups, *labels, *numbers, "published"]
    digits = f".{metric.digits}f"
    cells = [
        [
            row.name,
            "failed"
            if row.value is None
            else with_deviation(row.value, row.std, metric._replace(scale=1.0)),
            str(row.n),
            *(_number(row.groups.get(group)) for group in groups),
            *(_number(row.metrics.get(name), f".{o.digits}f") for name, o in others),
            *(_number(value, digits) for value in (row.validation, row.best, row.average)),
            _number(row.difference, f"+{digits}"),
            _number(row.p, ".3f"),
            ", ".join(f"{value:{digits}} ({paper})" for paper, value in row.published.items()),
        ]
        for row in rows
    ]
    kept = [i for i in range(len(header)) if any(row[i] for row in cells)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in cells]


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Example:
      >>> print(markdown(["row", "n"], [["erm", "3"]]))
      | row | n |
      | --- | --- |
      | erm | 3 |
    """
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(
    name: str,
    label: str,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: Sequence[RowSummary],
    about: Mapping[str, Any],
) -> str:
    table = markdown(header, cells)
    trials = (
        f"{about['trials']} trials of settings a row" if about["trials"] else "default settings"
    )
    epochs, devices, versions = (
        " and ".join(map(str, about[key])) for key in ("epochs", "devices", "versions")
    )
    commits = " and ".join(commit or "unknown" for commit in about["commits"])
    epochs += " epoch" if epochs == "1" else " epochs"
    told = f"{epochs}, {trials}; {devices}; {versions}; commit {commits or 'unknown'}"
    failures = "".join(f"\n{row.name}: {row.failure}\n" for row in rows if row.failure)
    commands = "\n".join(f"- {row.name}: `{row.command}`" for row in rows)
    note = _note(label)
    note += (PUBLISHED if "published" in header else "") + (BEST if "best" in header else "")
    return (
        f"# {name}\n\n{note} {told}.\n\n    {about['command']}\n\n{table}\n{failures}"
        f"\nRow by row:\n\n{commands}\n"
    )


def _note(label: str) -> str:
    return f"{label[0].upper()}{label[1:]} {NOTE}"


def latex(note: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table in LaTeX (booktabs), after a comment of one line."""

    def row(words: Sequence[str]) -> str:
        for sign, written in (("±", r"$\pm$"), ("_", r"\_"), ("%", r"\%")):
            words = [word.replace(sign, written) for word in words]
        return " & ".join(words) + r" \\"

    return "\n".join(
        (
            "% " + note.replace("±", "+-"),
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
