"""Tables of methods: what they ask for, how rows compare, and that nothing is done twice."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from lpa_jax import data
from lpa_jax.data import digits
from lpa_jax.evaluation import evaluate
from lpa_jax.methods import Range
from lpa_jax.tables import catalogue, comparison, runs, save, tuning
from lpa_jax.tables.catalogue import Row
from lpa_jax.training import checkpoints, files, fit, loop, provenance
from lpa_jax.training.config import ConfigError, flat

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
QUIET = Console(quiet=True)
SMALL = {"model.options": {"width": 4}, "limit": 200, "batch_size": 32}
EVERY = [(table, row) for table in catalogue.TABLES for row in catalogue.TABLES[table].rows]


def small(seeds=2, **changes):
    return runs.Protocol(seeds, epochs=2, changes=SMALL | changes)


@pytest.mark.parametrize(("table", "row"), EVERY)
def test_every_row_is_configured_as_its_command_says(table, row):
    table = catalogue.TABLES[table]
    row = table.rows[row]
    config, command = runs.configure(table, row, runs.Protocol(3, epochs=100))
    assert config.method == row.method
    assert (config.num_seeds, config.epochs) == (3, 100)
    assert shlex.split(command)[3].endswith(f":method={row.method}")
    known = flat(config.to_dict())
    for key, wanted in {**table.changes, **row.changes}.items():
        assert known[key] == wanted
        assert f"--config.{key}={wanted}" in shlex.split(command)
    if config.dataset != "digits":
        # The papers' boundaries, for half of their epochs.
        assert tuple(config.schedule.boundaries) == (50.0, 75.0)


@pytest.mark.parametrize(("table", "row"), EVERY)
def test_every_row_can_be_asked_for_and_has_a_directory(table, row):
    # --methods is split at commas.
    assert list(catalogue.chosen(table, row.split(",")).rows) == [row]
    assert "/" not in row


@pytest.mark.parametrize(("table", "row"), EVERY)
def test_every_search_begins_with_a_default_within_its_range(table, row):
    table = catalogue.TABLES[table]
    row = table.rows[row]
    config, _ = runs.configure(table, row, runs.Protocol(1))
    ranges = tuning.ranges(table, row, config)
    assert "schedule.learning_rate" in ranges
    known = flat(config.to_dict())
    for key, interval in ranges.items():
        assert interval.low <= known[key] <= interval.high, key


CLASS_LEVEL = ("lpa", "lpl", "lpg")
PUBLISHED = [
    (table, row, label)
    for table, row in EVERY
    for label in catalogue.TABLES[table].rows[row].published
]


@pytest.mark.parametrize(("table", "row", "label"), PUBLISHED)
def test_a_published_number_is_listed_with_its_form(table, row, label):
    table = catalogue.TABLES[table]
    row = table.rows[row]
    config, _ = runs.configure(table, row, runs.Protocol(1))
    paper, *told = label.split(", ")
    assert paper in ("LPA", "LPL", "MM")
    # That paper's networks are trained for longer.
    assert ("400 epochs" in told) == (paper == "MM")
    assert config.epochs == 200
    assert config.model.name == ("resnet_32" if config.imbalance.ratio else "wrn_28_10")
    methods = {name: config.perturbation[name] for name in CLASS_LEVEL if name in row.method}
    forms = {"fixed", "varied", "form not stated"} & set(told)
    assert len(forms) == bool(methods)
    for method in methods.values():
        if "fixed" in forms:
            assert method.epsilon > 0
            assert method.delta_epsilon == 0
        if "varied" in forms:
            assert method.delta_epsilon > 0
        assert method.split.name == ("tail" if config.imbalance.ratio else "mean_threshold")
    if "lpl" in methods and config.imbalance.ratio and "fixed" not in told and paper == "LPL":
        # Their steps by frequency.
        lpl = methods["lpl"]
        assert lpl.solver == "rounded_steps"
        head = (4, 0.6) if table.config == "cifar10" else (27, 0.2)
        assert (lpl.split.num_head, lpl.split.head_scale) == head
        assert lpl.delta_epsilon / lpl.step_size == pytest.approx(10)
        assert (lpl.epsilon, lpl.steps) == (0, None)


def names_of(transforms):
    return {name for name in transforms.split("+") if name != "erm"}


@pytest.mark.parametrize(("table", "row"), EVERY)
def test_the_configuration_of_a_row_matches_its_name(table, row):
    table = catalogue.TABLES[table]
    config, _ = runs.configure(table, table.rows[row], runs.Protocol(1))
    for name in names_of(row):
        method = name.removesuffix("_varied")
        if method in CLASS_LEVEL:
            bound = config.perturbation[method]
            assert (bound.delta_epsilon > 0) == name.endswith("_varied")
    focal = row in ("focal", "class_balanced_focal", "softmax_focal_loss")
    assert (config.loss.name == "softmax_focal_loss") == focal
    assert ("reweight" in config.perturbation) == row.startswith("class_balanced")
    normalized = names_of(row) & {"ldam", "additive_margin"}
    assert config.model.head == ("normalized" if normalized else "linear")
    if "noise.kind" in table.changes and "lpg" in config.perturbation:
        assert config.perturbation.lpg.split.inverted
        assert config.perturbation.lpg.split.name == "mean_threshold"


@pytest.mark.parametrize(
    ("table", "row", "label", "error"),
    [
        ("cifar10", "lpl", "LPL, fixed", 3.39),
        ("cifar10", "lpl_varied", "LPL, varied", 3.37),
        ("cifar10", "lpa_varied", "LPA, varied", 3.06),
        ("cifar100", "lpa", "LPA, fixed", 16.72),
        ("cifar100", "lpl_varied", "LPL, varied", 17.61),
        ("cifar10_lt", "focal", "LPL", 29.62),
        ("cifar10_lt", "class_balanced_focal", "LPL", 25.43),
        ("cifar10_lt10", "class_balanced_focal", "LPL", 12.52),
        ("cifar100_lt", "class_balanced_focal", "LPL", 60.40),
        ("cifar100_lt10", "class_balanced_focal", "LPL", 42.01),
        ("cifar10_lt", "lpl", "LPL, fixed", 23.97),
        ("cifar10_lt", "lpl_varied", "LPL, varied", 22.05),
        ("cifar10_lt", "lpa", "LPA, fixed", 100 - 46.8),
        ("cifar10_lt", "lpa_varied", "LPA, varied", 100 - 48.5),
        ("cifar100_lt", "lpa", "LPA, fixed", 100 - 31.5),
        ("cifar100_lt", "lpa_varied", "LPA, varied", 100 - 34.2),
        ("cifar100_lt10", "lpl_varied", "LPL, varied", 39.03),
    ],
)
def test_published_numbers_are_the_papers(table, row, label, error):
    assert catalogue.TABLES[table].rows[row].published[label] == pytest.approx(error)


def test_published_numbers_are_in_one_place():
    told = {f"{error:.2f}" for rows in catalogue.PUBLISHED.values() for row in rows.values()
            for error in row.values()}  # fmt: skip
    for path in CONFIGS.glob("cifar*.py"):
        assert not told & set(re.findall(r"\d+\.\d\d", path.read_text())), path


def test_disabled_arguments_are_not_searched():
    table = catalogue.TABLES["cifar10_lt"]
    found = {}
    for name in ("lpl", "lpl_varied", "lpa", "lpa_varied"):
        config, _ = runs.configure(table, table.rows[name], runs.Protocol(1))
        keys = set(tuning.ranges(table, table.rows[name], config)) - {"schedule.learning_rate"}
        found[name] = {key.removeprefix("perturbation.") for key in keys}
    assert found == {
        "lpl": {"lpl.epsilon"},
        "lpl_varied": {"lpl.delta_epsilon"},
        "lpa": {"lpa.epsilon"},
        "lpa_varied": {"lpa.epsilon", "lpa.delta_epsilon"},
    }


@pytest.mark.parametrize(
    ("table", "method", "changes"),
    [
        ("cifar10_lt", "logit_adjustment+lpl_varied", {}),
        ("digits_noisy", "lpg", {}),
        ("digits_noisy", "generalized_cross_entropy", {"model.options": {"width": 4}}),
        ("cifar10_lt", "lpa+lpl", {"dataset": "npz:a $b;'c.npz", "limit": 10, "image_size": None}),
        ("digits", "dropblock", {"perturbation.dropblock.site": "group1"}),
    ],
)
def test_the_command_of_a_row_gives_its_configuration(table, method, changes):
    table = catalogue.TABLES[table]
    protocol = runs.Protocol(3, epochs=7, changes=changes)
    config, command = runs.configure(table, table.rows[method], protocol)
    program = (
        "import sys, json\nfrom absl import flags\nfrom lpa_jax import main\n"
        "flags.FLAGS(sys.argv)\nprint(json.dumps(flags.FLAGS.config.to_dict()))"
    )
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "lpa_jax.main"]
    found = subprocess.run(
        [sys.executable, "-c", program, *words[3:]],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(found.stdout) == json.loads(json.dumps(config.to_dict()))


def result_of(*accuracies):
    results = [
        {"seed": s, "metrics": {"test": {"accuracy": a, "error": 1 - a}}}
        for s, a in enumerate(accuracies)
    ]
    return runs.RowResult(Row("erm"), "", {"seeds": results})


def test_a_table_names_a_configuration_or_a_file(tmp_path):
    table = catalogue.TABLES["digits"]
    with pytest.raises(ConfigError, match="no configuration 'digit'; did you mean digits"):
        runs.configure(table._replace(config="digit"), table.rows["erm"], runs.Protocol(1))
    path = tmp_path / "mine.py"
    path.write_text((CONFIGS / "digits.py").read_text())
    config, command = runs.configure(
        table._replace(config=str(path)), table.rows["erm"], runs.Protocol(1)
    )
    assert config.dataset == "digits"
    assert f"--config={path}:method=erm" in command


def test_the_data_of_a_table_are_read_once(monkeypatch):
    read, calls = digits.read, []
    monkeypatch.setattr(digits, "read", lambda *size: calls.append(1) or read(*size))
    built = runs.build_all(catalogue.chosen("digits", ["erm", "lpl", "sam"]), small())
    assert len(calls) == 1
    splits = [parts.dataset.splits["test"] for parts, _ in built.values()]
    assert {examples.fingerprint() for examples in splits} == {splits[0].fingerprint()}


def test_rows_are_compared_by_a_paired_test_with_holms_correction():
    rng = np.random.default_rng(0)
    first, second, third = 0.7 + 0.05 * rng.standard_normal((3, 6))
    lines = comparison.compare(
        {"erm": result_of(*first), "a": result_of(*second), "b": result_of(*third)}
    )
    ps = [stats.ttest_rel(first, other).pvalue for other in (second, third)]
    expected = [min(1.0, 2 * min(ps)), max(2 * min(ps), max(ps))]
    if ps[1] < ps[0]:
        expected.reverse()
    assert lines[0].p is None
    np.testing.assert_allclose([line.p for line in lines[1:]], expected, rtol=1e-9)
    np.testing.assert_allclose(lines[1].difference, 100 * np.mean(first - second))
    np.testing.assert_allclose(lines[2].std, 100 * np.std(third, ddof=1))


def test_seeds_are_paired_by_number_and_not_by_place():
    first = result_of(0.5, 0.6, 0.8)
    second = result_of(0.55, 0.66, 0.87)
    second.summary["seeds"].reverse()
    assert comparison.compare({"erm": first, "a": second})[1].difference == pytest.approx(-6.0)


def test_there_is_no_p_value_without_spread_or_seeds():
    lines = comparison.compare(
        {
            "erm": result_of(0.5, 0.6),
            "same": result_of(0.5, 0.6),
            "one": result_of(0.7),
            # By one image each, but for the rounding.
            "shifted": result_of(0.5 - 1 / 359, 0.6 - 1 / 359),
            "diverged": runs.RowResult(Row("erm"), "", None, "Step 3 was not finite."),
        }
    )
    assert [line.p for line in lines] == [None] * 5
    assert lines[1].difference == 0.0
    assert lines[2].std is None
    assert (lines[4].value, lines[4].n) == (None, 0)


def test_a_row_that_would_correct_class_frequencies_twice_stops_the_table_before_it_trains(
    tmp_path,
):
    table = catalogue.chosen("digits_lt", ["erm", "post_hoc_logit_adjustment"])
    table = table._replace(changes=table.changes | {"sampling": "class_aware"})
    with pytest.raises(ConfigError, match="logit adjustment post hoc would do so once more"):
        runs.run(table, small(seeds=1), tmp_path / "new", QUIET)
    assert not (tmp_path / "new").exists()


def test_epochs_that_are_no_number_are_refused():
    table = catalogue.chosen("digits", ["erm"])
    with pytest.raises(ConfigError, match="cannot be 'x': give it the type int"):
        runs.configure(table, table.rows["erm"], runs.Protocol(1, "x"))


def test_a_search_whose_default_is_out_of_its_range_is_refused(tmp_path):
    table = catalogue.chosen("digits", ["erm"])
    table = table._replace(ranges={"schedule.learning_rate": Range(0.5, 1.0)})
    with pytest.raises(ConfigError, match=r"config.schedule.learning_rate is 0.1, outside of 0.5"):
        tuning.tuned(table, small(1), 1, tmp_path, QUIET)


@pytest.mark.guarantee("killed-table")
def test_a_table_trains_what_is_missing_and_nothing_twice(tmp_path, monkeypatch):
    table = catalogue.chosen("digits_lt", ["erm", "post_hoc_logit_adjustment"])
    table = table._replace(changes=table.changes | {"imbalance.ratio": 5.0})
    first = runs.run(table, small(seeds=1), tmp_path, QUIET)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(kept) == 1

    second = runs.run(table, small(seeds=2), tmp_path, QUIET)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(tmp_path.rglob("result.json"))) == 2
    for name in table.rows:
        ours, before = second[name].summary["seeds"], first[name].summary["seeds"]
        assert ours[:1] == before
        assert [result["seed"] for result in ours] == [0, 1]
    # The networks of the first row, evaluated with adjusted logits.
    evaluated = evaluate.evaluate_run(tmp_path / "erm", logit_adjustment=1.0, console=QUIET)
    adjusted = second["post_hoc_logit_adjustment"].summary["seeds"]
    assert [result["metrics"]["test"] for result in adjusted] == [
        result["metrics"]["logit_adjusted"] for result in evaluated["seeds"]
    ]
    nll = second["erm"].summary["seeds"][0]["metrics"]["test"]["nll"]
    assert adjusted[0]["metrics"]["test"]["nll"] != nll

    lines = comparison.compare(second)
    about = {"command": "the command", "trials": 0, **runs.about(second)}
    save.save_table(tmp_path, "digits_lt", lines, about, QUIET)
    told = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in told["rows"]] == list(table.rows)
    for row in told["rows"]:
        seeds = second[row["name"]].summary["seeds"]
        errors = {
            str(r["seed"]): pytest.approx(100 * (1 - r["metrics"]["test"]["accuracy"]))
            for r in seeds
        }
        assert row["values"] == errors
    assert told["commits"] == [provenance.commit()]
    assert told["rows"][1]["value"] == pytest.approx(lines[1].value)
    markdown = (tmp_path / "table.md").read_text()
    assert f"| erm | {lines[0].value:.2f} ± {lines[0].std:.2f} | 2 |" in markdown
    assert f"; commit {provenance.commit()}." in markdown
    assert r"post\_hoc\_logit\_adjustment" in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    # With all there, no step is taken, and each seed keeps what is told of its machine.
    path = tmp_path / "erm" / "seed1" / "result.json"
    path.write_text(path.read_text().replace('"device": "', '"device": "another '))
    monkeypatch.setattr(checkpoints.Checkpoints, "save", None)
    third = runs.run(table, small(seeds=2), tmp_path, QUIET)
    assert comparison.compare(third) == lines
    (device,) = runs.about(second)["devices"]
    for outcomes in (third, {name: third[name] for name in list(table.rows)[1:]}):
        assert runs.about(outcomes)["devices"] == [device, f"another {device}"]

    # The rows that share these networks do not share other code's.
    monkeypatch.setattr(provenance, "of_code", lambda: "0" * 32)
    for ask in (runs.run, runs.plan):
        with pytest.raises(ConfigError, match="erm/seed0 was made with other code"):
            ask(table._replace(rows={"post": table.rows["post_hoc_logit_adjustment"]}),
                small(seeds=2), tmp_path, QUIET)  # fmt: skip


@pytest.mark.guarantee("fingerprints")
def test_a_row_of_other_code_is_named_before_any_is_trained(tmp_path, monkeypatch):
    table = catalogue.chosen("digits", ["erm", "lpa"])
    _, last = table.rows
    made = dict.fromkeys(provenance.FINGERPRINTS, "0" * 32)
    (tmp_path / last / "seed0").mkdir(parents=True)
    files.write_json(
        tmp_path / last / "seed0" / "result.json",
        {
            "seed": 0,
            "metrics": {},
            "perturbation": {},
            "sessions": [made | {"epochs": 2, "from_step": 0}],
        },
    )
    monkeypatch.setattr(loop, "train", None)
    with pytest.raises(ConfigError, match=r"lpa/seed0 was made with other data .* and other code"):
        runs.run(table, small(seeds=1), tmp_path, QUIET)


def test_a_row_that_diverges_is_reported(tmp_path, monkeypatch):
    def train(parts, *_):
        if parts.config["schedule"]["learning_rate"] > 1:
            raise fit.NonFiniteLossError("Step 3 was not finite.")
        (result,) = result_of(0.9).summary["seeds"]
        session = {"device": "", "versions": {}, "commit": None}
        return {"config": parts.config, "seeds": [result | {"sessions": [session]}]}

    monkeypatch.setattr(loop, "train", train)
    table = catalogue.chosen("digits", ["erm"])
    rows = {"hot": Row("erm", changes={"schedule.learning_rate": 1e30})} | table.rows
    outcomes = runs.run(table._replace(rows=rows), small(seeds=1), tmp_path, QUIET)
    assert outcomes["hot"].summary is None
    lines = comparison.compare(outcomes)
    about = {"command": "", "trials": 0, **runs.about(outcomes)}
    save.save_table(tmp_path, "digits", lines, about, QUIET)
    markdown = (tmp_path / "table.md").read_text()
    assert "| hot | failed | 0 |" in markdown
    assert "hot: Step 3 was not finite." in markdown
    assert "| erm | 10.00 | 1 |" in markdown
    assert "; commit unknown." in markdown


@pytest.mark.guarantee("search")
def test_a_search_chooses_by_the_validation_set_alone(tmp_path, monkeypatch):
    tried = {}

    def train(config, workdir, _):
        assert config.validation_fraction == tuning.VALIDATION_FRACTION
        assert config.seed not in range(2)
        rate = config.schedule.learning_rate
        workdir.mkdir(parents=True, exist_ok=True)
        tried.setdefault(workdir.parent.name, []).append(config.to_dict())
        if rate > 0.25:
            raise fit.NonFiniteLossError("Step 3 was not finite.")
        # Best near 0.04; worse there on the test set.
        accuracy = 1 - abs(np.log(rate / 0.04)) / 10
        metrics = {
            "validation": {"accuracy": accuracy, "nll": 1.0},
            "test": {"accuracy": 1 - accuracy},
        }
        return {"seeds": [{"metrics": metrics}]}

    monkeypatch.setattr(loop, "train_and_evaluate", train)
    table = catalogue.chosen("digits_lt", ["post_hoc_logit_adjustment", "erm", "lpa"])
    fixed = {"perturbation.lpa.steps": 1}
    lpa = table.rows["lpa"]
    lpa = lpa._replace(changes={**lpa.changes, **fixed})
    table = table._replace(rows={**table.rows, "lpa": lpa})
    tuned = tuning.tuned(table, small(seeds=2), 12, tmp_path, QUIET)
    assert tried.keys() == {"erm", "lpa"}
    assert [len(configs) for configs in tried.values()] == [12, 12]
    for name, configs in tried.items():
        first = runs.configure(table, table.rows[name], small(seeds=2))[0]
        assert configs[0]["schedule"] == first.schedule.to_dict()
        rates = [config["schedule"]["learning_rate"] for config in configs]
        best = min(rates, key=lambda rate: abs(np.log(rate / 0.04)))
        assert tuned.rows[name].changes["schedule.learning_rate"] == best
        assert json.loads((tmp_path / name / "search.json").read_text())["trial"] == rates.index(
            best
        )
    assert fixed.items() <= tuned.rows["lpa"].changes.items()
    assert tuned.rows["post_hoc_logit_adjustment"].changes == tuned.rows["erm"].changes
    # What the user fixes is not searched.
    protocol = small(1, **{"schedule.learning_rate": 0.05})
    erm = catalogue.chosen("digits", ["erm"])
    assert tuning.tuned(erm, protocol, 1, tmp_path, QUIET) == erm


def test_a_plan_lists_what_is_left_to_train(tmp_path):
    console = Console(record=True, width=120, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    table = catalogue.chosen("digits_lt", ["erm", "post_hoc_logit_adjustment"])
    table = table._replace(changes=table.changes | {"imbalance.ratio": 5.0})
    with console.file:
        seconds = runs.plan(table, small(seeds=3), tmp_path, console, trials=2)
        assert seconds > 0
    shown = console.export_text()
    assert "0 of 3" in shown
    assert "those of erm" in shown
    assert not list(tmp_path.iterdir())


def call(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lpa_jax.table", *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.guarantee("bad-input")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Say which table to run, for example --table=digits_lt."),
        (["--table=digit"], "There is no table 'digit'; did you mean digits"),
        (["--table=digits", "--config.epochs"], "sets no key: write --config.KEY=VALUE."),
        (["--table=digits", "--seeds=2"], "There is no --seeds: give --config.num_seeds=VALUE."),
        (
            ["--table=digits", "--config.seed=3"],
            "--config.seed cannot be set for a table: the seeds of a table count",
        ),
        (
            ["--table=digits", "--config.num_seeds=0"],
            "--config.num_seeds must be a whole number from 1, not 0.",
        ),
        (["--table=digits", "--methods="], "--methods names no row"),
        (["--table=digits", "--config.modle.name=x"], "did you mean config.model?"),
    ],
)
def test_a_wrong_call_ends_in_a_sentence(arguments, sentence, tmp_path):
    workdir = tmp_path / "table"
    ended = call(*arguments, f"--workdir={workdir}")
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not workdir.exists()


@pytest.mark.guarantee("bad-input")
@pytest.mark.parametrize(
    ("methods", "changes", "sentence"),
    [
        (["lpq"], {}, "The table 'digits' has no row 'lpq'; its rows are erm, "),
        (["erm", "erm"], {}, "--methods names a row twice: erm, erm."),
        (["erm"], {"epoch": 3}, "no config.epoch: did you mean config.epochs?"),
        (["erm"], {"model.options.depht": 4}, "has 'depht', which small_cnn does not"),
        (["erm"], {"modle.name": "x"}, "did you mean config.model?"),
        (["erm"], {"perturbation.lpa.epsilon": 3}, "choose rows that have it by --method"),
        (["lpa"], {"perturbation.lpa.site": "group9", "epochs": 1}, "group9"),
        (["erm"], {"epochs": "x"}, "cannot be 'x': give it the type int."),
        (["erm"], {"epochs.x": 1}, "config.epochs has no keys of its own"),
        (["erm"], {"dataset": "datasets_of_ours:without_test"}, "row erm have no split 'test'"),
    ],
)
def test_a_table_that_cannot_be_run_is_refused_before_training(
    methods, changes, sentence, tmp_path, monkeypatch
):
    module = types.ModuleType("datasets_of_ours")
    found = data.load("digits").splits
    splits = {"train": found["train"], "other": found["test"]}
    monkeypatch.setattr(module, "without_test", lambda: splits, raising=False)
    monkeypatch.setitem(sys.modules, "datasets_of_ours", module)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        runs.run(
            catalogue.chosen("digits", methods),
            runs.Protocol(1, changes=changes),
            tmp_path / "table",
            QUIET,
        )
    assert not (tmp_path / "table").exists()


@pytest.mark.guarantee("killed-table")
@pytest.mark.slow
def test_a_killed_table_resumes_to_the_same_numbers(tmp_path):
    arguments = [
        "--table=digits_noisy", "--methods=erm,elr", "--config.num_seeds=2", "--config.epochs=3",
        "--trials=7", "--config.limit=300", "--config.checkpoint_every=0.4",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call(*arguments, f"--workdir={whole}").returncode == 0

    def finished():
        return {path: path.stat().st_mtime_ns for path in killed.rglob("result.json")}

    rng, kills = np.random.default_rng(0), 0
    while True:
        before = finished()
        process = subprocess.Popen(
            [sys.executable, "-m", "lpa_jax.table", *arguments, f"--workdir={killed}"],
            cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        # Some way into the run after the next one or two.
        wanted = len(before) + rng.integers(1, 4)
        while process.poll() is None and len(finished()) < wanted:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 8))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        assert before.items() <= finished().items()
    print(f"{kills} kills")
    assert kills >= 4
    ours, theirs = (json.loads((d / "table.json").read_text()) for d in (killed, whole))
    assert ours["rows"] == theirs["rows"]
