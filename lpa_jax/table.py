"""The command line that runs a table of methods: `python -m lpa_jax.table --table=digits_lt`."""

import ast
import pathlib
import shlex
import sys

from absl import flags

from lpa_jax import commands
from lpa_jax.commands import sentences, UsageError, WORKDIR

flags.adopt_module_key_flags(commands)
_TABLE = flags.DEFINE_string("table", None, "Name of the table, such as digits_lt.")
_METHODS = flags.DEFINE_list(
    "methods", None, "Rows to run, the first of them to compare with; default all."
)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds of each row.", lower_bound=1)
_BUDGET = flags.DEFINE_integer(
    "budget", None, "Epochs of each run, instead of the configuration's own.", lower_bound=1
)
_TRIALS = flags.DEFINE_integer(
    "trials",
    0,
    "Settings to try for each row, on a validation set, before its seeds; 0 for the defaults.",
    lower_bound=0,
)
_CONFIGS = flags.DEFINE_string("configs", "configs", "Directory of the configuration files.")
_SET = flags.DEFINE_multi_string(
    "set", [], "KEY=VALUE: a key of the configuration for all rows, such as batch_size=64."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show the runs and how long they would take.")

RESERVED = {
    "epochs": "use --budget",
    "method": "use --methods",
    "num_seeds": "use --seeds",
    "seed": "the seeds of a table count from 0",
}


def _check() -> None:
    if _TABLE.value is None:
        raise UsageError("Say which table to run, for example --table=digits_lt.")
    if _METHODS.value == []:
        raise UsageError("--methods names no row: give one or several, or leave it out for all.")
    _changes()


def _changes() -> dict[str, object]:
    changes = {}
    for word in _SET.value:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise UsageError(f"--set takes KEY=VALUE, not {word!r}.")
        if key in RESERVED:
            raise UsageError(f"--set does not take {key}: {RESERVED[key]}.")
        try:
            changes[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[key] = text
    return changes


def _main(_: list[str]) -> None:
    with sentences("stopped; the same command goes on from there."):
        # Imported late: --help and a wrong flag need not wait for all that a run needs.
        from rich.console import Console

        from lpa_jax.tables import catalogue, comparison, report, runs, tuning

        console, name, trials = Console(), str(_TABLE.value), _TRIALS.value
        workdir = pathlib.Path(WORKDIR.value or f"runs/tables/{name}")
        configs = pathlib.Path(_CONFIGS.value)
        protocol = runs.Protocol(configs, _SEEDS.value, _BUDGET.value, _changes())
        table = catalogue.chosen(name, _METHODS.value)
        if _DRY_RUN.value:
            runs.plan(table, protocol, workdir, console, trials=trials)
            return
        if trials:
            table = tuning.tuned(table, protocol, trials, workdir / "tuning", console)
        outcomes = runs.run(table, protocol, runs.home(workdir, trials), console)
        command = f"python -m lpa_jax.table {shlex.join(sys.argv[1:])}"
        about = {"command": command, "trials": trials, **runs.about(outcomes)}
        report.leave(workdir, name, comparison.compare(outcomes), about, console)


if __name__ == "__main__":
    commands.run(_main, lambda argv: commands.parse(argv, _check))
