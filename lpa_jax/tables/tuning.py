"""The search for each method's numbers: on a validation set, with the same budget for each."""

import math
import pathlib
from typing import Any

from rich.console import Console

from lpa_jax import data
from lpa_jax.methods import METHODS, Range
from lpa_jax.tables import runs
from lpa_jax.tables.catalogue import Row, Table
from lpa_jax.training import files, fit, loop, progress
from lpa_jax.training.build import Parts, TEST
from lpa_jax.training.config import Config, ConfigError, flat

VALIDATION_FRACTION = 0.1
VALIDATION = "validation"
SEED = 1000
"""Of the trials: a table's own seeds count from 0."""


# For all rows alike, plain training included.
COMMON = {"schedule.learning_rate": Range(0.02, 0.3, log=True)}
# By loss; those of a method are in its row.
RANGES: dict[str, dict[str, Range]] = {
    "generalized_cross_entropy": {"q": Range(0.1, 1.0)},
    "softmax_focal_loss": {"gamma": Range(0.5, 4.0)},
}


def ranges(table: Table, row: Row, config: Config) -> dict[str, Range]:
    """Return the ranges of a row's numbers, by the dotted keys of its configuration.

    Args:
      table: The table.
      row: The row. What it sets is not searched, unless the table has a range for it.
      config: Its configuration. What is 0 there is not searched, such as the varied part of a fixed
        bound.

    Raises:
      ConfigError: If a range is none of a number.

    Example:
      >>> from lpa_jax.tables.catalogue import TABLES
      >>> from lpa_jax.training import config, method_config
      >>> config = method_config.choose(config.default(), "method=lpa+sam", {})
      >>> row = Row("lpa+sam", changes={"perturbation.sam.rho": 0.1})
      >>> sorted(ranges(TABLES["digits"], row, config))
      ['perturbation.lpa.epsilon', 'schedule.learning_rate']
    """
    found = dict(COMMON)
    for name in config.perturbation:
        for key, interval in METHODS[name].ranges.items():
            found[f"perturbation.{name}.{key}"] = interval
    for key, interval in RANGES.get(config.loss.name, {}).items():
        found[f"loss.{key}"] = interval
    known = flat(config.to_dict())
    found = {key: interval for key, interval in found.items() if key not in row.changes}
    found |= {key: interval for key, interval in table.ranges.items() if key in known}
    found = {key: interval for key, interval in found.items() if known[key] != 0}
    for key, one in found.items():
        number = isinstance(known[key], (int, float))
        if (
            not number
            or not isinstance(one, Range)
            or not (0 if one.log else -math.inf) < one.low <= one.high
        ):
            raise ConfigError(
                f"{key} cannot be searched in {one}: give a number a Range(low, high), "
                "above 0 if log."
            )
    return found


def tuned(
    table: Table, protocol: runs.Protocol, trials: int, workdir: pathlib.Path, console: Console
) -> Table:
    """Return a table with the numbers of each row that did best on the validation set.

    The search is Optuna's tree-structured Parzen estimator, which begins with the defaults. A trial
    is a run of one seed, that none of the table's own is, with a tenth of the training examples
    held out; the test set has no part in the choice. The searches are kept in `optuna.log`, a
    journal that Optuna's own tools read: rerunning resumes an interrupted search.

    Args:
      table: The table.
      protocol: What all its runs have in common.
      trials: Number of settings that each row tries, at least 1.
      workdir: Directory of the trials.
      console: Where to print.

    Raises:
      ConfigError: If Optuna is not installed, a row cannot be configured, or all trials of a row
        fail.

    References:
      Akiba et al., Optuna: A Next-generation Hyperparameter Optimization Framework, KDD 2019,
      arXiv:1907.10902.
    """
    # What cannot be run is told before anything is.
    built = runs.build_all(table, _on_trial(protocol), splits=(TEST, VALIDATION))
    best: dict[str, dict[str, Any]] = {}
    # Rows that share their networks share the search.
    searches: dict[str, Row] = {}
    for name, row in table.rows.items():
        searches.setdefault(runs.directory(name, row), row)
    left, ahead = progress.Left(), len(searches) * trials
    with data.loaded_once():
        begun = []
        for shared, row in searches.items():
            name = next(n for n, other in table.rows.items() if other is row)
            begun.append(_Search(table, shared, row, protocol, workdir, built[name][0]))
        for search in begun:
            ahead -= trials
            best[search.name] = search.run(trials, console, left, ahead)
    rows = {
        name: row._replace(changes={**row.changes, **best[runs.directory(name, row)]})
        for name, row in table.rows.items()
    }
    return table._replace(rows=rows)


def _on_trial(protocol: runs.Protocol) -> runs.Protocol:
    changes = {"validation_fraction": VALIDATION_FRACTION, "seed": SEED}
    return protocol._replace(seeds=1, changes={**protocol.changes, **changes})


def _cut(journal: pathlib.Path) -> None:
    """Leave out a line that a crash cut short, which the next would be written behind."""
    content = journal.read_bytes() if journal.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        journal.write_bytes(whole)


class _Search:
    """The search for the numbers of one row."""

    def __init__(
        self,
        table: Table,
        name: str,
        row: Row,
        protocol: runs.Protocol,
        workdir: pathlib.Path,
        parts: Parts,
    ):
        self.table, self.name, self.row, self.workdir = table, name, row, workdir
        self.protocol, self.task, self.metric = _on_trial(protocol), parts.task, parts.selection[1]
        self.defaults, _ = runs.configure(table, row, self.protocol)
        # What the user fixes is not searched.
        found = ranges(table, row, self.defaults)
        self.intervals = {key: value for key, value in found.items() if key not in protocol.changes}
        known = flat(self.defaults.to_dict())
        for key, interval in self.intervals.items():
            if not interval.low <= known[key] <= interval.high:
                raise ConfigError(
                    f"The search for {name} begins with the defaults, but config.{key} is "
                    f"{known[key]!r}, outside of {interval.low:g} to {interval.high:g}: fix it by "
                    f"--config.{key}, or give the table a range in which it is."
                )

    def run(self, trials: int, console: Console, left: progress.Left, after: int) -> dict[str, Any]:
        """Try so many settings, and return the best."""
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise ConfigError(
                "--trials needs Optuna: run `pip install 'lpa_jax[tune]'`, or leave --trials out."
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if not self.intervals:
            return {}
        states = optuna.trial.TrialState
        spans: dict[str, Any] = {
            key: optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)
            for key, one in self.intervals.items()
        }
        journal = self.workdir / "optuna.log"
        with files.writing(str(journal)):
            self.workdir.mkdir(parents=True, exist_ok=True)
            _cut(journal)
            backend = JournalFileBackend(str(journal))
            try:
                study = optuna.create_study(
                    study_name=self.name,
                    direction="maximize" if self.task.shown[self.metric].maximize else "minimize",
                    storage=optuna.storages.JournalStorage(backend),
                    load_if_exists=True,
                )
            except OSError:
                raise
            except Exception as error:  # Of any kind: Optuna checks nothing that it reads.
                raise ConfigError(
                    f"{journal} is damaged ({error!r}): restore it, or remove it and rerun the "
                    "command, which uses the trials again that are there."
                ) from error
        for trial in study.trials:
            # Its settings are drawn again, and the run itself is resumed.
            if trial.state == states.RUNNING:
                study.tell(trial.number, state=states.FAIL)
        known = flat(self.defaults.to_dict())
        tried = []
        for number in range(trials):
            ended = [t for t in study.trials if t.state in (states.COMPLETE, states.PRUNED)]
            trial = None
            if number < len(ended):
                drawn = dict(ended[number].params)
            elif number == 0:
                drawn = {key: float(known[key]) for key in spans}
            else:
                # By number: the draws of a resumed search are those of an uninterrupted one.
                study.sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=5)
                trial = study.ask(spans)
                drawn = dict(trial.params)
            place = self.workdir / self.name / f"trial{number}"
            time_left = left(after + trials - number)
            console.rule(f"{self.name}, trial {number + 1} of {trials}{time_left}")
            value, state = None, states.COMPLETE
            try:
                with left.timed(1 - runs.finished(place)):
                    found = self._train(drawn, place, console)
                value = found[self.metric]
                tried.append((found, number, drawn))
            except fit.NonFiniteLossError:
                # Taken for worse than all that ended.
                state = states.PRUNED
            if trial is not None:
                study.tell(trial, value, state)
            elif number == len(ended):
                study.add_trial(
                    optuna.trial.create_trial(
                        state=state, value=value, params=drawn, distributions=spans
                    )
                )
        if not tried:
            raise ConfigError(f"All {trials} trials of {self.name} diverged: give narrower ranges.")
        # Of equals the more likely, then the first.
        sign = 1 if self.task.shown[self.metric].maximize else -1
        found, number, drawn = max(
            tried, key=lambda one: (sign * one[0][self.metric], -one[0].get("nll", 0.0))
        )
        told = {
            "ranges": {key: interval._asdict() for key, interval in self.intervals.items()},
            "optuna": optuna.__version__,
            "trial": number,
            VALIDATION: {self.metric: found[self.metric]},
            "chosen": drawn,
        }
        with files.writing(f"The search in {self.workdir}"):
            files.write_json(self.workdir / self.name / "search.json", told)
        return drawn

    def _train(
        self, drawn: dict[str, Any], place: pathlib.Path, console: Console
    ) -> dict[str, float]:
        """Return the metrics of a trial on the validation set."""
        row = self.row._replace(changes={**self.row.changes, **drawn})
        config, _ = runs.configure(self.table, row, self.protocol)
        (result,) = loop.train_and_evaluate(config, place, console)["seeds"]
        return result["metrics"][VALIDATION]
