"""The command line, in processes of its own."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from stored import leaves
from tfds_fixture import write_tfds

from lpa_jax import commands
from lpa_jax.training import metric_log

ROOT = pathlib.Path(__file__).parent.parent


def command(*arguments):
    return [sys.executable, "-m", "lpa_jax.main", *map(str, arguments)]


def call(*arguments, timeout=300):
    # One CPU device: what a user has.
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command(*arguments),
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def start(*arguments):
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# Statistics by epoch, moving averages and an unfinished epoch are all in the checkpoint.
RESUMED = [
    "--config=configs/digits.py:method=lpa+lpl,smoke",
    "--config.epochs=6",
    "--config.checkpoint_every=0.4",
    "--config.perturbation.lpa.split.window=epoch",
    "--config.num_seeds=2",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the directory of a run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    assert call(*RESUMED, f"--workdir={directory}").returncode == 0
    return directory


def test_none_leaves_a_key_out_that_may_be():
    words = ["--config.limit=None", "--config.model.cached=None", "--config.model.cached=group1"]
    done = call("--config=configs/digits.py:smoke", *words, "--print_config")
    assert "\nlimit = None " in done.stdout
    assert "\nmodel.cached = 'group1' " in done.stdout
    done = call("--config=configs/digits.py:smoke", "--config.epochs=None", "--print_config")
    assert done.stderr == "lpa_jax: --config.epochs cannot be 'None': give an integer.\n"


def damage(checkpoint):
    """Cut every file of a checkpoint short, as a crash of the machine may."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


@pytest.mark.guarantee("killed-run", "sigterm", "damaged-checkpoint")
@pytest.mark.parametrize(
    "end",
    [
        "SIGKILL",
        *(pytest.param(end, marks=pytest.mark.slow) for end in ("SIGTERM", "SIGKILL and damage")),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(end, whole, tmp_path):
    arguments = [*RESUMED, f"--workdir={tmp_path}"]
    if end == "SIGTERM":
        # Before the last step nothing but the signal saves.
        arguments += ["--config.checkpoint_every=100"]
    process = start(*arguments)
    rows = tmp_path / "seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(metric_log.read_rows(rows)) < 2:
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(getattr(signal, end.split()[0]))
    _, errors = process.communicate()
    assert process.returncode == (commands.TEMPORARY if end == "SIGTERM" else -signal.SIGKILL)
    assert not (tmp_path / "seed0" / "result.json").exists()
    found = (tmp_path / "seed0" / "checkpoints").iterdir()
    # What was being written when it was killed has another name.
    newest = max((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))
    if end == "SIGTERM":
        assert f"SIGTERM came; step {newest.name} is saved in {tmp_path / 'seed0'}." in errors
    if end.endswith("damage"):
        damage(newest)
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert (f"checkpoint of step {newest.name}" in done.stderr) == end.endswith("damage")

    for seed in ("seed0", "seed1"):
        for name in ("metrics.jsonl", "result.json"):
            texts = [(directory / seed / name).read_text() for directory in (tmp_path, whole)]
            if end == "SIGTERM":
                # The configuration's fingerprint has when to save in it.
                texts = [re.sub(r'"configuration": "\w+"', "", text) for text in texts]
            assert texts[0] == texts[1]
        # The last of them: SIGTERM adds one of its own.
        last = f"[{max(int(path.name) for path in (whole / seed / 'checkpoints').iterdir())}]"
        ours, theirs = (
            {name: leaf for name, leaf in found.items() if name.startswith(last)}
            for found in (leaves(d / seed / "checkpoints") for d in (tmp_path, whole))
        )
        assert ours
        assert ours.keys() == theirs.keys()
        for name, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[name])


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.exists(), reason="real images are not beside the repository")
@pytest.mark.parametrize("source", ["npz", "tfds"])
def test_real_cifar10_trains_from_either_source(source, tmp_path):
    path = tmp_path / "cifar10.npz"
    unpack = [sys.executable, SHARED / "unpack.py", "cifar10", path, "--train-shards=0:5"]
    subprocess.run(unpack, check=True, capture_output=True)
    extra = [f"--config.dataset=npz:{path}"]
    if source == "tfds":
        with np.load(path) as arrays:
            write_tfds(
                tmp_path, "cifar10",
                arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"],
                version="3.0.2",
            )  # fmt: skip
        extra = [f"--config.data_dir={tmp_path}"]
    done = call(
        "--config=configs/cifar10.py:method=lpa,smoke", f"--workdir={tmp_path / 'run'}", *extra,
        "--config.epochs=4", "--config.limit=4096", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # Chance is 0.1.
    assert summary["metrics"]["test"]["accuracy"]["mean"] > 0.25


METHODS = (
    "erm", "lpa", "lpl", "lpg", "lpa+lpl", "lpa+lpl+lpg", "manifold_mixup", "dropout", "sam",
)  # fmt: skip


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory):
    """32x32 images of ten classes that a network can tell apart by brightness."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "small.npz"
    labels = {"y_train": np.arange(256) % 10, "y_test": np.arange(64) % 10}
    images = {
        f"x{name[1:]}": np.clip(
            rng.normal(25 * y[:, None, None, None], 20, (len(y), 32, 32, 3)), 0, 255
        ).astype(np.uint8)
        for name, y in labels.items()
    }
    np.savez(path, **images, **{name: y.astype(np.uint8) for name, y in labels.items()})
    return path


def smoke(config, method, workdir, small_npz):
    extra = [] if config == "digits" else [f"--config.dataset=npz:{small_npz}"]
    began = time.monotonic()
    done = call(
        f"--config=configs/{config}.py:method={method},smoke", f"--workdir={workdir}", *extra
    )
    assert done.returncode == 0, done.stderr
    # Seconds, a minute at most, on cores that nobody else uses.
    assert time.monotonic() - began < 180
    summary = json.loads((workdir / "summary.json").read_text())
    assert np.isfinite(summary["metrics"]["test"]["nll"]["mean"])
    assert "test accuracy %" in done.stdout


@pytest.mark.parametrize(
    ("config", "method"),
    [("digits", "sam"), pytest.param("cifar10", "lpa+lpl+lpg", marks=pytest.mark.slow)],
)
def test_a_smoke_run_finishes(config, method, tmp_path, small_npz):
    smoke(config, method, tmp_path / "run", small_npz)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", ["digits", "cifar10", "cifar100"])
def test_every_config_and_method_has_a_smoke_run(config, method, tmp_path, small_npz):
    smoke(config, method, tmp_path / "run", small_npz)


def test_importing_the_library_is_quick_and_light():
    program = """
import time, sys
import jax, flax, optax, flax.linen
began = time.perf_counter()
import lpa_jax
seconds = time.perf_counter() - began
heavy = {"tensorflow_datasets", "sklearn", "matplotlib", "tensorflow", "ml_collections", "PIL"}
print(seconds, sorted(heavy & set(sys.modules)))
"""
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split(maxsplit=1)
    assert float(out[0]) < 2.0
    assert out[1].strip() == "[]"
