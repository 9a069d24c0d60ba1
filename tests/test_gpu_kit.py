"""The kit for a machine with a GPU goes on where it was stopped, and loses nothing on the way."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from gpu import run
import numpy as np
import pytest

from lpa_jax import data, models
from lpa_jax.tables import catalogue

SCRIPT = pathlib.Path(run.__file__)
STEPS = [task for task in run.tasks(5, False) if not task.resumes]
TABLES = [task for task in run.tasks(5, False) if task.resumes]


def new_state():
    return {"code": "here", "tiny": False, "saved": 0, "finished": {}, "failed": {}}


def fill(work):
    (work / "cifar10_lt" / "erm").mkdir(parents=True)
    (work / "cifar10_lt" / "empty").mkdir()
    (work / "cifar10_lt" / "erm" / "weights").write_bytes(os.urandom(2500))
    (work / run.DATA).write_bytes(b"images")


def put(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- What is to be done. --------------------------------------------------------------------------


def test_steps_come_first_and_then_the_tables():
    names = [task.name for task in run.tasks(5, False)]
    assert names == [
        "step_cost_wrn_28_10_float32",
        "step_cost_wrn_28_10_bfloat16",
        "step_cost_resnet_32_float32",
        "step_cost_resnet_32_bfloat16",
        "against_pytorch_wrn_28_10_float32",
        "against_pytorch_wrn_28_10_bfloat16",
        "cifar10_lt",
        "cifar10_noisy",
    ]


@pytest.mark.parametrize("tiny", [False, True])
def test_what_is_run_exists(tiny):
    for task in run.tasks(5, tiny):
        if task.resumes:
            assert task.name in catalogue.TABLES
            chosen = [word[10:] for word in task.command if word.startswith("--methods=")]
            assert all(set(words.split(",")) < {*catalogue.TABLES[task.name].rows}
                       for words in chosen)  # fmt: skip
        else:
            assert pathlib.Path(task.command[0]).is_file()
            name = task.command[1].removeprefix("--model=")
            models.create(name, num_classes=10, mean=(0.5,), std=(0.25,))


def test_the_tables_train_resnet_32_for_200_epochs(tmp_path):
    from lpa_jax import commands
    from lpa_jax.tables import runs

    for task in TABLES:
        _, changes = commands.changes(task.command)
        protocol = runs.Protocol(changes.pop("num_seeds"), None, changes)
        for row in catalogue.TABLES[task.name].rows.values():
            config, _ = runs.configure(catalogue.TABLES[task.name], row, protocol)
            assert (config.model.name, config.epochs) == ("resnet_32", 200)
            assert config.dataset == "npz:cifar10.npz"


def test_another_command_is_another_task():
    state, one = new_state(), TABLES[0]
    assert run.why_not(one, state, {}) is None
    state["finished"][one.name] = {"command": one.command, "seconds": 1}
    assert run.why_not(one, state, {}) == "finished"
    (more,) = (task for task in run.tasks(6, False) if task.name == one.name)
    assert run.why_not(more, state, {}) is None


def test_a_clone_elsewhere_has_finished_the_same_steps():
    state, one = new_state(), STEPS[0]
    elsewhere = ["/elsewhere/step_cost.py", *one.command[1:]]
    state["finished"][one.name] = {"command": elsewhere, "seconds": 1}
    assert run.why_not(one, state, {}) == "finished"


def test_what_the_machine_lacks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    found = run.hindrances(run.tasks(5, False), tmp_path / "none.npz")
    assert {name: words.split(":")[0] for name, words in found.items()} == {
        "against_pytorch_wrn_28_10_float32": "left out",
        "against_pytorch_wrn_28_10_bfloat16": "left out",
        "cifar10_lt": "left, needs --data",
        "cifar10_noisy": "left, needs --data",
    }
    told = run.report(run.tasks(5, False), new_state(), found, tmp_path)
    assert told.count("left out: PyTorch is not installed here") == 2


# --- The state. -----------------------------------------------------------------------------------


def test_a_state_travels_in_small_files_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART_BYTES", 1000)
    work, out, back = (tmp_path / name for name in ("work", "out", "back"))
    fill(work)
    state = new_state() | {"failed": {"x": "y"}}
    run.save(state, work, out)
    assert 2 < len(list(out.iterdir())) < 10
    assert all(path.stat().st_size <= 1000 for path in out.iterdir())
    back.mkdir()
    assert run.load(out, back) == state
    weights = pathlib.Path("cifar10_lt", "erm", "weights")
    assert (back / weights).read_bytes() == (work / weights).read_bytes()
    assert (back / "cifar10_lt" / "empty").is_dir()
    # Images are sent once, not with every state.
    assert not (back / run.DATA).exists()


def test_a_state_takes_the_place_of_the_one_before(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    fill(work)
    state = new_state()
    for _ in range(2):
        run.save(state, work, out)
    assert [path.name for path in out.iterdir()] == ["state000002.1of1"]


def test_a_state_of_which_a_part_is_missing_is_not_taken(tmp_path):
    for name in ("state000001.1of1", "state000002.1of2"):
        put(tmp_path / name)
    assert [path.name for path in run.newest(tmp_path)] == ["state000001.1of1"]


def test_a_state_that_is_not_there_or_damaged_ends_in_a_sentence(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    with pytest.raises(SystemExit, match="leave --state out in the first slice"):
        run.load(out, work)
    fill(work)
    run.save(new_state(), work, out)
    (path,) = out.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=r"is damaged .* copy it again"):
        run.load(out, tmp_path / "back")


def test_only_checkpoints_that_are_read_again_travel(tmp_path):
    table = tmp_path / "cifar10_lt"
    for row, finished in (("erm", True), ("lpa", True), ("lpl", False)):
        for step in ("9", "10", "11.orbax-checkpoint-tmp"):
            put(table / row / "seed0" / "checkpoints" / step / "weights")
        if finished:
            put(table / row / "seed0" / "result.json")
    put(tmp_path / "cifar10_noisy" / "erm" / "seed0" / "result.json")
    put(tmp_path / "cifar10_noisy" / "erm" / "seed0" / "checkpoints" / "9" / "weights")
    run.prune(tmp_path)
    # Post-hoc logit adjustment evaluates the networks of erm.
    assert sorted(str(path.relative_to(table)) for path in table.glob("*/*/*/*")) == [
        "erm/seed0/checkpoints/10",
        "lpl/seed0/checkpoints/10",
    ]
    assert not list(tmp_path.glob("cifar10_noisy/*/*/checkpoints/*"))
    assert run.progress(table) == [
        "erm: 1 seeds finished",
        "lpa: 1 seeds finished",
        "lpl: 0 seeds finished, seed0 at step 10",
    ]


# --- A slice. -------------------------------------------------------------------------------------

SAVES = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit({code})); time.sleep(60)"


@pytest.mark.parametrize(
    ("program", "resumes", "seconds", "ran", "finished", "failed"),
    [
        ("pass", False, 60, False, True, ""),
        ("import sys; sys.exit('It went wrong.')", False, 60, False, False, "It went wrong."),
        ("import os, signal; os.kill(os.getpid(), 9)", True, 60, False, False, "code -9"),
        # Stopped: what resumes goes on, what does not begins again, if it had not the whole slice.
        (SAVES.format(code=75), True, 3, False, False, ""),
        ("import time; time.sleep(60)", False, 1, True, False, ""),
        ("import time; time.sleep(60)", False, 1, False, False, "--retry and more --minutes"),
        # It ended while it was asked to stop.
        (SAVES.format(code=0), True, 3, False, True, ""),
        (SAVES.format(code=2), True, 3, False, False, "code 2"),
        ("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)", True, 3, False,
         False, ""),
    ],
)  # fmt: skip
def test_how_a_task_ends(tmp_path, program, resumes, seconds, ran, finished, failed):
    state = new_state()
    part = run.Slice(tmp_path, time.monotonic() + seconds, 1.0)
    part.ran = ran
    run.attempt(run.Task("one", ["-c", program], resumes), state, part, 9.5)
    assert ("one" in state["finished"]) == finished
    assert failed in state["failed"].get("one", "")
    assert bool(failed) == ("one" in state["failed"])


def test_a_slice_that_is_ended_from_outside_blames_no_step(tmp_path):
    state, part = new_state(), run.Slice(tmp_path, time.monotonic() + 60, 1.0)
    before = signal.signal(signal.SIGALRM, part.stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        run.attempt(run.Task("one", ["-c", "import time; time.sleep(60)"]), state, part, 9.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert part.over
    assert state == new_state()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "run needs --out"),
        (["unpack", "--data={new}"], "unpack needs folders of packs"),
        (["run", "{out}", "--out={new}"], "Only unpack takes folders"),
        (["--out={out}"], "holds a state already"),
        (["--out={new}", "--data={new}"], "make it by `run.py unpack`"),
        (["--state={out}", "--out={out}"], "use the commit that it was made with"),
        (["--state={out}", "--out={out}", "--tiny"], "use the commit that it was made with"),
        (["collect", "--state={out}", "--out={new}"], "collect them in a clone"),
        (["--out={new}"], "JAX sees no GPU here (cpu)"),
    ],
)
def test_what_cannot_be_a_slice_is_refused(words, told, tmp_path, monkeypatch, capsys):
    work, out, new = (tmp_path / name for name in ("work", "out", "new"))
    fill(work)
    run.save(new_state(), work, out)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = [word.format(out=out, new=new) for word in words]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit) as refused:
        run.main()
    assert told in f"{refused.value} {capsys.readouterr().err}"
    assert not new.exists()


def test_a_rehearsal_and_a_measurement_have_states_of_their_own(tmp_path, monkeypatch):
    from lpa_jax.training import provenance

    work, out = tmp_path / "work", tmp_path / "out"
    fill(work)
    run.save(new_state() | {"code": provenance.of_code()}, work, out)
    monkeypatch.setattr(sys, "argv", ["run.py", "--tiny", f"--state={out}", f"--out={out}"])
    with pytest.raises(SystemExit, match="a rehearsal needs a state of its own"):
        run.main()


# --- Images. --------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "all.npz"
    run.random_data(path)
    return path


def fingerprint(path, name):
    changes = catalogue.TABLES[name].changes
    loaded = data.load(f"npz:{path}", validation_fraction=0.0)
    imbalance = {"kind": changes.get("imbalance.kind", "none"), "ratio": 100.0}
    noise = {"kind": changes.get("noise.kind", "none"), "rate": 0.4}
    return data.modify(loaded, imbalance, noise).fingerprint()


def test_the_first_pack_is_all_that_the_long_tail_trains_on(images, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SHARD", 100)
    monkeypatch.setattr(run, "PACK_BYTES", 100_000)
    packs, path = tmp_path / "packs", tmp_path / "cifar10.npz"
    run.pack(images, packs)
    first, *others = sorted(packs.iterdir())
    assert len(others) > 1
    run.unpack([first], path)
    tail, noisy = TABLES
    assert run.lacks(tail, path) is None
    assert fingerprint(path, tail.name) == fingerprint(images, tail.name)
    assert "needs 758 more images: unpack the other packs" in run.lacks(noisy, path)
    # In any order, one after another.
    for pack in reversed(others):
        run.unpack([pack], path)
    assert run.lacks(noisy, path) is None
    with np.load(images) as expected, np.load(path) as found:
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name])


def test_the_long_tail_lacks_its_images_without_the_first_pack(images, tmp_path):
    run.pack(images, tmp_path / "packs")
    run.unpack([tmp_path / "packs" / "pack1"], tmp_path / "some.npz")
    assert "needs" in run.lacks(TABLES[0], tmp_path / "some.npz")
    with pytest.raises(SystemExit, match="lacks images itself"):
        run.pack(tmp_path / "some.npz", tmp_path / "again")


def test_packs_that_do_not_fit_are_refused(images, tmp_path):
    packs = tmp_path / "packs"
    run.pack(images, packs)
    with pytest.raises(SystemExit, match="holds packs already"):
        run.pack(images, packs)
    with pytest.raises(SystemExit, match="has all images already"):
        run.unpack([packs / "pack0"], images)
    with pytest.raises(SystemExit, match="holds no pack"):
        run.unpack([packs], tmp_path / "some.npz")
    with np.load(images) as file:
        arrays = dict(file)
    np.savez(images, **arrays | {"y_test": arrays["y_test"][::-1]})
    run.pack(images, tmp_path / "other")
    run.unpack([packs / "pack0"], tmp_path / "some.npz")
    with pytest.raises(SystemExit, match="is of other data"):
        run.unpack([tmp_path / "other" / "pack1"], tmp_path / "some.npz")
    (packs / "pack1" / "000.webp").unlink()
    with pytest.raises(SystemExit, match="lacks some of its WebP files"):
        run.unpack([packs / "pack1"], tmp_path / "some.npz")


# --- All of it. -----------------------------------------------------------------------------------


def command(*words):
    return [sys.executable, str(SCRIPT), *map(str, words)]


@pytest.mark.slow
def test_a_rehearsal_goes_on_on_another_machine(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    first, second, results = (tmp_path / name for name in ("first", "second", "results"))
    with subprocess.Popen(
        command("--tiny", "--minutes=60", f"--out={first}"), env=env, stdout=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        while not list(tmp_path.glob("lpa_jax_gpu_*/cifar10_lt/erm/seed0/checkpoints/[1-9]")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        process.terminate()
        told = process.communicate()[0]
    assert process.returncode == 75, told
    assert "step_cost_wrn_10_1_float32: finished" in told
    assert "cifar10_lt: stopped" in told
    assert "cifar10_noisy begins" not in told
    # Nothing but the state is left of the first.
    assert not list(tmp_path.glob("lpa_jax_gpu_*"))
    done = subprocess.run(
        command("--tiny", "--minutes=60", f"--state={first}", f"--out={second}"),
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step_cost_wrn_10_1_float32 begins" not in done.stdout
    assert "cifar10_lt: finished" in done.stdout
    assert len(list(second.iterdir())) == 1
    collect = command("collect", f"--state={second}", f"--out={results}")
    subprocess.run(collect, env=env, check=True)
    cost = json.loads((results / "step_cost_wrn_10_1_float32.json").read_text())
    assert len(cost["rows"]) == 8
    for table, number in (("cifar10_lt", 3), ("cifar10_noisy", 2)):
        found = json.loads((results / table / "table.json").read_text())
        assert len(found["rows"]) == number
    about = json.loads((results / "about.json").read_text())
    assert {"commit", "code", "finished"} <= about.keys()
    assert not about["failed"]
