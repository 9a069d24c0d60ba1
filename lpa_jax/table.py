"""The command line that runs a table of methods: `python -m lpa_jax.table --table=digits_lt`."""

import functools
import pathlib
import re
import shlex
import sys
from typing import Any

# First: it says what is not installed.
from lpa_jax import commands

# isort: split
from absl import flags
import jax

from lpa_jax.commands import PRINT_CONFIG, sentences, UsageError, WORKDIR

flags.adopt_module_key_flags(commands)
_TABLE = flags.DEFINE_string(
    "table", None, "Name of the table, such as digits_lt, or of domains, such as rotated_digits."
)
_METHODS = flags.DEFINE_list(
    "methods", None, "Rows to run, the first of them to compare with; default all."
)
_TRIALS = flags.DEFINE_integer(
    "trials",
    None,
    "Settings to try for each row, on a validation set, before its seeds; default 0, none. Of a "
    "table of domains: trials, each with splits of its own; default 3.",
    lower_bound=0,
)
_DRAWS = flags.DEFINE_integer(
    "draws", 1, "Of a table of domains: draws of hyper-parameters of each trial.", lower_bound=1
)
_PRESET = flags.DEFINE_string(
    "preset",
    "domainbed_2020",
    "Of a table of domains: its protocol, domainbed_2020, swad, domainbed_head or cached.",
)
_CROSS_VALIDATION = flags.DEFINE_bool(
    "cross_validation",
    False,
    "Of a table of domains: test on each pair of domains as well, by which leave-one-domain-out "
    "cross-validation selects.",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show the runs and how long they would take.")
_JOBS = flags.DEFINE_string(
    "jobs",
    "1",
    "Runs at once, each in a process of its own with its share of the cores, or a GPU; auto: one a "
    "core or GPU.",
)
_SLURM = flags.DEFINE_string(
    "slurm",
    None,
    "Write scripts that submit the runs to Slurm, with these options of sbatch, such as "
    "--slurm='--time=4:00:00 --gres=gpu:1'.",
)
_JOB = flags.DEFINE_string(
    "job",
    None,
    "Run ROW/seedN or ROW/trialN of the table alone; of domains ROW/trialN/drawN.",
)
SEEDS = 5
"""Of each row, where --config.num_seeds says nothing else."""
TRIALS = 3
"""Of a table of domains, where --trials says nothing else."""
RESERVED = {"method": "use --methods", "seed": "the seeds of a table count from 0"}
FLAGS_OF_DOMAINS = ("draws", "preset", "cross_validation")
OF_DOMAINS = {
    "num_seeds": "give --trials",
    "data_seed": "the trials of a table count from 0",
    "test_domains": "each domain is tested on in turn",
}
"""Keys that no run of a table of domains has for itself."""
FORMER = {"seeds": "num_seeds", "budget": "epochs", "set": "KEY"}
"""Flags of version 0.1, and the keys that stand for them."""
_changes: dict[str, Any] = {}


def _check() -> None:
    if _TABLE.value is None:
        raise UsageError("Say which table to run, for example --table=digits_lt.")
    if _METHODS.value == []:
        raise UsageError("--methods names no row: give one or several, or leave it out for all.")
    if _JOBS.value != "auto" and not re.fullmatch(r"[1-9]\d*", str(_JOBS.value)):
        raise UsageError(f"--jobs must be a number from 1, or auto, not {_JOBS.value!r}.")
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

        from lpa_jax.tables import catalogue, comparison, jobs, runs, save, tuning
        from lpa_jax.training import config as configuration

        console, name, trials = Console(), str(_TABLE.value), _TRIALS.value or 0
        workdir = pathlib.Path(WORKDIR.value or f"runs/tables/{name.replace(':', '.')}")
        _keep_compiled(workdir)
        found = catalogue.find(name)
        if isinstance(found, catalogue.DomainTable):
            _main_of_domains(found, workdir, console)
            return
        for flag in FLAGS_OF_DOMAINS:
            if flags.FLAGS[flag].present:
                raise UsageError(f"--{flag} is of tables of domains: {name!r} is none.")
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
        tuned_in, home = workdir / "tuning", runs.home(workdir, trials)
        if _JOB.value is not None:
            try:
                jobs.run_one(jobs.job(_JOB.value), table, protocol, trials, workdir, console)
            finally:
                jobs.tell_memory()
            return
        if _SLURM.value is not None:
            _submit(table, protocol, workdir, console)
            return
        apart, failed = _apart(workdir, console), {}
        if trials:
            if apart is not None:
                failed = _by_row(apart(jobs.trials(table, protocol, trials, tuned_in)))
            whole = {
                name: row
                for name, row in table.rows.items()
                if runs.directory(name, row) not in failed
            }
            found = tuning.tuned(table._replace(rows=whole), protocol, trials, tuned_in, console)
            table = table._replace(rows={**table.rows, **found.rows})
        if apart is not None:
            left = jobs.seeds(table, protocol, home)
            failed |= _by_row(apart([one for one in left if one.row not in failed]))
        results = runs.run(table, protocol, home, console, failed)
        about = {"command": _asked(), "trials": trials, **runs.about(results)}
        task = next(iter(results.values())).task
        save.save_table(workdir, name, comparison.compare(results), about, console, task)


def _keep_compiled(workdir: pathlib.Path) -> None:
    """Let the runs of a table compile what they share once, where nothing else was said."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
        # Most of what a small network is made of compiles in less than the default of a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _main_of_domains(table: Any, workdir: pathlib.Path, console: Any) -> None:
    """Run a table of domain generalization."""
    from lpa_jax.tables import domain_catalogue, domain_report, domains, jobs, runs
    from lpa_jax.training import config as configuration
    from lpa_jax.training import display, files, fit
    from lpa_jax.training.build import as_config_error

    for key, told in OF_DOMAINS.items():
        if key in _changes:
            raise UsageError(f"--config.{key} cannot be set for a table of domains: {told}.")
    if _TRIALS.value == 0:
        raise UsageError("--trials must be at least 1 for a table of domains.")
    with as_config_error():
        preset = domain_catalogue.PRESETS.find(str(_PRESET.value))
    sweep = domains.sweep(
        str(_TABLE.value), table, preset, _METHODS.value, _TRIALS.value or TRIALS, _DRAWS.value,
        bool(_CROSS_VALIDATION.value), _changes,
    )  # fmt: skip
    if PRINT_CONFIG.value:
        print(configuration.describe(domains.configure(sweep, sweep.runs()[0], workdir)[0]))
    elif _JOB.value is not None:
        try:
            group = domains.named(sweep, _JOB.value)
            if failed := domains.train_all(sweep, workdir, console, group):
                raise fit.NonFiniteLossError(
                    " ".join(f"{name}: {why}" for name, why in failed.items())
                )
        finally:
            jobs.tell_memory()
    elif _DRY_RUN.value:
        domains.plan(sweep, workdir, console)
    else:
        domains.check(sweep, workdir)
        left = domains.left(sweep, workdir)
        if _SLURM.value is not None:
            names = [str(group) for group in domains.groups(left)]
            _write_slurm([("runs", names)] if names else [], workdir, console)
            return
        apart = _apart(workdir, console)
        if apart is not None:
            failed = {str(one): why for one, why in apart(domains.groups(left)).items()}
        else:
            failed = domains.train_all(sweep, workdir, console)
        records = domains.collect(sweep, workdir)
        if not records:
            display.say(console, f"No run has finished: {next(iter(failed.values()))}")
            return
        paths = [domains.result_path(run, workdir) for run in sweep.runs()]
        results = [files.read_json(path) for path in paths if path.exists()]
        about = {"command": _asked(), **runs.made(results)}
        about["steps"] = [max(record["step"] for record in records)]
        domain_report.report(sweep, records, about, failed, workdir, console)


def _asked() -> str:
    """Return the command as it was given."""
    return f"python -m lpa_jax.table {shlex.join(sys.argv[1:])}"


def _apart(workdir: pathlib.Path, console: Any) -> Any:
    """Return what runs jobs in processes of their own; None if all are to be run in this one."""
    from lpa_jax.tables import jobs

    where = jobs.places(None if _JOBS.value == "auto" else int(str(_JOBS.value)))
    if len(where) == 1:
        return None
    # The devices are for the runs.
    jax.config.update("jax_platforms", "cpu")
    return functools.partial(
        jobs.run_all,
        command=_command(workdir),
        where=where,
        logs=workdir / "logs",
        console=console,
    )


def _by_row(failed: Any) -> dict[str, str]:
    return {one.row: why for one, why in failed.items()}


def _command(workdir: pathlib.Path) -> list[str]:
    """Return what runs this table, or with `--job` a part of it."""
    words = [f"--table={_TABLE.value}", f"--workdir={workdir}"]
    given = (flags.FLAGS[name] for name in ("trials", *FLAGS_OF_DOMAINS))
    words += [f"--{flag.name}={flag.value}" for flag in given if flag.present]
    words += [f"--import={name}" for name in flags.FLAGS["import"].value or ()]
    methods = _METHODS.value
    words += [] if methods is None else [f"--methods={','.join(methods)}"]
    words += [] if flags.FLAGS["keep_memory"].value else ["--nokeep_memory"]
    words += [f"--config.{key}={value!r}" for key, value in _changes.items()]
    return [sys.executable, "-m", "lpa_jax.table", *words]


def _submit(table: Any, protocol: Any, workdir: pathlib.Path, console: Any) -> None:
    """Write the scripts that run a table on Slurm."""
    from lpa_jax.tables import jobs, runs

    stages, trials = [], _TRIALS.value or 0
    if trials:
        stages.append(("trials", jobs.trials(table, protocol, trials, workdir / "tuning")))
    stages.append(("seeds", jobs.seeds(table, protocol, runs.home(workdir, trials))))
    stages = [(stage, [str(one) for one in found]) for stage, found in stages if found]
    _write_slurm(stages, workdir, console)


def _write_slurm(stages: Any, workdir: pathlib.Path, console: Any) -> None:
    """Write scripts for Slurm, and say how to submit them."""
    from lpa_jax.tables import jobs
    from lpa_jax.training import display

    options = shlex.split(str(_SLURM.value))
    script = jobs.slurm(stages, _command(workdir), options, workdir)
    number = sum(len(names) for _, names in stages)
    display.say(console, f"{number} runs are to be made; submit them by: bash {script}")


if __name__ == "__main__":
    commands.run(_main, _parse)
