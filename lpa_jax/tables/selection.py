"""Selection of DomainBed: which checkpoint of which draw stands for a trial, and tables of these.

DomainBed calls both a protocol and a rule "leave one domain out". Here the protocol is a test on
domains that are not learned from, and the rule `cross_validation`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import itertools
import re
from typing import Any, cast, NamedTuple

import numpy as np

from lpa_jax.registry import Registry
from lpa_jax.training.config import ConfigError


class Checkpoint(NamedTuple):
    """A network during training, evaluated on all domains.

    Attributes:
      dataset: Name of the set.
      algorithm: Name of the algorithm.
      test_domains: Numbers of the domains that are not learned from, ascending.
      trial: Seed of the trial, which has a split of its own.
      draw: Number of the draw of hyper-parameters; 0 is the defaults.
      step: Steps of training.
      inside: Accuracy on the *in* split of each domain, in [0, 1]; None where it was not evaluated,
        which may be so of domains that are learned from.
      outside: Accuracy on the *out* split of each domain.
    """

    dataset: str
    algorithm: str
    test_domains: tuple[int, ...]
    trial: int
    draw: int
    step: int
    inside: tuple[float | None, ...]
    outside: tuple[float, ...]


class Choice(NamedTuple):
    """What a rule chose for one test domain of one trial.

    Attributes:
      dataset: Name of the set.
      algorithm: Name of the algorithm.
      test_domain: Its number.
      trial: Its seed.
      draw: The draw that was chosen; None if no choice could be made, as for the next three.
      step: The step of the checkpoint that was chosen.
      validation: What it was chosen by.
      accuracy: On the *in* split of the test domain, which is what is reported.
      draws: How many draws there were to choose from.
      missing: What lacks for a choice, or for some draws to be among them; empty if nothing.
    """

    dataset: str
    algorithm: str
    test_domain: int
    trial: int
    draw: int | None
    step: int | None
    validation: float | None
    accuracy: float | None
    draws: int
    missing: str


class Cell(NamedTuple):
    """A number of a table, in percent; as text, as DomainBed prints it.

    Attributes:
      mean: None if it cannot be told.
      error: Standard error of the mean: population standard deviation / sqrt(n); None for a mean
        of cells.
      n: Of how many trials, or cells.
      missing: What lacks; empty if nothing.

    Example:
      >>> print(Cell(78.34, 0.05, 3), Cell(78.34, None, 4), Cell(None, None, 0, "no run"))
      78.3 +/- 0.1 78.3 X
    """

    mean: float | None
    error: float | None
    n: int
    missing: str = ""

    def __str__(self) -> str:
        """Return the text of a table."""
        if self.mean is None:
            return "X"
        return f"{self.mean:.1f}" + ("" if self.error is None else f" +/- {self.error:.1f}")


class SelectionRow(NamedTuple):
    """An algorithm on a set.

    Attributes:
      dataset: Name of the set.
      algorithm: Name of the algorithm.
      cells: A cell for each test domain, over trials.
      average: Mean of the cells.
      trials: Over trials, of the mean over test domains: the cell of this set in a table of sets.
      choices: What was chosen, by test domain, then by trial.
    """

    dataset: str
    algorithm: str
    cells: tuple[Cell, ...]
    average: Cell
    trials: Cell
    choices: tuple[Choice, ...]


def checkpoints(records: Iterable[Mapping[str, Any]]) -> list[Checkpoint]:
    """Return the checkpoints of records as DomainBed writes them, a line of JSON each.

    Args:
      records: Each with `step`, `env0_in_acc`, `env0_out_acc`, `env1_in_acc` and so on, and in
        `args` the keys `dataset`, `algorithm`, `test_envs`, `trial_seed` and `hparams_seed`.

    Raises:
      ConfigError: If something lacks in a record, or an accuracy is outside of [0, 1].

    Example:
      >>> accuracies = {"env0_in_acc": 0.5, "env0_out_acc": 0.4}
      >>> args = {"dataset": "PACS", "algorithm": "ERM", "test_envs": [0], "trial_seed": 0,
      ...         "hparams_seed": 2}
      >>> checkpoints([{"args": args, "step": 300, **accuracies}])[0][3:]
      (0, 2, 300, (0.5,), (0.4,))
    """
    found = []
    for number, record in enumerate(records, 1):
        domains = range(sum(re.fullmatch(r"env\d+_out_acc", key) is not None for key in record))
        try:
            args = record["args"]
            one = Checkpoint(
                dataset=args["dataset"],
                algorithm=args["algorithm"],
                test_domains=tuple(sorted(args["test_envs"])),
                trial=args["trial_seed"],
                draw=args["hparams_seed"],
                step=record["step"],
                inside=tuple(record.get(f"env{domain}_in_acc") for domain in domains),
                outside=tuple(record[f"env{domain}_out_acc"] for domain in domains),
            )
        except KeyError as error:
            raise ConfigError(
                f"Record {number} lacks {error}: give records as DomainBed writes them, with "
                "args, step, and env0_in_acc, env0_out_acc and so on."
            ) from error
        if lacking := [domain for domain in one.test_domains if one.inside[domain] is None]:
            raise ConfigError(
                f"Record {number} lacks env{lacking[0]}_in_acc, of a test domain: evaluate it."
            )
        known = [value for value in one.inside + one.outside if value is not None]
        if odd := [value for value in known if not 0 <= value <= 1]:
            raise ConfigError(f"Record {number} has the accuracy {odd[0]}: give shares in [0, 1].")
        found.append(one)
    return found


# For a test domain, from the checkpoints of a draw by the test domains of the run, each in the
# order of steps: the checkpoint with what it is judged by, or what lacks for that.
Runs = Mapping[tuple[int, ...], Sequence[Checkpoint]]
Judged = tuple[float, Checkpoint]
Judge = Callable[[Runs, int], Judged | str]


class Rule(NamedTuple):
    """A rule of selection.

    Attributes:
      label: What DomainBed's tables call it, or this package.
      judge: Chooses the checkpoint of a draw.
    """

    label: str
    judge: Judge


def _best(judged: Sequence[Judged]) -> Judged:
    """Return the best; of equals the first."""
    return max(judged, key=lambda one: one[0])


def _alone(runs: Runs, test: int) -> Sequence[Checkpoint] | str:
    return runs.get((test,)) or f"a run with the test domain {test} alone"


def _training_domains(runs: Runs, test: int) -> Judged | str:
    found = _alone(runs, test)
    if isinstance(found, str):
        return found
    return _best([(_mean_of_others(one.outside, test), one) for one in found])


def _cross_validation(runs: Runs, test: int) -> Judged | str:
    found = _alone(runs, test)
    if isinstance(found, str):
        return found
    others = [domain for domain in range(len(found[0].inside)) if domain != test]
    pairs = {domain: (min(test, domain), max(test, domain)) for domain in others}
    if lacking := [f"{a} and {b}" for a, b in pairs.values() if (a, b) not in runs]:
        return f"runs with the test domains {', '.join(lacking)}"
    # By step, the accuracy on each domain when neither it nor the test domain is learned from.
    held_out = [
        {one.step: cast(float, one.inside[domain]) for one in runs[pair]}
        for domain, pair in pairs.items()
    ]
    judged = [
        (float(np.mean([accuracy[one.step] for accuracy in held_out])), one)
        for one in found
        if all(one.step in accuracy for accuracy in held_out)
    ]
    return _best(judged) if judged else "a step at which all runs of a pair were evaluated"


def _oracle(runs: Runs, test: int) -> Judged | str:
    found = _alone(runs, test)
    return found if isinstance(found, str) else (found[-1].outside[test], found[-1])


def _oracle_checkpoint(runs: Runs, test: int) -> Judged | str:
    found = _alone(runs, test)
    if isinstance(found, str):
        return found
    return _best([(one.outside[test], one) for one in found])


def _mean_of_others(accuracies: Sequence[float], test: int) -> float:
    return float(np.mean([*accuracies[:test], *accuracies[test + 1 :]]))


RULES: Registry[Rule] = Registry(
    "rule of selection",
    {
        "training_domains": Rule("training-domain validation set", _training_domains),
        "cross_validation": Rule("leave-one-domain-out cross-validation", _cross_validation),
        "oracle": Rule("test-domain validation set (oracle)", _oracle),
        "oracle_checkpoint": Rule(
            "test-domain validation set (oracle) of every checkpoint", _oracle_checkpoint
        ),
    },
    Rule,
)
"""By name; see `choose`."""


def choose(found: Sequence[Checkpoint], rule: str) -> list[Choice]:
    """Choose a checkpoint and a draw for each test domain of each trial.

    Args:
      found: Checkpoints of any runs, in any order.
      rule: `"training_domains"`: the best mean accuracy on the *out* splits of the training
        domains, of all checkpoints. `"cross_validation"`: the best mean, over the other domains, of
        the accuracy on the *in* split of one when it is a test domain as well, which takes runs
        with each pair of test domains. `"oracle"`: the best accuracy on the *out* split of the test
        domain, of last checkpoints. `"oracle_checkpoint"`: likewise of all checkpoints, which SWAD
        calls oracle. Of equal checkpoints the first is chosen, of equal draws the last.

    Returns:
      A choice for each domain and each trial of each algorithm on each set, whether or not one
      could be made.

    Raises:
      ConfigError: If there is no such rule, two runs of a set differ in the number of domains or
        test on a domain that is none, or two checkpoints differ that should be the same.

    Example:
      >>> made = [
      ...     Checkpoint("PACS", "ERM", (0,), 0, draw, step, (test, 1.0), (0.0, validation))
      ...     for draw, step, test, validation in (
      ...         (0, 0, 0.3, 0.5), (0, 9, 0.4, 0.8), (1, 0, 0.5, 0.8), (1, 9, 0.6, 0.8))
      ... ]
      >>> for choice in choose(made, "training_domains"):
      ...     print(choice[2:])
      (0, 0, 1, 0, 0.8, 0.5, 2, '')
      (1, 0, None, None, None, None, 0, 'a run with the test domain 1 alone (draws 0, 1)')

    References:
      Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization, ICLR 2021, arXiv:2007.01434,
      section 3; Cha et al., SWAD: Domain Generalization by Seeking Flat Minima, NeurIPS 2021,
      arXiv:2102.08604.
    """
    if rule not in RULES:
        raise ConfigError(RULES.unknown(rule))
    choices = []
    for (dataset, algorithm), of_algorithm in _grouped(found, "dataset", "algorithm").items():
        domains = _domains(of_algorithm, dataset)
        runs = {
            (trial, draw): {
                tests: _by_step(run) for (tests,), run in _grouped(group, "test_domains").items()
            }
            for (trial, draw), group in _grouped(of_algorithm, "trial", "draw").items()
        }
        trials, draws = (sorted(set(numbers)) for numbers in zip(*runs, strict=True))
        for test, trial in itertools.product(range(domains), trials):
            judged: list[tuple[float, int, Checkpoint]] = []
            lacking: dict[str, list[str]] = {}
            for draw in draws:
                best = RULES[rule].judge(runs.get((trial, draw), {}), test)
                if isinstance(best, str):
                    lacking.setdefault(best, []).append(str(draw))
                else:
                    judged.append((best[0], draw, best[1]))
            missing = "; ".join(
                f"{told} (draw{'s' * (len(of) > 1)} {', '.join(of)})"
                for told, of in lacking.items()
            )
            chosen = (None, None, None, None)
            if judged:
                # No two are of the same draw.
                validation, draw, one = max(judged)
                chosen = draw, one.step, validation, one.inside[test]
            choices.append(Choice(dataset, algorithm, test, trial, *chosen, len(judged), missing))
    return choices


def _grouped(found: Sequence[Checkpoint], *names: str) -> dict[tuple[Any, ...], list[Checkpoint]]:
    """Return checkpoints by the values of attributes, in the order in which these come first."""
    groups: dict[tuple[Any, ...], list[Checkpoint]] = {}
    for one in found:
        groups.setdefault(tuple(getattr(one, name) for name in names), []).append(one)
    return groups


def _domains(found: Sequence[Checkpoint], dataset: str) -> int:
    """Return the number of domains, which all agree on."""
    numbers = sorted({number for one in found for number in (len(one.inside), len(one.outside))})
    if len(numbers) > 1 or numbers[0] < 2:
        raise ConfigError(
            f"The records of {dataset} have {' and '.join(map(str, numbers))} domains: give those "
            "of one set one name, and all of them the same number, at least 2."
        )
    if odd := [test for one in found for test in one.test_domains if test >= numbers[0]]:
        raise ConfigError(
            f"A record of {dataset} tests on domain {odd[0]}, but has accuracies of domains 0 to "
            f"{numbers[0] - 1} alone: correct it."
        )
    return numbers[0]


def _by_step(run: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints of a run in order; one may come twice, as where a run was resumed."""
    by_step: dict[int, Checkpoint] = {}
    for one in run:
        if by_step.setdefault(one.step, one) != one:
            raise ConfigError(
                f"There are two records of step {one.step} of {one.algorithm} on {one.dataset} "
                f"with the test domains {list(one.test_domains)}, trial {one.trial} and draw "
                f"{one.draw}, which differ: keep those of one run."
            )
    return [by_step[step] for step in sorted(by_step)]


def rows(choices: Sequence[Choice]) -> list[SelectionRow]:
    """Return the rows of a table: for each set and algorithm a cell for each test domain.

    A trial without a choice is left out of a cell, which then tells what lacks; a cell with none
    cannot be filled, and neither can the average of its row.

    Args:
      choices: What `choose` returned.

    Example:
      >>> found = [
      ...     Choice("PACS", "ERM", test, trial, 0, 300, 0.9, accuracy, 20, "")
      ...     for test, trial, accuracy in ((0, 0, 0.8), (0, 1, 0.82), (1, 0, 0.7), (1, 1, 0.76))
      ... ]
      >>> found.append(Choice("PACS", "IRM", 0, 0, None, None, None, None, 0, "a run"))
      >>> for row in rows(found):
      ...     print(row.algorithm, *row.cells, row.average, row.trials, row.trials.missing)
      ERM 81.0 +/- 0.7 73.0 +/- 2.1 77.0 77.0 +/- 1.4
      IRM X X X domain 0, trial 0: a run
    """
    by_row: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        by_row.setdefault((choice.dataset, choice.algorithm), []).append(choice)
    found = []
    for (dataset, algorithm), of_row in by_row.items():
        by_domain: dict[int, list[Choice]] = {}
        by_trial: dict[int, list[Choice]] = {}
        for choice in of_row:
            by_domain.setdefault(choice.test_domain, []).append(choice)
            by_trial.setdefault(choice.trial, []).append(choice)
        cells = tuple(
            _cell([choice.accuracy for choice in by_domain[domain]], by_domain[domain])
            for domain in sorted(by_domain)
        )
        means: list[float | None] = []
        for of_trial in by_trial.values():
            found_there = [one.accuracy for one in of_trial if one.accuracy is not None]
            # A mean of other domains than those of the other trials would not compare.
            whole = len(found_there) == len(of_trial)
            means.append(float(np.mean(found_there)) if whole else None)
        row = SelectionRow(
            dataset, algorithm, cells, average(cells), _cell(means, of_row), tuple(of_row)
        )
        found.append(row)
    return found


def average(cells: Sequence[Cell]) -> Cell:
    """Return the mean of cells, without an error; none if one of them cannot be filled.

    Example:
      >>> print(average([Cell(70.0, 0.5, 3), Cell(80.0, 0.5, 3)]))
      75.0
    """
    missing = "; ".join(cell.missing for cell in cells if cell.missing)
    means = [cell.mean for cell in cells if cell.mean is not None]
    if not cells or len(means) < len(cells):
        return Cell(None, None, 0, missing)
    return Cell(float(np.mean(means)), None, len(means), missing)


def _cell(accuracies: Sequence[float | None], choices: Sequence[Choice]) -> Cell:
    values = [accuracy for accuracy in accuracies if accuracy is not None]
    missing = "; ".join(
        f"domain {choice.test_domain}, trial {choice.trial}: {choice.missing}"
        for choice in choices
        if choice.missing
    )
    if not values:
        return Cell(None, None, 0, missing)
    error = np.std(values) / np.sqrt(len(values))
    return Cell(100 * float(np.mean(values)), 100 * float(error), len(values), missing)
