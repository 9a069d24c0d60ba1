"""What is shown of long work: counts of what is finished, measured rates, and how it is stopped."""

import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from lpa_jax.evaluation import evaluate
from lpa_jax.tables import catalogue, runs
from lpa_jax.training import config as configuration
from lpa_jax.training import loop, progress

ROOT = pathlib.Path(__file__).parent.parent


def terminal(width=200):
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def shown(console):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def test_counted_steps_are_finished_and_the_host_is_little_ahead():
    @jax.jit
    def step(x):
        # What is cheap, a CPU computes while the host waits.
        y = jnp.full((64, 64), x)
        return jax.lax.fori_loop(0, 3000, lambda _, y: 0.01 * (y @ y), y)[0, 0]

    x, made, ahead = jax.block_until_ready(step(jnp.float32(0))), [], []
    with progress.bar(terminal(), "work", 40) as bar:
        began = time.monotonic()
        for given in range(1, 41):
            made.append(bar.run(step, made[-1] if made else x))
            bar.given(given, made[-1])
            counted = bar.done
            assert all(one.is_ready() for one in made[:counted])
            ahead.append(given - counted)
        jax.block_until_ready(made[-1])
        bar.finished_to(40)
        seconds = time.monotonic() - began
        # As long as it takes the device, not the host; the first call is taken for compilation.
        assert bar.rate == pytest.approx(40 / seconds, rel=0.3)
    # It does run ahead, so that the device need not wait, but by a second at most.
    assert 1 < max(ahead) <= 3 + 1.5 * 40 / seconds


def test_rates_exclude_compilation_and_other_work():
    def step():
        time.sleep(1.0 if not bar.done else 0.01)

    console = terminal()
    with progress.bar(console, "work", 40) as bar:
        for _ in range(2):
            for _ in range(10):
                bar.run(step)
                bar.finished()
            bar.finished_to(bar.done)
            time.sleep(0.5)
        # The first call is counted and not timed: at most 20 in 0.19 seconds.
        assert 50 < bar.rate < 106
    told = shown(console)
    assert "compiling" in told
    assert "20/40" in told
    # What is apart takes its time again: 20 steps took 1.2 seconds.
    assert "0:00:01 left" in told


def test_parts_that_cost_more_have_their_share_of_the_time_left():
    console = terminal()
    with progress.bar(console, "", 2, unit="batch", work=11.0) as bar:
        bar.begin("quick")
        bar.run(time.sleep, 0.0)
        bar.run(time.sleep, 0.4)
        bar.finished(work=1.0)
    assert "0:00:04 left" in shown(console)


def small(**changes):
    config = configuration.default()
    changes = {
        "model.name": "small_cnn", "model.options": {"width": 4}, "augment": "crop=1", "epochs": 2,
        "limit": 128, "batch_size": 64, **changes,
    }  # fmt: skip
    config.update_from_flattened_dict(changes)
    return config


def test_a_run_reports_compilation_and_its_seeds(tmp_path):
    console = Console(file=io.StringIO(), width=40)
    # Neither taken for a style nor broken into lines.
    workdir = tmp_path / "a[bold]b"
    loop.train_and_evaluate(small(num_seeds=2), workdir, console)
    assert f"Plots, metrics and checkpoints are in {workdir}.\n" in console.file.getvalue()
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("seed ")]
    assert lines[0] == "seed 0 (1 of 2): compiling"
    epochs = [f"seed {seed} ({seed + 1} of 2): epoch {e} of 2" for seed in (0, 1) for e in (1, 2)]
    assert [line.partition(",")[0] for line in lines[1:]] == epochs
    ending = r"[\d.]+ (steps/s|s/step), 0:00:\d\d left$"
    assert all(re.search(ending, line) for line in lines[1:])


def test_a_run_on_a_narrow_terminal_shows_how_much_is_done(tmp_path):
    console = terminal(width=80)
    loop.train_and_evaluate(small(validation_fraction=0.1), tmp_path, console)
    told = shown(console)
    for words in ("compiling", "0/4", "4/4", "0:00:00 left", "seed 0: epoch 2 of 2, loss"):
        assert words in told, words
    assert "…" not in told


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    loop.train_and_evaluate(small(), workdir, Console(quiet=True))
    return workdir


def test_an_evaluation_counts_its_conditions_and_batches(run):
    evaluate.evaluate_run(run, attack=True, console=(console := terminal()))
    told = shown(console)
    # 128 test images, fewer than a batch, in each condition.
    for words in ("clean (1 of 3)", "fgsm (2 of 3)", "pgd (3 of 3)", "3/3", "left", "compiling"):
        assert words in told, words
    evaluate.evaluate_run(run, attack=True, console=(console := Console(file=io.StringIO())))
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "clean (1 of 3): compiling"
    assert re.match(r"pgd \(3 of 3\): error % [\d.]+, ", lines[5])


@pytest.mark.slow
def test_a_table_counts_its_rows_and_shows_the_time_left(tmp_path):
    protocol = runs.Protocol(1, 1, {"limit": 128})
    table = catalogue.chosen("digits", ["erm", "lpl"])
    runs.plan(table, protocol, tmp_path, console := terminal())
    assert "timing lpl" in shown(console)
    assert "2/2" in shown(console)
    runs.run(table, protocol, tmp_path, console := terminal())
    assert "erm (1 of 2) ─" in shown(console)
    assert re.search(r"lpl \(2 of 2\), about 0:00:\d\d left", shown(console))


ENDLESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from lpa_jax import commands, data
from lpa_jax.tasks.classification import Outcomes
from lpa_jax.training import predict as prediction

@jax.jit
def endless(x):
    # What is cheap runs while the host waits, on a CPU.
    y = jnp.full((64, 64), x[0])
    y = jax.lax.while_loop(lambda y: y[0, 0] < 2, lambda y: 0.01 * (y @ y), y)
    return Outcomes(x, x + y[0, 0], x)

def predict(variables, images, labels, index):
    found = endless(jnp.zeros(len(labels)))
    print("given", flush=True)
    return found

examples = data.Examples(np.zeros((64, 2, 2, 1), np.uint8), np.zeros(64, np.int32))
with commands.sentences("stopped."):
    prediction.collect(predict, None, examples, 1)
"""


def test_an_evaluation_stops_at_once_however_long_a_batch_takes():
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "given\n"
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=5)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (130, "lpa_jax: stopped.\n")
    # And it was not given all of its work before.
    assert out.count("given") <= 3


@pytest.mark.slow
def test_training_that_is_stopped_resumes(tmp_path):
    command = [
        sys.executable, "-m", "lpa_jax.main", "--config=configs/digits.py:smoke",
        f"--workdir={tmp_path}", "--config.epochs=30",
    ]  # fmt: skip
    options = {"cwd": ROOT, "env": {**os.environ, "JAX_PLATFORMS": "cpu"}, "text": True}
    process = subprocess.Popen(
        command, **options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
    )
    while "epoch 2" not in process.stdout.readline():
        assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 130
    assert "rerun the command to resume from the last checkpoint" in errors
    assert (
        subprocess.run(command, **options, stdout=subprocess.DEVNULL, check=False).returncode == 0
    )
    assert json.loads((tmp_path / "summary.json").read_text())["seeds"]
