"""Failures outside of the program: full disks, unwritable directories, lost processes."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stored import leaves

from lpa_jax import commands, main
from lpa_jax.training import checkpoints, config, files, identity, metric_log

ROOT = pathlib.Path(__file__).parent.parent

# tensorboardX and orbax are third parties to these; where they cannot write, they leave threads
# and coroutines behind.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture
def mount(tmp_path):
    """Return a function that mounts a file system of its own; only root may."""
    mounted = []

    def of_size(options):
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no small file system can be mounted here")
        mounted.append(directory)
        return directory

    yield of_size
    for directory in mounted:
        subprocess.run(["umount", "-l", directory], check=True)


def fill(disk, leave=0):
    """Fill a file system up to `leave` bytes; return the file to remove to make room again."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        room = os.statvfs(disk)
        count = room.f_bavail * room.f_frsize - leave
        # Less is written where a run took some of the room meanwhile: it is full all the same.
        file.write(bytes(count))
    return ballast


STATE = {"a": jnp.arange(30000.0), "b": jnp.int32(1)}


def save(directory, step):
    with contextlib.closing(checkpoints.Checkpoints(directory)) as saved:
        saved.save(step, {"state": scaled(step)})


def restored(directory):
    saved = checkpoints.Checkpoints(directory)
    like = jax.eval_shape(lambda: STATE)
    places = jax.tree.map(lambda leaf: leaf.sharding, STATE)
    found = saved.restore({"state": like}, {"state": places})
    saved.close()
    return found["state"]


def scaled(factor):
    return jax.tree.map(lambda leaf: leaf * factor, STATE)


@pytest.mark.root
@pytest.mark.guarantee("full-disk")
@pytest.mark.parametrize("leave", [0, 30_000, 100_000])
def test_a_full_disk_keeps_the_previous_checkpoint(leave, mount):
    disk = mount("size=2M")
    save(disk / "c", 1)
    ballast = fill(disk, leave)
    message = r"checkpoint in .*/c cannot be written \(No space left on device\).*make room"
    with pytest.raises(files.WriteError, match=message):
        save(disk / "c", 2)
    jax.tree.map(np.testing.assert_array_equal, restored(disk / "c"), scaled(1))
    ballast.unlink()
    save(disk / "c", 2)
    jax.tree.map(np.testing.assert_array_equal, restored(disk / "c"), scaled(2))


@pytest.mark.root
@pytest.mark.guarantee("full-disk")
def test_a_full_disk_keeps_the_previous_records(mount):
    disk = mount("size=1M")
    log = metric_log.MetricLog(disk, 0)
    files.write_json(disk / "result.json", {"seed": 0})
    log.write({"step": 1, "loss": 0.5})
    ballast = fill(disk)
    long = {"step": 2} | {f"class{i}": i / 7 for i in range(400)}
    with pytest.raises(files.WriteError, match=r"metrics.jsonl cannot be written \(No space"):
        log.write(long)
    with pytest.raises(OSError, match="No space"):
        files.write_json(disk / "result.json", {"seed": "x" * 5000})
    assert not list(disk.glob("*.partial"))
    assert files.read_json(disk / "result.json") == {"seed": 0}
    assert metric_log.read_rows(disk / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    ballast.unlink()
    again = metric_log.MetricLog(disk, 1)
    again.write(long)
    again.close()
    assert [row["step"] for row in metric_log.read_rows(disk / "metrics.jsonl")] == [1, 2]


@pytest.mark.root
@pytest.mark.guarantee("full-disk")
def test_a_full_disk_is_not_reported_as_a_wrong_work_directory(mount):
    disk = mount("size=1M")
    identity.claim(disk / "begun", {"epochs": 1})
    ballast = fill(disk)
    for claim in (
        lambda: identity.claim(disk / "new", {"epochs": 1}),
        lambda: identity.claim(disk / "begun", {"epochs": "2" * 9000}, allow_change=True),
    ):
        with pytest.raises(files.WriteError, match=r"cannot be written \(No space.*make room"):
            claim()
    # Had the change been half made, the first configuration would now be refused.
    assert identity.claim(disk / "begun", {"epochs": 1}) == []
    ballast.unlink()
    identity.claim(disk / "new", {"epochs": 1})


# ---------------------------------------------------------------- by command line

SMOKE = [
    "--config=configs/digits.py:method=lpa+lpl,smoke",
    "--config.epochs=6",
    "--config.checkpoint_every=0.5",
]


def start(cache, workdir, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "lpa_jax.main", *SMOKE, f"--workdir={workdir}", *arguments],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)},
    )  # fmt: skip


def end(process, timeout=600):
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def until_row(process, workdir, number):
    deadline = time.monotonic() + 600
    while len(metric_log.read_rows(workdir / "seed0" / "metrics.jsonl")) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.guarantee("unwritable-directory")
@pytest.mark.parametrize(
    "kind", ["a file", "in a file", pytest.param("read-only", marks=pytest.mark.root)]
)
def test_a_directory_that_cannot_be_written_is_named(kind, tmp_path, request):
    file = tmp_path / "file"
    file.touch()
    if kind == "read-only":
        # Of the three this alone needs a file system of its own.
        directory = request.getfixturevalue("mount")("size=1M,ro") / "run"
    else:
        directory = {"a file": file, "in a file": file / "run"}[kind]
    message = r"cannot be a work directory: .*Errno"
    with pytest.raises(config.ConfigError, match=message):
        identity.claim(directory, {"epochs": 1})
    code, errors = end(start(tmp_path / "cache", directory))
    assert code == 2, errors
    assert re.fullmatch(rf"lpa_jax: \S+ {message}.*\n", errors), errors
    assert not file.read_bytes()


@pytest.mark.root
@pytest.mark.guarantee("full-disk")
@pytest.mark.slow
def test_a_run_resumes_when_there_is_space_again(mount, tmp_path):
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    assert end(start(cache, whole))[0] == 0
    disk = mount("size=4M")
    process = start(cache, disk / "run")
    until_row(process, disk / "run", 2)
    ballast = fill(disk)
    code, errors = end(process)
    assert code == commands.IO_ERROR, errors
    sentence = errors.strip().rpartition("\n")[2]
    assert sentence.startswith("lpa_jax: ")
    assert "cannot be written (No space left on device)" in sentence
    assert "make room, and rerun the command" in sentence
    kept = [path for path in disk.glob("run/seed0/checkpoints/*") if path.name.isdigit()]
    assert kept
    # No room for anything: the same sentence again, and nothing is lost.
    code, errors = end(start(cache, disk / "run"))
    assert code == commands.IO_ERROR, errors
    assert all(path.exists() for path in kept)
    ballast.unlink()
    code, errors = end(start(cache, disk / "run"))
    assert code == 0, errors
    for name in ("metrics.jsonl", "result.json"):
        ours, theirs = (d / "seed0" / name for d in (disk / "run", whole))
        assert ours.read_text() == theirs.read_text()
    ours, theirs = (leaves(d / "seed0" / "checkpoints") for d in (disk / "run", whole))
    assert ours.keys() == theirs.keys()
    for key, leaf in theirs.items():
        np.testing.assert_array_equal(ours[key], leaf)


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.guarantee("lost-process")
@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_in_time(lost, tmp_path):
    def pair(*more):
        address = f"--coordinator_address=localhost:{free_port()}"
        return [
            start(tmp_path / f"cache{i}", tmp_path / "run", address, "--num_processes=2",
                  f"--process_id={i}", *more)
            for i in range(2)
        ]  # fmt: skip

    epochs = "--config.epochs=60"
    processes = pair(epochs)
    try:
        until_row(processes[0], tmp_path / "run", 2)
        processes[lost].kill()
        # The heartbeat timeout, and some time to notice and to end.
        code, errors = end(processes[1 - lost], timeout=main.HEARTBEAT_TIMEOUT + 60)
    finally:
        for process in processes:
            process.kill()
        # Read what it wrote.
        processes[lost].communicate()
    # Either the trainer notices first, or JAX, which aborts.
    assert code in (commands.TEMPORARY, -6), errors
    assert ("Another process of the run" in errors) or ("another task died" in errors), errors
    kept = {p for p in tmp_path.glob("run/seed0/checkpoints/*") if p.name.isdigit()}
    assert kept
    again = pair(epochs)
    assert [end(process)[0] for process in again] == [0, 0]
    rows = metric_log.read_rows(tmp_path / "run" / "seed0" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == list(range(1, 61))
    json.loads((tmp_path / "run" / "seed0" / "result.json").read_text())
