"""The search for each method's numbers: on a validation set, with the same budget for each."""

import contextlib
import math
import pathlib
from typing import Any
import zlib

from rich.console import Console
from scipy.stats import qmc

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
NUMBER = "number"
"""What Optuna's journal names the number of a trial by, which is not that of its end."""


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
    table: Table,
    protocol: runs.Protocol,
    trials: int,
    workdir: pathlib.Path,
    console: Console,
) -> Table:
    """Return a table with the numbers of each row that did best on the validation set.

    The first setting is the defaults. Each other is a point of a scrambled Halton sequence in the
    row's ranges, which depends on the name of the row and the number of the trial alone, so that
    trials may run in any order, and several at once. A trial is a run of one seed, that none of
    the table's own is, with a tenth of the training examples held out; the test set has no part in
    the choice. The searches are kept in `optuna.log`, a journal that Optuna's own tools read, and
    that several processes may share: rerunning resumes an interrupted search.

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
      Halton, On the efficiency of certain quasi-random sequences of points, Numer. Math. 1960;
      Akiba et al., Optuna: A Next-generation Hyperparameter Optimization Framework, KDD 2019,
      arXiv:1907.10902.
    """
    mend(workdir)
    with data.loaded_once():
        searches = begin(table, protocol, workdir)
        left, ahead = progress.Left(), len(searches) * trials
        best = {}
        for search in searches.values():
            ahead -= trials
            told = search.run(trials, console, left, ahead)
            best[search.name] = told["chosen"]
            if search.intervals:
                with files.writing(f"The search in {workdir}"):
                    files.write_json(workdir / search.name / "search.json", told)
    rows = {
        name: row._replace(changes={**row.changes, **best[runs.directory(name, row)]})
        for name, row in table.rows.items()
    }
    return table._replace(rows=rows)


def begin(table: Table, protocol: runs.Protocol, workdir: pathlib.Path) -> dict[str, "Search"]:
    """Return the searches of a table by name; rows that share their networks share one.

    Raises:
      ConfigError: If a row cannot be searched, which is told before anything is run.
    """
    built = runs.build_all(table, _on_trial(protocol), splits=(TEST, VALIDATION))
    searches: dict[str, Search] = {}
    for name, row in table.rows.items():
        shared = runs.directory(name, row)
        if shared not in searches:
            searches[shared] = Search(table, shared, row, protocol, workdir, built[name][0])
    return searches


def _on_trial(protocol: runs.Protocol) -> runs.Protocol:
    changes = {"validation_fraction": VALIDATION_FRACTION, "seed": SEED}
    return protocol._replace(seeds=1, changes={**protocol.changes, **changes})


class Search:
    """The search for the numbers of one row.

    Attributes:
      name: Of the directory of its trials, and of the study in Optuna's journal.
      intervals: The ranges that are searched, by key; none if the row has nothing to search.
    """

    def __init__(
        self,
        table: Table,
        name: str,
        row: Row,
        protocol: runs.Protocol,
        workdir: pathlib.Path,
        parts: Parts,
    ):
        """Open the search; nothing is written before it is asked for its trials."""
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

    def draw(self, number: int) -> dict[str, float]:
        """Return the setting of a trial, which depends on its number and the row's name alone."""
        if number == 0:
            known = flat(self.defaults.to_dict())
            return {key: float(known[key]) for key in self.intervals}
        points = qmc.Halton(len(self.intervals), rng=zlib.crc32(self.name.encode()))
        points.fast_forward(number - 1)
        (point,) = points.random(1)
        return {
            key: one.low * (one.high / one.low) ** share
            if one.log
            else one.low + share * (one.high - one.low)
            for (key, one), share in zip(self.intervals.items(), map(float, point), strict=True)
        }

    def left(self, trials: int) -> list[int]:
        """Return the numbers of the trials that have not ended; none if nothing is searched."""
        if not self.intervals:
            return []
        ended = self._ended()
        return [number for number in range(trials) if number not in ended]

    def attempt(self, number: int, console: Console) -> dict[str, Any] | None:
        """Train and record a trial that has not ended; return its metrics, None if it diverged."""
        import optuna

        drawn, found, value = self.draw(number), None, None
        # Taken for worse than all that ended.
        state = optuna.trial.TrialState.PRUNED
        with contextlib.suppress(fit.NonFiniteLossError):
            found = self._train(drawn, number, console)
            value, state = found[self.metric], optuna.trial.TrialState.COMPLETE
        spans: dict[str, Any] = {
            key: optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)
            for key, one in self.intervals.items()
        }
        trial = optuna.trial.create_trial(
            state=state,
            value=value,
            params=drawn,
            distributions=spans,
            user_attrs={NUMBER: number},
        )
        with files.writing(str(self._journal)):
            self._study().add_trial(trial)
        return found

    def run(self, trials: int, console: Console, left: progress.Left, after: int) -> dict[str, Any]:
        """Try what has not been tried of so many settings, and return the `"chosen"` and more."""
        if not self.intervals:
            return {"chosen": {}}
        ended = self._ended()
        tried = []
        for number in range(trials):
            time_left = left(after + trials - number)
            console.rule(f"{self.name}, trial {number + 1} of {trials}{time_left}")
            with left.timed(number not in ended):
                if number not in ended:
                    found = self.attempt(number, console)
                elif ended[number].value is None:
                    found = None
                else:
                    # What was made with other data or code is refused there.
                    found = self._train(dict(ended[number].params), number, console)
            if found is not None:
                tried.append((found, number))
        if not tried:
            raise ConfigError(f"All {trials} trials of {self.name} diverged: give narrower ranges.")
        # Of equals the more likely, then the first.
        sign = 1 if self.task.shown[self.metric].maximize else -1
        found, number = max(
            tried, key=lambda one: (sign * one[0][self.metric], -one[0].get("nll", 0.0))
        )
        return {
            "ranges": {key: interval._asdict() for key, interval in self.intervals.items()},
            "trial": number,
            VALIDATION: {self.metric: found[self.metric]},
            "chosen": self.draw(number),
        }

    @property
    def _journal(self) -> pathlib.Path:
        return self.workdir / "optuna.log"

    def _ended(self) -> dict[int, Any]:
        """Return the trials that ended, by number; not those of Optuna's own samplers."""
        trials = self._study().get_trials(deepcopy=False)
        return {
            trial.user_attrs[NUMBER]: trial
            for trial in trials
            if NUMBER in trial.user_attrs and trial.state.is_finished()
        }

    def _study(self) -> Any:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise ConfigError(
                "--trials needs Optuna: run `pip install 'lpa_jax[tune]'`, or leave --trials out."
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with files.writing(str(self._journal)):
            self.workdir.mkdir(parents=True, exist_ok=True)
            try:
                return optuna.create_study(
                    study_name=self.name,
                    direction="maximize" if self.task.shown[self.metric].maximize else "minimize",
                    storage=optuna.storages.JournalStorage(JournalFileBackend(str(self._journal))),
                    load_if_exists=True,
                )
            except OSError:
                raise
            except Exception as error:  # Of any kind: Optuna checks nothing that it reads.
                raise ConfigError(
                    f"{self._journal} is damaged ({error!r}): restore it, or remove it and rerun "
                    "the command, which uses the trials again that are there."
                ) from error

    def _train(self, drawn: dict[str, Any], number: int, console: Console) -> dict[str, float]:
        """Return the metrics of a trial on the validation set."""
        row = self.row._replace(changes={**self.row.changes, **drawn})
        config, _ = runs.configure(self.table, row, self.protocol)
        place = self.workdir / self.name / f"trial{number}"
        (result,) = loop.train_and_evaluate(config, place, console)["seeds"]
        return result["metrics"][VALIDATION]


def mend(workdir: pathlib.Path) -> None:
    """Leave out a line of the journal that a crash cut short; no other process may write then."""
    journal = workdir / "optuna.log"
    content = journal.read_bytes() if journal.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with files.writing(str(journal)):
            journal.write_bytes(whole)
