"""The search for each method's numbers: on a validation set, with the same budget for each."""

import pathlib
from typing import Any

from rich.console import Console

from lpa_jax.methods import METHODS, Range
from lpa_jax.tables import runs
from lpa_jax.tables.catalogue import Row, Table
from lpa_jax.training import loop, progress, records
from lpa_jax.training.config import Config, ConfigError, flat

VALIDATION_FRACTION = 0.1
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

    Example:
      >>> from lpa_jax.tables.catalogue import TABLES
      >>> from lpa_jax.training import config as configuration
      >>> config = configuration.choose(configuration.default(), "method=lpa+sam", {}, {})
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
    return {key: interval for key, interval in found.items() if known[key] != 0}


def tuned(
    table: Table, protocol: runs.Protocol, trials: int, workdir: pathlib.Path, console: Console
) -> Table:
    """Return a table with the numbers of each row that did best on the validation set.

    The search is Optuna's tree-structured Parzen estimator, which begins with the defaults. A trial
    is a run of one seed, that none of the table's own is, with a tenth of the training examples
    held out; the test set has no part in the choice. Finished trials are read, not repeated.

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
    runs.configure_all(table, _on_trial(protocol))
    best: dict[str, dict[str, Any]] = {}
    # Rows that share their networks share the search.
    searches: dict[str, Row] = {}
    for name, row in table.rows.items():
        searches.setdefault(runs.directory(name, row), row)
    left, ahead = progress.Left(), len(searches) * trials
    for shared, row in searches.items():
        ahead -= trials
        found = _search(table, shared, row, protocol, trials, workdir, console, left, ahead)
        best[shared] = found
    rows = {
        name: row._replace(changes={**row.changes, **best[runs.directory(name, row)]})
        for name, row in table.rows.items()
    }
    return table._replace(rows=rows)


def _on_trial(protocol: runs.Protocol) -> runs.Protocol:
    changes = {"validation_fraction": VALIDATION_FRACTION, "seed": SEED}
    return protocol._replace(seeds=1, changes={**protocol.changes, **changes})


def _search(
    table: Table,
    name: str,
    row: Row,
    protocol: runs.Protocol,
    trials: int,
    workdir: pathlib.Path,
    console: Console,
    left: progress.Left,
    after: int,
) -> dict[str, Any]:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "--trials needs Optuna: run `pip install -e '.[tune]'`, or leave --trials out."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    held_out = _on_trial(protocol)
    defaults, _ = runs.configure(table, row, held_out)
    # What the user fixes is not searched.
    found = ranges(table, row, defaults)
    intervals = {key: interval for key, interval in found.items() if key not in protocol.changes}
    if not intervals:
        return {}
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5)
    )
    known = flat(defaults.to_dict())
    study.enqueue_trial({key: known[key] for key in intervals})
    # The sampler's draws follow from what was told, so that those of a search cut off come again.
    tried = []
    for number in range(trials):
        trial = study.ask()
        drawn = {
            key: trial.suggest_float(key, interval.low, interval.high, log=interval.log)
            for key, interval in intervals.items()
        }
        config, _ = runs.configure(table, row._replace(changes={**row.changes, **drawn}), held_out)
        console.rule(f"{name}, trial {number + 1} of {trials}{left(after + trials - number)}")
        place = workdir / name / f"trial{number}"
        try:
            with left.timed(1 - runs.finished(place)):
                summary = loop.train_and_evaluate(config, place, console)
        except loop.NonFiniteLossError:
            study.tell(trial, 0.0)
            continue
        (result,) = summary["seeds"]
        study.tell(trial, result["validation_accuracy"])
        tried.append((result["validation_accuracy"], -result["validation_nll"], number, drawn))
    if not tried:
        raise ConfigError(f"All {trials} trials of {name} diverged: give narrower ranges.")
    # Of equals the first.
    accuracy, _, number, drawn = max(tried, key=lambda one: one[:2])
    told = {"ranges": {key: interval._asdict() for key, interval in intervals.items()}}
    told |= {
        "optuna": optuna.__version__,
        "trial": number,
        "validation_accuracy": accuracy,
        "chosen": drawn,
    }
    with records.writing(f"The search in {workdir}"):
        records.write_json(workdir / name / "search.json", told)
    return drawn
