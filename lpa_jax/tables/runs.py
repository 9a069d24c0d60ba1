"""The runs that a table asks for: what each is, how long it would take, and its results."""

from collections.abc import Iterable, Mapping, Sequence
import pathlib
import runpy
import shlex
import statistics
import time
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections.config_flags import config_path
import numpy as np
from rich.console import Console
import rich.table

from lpa_jax import configs, data
from lpa_jax.evaluation import evaluate
from lpa_jax.tables.catalogue import Row, Table
from lpa_jax.tasks import classification, Task
from lpa_jax.training import config as configuration
from lpa_jax.training import fit, identity, loop, mesh, predict, progress, provenance
from lpa_jax.training.build import as_config_error, build, Parts, TEST
from lpa_jax.training.config import Config, ConfigError


class Protocol(NamedTuple):
    """What all runs of a table have in common.

    Attributes:
      seeds: Number of seeds of each row.
      epochs: Of each run, for which the learning rate's boundaries are moved in proportion; None
        for the configuration's own.
      changes: Keys of the configuration, dotted where nested, that differ from the table's.
    """

    seeds: int
    epochs: int | None = None
    changes: Mapping[str, Any] = {}


class RowResult(NamedTuple):
    """The results of a row.

    Attributes:
      row: The row.
      command: What trains it, by itself.
      summary: `summary.json` of its runs; None if they failed.
      failure: Why they failed.
      task: What labels mean.
    """

    row: Row
    command: str
    summary: Mapping[str, Any] | None
    failure: str = ""
    task: Task = classification


def configure(table: Table, row: Row, protocol: Protocol) -> tuple[Config, str]:
    """Return the configuration of a row, and the command that trains it by itself.

    Raises:
      ConfigError: If a file or key is unknown, or a value is of the wrong type.
    """
    path = configs.FILES.get(table.config, pathlib.Path(table.config))
    if not path.is_file():
        raise ConfigError(
            f"{configs.FILES.unknown(table.config)} A table names one of these, or a FILE.py."
        )
    try:
        config = runpy.run_path(str(path))["get_config"](f"method={row.method}")
    except Exception as error:
        raise ConfigError(f"{path} gives no configuration: {error!r}.") from error
    changes = {**table.changes, **row.changes, "num_seeds": protocol.seeds}
    if isinstance(protocol.epochs, int):
        scale = protocol.epochs / config.epochs
        boundaries = tuple(scale * epoch for epoch in config.schedule.boundaries)
        changes |= {"schedule.boundaries": boundaries}
    if protocol.epochs is not None:
        changes |= {"epochs": protocol.epochs}
    changes |= protocol.changes
    # What is set that is no key, the check below finds.
    config.unlock()
    for key, value in changes.items():
        if told := configuration.absent(config, key):
            if key.startswith("perturbation."):
                told = "choose rows that have it by --methods."
            raise ConfigError(f"{key} cannot be set in the row of method {row.method}: {told}")
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            kind: Any = config_path.get_type(key, config, default_type=object)
            raise ConfigError(
                f"config.{key} of method {row.method} cannot be {value!r}: give it the type "
                f"{kind.__name__}."
            ) from error
    configuration.check(config)
    words = ["python", "-m", "lpa_jax.main", f"--config={table.config}:method={row.method}"]
    words += [f"--config.{key}={value}" for key, value in changes.items() if value is not None]
    return config, shlex.join(words)


def build_all(
    table: Table,
    protocol: Protocol,
    workdir: pathlib.Path | None = None,
    *,
    splits: Sequence[str] = (TEST,),
) -> dict[str, tuple[Parts, str]]:
    """Return the parts of each row and its command; a data set is loaded once for all rows.

    Args:
      table: The table.
      protocol: What all its runs have in common.
      workdir: Where the rows are trained: what is there must be fit to be pooled with what this
        process would make. None where that does not count.
      splits: What the data of each row must have.

    Raises:
      ConfigError: If one cannot, lacks a split, or a seed of it was made with other data, code or
        configuration.
      DataError: If the data cannot be read.
    """
    built = {}
    with data.loaded_once():
        for name, row in table.rows.items():
            config, command = configure(table, row, protocol)
            parts = build(config)
            for split in splits:
                if split not in parts.dataset.splits:
                    raise ConfigError(
                        f"The data of row {name} have no split {split!r}, which a table compares "
                        f"or searches by: they have {', '.join(parts.dataset.splits)}."
                    )
            built[name] = parts, command
            if row.post_hoc is not None:
                evaluate.check_adjustable(parts)
            if workdir is not None:
                place = workdir / directory(name, row)
                ours = provenance.fingerprints(parts.config, parts.dataset)
                identity.find_seeds(
                    place, parts.config, parts.plan.seeds, ours, parts.plan.num_steps
                )
    return built


def run(
    table: Table,
    protocol: Protocol,
    workdir: pathlib.Path,
    console: Console,
    failed: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, RowResult]:
    """Train what is missing of a table, and return the results of each row.

    Every row has a directory of its own, in which interrupted runs are resumed, and finished ones
    are only read. A row of which a seed diverges is reported as such, without a
    number: a mean over the other seeds would flatter it.

    Args:
      table: The table.
      protocol: What all its runs have in common.
      workdir: Directory of the rows.
      console: Where to print.
      failed: Why rows failed already, by their directory; they are reported likewise.

    Raises:
      ConfigError: If a row cannot be built, or a seed of it was made with other data, code or
        configuration; none is trained then.
      DataError: If the data cannot be read.
      PreemptedError: If the process was sent SIGTERM, after the present step has been saved.
      WriteError: If the work directory takes no more.
    """
    built = build_all(table, protocol, workdir)
    results: dict[str, RowResult] = {}
    left, names = progress.Left(), list(table.rows)
    for number, (name, row) in enumerate(table.rows.items(), 1):
        parts, command = built[name]
        place = workdir / directory(name, row)
        # Rows that share their networks train them once.
        ahead = {workdir / directory(other, table.rows[other]) for other in names[number - 1 :]}
        missing = {path: max(0, protocol.seeds - finished(path)) for path in ahead}
        command += f" {shlex.quote(f'--workdir=runs/again/{place.name}')}"
        if place.name in failed:
            results[name] = RowResult(row, command, None, failed[place.name], parts.task)
            continue
        console.rule(f"{name} ({number} of {len(names)}){left(sum(missing.values()))}")
        try:
            with left.timed(missing[place]):
                summary = loop.train(parts, place, console)
        except fit.NonFiniteLossError as error:
            results[name] = RowResult(row, command, None, str(error), parts.task)
            continue
        if row.post_hoc is not None:
            command += (
                f" && python -m lpa_jax.evaluate --workdir=runs/again/{place.name} "
                f"--logit_adjustment={row.post_hoc}"
            )
            adjusted = _adjusted(parts, place, row.post_hoc, console)
            # The networks are those that were trained.
            trained = {result["seed"]: result["sessions"] for result in summary["seeds"]}
            adjusted = [{**result, "sessions": trained[result["seed"]]} for result in adjusted]
            summary = {**summary, "seeds": adjusted}
        results[name] = RowResult(row, command, summary, task=parts.task)
    return results


def directory(name: str, row: Row) -> str:
    """Return the name of the directory, within the table's, in which a row is trained."""
    return name if row.post_hoc is None else "erm"


def _adjusted(
    parts: Parts, directory: pathlib.Path, tau: float, console: Console
) -> list[dict[str, Any]]:
    """Evaluate finished runs with adjusted logits, and return results like those of the runs."""
    found = evaluate.evaluate_run(
        directory, seeds=parts.plan.seeds, logit_adjustment=tau, parts=parts, console=console
    )
    return [
        {"seed": result["seed"], "metrics": {TEST: result["metrics"]["logit_adjusted"]}}
        for result in found["seeds"]
    ]


def plan(
    table: Table,
    protocol: Protocol,
    workdir: pathlib.Path,
    console: Console,
    *,
    trials: int = 0,
) -> float:
    """Show which runs are to be made, and estimate their seconds from a few steps of each row.

    Args:
      table: The table.
      protocol: What all its runs have in common.
      workdir: Directory of the table.
      console: Where to print.
      trials: Number of settings that each row tries first, see `tuning.tuned`.

    Raises:
      ConfigError: If a row cannot be configured, or what is there cannot be pooled with it.
      DataError: If the data cannot be read.
    """
    shown = rich.table.Table(title="runs of the table")
    shown.add_column("row", overflow="fold", min_width=max(map(len, table.rows)))
    for column in ("trials", "seeds", "steps a seed", "seconds a step", "time left"):
        shown.add_column(column, justify="right")
    # What a search would choose is not known here.
    built = build_all(table, protocol, None if trials else workdir)
    rows = {name: directory(name, row) for name, row in table.rows.items()}
    shared = {name for name, place in rows.items() if place != name and place in rows}
    total = 0.0
    with progress.bar(console, "timing", len(rows) - len(shared), unit="row") as bar:
        for name, place in rows.items():
            if name in shared:
                shown.add_row(name, "", f"those of {place}")
                continue
            done = finished(home(workdir, trials) / place)
            tried = sum(finished(path) for path in (workdir / "tuning" / place).glob("trial*"))
            bar.begin(f"timing {name}")
            with as_config_error():
                step, _ = seconds(built[name][0], bar, console)
            num_steps = built[name][0].plan.num_steps
            bar.finished()
            left = max(0, trials - tried) + max(0, protocol.seeds - done)
            left *= num_steps * step
            total += left
            cells = (f"{tried} of {trials}", f"{done} of {protocol.seeds}", str(num_steps))
            shown.add_row(name, *cells, f"{step:.3f}", progress.clock(left))
    console.print(shown)
    console.print(
        f"About {progress.clock(total)} in all; compilation and evaluation are not counted.",
        highlight=False,
    )
    return total


def home(workdir: pathlib.Path, trials: int) -> pathlib.Path:
    """Return where the rows of a table are trained: those with other settings are other runs."""
    return workdir / f"trials{trials}" if trials else workdir


def finished(workdir: pathlib.Path) -> int:
    """Return the number of seeds of which the results are in a directory."""
    return len(list(workdir.glob("seed*/result.json")))


def seconds(parts: Parts, bar: progress.Bar, console: Console) -> tuple[float, float]:
    """Return the seconds of a step, median of up to 5 after the first, and of an evaluation.

    Raises:
      ConfigError: If the run cannot be carried out.
    """
    # Steps one at a time, whatever the run takes in one call.
    single = parts._replace(plan=parts.plan._replace(steps_per_dispatch=1))
    used, compiled = loop.ready(single, fit.make_devices(single), console)
    state = bar.call(compiled.steps.init, jnp.int32(0))
    seed, one = mesh.put((np.int32(0), np.int32(1)), mesh.replicated(compiled.devices))
    given, times = next(compiled.feed.open(0, 0)), []
    while len(times) < 6 and sum(times[1:]) < 10.0:
        began = time.perf_counter()
        state = jax.block_until_ready(bar.call(compiled.steps.train, state, seed, one, *given))
        times.append(time.perf_counter() - began)
    splits = [examples for name, examples in used.dataset.splits.items() if name != "train"]
    batch = compiled.eval_batch_size
    few = splits[0].take(np.arange(len(splits[0]))[: 2 * batch])
    predict.collect(compiled.predict, state.variables, few, batch)
    began = time.perf_counter()
    predict.collect(compiled.predict, state.variables, few, batch)
    evaluation = time.perf_counter() - began
    batches = sum(-(-len(examples) // batch) for examples in splits)
    return statistics.median(times[1:]), evaluation * batches / -(-len(few) // batch)


def about(results: Mapping[str, RowResult]) -> dict[str, Any]:
    """Return how the runs of a table were made: what `made` does, and all `"epochs"`."""
    summaries = [row.summary for row in results.values() if row.summary is not None]
    epochs = dict.fromkeys(summary["config"]["epochs"] for summary in summaries)
    return {
        "epochs": list(epochs),
        **made(result for summary in summaries for result in summary["seeds"]),
    }


def made(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how results of seeds were made: all `"devices"`, `"versions"` and `"commits"`."""
    sessions = [session for result in results for session in result["sessions"]]
    versions = [", ".join(f"{k} {v}" for k, v in s["versions"].items()) for s in sessions]
    return {
        "devices": list(dict.fromkeys(session["device"] for session in sessions)),
        "versions": list(dict.fromkeys(versions)),
        "commits": list(dict.fromkeys(session["commit"] for session in sessions)),
    }
