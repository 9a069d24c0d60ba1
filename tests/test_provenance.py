"""The origin of a result is recorded with it, and results of different origins are not pooled."""

import dataclasses
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import digits
from lpa_jax import data
from lpa_jax.evaluation import evaluate
from lpa_jax.training import checkpoints, files, loop, metric_log, provenance
from lpa_jax.training.config import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX"),
    pytest.mark.guarantee("fingerprints"),
]

SMALL = {"limit": 128, "batch_size": 32, "epochs": 1, "schedule.name": "constant"}
QUIET = Console(quiet=True)


def run(workdir, *, allow=False, **changes):
    config = digits.get_config("method=erm,smoke")
    config.update_from_flattened_dict(SMALL | changes)
    console = Console(file=io.StringIO(), width=120)
    summary = loop.train_and_evaluate(config, workdir, console, allow_config_change=allow)
    return summary, console.file.getvalue()


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def unfinish(workdir, seed=0):
    """Delete the result of a seed and keep its checkpoints."""
    (workdir / f"seed{seed}" / "result.json").unlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    run(workdir)
    return workdir


@pytest.fixture
def finished(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def write_npz(path, brightness):
    labels = np.arange(64, dtype=np.uint8) % 2
    images = np.zeros((64, 8, 8, 1), np.uint8) + brightness * labels[:, None, None, None]
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("half", [False, True], ids=["finished", "half-finished"])
def test_other_data_under_the_same_name_are_refused(half, tmp_path):
    path, workdir = tmp_path / "data.npz", tmp_path / "run"
    write_npz(path, 100)
    dataset = {"dataset": f"npz:{path}", "limit": None}
    before, _ = run(workdir, **dataset)
    if half:
        unfinish(workdir)
    write_npz(path, 101)
    kept = contents(workdir)
    for allow in (False, True):
        with pytest.raises(
            ConfigError, match=r"seed0 was made with other data \(fin.*restore the data"
        ):
            run(workdir, num_seeds=2, allow=allow, **dataset)
        assert contents(workdir) == kept
    with pytest.raises(ConfigError, match=r"seed0 was made with other data \(fingerprint"):
        evaluate.evaluate_run(workdir, console=QUIET)
    assert contents(workdir) == kept

    write_npz(path, 100)
    again, _ = run(workdir, num_seeds=2, **dataset)
    assert again["seeds"][0] == before["seeds"][0]


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("field", ["images", "labels"])
def test_every_image_and_label_counts(part, field):
    dataset = data.load("digits")
    examples = dataset.splits[part]
    array = getattr(examples, field).copy()
    array.flat[-1] += 1
    other = dataclasses.replace(examples, **{field: array})
    changed = dataset.replace(splits={**dataset.splits, part: other})
    assert changed.fingerprint() != dataset.fingerprint()
    names = dataset.class_names
    renamed = dataset.replace(class_names=(*names[:-1], "another"))
    assert renamed.fingerprint() != dataset.fingerprint()


# ---------------------------------------------------------------- code


def test_the_code_is_that_which_training_imports(tmp_path):
    package = shutil.copytree(provenance.PACKAGE, tmp_path / "lpa_jax")
    before = provenance.of_code.__wrapped__(package)
    assert before == provenance.of_code()
    for name in (
        "main.py",
        "table.py",
        "tables/runs.py",
        "evaluation/evaluate.py",
        "transforms/new.py",
    ):
        with (package / name).open("a") as file:
            file.write("\nEDITED = True\n")
        assert provenance.of_code.__wrapped__(package) == before, name
    codes = {before}
    for name in ("__init__.py", "transforms/ldam.py", "training/loop.py", "data/npz.py"):
        with (package / name).open("a") as file:
            file.write("\nEDITED = True\n")
        codes.add(provenance.of_code.__wrapped__(package))
    with (package / "losses.py").open("a") as file:
        file.write("\nfrom .transforms import new\n")
    codes.add(provenance.of_code.__wrapped__(package))
    with (package / "transforms" / "new.py").open("a") as file:
        file.write("\nEDITED = 2\n")
    codes.add(provenance.of_code.__wrapped__(package))
    assert len(codes) == 7


def test_all_that_training_imports_is_found():
    program = (
        "import sys, lpa_jax.training.loop, lpa_jax.training.run\n"
        "print(*(name for name in sys.modules if name.split('.')[0] == 'lpa_jax'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=provenance.PACKAGE.parent,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert sorted(provenance._imported(provenance.PACKAGE)) == sorted(done.stdout.split())


@pytest.mark.parametrize("half", [False, True], ids=["finished", "half-finished"])
def test_other_code_is_refused(half, finished, monkeypatch):
    if half:
        unfinish(finished)
    kept = contents(finished)
    monkeypatch.setattr(provenance, "of_code", lambda: "0" * 32)
    monkeypatch.setattr(provenance, "commit", lambda: "abc-dirty")
    with pytest.raises(
        ConfigError,
        match=r"seed0 was made with other code \(fingerprint \w{8} at commit \w+(-dirty)? "
        r"instead of 0{8} at commit abc-dirty\).*give --workdir another.*or remove .*seed0.*"
        r"a git worktree",
    ):
        run(finished, num_seeds=2)
    assert contents(finished) == kept
    # What has taken no step of its own begins anew.
    shutil.rmtree(finished / "seed0" / "checkpoints")
    if half:
        summary, _ = run(finished)
        assert [made["code"] for made in summary["seeds"][0]["sessions"]] == ["0" * 32]


def test_seeds_of_different_code_are_not_evaluated_together(finished):
    shutil.copytree(finished / "seed0", finished / "seed1")
    path = finished / "seed1" / "sessions.json"
    (made,) = files.read_json(path)["sessions"]
    files.write_json(path, {"sessions": [{**made, "code": "0" * 32}]})
    with pytest.raises(ConfigError, match="seed1 was made with other code"):
        evaluate.evaluate_run(finished, console=QUIET)
    evaluate.evaluate_run(finished, seeds=[1], console=QUIET)


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    package = tmp_path / "lpa_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "PACKAGE", package)

    def git(*arguments):
        command = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
        done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert provenance.commit.__wrapped__() is None
    git("init")
    git("commit", "--allow-empty", "-m", "Of something else")
    assert provenance.commit.__wrapped__() is None
    git("add", ".")
    git("commit", "-m", "Of the package")
    head = git("rev-parse", "HEAD")
    assert provenance.commit.__wrapped__() == head
    (package / "__init__.py").write_text("EDITED = True\n")
    assert provenance.commit.__wrapped__() == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit.__wrapped__() is None


# ---------------------------------------------------------------- sessions


def test_each_seed_records_the_session_that_made_it(finished, monkeypatch):
    first = files.read_json(finished / "seed0" / "result.json")["sessions"]
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + ".later")
    summary, _ = run(finished, num_seeds=2)
    assert summary == json.loads((finished / "summary.json").read_text())
    assert not {"device", "versions"} & set(summary)
    sessions = [seed["sessions"] for seed in summary["seeds"]]
    assert sessions[0] == first
    (old,), (new,) = sessions
    assert new["versions"]["jax"] == f"{old['versions']['jax']}.later"
    for made in (old, new):
        assert made["device"].startswith("8 x ")
        assert made["from_step"] == 0
        assert made["commit"] == provenance.commit()


def test_a_seed_records_all_its_sessions(finished, monkeypatch):
    unfinish(finished)
    (old,) = files.read_json(finished / "seed0" / "sessions.json")["sessions"]
    # The same again is no other session.
    summary, _ = run(finished)
    assert summary["seeds"][0]["sessions"] == [old]
    unfinish(finished)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + ".later")
    summary, _ = run(finished)
    last_step = max(int(path.name) for path in (finished / "seed0" / "checkpoints").iterdir())
    assert [made["from_step"] for made in summary["seeds"][0]["sessions"]] == [0, last_step]
    assert summary["seeds"][0]["sessions"][0] == old


@pytest.mark.parametrize("half", [False, True], ids=["finished", "half-finished"])
def test_what_does_not_record_its_origin_is_refused(half, finished):
    path = finished / "seed0" / "result.json"
    result = files.read_json(path)
    del result["sessions"]
    files.write_json(path, result)
    if half:
        path.unlink()
        (finished / "seed0" / "sessions.json").unlink()
    kept = contents(finished)
    with pytest.raises(ConfigError, match=r"seed0 does not record the data and the code.*remove"):
        run(finished, num_seeds=2)
    assert contents(finished) == kept


@pytest.mark.guarantee("damaged-records")
@pytest.mark.parametrize("sessions", ["x", {"a": 1}, [1], [{"data": "0"}]], ids=repr)
@pytest.mark.parametrize("name", ["result.json", "sessions.json"])
def test_damaged_records_of_sessions_are_named(name, sessions, finished):
    path = finished / "seed0" / name
    files.write_json(path, {**files.read_json(path), "sessions": sessions})
    if name == "sessions.json":
        unfinish(finished)
    kept = contents(finished)
    with pytest.raises(ConfigError, match=rf"{name} is damaged: its sessions are no list of"):
        run(finished, num_seeds=2)
    assert contents(finished) == kept


@pytest.mark.parametrize("error", [ConfigError, files.WriteError])
@pytest.mark.parametrize("index", [0, 1])
def test_an_error_of_the_first_process_ends_all(index, error, monkeypatch):
    told = []

    def broadcast(value):
        # The other process is sent what the first has said.
        told.append(value)
        return value if index == 0 else told[0]

    def decide():
        raise error("No room.")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(provenance, "_from_first", broadcast)
    if index:
        told.append({"error": "No room.", "full": error is files.WriteError})
    monkeypatch.setattr(jax, "process_index", lambda: index)
    with pytest.raises(error, match="No room"):
        provenance.by_first(decide)
    assert len(told) == 1 + index


# ---------------------------------------------------------------- configuration


@pytest.mark.guarantee("refused-change")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schedule.learning_rate": 0.05}, r"schedule.learning_rate from 0.1 to 0.05"),
        ({"epochs": 2, "schedule.learning_rate": 0.05}, r"epochs from 1 to 2, schedule.learning"),
    ],
)
def test_a_finished_run_keeps_its_configuration(changes, told, finished):
    kept = contents(finished)
    with pytest.raises(ConfigError, match=f"{told}.*Of a finished seed only config.epochs"):
        run(finished, allow=True, **changes)
    assert contents(finished) == kept
    # The command it was made by shows it.
    _, text = run(finished)
    assert ", 1 epoch " in text


@pytest.mark.guarantee("refused-change")
def test_a_finished_run_trains_on_to_more_epochs(finished, tmp_path, monkeypatch):
    before = files.read_json(finished / "seed0" / "result.json")
    begin = provenance.begin

    def stopped(*arguments):
        begin(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(provenance, "begin", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(finished, allow=True, epochs=3)
    monkeypatch.undo()
    # The result is replaced at the end.
    assert files.read_json(finished / "seed0" / "result.json") == before
    # The change was allowed already.
    summary, text = run(finished, epochs=3)
    assert "3 epochs" in text
    assert summary["config_changes"] == [{"epochs": [1, 3]}]
    (result,) = summary["seeds"]
    assert files.read_json(finished / "seed0" / "result.json") == result
    assert [(made["from_step"], made["epochs"]) for made in result["sessions"]] == [(0, 1), (4, 3)]
    # With a constant learning rate it is as if all had been asked for at once.
    whole, _ = run(tmp_path / "whole", epochs=3)
    (expected,) = whole["seeds"]
    for made in (result, expected):
        del made["sessions"]
    assert result == expected
    rows = [
        metric_log.read_rows(d / "seed0" / "metrics.jsonl") for d in (finished, tmp_path / "whole")
    ]
    assert rows[0] == rows[1]
    # Fewer would be another run.
    kept = contents(finished)
    with pytest.raises(ConfigError, match=r"epochs from 3 to 2.*only config.epochs"):
        run(finished, allow=True, epochs=2)
    assert contents(finished) == kept
    # The network of the first result is gone.
    files.write_json(finished / "seed0" / "result.json", before)
    with pytest.raises(ConfigError, match="has taken 12 steps, but this configuration has 4"):
        run(finished, allow=True, epochs=1)


@pytest.mark.guarantee("refused-change")
def test_a_finished_run_without_its_checkpoints_is_kept(finished):
    shutil.rmtree(finished / "seed0" / "checkpoints")
    kept = contents(finished)
    with pytest.raises(ConfigError, match="to more, with --allow_config_change and its checkp"):
        run(finished, allow=True, epochs=2)
    assert contents(finished) == kept


@pytest.mark.guarantee("refused-change")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model.options.width": 8}, checkpoints.CheckpointError),
        # The labels that were trained on are others.
        ({"noise.rate": 0.5}, ConfigError),
    ],
)
def test_what_cannot_be_resumed_keeps_the_configuration(changes, error, tmp_path):
    noise = {"noise.kind": "symmetric_exclusive", "noise.rate": 0.2}
    run(tmp_path, **noise)
    unfinish(tmp_path)
    kept = contents(tmp_path)
    with pytest.raises(error):
        run(tmp_path, allow=True, **noise | changes)
    assert contents(tmp_path) == kept


def test_another_configuration_is_detected_without_its_file(finished):
    (finished / "config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"seed0 was made with another configuration \(fingerprint"
    ):
        run(finished, epochs=2)
    assert not (finished / "config.json").exists()
