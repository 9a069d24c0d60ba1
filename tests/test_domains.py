"""Domain generalization end to end: held-out domains in the trainer, sweeps and their tables."""

import json
import re

import jax
import numpy as np
import pytest
from rich.console import Console

import lpa_jax
from lpa_jax import data
from lpa_jax.data import domainbed
from lpa_jax.tables import domain_algorithms, domain_catalogue, domain_report, domains, selection
from lpa_jax.tables.domain_catalogue import DOMAIN_TABLES, PRESETS, PUBLISHED
from lpa_jax.training import config as configuration
from lpa_jax.training import feed, fit, identity
from lpa_jax.training.build import build
from lpa_jax.training.config import ConfigError

QUIET = Console(quiet=True)
PACS = ("art_painting", "cartoon", "photo", "sketch")
SMALL = {
    "model.options": {"width": 4}, "epochs": 2, "steps_per_epoch": 3, "checkpoint_every": 1.0,
    "batch_size": 20,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def small(**changes):
    import runpy

    from lpa_jax import configs

    config = runpy.run_path(str(configs.FILES["domains"]))["get_config"]("smoke")
    for key, value in changes.items():
        config.update_from_flattened_dict({key: value})
    return config


# ---------------------------------------------------------------- the trainer


@pytest.mark.parametrize("place", ["device", "host"])
def test_every_batch_has_equally_many_of_each_domain(place):
    parts = build(small(input=place, steps_per_epoch=7))
    plan, train = parts.plan, parts.dataset.train
    assert plan.num_steps == 14
    made = feed.make_feed(
        place, train, plan.batch_size, plan.num_steps, fit.make_devices(parts), "domains",
        steps_per_epoch=7,
    )  # fmt: skip
    batches = made.open(0, 0)
    seen = []
    for step in range(plan.num_steps):
        _, labels, extra = made.take(step, *next(batches))
        seen.append(np.asarray(extra["domains"]))
        examples = np.asarray(extra["examples"])
        np.testing.assert_array_equal(train.labels[examples], labels)
        np.testing.assert_array_equal(train.extra["domains"][examples], seen[-1])
    batches.close()
    assert {tuple(np.bincount(one)) for one in seen} == {(32,) * 5}
    assert not np.array_equal(seen[0], seen[1])


def test_a_run_evaluates_every_domain_and_chooses_by_none_that_is_tested(tmp_path):
    summary = lpa_jax.train_and_evaluate(small(), tmp_path, QUIET)
    found = {f"{angle}/{part}" for angle in (0, 15, 30, 45, 60, 75) for part in ("in", "out")}
    assert found | {"train", "validation"} == summary["metrics"].keys()
    with pytest.raises(
        ConfigError, match=r"selection.split must be one of validation, 0/in, .* no"
    ):
        build(small(**{"selection.split": "75/out"}))
    assert build(small(**{"selection.split": "60/out"})).selection[0] == "60/out"


def test_some_splits_can_be_left_to_the_end(tmp_path):
    config = small(evaluate_splits=("*/out", "75/in"))
    summary = lpa_jax.train_and_evaluate(config, tmp_path / "a", QUIET)
    lines = (tmp_path / "a/seed0/metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["metrics"].keys() for line in lines)
    outside = {f"{angle}/out" for angle in (0, 15, 30, 45, 60, 75)}
    assert first == outside | {"75/in", "train"}
    assert last == summary["metrics"].keys() > first
    # A choice among one epoch would be none.
    assert "best" not in summary
    whole = lpa_jax.train_and_evaluate(small(), tmp_path / "b", QUIET)
    assert whole["metrics"] == summary["metrics"]


def test_validation_images_can_be_augmented_as_in_domainbed(tmp_path):
    plain = lpa_jax.train_and_evaluate(small(augment="crop=3"), tmp_path / "a", QUIET)
    config = small(augment="crop=3", augment_validation=True)
    found = lpa_jax.train_and_evaluate(config, tmp_path / "b", QUIET)
    changed = {
        split for split, metrics in plain["metrics"].items() if metrics != found["metrics"][split]
    }
    assert changed == {"validation", *(f"{angle}/out" for angle in (0, 15, 30, 45, 60))}
    again = lpa_jax.train_and_evaluate(config, tmp_path / "c", QUIET)
    assert again["metrics"] == found["metrics"]


WRONG = {
    "no such domain": ({"test_domains": ("90",)}, "There is no domain '90': give some of 0, 15"),
    "all domains": (
        {"test_domains": ("0", "15", "30", "45", "60", "75")}, "All domains are test domains",
    ),
    "a set without domains": ({"dataset": "digits"}, "'digits' has no domains to test on"),
    "sampling without domains": (
        {"dataset": "digits", "test_domains": (), "steps_per_epoch": None},
        "config.sampling 'domains' needs the domain of each training example",
    ),
    "a batch that cannot be shared": (
        {"batch_size": 33}, "batch has equally many examples of each of 5 domains: give a multiple",
    ),
    "an epoch of another length": (
        {"sampling": "uniform"}, "config.steps_per_epoch needs config.sampling to be 'domains'",
    ),
    "a split that there is not": (
        {"evaluate_splits": ("*/outside",)}, "evaluate_splits has '\\*/outside', which fits none",
    ),
    "validation that is not augmented": (
        {"augment_validation": True}, "augment_validation has no effect where no image is",
    ),
    "a set to rotate that there is not": ({"dataset": "rotated:"}, "'' is no name of a dataset"),
    "a color that there is not": ({"dataset": "colored:digits"}, "There is no domain '75'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_told(name):
    changes, told = WRONG[name]
    with pytest.raises((ConfigError, data.DataError), match=told):
        build(small(**changes))


# ---------------------------------------------------------------- sweeps


def made(table="pacs", preset="domainbed_2020", rows=("ERM",), names=PACS, **changes):
    """A sweep whose data need not be there."""
    return domains.Sweep(
        table, DOMAIN_TABLES[table], PRESETS[preset], rows, names, 3, 2, False, changes
    )


def test_a_sweep_has_each_draw_of_each_trial_on_each_test_domain():
    found = made(rows=("ERM", "LPA+SWAD")).runs()
    assert len(set(map(str, found))) == len(found) == 3 * 2 * 2 * 4
    assert str(found[0]) == "ERM/art_painting/trial0/draw0"
    assert str(found[-1]) == "LPA+SWAD/sketch/trial2/draw1"
    pairs = made()._replace(pairs=True, trials=1, draws=1).runs()
    assert [run.test for run in pairs][4:6] == [PACS[:2], ("art_painting", "photo")]
    assert len(pairs) == 10
    groups = domains.groups(found)
    assert len(groups) == 3 * 2 * 2
    assert domains.named(made(), "ERM/trial2/draw1") == domains.Group("ERM", 2, 1)
    with pytest.raises(ConfigError, match=r"give ROW/trialN/drawN, such as ERM/trial0/draw0"):
        domains.named(made(), "ERM/art/trial0/draw0")


def test_the_configuration_of_a_run_is_that_of_domainbed(tmp_path):
    run = domains.Run("ERM", ("photo",), 0, 1)
    config, command = domains.configure(made(), run, tmp_path)
    assert config.schedule.learning_rate == pytest.approx(2.7028930742e-5, rel=1e-9)
    assert config.optimizer.weight_decay == pytest.approx(4.4832883882e-4, rel=1e-9)
    assert (config.batch_size, config.perturbation.dropout.rate) == (3 * 39, 0.5)
    assert (config.method, config.test_domains, config.image_size) == ("dropout", ("photo",), 224)
    assert (config.optimizer.name, config.epochs * config.steps_per_epoch) == ("adam", 5000)
    assert command.startswith("python -m lpa_jax.main --config=domains:method=dropout ")


def test_protocols_differ_where_they_did(tmp_path):
    swad = domains.Run("SWAD", ("photo",), 0, 1)

    def configured(preset, run=swad, **arguments):
        return domains.configure(made(preset=preset, **arguments), run, tmp_path)[0]

    found = {preset: configured(preset) for preset in PRESETS}
    norm = {preset: one.model.options.get("freeze_norm", False) for preset, one in found.items()}
    assert norm == {"domainbed_2020": True, "swad": True, "domainbed_head": False, "cached": True}
    augmented = {preset for preset, one in found.items() if one.augment_validation}
    assert augmented == {"domainbed_2020", "domainbed_head"}
    every = {preset: one.evaluate_every * one.steps_per_epoch for preset, one in found.items()}
    assert every == {"domainbed_2020": 300, "swad": 100, "domainbed_head": 300, "cached": 40}
    mixup = domains.Run("Mixup", ("photo",), 0, 1)
    alphas = {p: configured(p, mixup).perturbation.domain_mixup.alpha for p in PRESETS}
    assert alphas["domainbed_2020"] == alphas["swad"] == 0.1
    assert alphas["domainbed_head"] == alphas["cached"] != 0.1
    first = domains.Run("Mixup", ("photo",), 0, 0)
    assert configured("swad", first).perturbation.domain_mixup.alpha == 0.2
    vlcs = domains.Run("SWAD", ("SUN09",), 0, 0)
    names = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
    assert configured("swad", vlcs, table="vlcs", names=names).optimizer.swad.ratio == 0.2
    assert found["swad"].optimizer.swad.ratio == 0.3
    assert configured("swad", domains.Run("ERM", ("photo",), 0, 0)).optimizer.swad.ratio is None
    assert found["cached"].model.cache_dir == str(tmp_path / "prefix")
    assert found["cached"].evaluate_splits == ("*/out", "photo/in")


ROWS = [*domain_algorithms.ALGORITHMS, "LPA+SWAD", "LPA+LPL", "CORAL+LPA"]


@pytest.mark.parametrize("table", ["rotated_digits", "rotated_mnist", "pacs"])
def test_every_row_has_what_is_drawn_for_it(table, tmp_path):
    for preset in ("domainbed_2020", "cached"):
        for row in ROWS:
            of = made(table, preset, (row,))
            run = domains.Run(row, ("photo",), 1, 1)
            config, _ = domains.configure(of, run, tmp_path)
            configuration.check(config)
            values = configuration.flat(config.to_dict())
            drawn = domains.drawn(of, run)
            known = domain_algorithms.hyperparameters(row, of.table.set)
            wanted = domain_algorithms.changes(row, of.table.set, drawn, 3)
            assert drawn.keys() == known.keys()
            lacking = {key for key in wanted if key not in values}
            assert lacking <= {"perturbation.dropout.rate"}
            assert of.table.images != bool(lacking)
            assert {key: values[key] for key in wanted.keys() - lacking} == {
                key: value for key, value in wanted.items() if key not in lacking
            }


def test_counts_of_steps_are_shares_of_the_run():
    drawn = {**domain_algorithms.draw("IRM", "PACS", 0, 0), "irm_penalty_anneal_iters": 9000}
    found = domain_algorithms.changes("IRM", "PACS", drawn, 3)
    assert found["perturbation.irm.anneal_steps"] == 1.0
    drawn["irm_penalty_anneal_iters"] = 500
    found = domain_algorithms.changes("IRM", "PACS", drawn, 3)
    assert found["perturbation.irm.anneal_steps"] == 500 / 5001


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"rows": ["ERM", "ERM"]}, "names a row twice"),
        ({"rows": ["ERN"]}, "There is no algorithm 'ERN'; did you mean ERM"),
        ({"rows": ["SWAD+EMA"]}, "would average the weights twice"),
        ({"changes": {"perturbation.lpa.epsilon": 0.1}}, "fits no row: choose rows that have it"),
        ({"changes": {"dataset": "digits"}}, "'digits' has no domains"),
        ({"table": "pacs"}, "begins with torchvision's V1 weights.*--preset=cached"),
    ],
)
def test_a_sweep_that_cannot_be_is_told(arguments, told):
    wanted = {"table": "rotated_digits", "rows": ["ERM"], "changes": {}} | arguments
    table = DOMAIN_TABLES[wanted["table"]]
    with pytest.raises((ConfigError, data.DataError), match=told):
        domains.sweep(
            "x", table, PRESETS["domainbed_2020"], wanted["rows"], 1, 1, False, wanted["changes"]
        )


def swept(rows, trials=1, draws=1, pairs=False, **changes):
    return domains.sweep(
        "rotated_digits", DOMAIN_TABLES["rotated_digits"], PRESETS["domainbed_2020"], rows, trials,
        draws, pairs, SMALL | changes,
    )  # fmt: skip


@pytest.fixture
def two_domains(monkeypatch):
    """Rotated digits of two angles, so that a sweep is short."""
    monkeypatch.setattr(domainbed, "ANGLES", (0, 45))


def test_a_sweep_trains_what_is_missing_and_tells_what_was_chosen(
    tmp_path, two_domains, monkeypatch
):
    of = swept(["ERM", "SWAD"], trials=2)
    assert [*of.domains] == ["0", "45"]
    assert domains.train_all(of, tmp_path, QUIET) == {}
    assert domains.left(of, tmp_path) == []
    monkeypatch.setattr(domains, "train", None)
    domains.check(of, tmp_path)
    assert domains.train_all(of, tmp_path, QUIET) == {}
    records = domains.collect(of, tmp_path)
    # Of SWAD the last step alone.
    counts = {row: sum(one["args"]["algorithm"] == row for one in records) for row in of.rows}
    assert counts == {"ERM": 2 * 2 * 2, "SWAD": 2 * 2}
    for record in records:
        assert record["args"]["dataset"] == "rotated digits"
        for env in (0, 1):
            # Of a domain that is learned from, in is evaluated at the end alone.
            if f"env{env}_in_acc" not in record:
                assert env not in record["args"]["test_envs"]
                assert record["step"] < 6
                continue
            inside, outside = record[f"env{env}_in_acc"], record[f"env{env}_out_acc"]
            number = len(data.load("rotated:digits", test_domains=("0",)).splits["0/in"])
            whole = (number * inside + (number // 4) * outside) / (number + number // 4)
            assert record[f"env{env}_acc"] == pytest.approx(whole, abs=2e-3)
    result = json.loads(domains.result_path(of.runs()[0], tmp_path).read_text())
    last = [one for one in records if one["args"]["algorithm"] == "ERM"][1]
    assert last["env0_in_acc"] == result["metrics"]["0/in"]["accuracy"]
    swad = domains.Run("SWAD", ("0",), 0, 0)
    result = json.loads(domains.result_path(swad, tmp_path).read_text())
    (record,) = (
        one for one in records
        if one["args"]["algorithm"] == "SWAD" and one["args"]["test_envs"] == [0]
        and one["args"]["trial_seed"] == 0
    )  # fmt: skip
    assert record["env1_out_acc"] == result["average"]["45/out"]["accuracy"]

    about = {
        "command": "the command", "steps": [6], "devices": ["cpu"], "versions": ["jax"],
        "commits": [None],
    }  # fmt: skip
    failed = {"ERM/0/trial7/draw0": "It diverged."}
    domain_report.report(of, records, about, failed, tmp_path, QUIET)
    told = json.loads((tmp_path / "table.json").read_text())
    assert told["rules"].keys() == {"training_domains", "oracle", "oracle_checkpoint"}
    rows = told["rules"]["training_domains"]["rows"]
    assert [row["name"] for row in rows] == ["ERM", "SWAD"]
    choices = selection.choose(selection.checkpoints(records), "training_domains")
    erm = [one for one in choices if one.algorithm == "ERM"]
    wanted = 100 * np.mean([one.accuracy for one in erm if one.test_domain == 0])
    assert rows[0]["cells"][0]["mean"] == pytest.approx(wanted)
    assert rows[0]["difference"] is None
    assert rows[1]["difference"] is not None
    page = (tmp_path / "table.md").read_text()
    assert re.search(r"\| algorithm \| 0 \| 45 \| average \| trials \| difference \|", page)
    assert "## Runs that failed\n\n- ERM/0/trial7/draw0: It diverged." in page
    assert "the small network of configs/domains.py. 6 steps, 2 trials, 1 draw" in page.replace(
        "The small", "the small"
    )
    assert r"\begin{tabular}" in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "table.png").stat().st_size > 1000
    lines = (tmp_path / domains.RECORDS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == records


@pytest.mark.slow
def test_a_run_that_diverges_is_left_out_and_told(tmp_path, two_domains):
    of = swept(["ERM", "RSC"], **{"schedule.learning_rate": 1e30})
    failed = domains.train_all(of, tmp_path, QUIET)
    assert failed.keys() == {str(run) for run in of.runs()}
    assert domains.collect(of, tmp_path) == []


def test_what_was_made_otherwise_is_not_pooled(tmp_path, two_domains):
    domains.train_all(swept(["ERM"]), tmp_path, QUIET)
    with pytest.raises(ConfigError, match=r"it differs in\s+batch_size"):
        domains.check(swept(["ERM"], batch_size=10), tmp_path)


def test_a_killed_sweep_loses_no_more_than_one_interval(tmp_path, two_domains, monkeypatch):
    def save(self, state, step):
        kept(self, state, step)
        if step == 3:
            raise KeyboardInterrupt

    of, kept = swept(["ERM"]), fit.Fit._save
    monkeypatch.setattr(fit.Fit, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        domains.train_all(of, tmp_path / "a", QUIET)
    monkeypatch.setattr(fit.Fit, "_save", kept)
    finished, resumed = identity.find_seeds(
        tmp_path / "a" / str(of.runs()[0]),
        *_found(of, of.runs()[0], tmp_path / "a"),
    )
    assert (finished, resumed) == ([], [0])
    domains.train_all(of, tmp_path / "a", QUIET)
    domains.train_all(of, tmp_path / "b", QUIET)
    assert domains.collect(of, tmp_path / "a") == domains.collect(of, tmp_path / "b")


def _found(of, run, workdir):
    from lpa_jax.training import provenance

    parts = build(domains.configure(of, run, workdir)[0])
    fingerprints = provenance.fingerprints(parts.config, parts.dataset)
    return parts.config, parts.plan.seeds, fingerprints, parts.plan.num_steps


def test_published_averages_are_those_of_the_papers():
    assert PUBLISHED["VLCS"]["LPA"] == {"LPA's paper, protocol not stated": 79.1}
    assert PUBLISHED["VLCS"]["SWAD"]["SWAD's paper"] == 79.1
    assert PUBLISHED["PACS"]["ERM"]["DomainBed 2020"] == 85.5
    assert PUBLISHED["RotatedMNIST"]["ERM"]["DomainBed 2020"] == 98.0
    assert {*domain_catalogue.ROWS, *domain_catalogue.CACHED_ROWS} <= {*ROWS}
