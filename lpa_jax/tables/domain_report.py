"""A table of domain generalization as people read it: printed, Markdown, LaTeX, JSON and a plot."""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from lpa_jax import plots
from lpa_jax.data import domainbed
from lpa_jax.tables import domains, selection
from lpa_jax.tables.comparison import holm, ROUNDING
from lpa_jax.tables.domain_catalogue import PUBLISHED
from lpa_jax.tables.save import latex, markdown
from lpa_jax.training import files
from lpa_jax.training.display import say

NOTE = (
    "Accuracy in percent on the in split of the domain that was not learned from, mean ± standard "
    "error over trials, of the checkpoint and the draw that the {rule} chose. The difference from "
    "the first row is paired by trial and test domain, with the standard error of its mean; p is "
    "that of a paired t-test, corrected for the number of rows by Holm's method."
)
PRINTED = "training_domains"
"""The rule whose table is printed."""


class DomainRow(NamedTuple):
    """A row, in percent.

    Attributes:
      name: Of the algorithm.
      cells: Of each test domain, see `selection.rows`.
      value: Mean of the cells; None if one of them cannot be filled.
      std: Standard error over trials of the mean over test domains.
      n: Number of trials.
      difference: Mean difference from the first row, over trials and test domains that both have.
      error: Standard error of that mean.
      p: Of a paired t-test of it, corrected by Holm's method.
      published: Averages by protocol.
    """

    name: str
    cells: tuple[selection.Cell, ...]
    value: float | None
    std: float | None
    n: int
    difference: float | None
    error: float | None
    p: float | None
    published: Mapping[str, float]


def compare(found: Sequence[selection.SelectionRow]) -> list[DomainRow]:
    """Compare each row with the first, over trials and test domains.

    Example:
      >>> values = {"ERM": (0.8, 0.7, 0.8, 0.72), "LPA": (0.82, 0.7, 0.83, 0.74)}
      >>> choices = [
      ...     selection.Choice("PACS", name, test, trial, 0, 300, 0.9, accuracy, 1, "")
      ...     for name, accuracies in values.items()
      ...     for (test, trial), accuracy in zip(((0, 0), (0, 1), (1, 0), (1, 1)), accuracies)
      ... ]
      >>> row = compare(selection.rows(choices))[1]
      >>> f"{row.value:.2f} {row.difference:+.2f} {row.error:.2f} {row.p:.2f}"
      '77.25 +1.75 0.63 0.07'
    """
    baseline = _by_pair(found[0])
    rows, ps = [], {}
    for one in found:
        values = _by_pair(one)
        shared = [pair for pair in values if pair in baseline and one is not found[0]]
        differences = np.array([100 * (values[pair] - baseline[pair]) for pair in shared])
        error = None
        if len(shared) > 1:
            error = float(differences.std(ddof=1) / np.sqrt(len(shared)))
            if np.ptp(differences) > ROUNDING:
                _, p = stats.ttest_1samp(differences, 0.0)
                ps[one.algorithm] = float(p)  # pyright: ignore[reportArgumentType]
        rows.append(
            DomainRow(
                one.algorithm,
                one.cells,
                one.average.mean,
                one.trials.error,
                one.trials.n,
                float(differences.mean()) if shared else None,
                error,
                None,
                PUBLISHED.get(one.dataset, {}).get(one.algorithm, {}),
            )
        )
    corrected = holm(ps)
    return [row._replace(p=corrected.get(row.name)) for row in rows]


def _by_pair(row: selection.SelectionRow) -> dict[tuple[int, int], float]:
    return {
        (choice.test_domain, choice.trial): choice.accuracy
        for choice in row.choices
        if choice.accuracy is not None
    }


def report(
    of: domains.Sweep,
    records: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    failed: Mapping[str, str],
    workdir: pathlib.Path,
    console: Console,
) -> None:
    """Print a table, and save it in `workdir` as `table.md`, `.tex`, `.json` and `.png`.

    The records are saved as `records.jsonl`, a line of JSON each, as DomainBed writes them.

    Args:
      of: The sweep.
      records: From `domains.collect`, at least one.
      about: How they came about: `"command"`, and what `runs.about` tells.
      failed: Why runs failed, by their names.
      workdir: A directory.
      console: Where to print.

    Raises:
      WriteError: If the directory takes no more.
    """
    found = selection.checkpoints(records)
    if of.pairs:
        rules = [*selection.RULES]
    else:
        # It needs the pairs.
        rules = [rule for rule in selection.RULES if rule != "cross_validation"]
    tables = {rule: selection.rows(selection.choose(found, rule)) for rule in rules}
    compared = {rule: compare(rows) for rule, rows in tables.items()}
    letters = domainbed.letters(of.domains)
    header, cells = _cells(compared[PRINTED], letters)
    shown = Table(title=f"{of.name}: accuracy %, {selection.RULES[PRINTED].label}")
    kept = [i for i, column in enumerate(header) if column != "published"]
    for i in kept:
        shown.add_column(header[i], justify="left" if i == 0 else "right")
    for row in cells:
        shown.add_row(*(row[i] for i in kept))
    console.print(shown)
    with files.writing(f"The table in {workdir}"):
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (workdir / domains.RECORDS).write_text(lines, encoding="utf-8")
        page = _page(of, tables, compared, letters, about, failed)
        (workdir / "table.md").write_text(page, encoding="utf-8")
        note = NOTE.format(rule=selection.RULES[PRINTED].label)
        (workdir / "table.tex").write_text(latex(note, header, cells), encoding="utf-8")
        told = {
            "table": of.name,
            "domains": of.domains,
            "preset": of.about,
            "trials": of.trials,
            "draws": of.draws,
            **about,
            "failed": failed,
            "rules": {
                rule: {
                    "rows": [_plain(row) for row in compared[rule]],
                    "choices": [choice._asdict() for row in rows for choice in row.choices],
                }
                for rule, rows in tables.items()
            },
        }
        files.write_json(workdir / "table.json", told)
        canvas = plots.table(
            of.name,
            f"accuracy %, {selection.RULES[PRINTED].label}",
            compared[PRINTED],
            "mean ± standard error of the trials",
        )
        plots.save(canvas, workdir / "table.png")
    say(console, f"The table is in {workdir}, as table.md, .tex, .json and .png.")


def _plain(row: DomainRow) -> dict[str, Any]:
    return {**row._asdict(), "cells": [cell._asdict() for cell in row.cells]}


def _cells(rows: Sequence[DomainRow], letters: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows, without columns that would be empty."""
    header = ["algorithm", *letters, "average", "trials", "difference", "p", "published"]
    cells = [
        [
            row.name,
            # The error of one trial, 0, would tell nothing.
            *(
                str(cell if cell.n > 1 else cell._replace(error=None)).replace("+/-", "±")
                for cell in row.cells
            ),
            "X" if row.value is None else f"{row.value:.1f}",
            str(row.n),
            "" if row.difference is None else _signed(row.difference, row.error),
            "" if row.p is None else f"{row.p:.3f}",
            ", ".join(f"{value:.1f} ({protocol})" for protocol, value in row.published.items()),
        ]
        for row in rows
    ]
    kept = [i for i in range(len(header)) if any(row[i] for row in cells)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in cells]


def _signed(number: float, error: float | None) -> str:
    return f"{number:+.1f}" + ("" if error is None else f" ± {error:.1f}")


def _page(
    of: domains.Sweep,
    tables: Mapping[str, Sequence[selection.SelectionRow]],
    compared: Mapping[str, Sequence[DomainRow]],
    letters: Sequence[str],
    about: Mapping[str, Any],
    failed: Mapping[str, str],
) -> str:
    devices, versions, commits = (
        " and ".join(str(one or "unknown") for one in about[key])
        for key in ("devices", "versions", "commits")
    )
    steps = " and ".join(map(str, about["steps"]))
    several = ("trial" + "s" * (of.trials > 1), "draw" + "s" * (of.draws > 1))
    parts = [
        f"# {of.name}",
        f"{of.about[0].upper()}{of.about[1:]}. {steps} steps, {of.trials} "
        f"{several[0]}, {of.draws} {several[1]} of hyper-parameters (the first: DomainBed's "
        f"defaults); {devices}; {versions}; commit {commits or 'unknown'}.",
        f"    {about['command']}",
    ]
    for rule, rows in tables.items():
        label = selection.RULES[rule].label
        parts += [
            f"## {label[0].upper()}{label[1:]}",
            NOTE.format(rule=label),
            markdown(*_cells(compared[rule], letters)),
        ]
        missing = {
            f"- {row.algorithm}: {cell.missing}"
            for row in rows
            for cell in row.cells
            if cell.missing
        }
        parts += ["\n".join(sorted(missing))] if missing else []
    chosen = [
        [
            choice.algorithm, letters[choice.test_domain], str(choice.trial), str(choice.draw),
            str(choice.step), _percent(choice.validation), _percent(choice.accuracy),
        ]
        for row in tables[PRINTED]
        for choice in row.choices
        if choice.draw is not None
    ]  # fmt: skip
    header = ["algorithm", "test domain", "trial", "draw", "step", "validation", "test"]
    parts += ["## What was chosen", markdown(header, chosen)]
    if failed:
        reasons = "\n".join(f"- {name}: {why}" for name, why in failed.items())
        parts += ["## Runs that failed", reasons]
    return "\n\n".join(parts) + "\n"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
