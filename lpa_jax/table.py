"""The command line that runs a table of methods: `python -m lpa_jax.table --table=digits_lt`."""

import pathlib
import shlex
import sys
from typing import Any

# First: it says what is not installed.
from lpa_jax import commands

# isort: split
from absl import flags

from lpa_jax.commands import PRINT_CONFIG, sentences, UsageError, WORKDIR

flags.adopt_module_key_flags(commands)
_TABLE = flags.DEFINE_string("table", None, "Name of the table, such as digits_lt.")
_METHODS = flags.DEFINE_list(
    "methods", None, "Rows to run, the first of them to compare with; default all."
)
_TRIALS = flags.DEFINE_integer(
    "trials",
    0,
    "Settings to try for each row, on a validation set, before its seeds; 0 for the defaults.",
    lower_bound=0,
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show the runs and how long they would take.")
SEEDS = 5
"""Of each row, where --config.num_seeds says nothing else."""
RESERVED = {"method": "use --methods", "seed": "the seeds of a table count from 0"}
FORMER = {"seeds": "num_seeds", "budget": "epochs", "set": "KEY"}
"""Flags of version 0.1, and the keys that stand for them."""
_changes: dict[str, Any] = {}


def _check() -> None:
    if _TABLE.value is None:
        raise UsageError("Say which table to run, for example --table=digits_lt.")
    if _METHODS.value == []:
        raise UsageError("--methods names no row: give one or several, or leave it out for all.")
    for key, told in RESERVED.items():
        if key in _changes:
            raise UsageError(f"--config.{key} cannot be set for a table: {told}.")
    seeds = _changes.get("num_seeds", SEEDS)
    if not isinstance(seeds, int) or seeds < 1:
        raise UsageError(f"--config.num_seeds must be a whole number from 1, not {seeds!r}.")


def _explain(_: list[str], error: Exception) -> str | None:
    name = getattr(error, "flagname", None)
    if name not in FORMER:
        return None
    return f"There is no --{name}: give --config.{FORMER[name]}=VALUE."


def _parse(argv: list[str]) -> list[str]:
    return commands.parse_with_changes(argv, _changes, _check, _explain)


def _main(_: list[str]) -> None:
    with sentences("stopped; rerun the command to resume."):
        # Imported late: --help and a wrong flag need not wait for all that a run needs.
        from rich.console import Console

        from lpa_jax.tables import catalogue, comparison, runs, save, tuning
        from lpa_jax.training import config as configuration

        console, name, trials = Console(), str(_TABLE.value), _TRIALS.value
        workdir = pathlib.Path(WORKDIR.value or f"runs/tables/{name.replace(':', '.')}")
        changes = dict(_changes)
        protocol = runs.Protocol(
            changes.pop("num_seeds", SEEDS), changes.pop("epochs", None), changes
        )
        table = catalogue.chosen(name, _METHODS.value)
        if PRINT_CONFIG.value:
            first = next(iter(table.rows.values()))
            print(configuration.describe(runs.configure(table, first, protocol)[0]))
            return
        if _DRY_RUN.value:
            runs.plan(table, protocol, workdir, console, trials=trials)
            return
        if trials:
            table = tuning.tuned(table, protocol, trials, workdir / "tuning", console)
        results = runs.run(table, protocol, runs.home(workdir, trials), console)
        command = f"python -m lpa_jax.table {shlex.join(sys.argv[1:])}"
        about = {"command": command, "trials": trials, **runs.about(results)}
        task = next(iter(results.values())).task
        save.save_table(workdir, name, comparison.compare(results), about, console, task)


if __name__ == "__main__":
    commands.run(_main, _parse)
