"""The runs of a table in processes of their own."""

import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from lpa_jax.tables import catalogue, jobs, runs, tuning
from lpa_jax.training import fit
from lpa_jax.training.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
QUIET = Console(quiet=True)
SMALL = {"model.options": {"width": 4}, "limit": 200, "batch_size": 32}
PROGRAM = """
import os, pathlib, signal, sys, time
name = sys.argv[-1].removeprefix("--job=")
home = pathlib.Path(sys.argv[1])
(home / name.replace("/", ".")).write_text(str(sorted(os.sched_getaffinity(0))))
if name == "bad/seed0":
    print("lpa_jax: Step 3 was not finite.")
    sys.exit(2)
if name == "dead/seed0":
    os.kill(os.getpid(), signal.SIGKILL)
if name.startswith("long"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
    (home / "late").touch()
print("Peak memory: 1.25 GiB")
"""


def command(home):
    return [sys.executable, "-c", PROGRAM, str(home)]


def run_all(names, home, number=2, console=QUIET):
    cores = sorted(os.sched_getaffinity(0))
    where = [jobs.Place(f"cores {i}", frozenset({cores[i % len(cores)]})) for i in range(number)]
    return jobs.run_all(
        [jobs.job(name) for name in names], command(home), where, home / "logs", console
    )


def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path):
    console = Console(record=True, width=200, file=(tmp_path / "shown").open("w"))
    names = ["bad/seed0", "dead/seed0", "erm/seed0", "erm/seed1"]
    before = os.sched_getaffinity(0)
    failed = {str(job): why for job, why in run_all(names, tmp_path, console=console).items()}
    assert failed.keys() == {"bad/seed0", "dead/seed0"}
    assert failed["bad/seed0"].startswith("Step 3 was not finite. See ")
    assert "ended by SIGKILL; if memory was short, give a smaller --jobs." in failed["dead/seed0"]
    for name in names:
        found = json.loads((tmp_path / name.replace("/", ".")).read_text())
        assert len(found) == 1
    assert os.sched_getaffinity(0) == before
    shown = console.export_text()
    assert re.search(r"erm/seed0: finished in 0:00:\d\d on cores \d, 1.25 GiB", shown)
    assert "bad/seed0: failed" in shown
    console.file.close()


def test_what_stops_the_command_stops_its_runs_in_order(tmp_path):
    def stop():
        while not (tmp_path / "long.seed1").exists():
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(fit.PreemptedError, match="runs that had begun are saved"):
        run_all(["long/seed0", "long/seed1", "erm/seed0"], tmp_path)
    stopper.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "late").exists()
    assert not (tmp_path / "erm.seed0").exists()


def test_what_has_begun_is_stopped_when_the_user_stops_the_command(tmp_path, monkeypatch):
    def interrupt(_):
        if (tmp_path / "long.seed0").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all(["long/seed0"], tmp_path)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("name", ["erm", "erm/seed", "seed0", "erm/epoch3"])
def test_what_names_no_run_is_refused(name):
    with pytest.raises(ConfigError, match="is no run of a table: give ROW/seedN or ROW/trialN"):
        jobs.job(name)


def test_places_share_the_cores_or_have_a_gpu_each(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert [place.cores for place in jobs.places(None)] == [{i} for i in range(8)]
    assert [place.cores for place in jobs.places(3)] == [{0, 3, 6}, {1, 4, 7}, {2, 5}]
    with pytest.raises(ConfigError, match="--jobs=9 needs as many cores, but there are 8"):
        jobs.places(9)
    # Two GPUs, as the driver's own tool lists them.
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("JAX_PLATFORMS")
    assert [place.variables for place in jobs.places(None)] == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    assert [place.cores for place in jobs.places(None)] == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert [place.name for place in jobs.places(None)] == ["GPU 3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(jobs.places(None)) == 8


def test_the_setting_of_a_trial_depends_on_its_row_and_number_alone(tmp_path):
    table = catalogue.chosen("digits", ["erm", "lpa"])
    protocol = runs.Protocol(1, epochs=2, changes=SMALL)
    searches = tuning.begin(table, protocol, tmp_path / "a")
    drawn = [searches["lpa"].draw(number) for number in range(12)]
    again = tuning.begin(table._replace(rows={"lpa": table.rows["lpa"]}), protocol, tmp_path / "b")
    assert [again["lpa"].draw(number) for number in reversed(range(12))] == drawn[::-1]
    assert drawn[0] == {"perturbation.lpa.epsilon": 0.05, "schedule.learning_rate": 0.1}
    for key, one in searches["lpa"].intervals.items():
        values = [setting[key] for setting in drawn[1:]]
        assert len(set(values)) == 11
        assert all(one.low <= value <= one.high for value in values)
        # Spread over the range: no third of it, on its logarithmic scale, is empty.
        bounds = [one.low * (one.high / one.low) ** (i / 3) for i in range(4)]
        assert all(
            any(low <= value <= high for value in values)
            for low, high in itertools.pairwise(bounds)
        )
    assert searches["erm"].draw(1)["schedule.learning_rate"] != drawn[1]["schedule.learning_rate"]


def test_a_run_is_made_by_itself_and_is_not_made_twice(tmp_path):
    table = catalogue.chosen("digits_lt", ["erm", "post_hoc_logit_adjustment"])
    table = table._replace(changes=table.changes | {"imbalance.ratio": 5.0})
    protocol = runs.Protocol(2, epochs=1, changes=SMALL)
    home = runs.home(tmp_path, 1)
    with pytest.raises(ConfigError, match="erm/seed0 needs trial 0 of erm, which has not ended"):
        jobs.run_one(jobs.job("erm/seed0"), table, protocol, 1, tmp_path, QUIET)
    left = jobs.trials(table, protocol, 1, tmp_path / "tuning")
    assert [str(one) for one in left] == ["erm/trial0"]
    jobs.run_one(left[0], table, protocol, 1, tmp_path, QUIET)
    assert jobs.trials(table, protocol, 1, tmp_path / "tuning") == []
    assert [str(one) for one in jobs.seeds(table, protocol, home)] == ["erm/seed0", "erm/seed1"]
    jobs.run_one(jobs.job("erm/seed1"), table, protocol, 1, tmp_path, QUIET)
    assert [str(one) for one in jobs.seeds(table, protocol, home)] == ["erm/seed0"]
    made = home / "erm" / "seed1" / "result.json"
    before = made.stat().st_mtime_ns
    jobs.run_one(jobs.job("erm/seed1"), table, protocol, 1, tmp_path, QUIET)
    assert made.stat().st_mtime_ns == before
    for name, sentence in (
        ("lpq/seed0", "The table has no row 'lpq'"),
        ("erm/seed2", "erm/seed2 is no run of the table: give --config.num_seeds more"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            jobs.run_one(jobs.job(name), table, protocol, 1, tmp_path, QUIET)


def test_a_row_that_failed_is_in_the_table_without_a_number(tmp_path):
    table = catalogue.chosen("digits", ["erm"])
    found = runs.run(
        table, runs.Protocol(1, epochs=1, changes=SMALL), tmp_path, QUIET, {"erm": "It broke."}
    )
    assert (found["erm"].summary, found["erm"].failure) == (None, "It broke.")
    assert not (tmp_path / "erm").exists()


ARGUMENTS = [
    "--table=digits", "--methods=erm,lpg", "--config.num_seeds=2", "--config.epochs=2",
    "--config.limit=200", "--trials=2", "--config.model.options={'width': 4}",
]  # fmt: skip


def call(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "lpa_jax.table", *ARGUMENTS, *arguments],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def one_core():
    return ["taskset", "-c", str(min(os.sched_getaffinity(0)))]


@pytest.mark.slow
def test_several_at_once_give_the_numbers_of_one_after_another(tmp_path):
    subprocess.run(
        [*one_core(), sys.executable, "-m", "lpa_jax.table", *ARGUMENTS,
         f"--workdir={tmp_path / 'one'}"],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True,
    )  # fmt: skip
    ended = call("--jobs=auto", f"--workdir={tmp_path / 'several'}")
    assert ended.returncode == 0, ended.stderr
    one, several = (
        json.loads((tmp_path / name / "table.json").read_text()) for name in ("one", "several")
    )
    assert one["rows"] == several["rows"]
    assert len(list((tmp_path / "several" / "logs").glob("*.log"))) == 8


SBATCH = """#!/usr/bin/env python
import os, re, subprocess, sys
said = " ".join(sys.argv[1:])
open(os.environ["SAID"], "a").write(said + "\\n")
wrapped = [word.removeprefix("--wrap=") for word in sys.argv if word.startswith("--wrap=")]
last = int((re.findall(r"--array=0-(\\d+)", said) or ["-1"])[0])
for i in range(last + 1):
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(i)}
    subprocess.run(["bash", sys.argv[-1]], env=env, check=True, stdout=sys.stderr)
for words in wrapped:
    subprocess.run(words, shell=True, check=True, stdout=sys.stderr)
print(17)
"""


@pytest.mark.slow
def test_slurm_runs_the_table_in_stages_and_collects_it(tmp_path):
    workdir = tmp_path / "a table"
    ended = call("--slurm=--time=1:00:00 --gres=gpu:1", f"--workdir={workdir}")
    assert ended.returncode == 0, ended.stderr
    assert "8 runs are to be made; submit them by: bash" in " ".join(ended.stdout.split())
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(SBATCH.replace("/usr/bin/env python", sys.executable))
    stub.chmod(0o755)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "SAID": str(tmp_path / "said")}
    env["PATH"] = f"{stub.parent}{os.pathsep}{env['PATH']}"
    subprocess.run(["bash", workdir / "slurm" / "submit.sh"], env=env, check=True, cwd=ROOT)
    trials, seeds, table = (tmp_path / "said").read_text().splitlines()
    for said in (trials, seeds, table):
        assert "--time=1:00:00 --gres=gpu:1" in said
    assert "--array=0-3" in trials
    assert "--dependency" not in trials
    assert "--array=0-3" in seeds
    assert all("--dependency=afterany:17" in said for said in (seeds, table))
    assert len(json.loads((workdir / "table.json").read_text())["rows"]) == 2
