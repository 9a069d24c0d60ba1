"""Runs that are killed repeatedly end with the bits of an uninterrupted run.

`python -m pytest tests/test_interruption.py -m slow -s` tells how many kills were tried.
"""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest
from stored import leaves

from lpa_jax.training import metric_log

ROOT = pathlib.Path(__file__).parent.parent
KILLS = 10
"""Of each case."""
COMMON = [
    "--config.epochs=12",
    "--config.checkpoint_every=0.4",
    "--config.evaluate_every=3",
]
# Everything that has a state, of whatever kind: moving averages, statistics by epoch, targets by
# example, what an optimizer gathers, several seeds, and batches from the host's threads.
CASES = {
    "lpa": [],
    "lpa+lpl": ["--config.perturbation.lpa.split.window=epoch", "--config.num_seeds=2"],
    "lpl": ["--config.steps_per_dispatch=3"],
    "lpg": ["--config.input=host"],
    "lpa+lpl+lpg": ["--config.model.dtype=bfloat16"],
    "isda+drw": ["--config.imbalance.kind=exponential", "--config.imbalance.ratio=5"],
    "mixup+sam": [],
    "asam": ["--config.optimizer.accumulate=3"],
    "elr": ["--config.noise.kind=symmetric_exclusive", "--config.noise.rate=0.4"],
    "dropblock+adversarial": [],
}
AIMS = ("anywhere", "training", "saving", "training", "saving")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.guarantee("killed-run", "complete-checkpoint"),
]


def start(method, workdir, cache, *more):
    command = [
        sys.executable, "-m", "lpa_jax.main", f"--config=configs/digits.py:method={method},smoke",
        f"--workdir={workdir}", *COMMON, *CASES.get(method, []), *more,
    ]  # fmt: skip
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    # What has the name of a checkpoint was complete, whenever the process before was killed.
    assert "cannot be read" not in errors


def unfinished(workdir):
    """Return the checkpoints that are being written, or were when the process was killed."""
    return set(workdir.glob("seed*/checkpoints/*.orbax-checkpoint-tmp*"))


def saved(workdir):
    return {path for path in workdir.glob("seed*/checkpoints/*") if path.name.isdigit()}


def kill(process, workdir, aim, rng):
    """Kill a process at the moment aimed at; return whether it was saving, None if it had ended."""
    old, before = unfinished(workdir), saved(workdir)

    def begun():
        # What a process killed before left behind, the next removes, and may use the name again.
        old.intersection_update(unfinished(workdir))
        return unfinished(workdir) - old

    def wait(seconds=None, until=lambda: False):
        deadline = time.monotonic() + (600 if seconds is None else seconds)
        while process.poll() is None and time.monotonic() < deadline and not until():
            begun()
            time.sleep(0.001)

    if aim == "anywhere":
        wait(rng.uniform(0, 10))
    else:
        # Something of this process: its first checkpoint, begun or complete.
        wait(until=lambda: begun() or saved(workdir) - before)
        wait(rng.uniform(0, 1.5))
    if aim == "saving":
        old |= unfinished(workdir)
        wait(until=begun)
        time.sleep(rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert "cannot be read" not in errors
    if process.returncode != -signal.SIGKILL:
        assert process.returncode == 0, errors
        return None
    return bool(begun())


def assert_same(ours, theirs):
    seeds = sorted(path.name for path in theirs.glob("seed*"))
    assert sorted(path.name for path in ours.glob("seed*")) == seeds
    for seed in seeds:
        for name in ("metrics.jsonl", "result.json"):
            assert (ours / seed / name).read_text() == (theirs / seed / name).read_text()
        rows = metric_log.read_rows(ours / seed / "metrics.jsonl")
        assert [row["epoch"] for row in rows] == list(range(1, 13))
        found, expected = (leaves(d / seed / "checkpoints") for d in (ours, theirs))
        assert found.keys() == expected.keys()
        for key, leaf in expected.items():
            np.testing.assert_array_equal(found[key], leaf, err_msg=str(key), strict=True)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (ours, theirs)]
    for summary in summaries:
        del summary["session_seconds"], summary["first_step_time"], summary["config"]["readers"]
    assert summaries[0] == summaries[1]
    assert not list(ours.rglob("*.partial"))
    assert not unfinished(ours)


@pytest.fixture(scope="module")
def tally():
    counts = {"kills": 0, "while saving": 0, "runs finished": 0}
    yield counts
    print("\n" + ", ".join(f"{name}: {count}" for name, count in counts.items()))


@pytest.mark.parametrize("method", CASES)
def test_a_run_killed_repeatedly_ends_with_the_same_bits(method, tmp_path, tally):
    kill_repeatedly(method, tmp_path, tally, list(CASES).index(method), itertools.repeat([]))


def test_a_killed_run_on_files_resumes_with_other_readers_to_the_same_bits(tmp_path, tally):
    for split, number in (("train", 60), ("val", 8), ("test", 8)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = np.random.default_rng([label, i]).integers(0, 256, (20, 30, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    files = [
        f"--config.dataset=folder:{tmp_path / 'images'}", "--config.image_size=16",
        "--config.augment=imagenet", "--config.batch_size=16",
    ]  # fmt: skip
    readers = itertools.cycle((0, 2, 1))
    arguments = ([*files, f"--config.readers={number}"] for number in readers)
    kill_repeatedly("dropout", tmp_path, tally, 0, arguments)


def kill_repeatedly(method, tmp_path, tally, seed, arguments):
    """Kill runs, each with the next arguments, and compare what they come to."""
    rng = np.random.default_rng(seed)
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    finish(start(method, whole, cache, *next(arguments)))
    killed, while_saving, run = 0, 0, 0
    while killed < KILLS:
        workdir = tmp_path / f"run{run}"
        process = start(method, workdir, cache, *next(arguments))
        saving = kill(process, workdir, AIMS[killed % len(AIMS)], rng)
        if saving is None:
            # It ended before the kill: one more resumed run, and a new one is begun.
            assert_same(workdir, whole)
            run += 1
            continue
        killed += 1
        while_saving += saving
    finish(start(method, workdir, cache, *next(arguments)))
    assert_same(workdir, whole)
    tally["kills"] += killed
    tally["while saving"] += while_saving
    tally["runs finished"] += run + 1
    print(f"{method}: {killed} kills, {while_saving} while saving, {run + 1} runs finished")
    assert while_saving >= 2
