"""What the command lines print, where it can be read and where it cannot."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SMALL = [
    "--config=configs/digits.py",
    "--config.epochs=2",
    "--config.limit=128",
    "--config.model.options.width=4",
    "--config.num_seeds=2",
]


def call(module, *arguments, shell="", **options):
    """Run a command line, its output into a pipe that nobody reads unless `shell` redirects it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", f"lpa_jax.{module}", *map(str, arguments)]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    try:
        return subprocess.run(
            command,
            cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **options},
        )  # fmt: skip
    finally:
        os.close(writer)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directory of a run whose output nobody read, and its result."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, call("main", *SMALL, f"--workdir={workdir}")


def complete(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    assert [result["seed"] for result in summary["seeds"]] == [0, 1]
    assert (workdir / "curves.png").stat().st_size
    return True


def test_a_closed_pipe_does_not_stop_training(run):
    workdir, done = run
    assert (done.returncode, done.stderr) == (0, "")
    assert complete(workdir)
    # What has no default yet can be set all the same.
    assert json.loads((workdir / "config.json").read_text())["model"]["options"] == {"width": 4}


def test_a_closed_pipe_does_not_stop_an_evaluation(run):
    workdir, _ = run
    done = call("evaluate", f"--workdir={workdir}")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((workdir / "evaluation.json").read_text())["metrics"]["clean"]


def test_a_closed_pipe_does_not_stop_a_table(tmp_path):
    done = call(
        "table", "--table=digits", "--methods=erm", "--config.num_seeds=1",
        "--config.epochs=1", "--config.limit=128",
        f"--workdir={tmp_path}",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "table.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        (">&- 2>&-", ""),
        ("2>&1", ""),
        (
            "> /dev/full",
            "lpa_jax: What is printed is lost (No space left on device); the command continues.\n",
        ),
    ],
)
def test_output_that_cannot_be_written_does_not_stop_training(shell, said, tmp_path):
    if "/dev/full" in shell and not pathlib.Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    done = call("main", *SMALL, f"--workdir={tmp_path}", shell=shell)
    assert (done.returncode, done.stderr) == (0, said)
    assert complete(tmp_path)
    # Nothing that was meant for the terminal is in the files.
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 2


@pytest.mark.parametrize("names", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C"}])
def test_characters_that_a_terminal_lacks_do_not_stop_a_run(names, run, tmp_path):
    workdir, _ = run
    done = call("main", *SMALL, f"--workdir={workdir}", shell=f"> {tmp_path}/out", **names)
    assert (done.returncode, done.stderr) == (0, "")
    assert "that the selection chose: test accuracy" in (tmp_path / "out").read_text(
        encoding="utf-8"
    )


def test_a_wrong_flag_has_its_exit_code_without_a_reader():
    assert call("main", "--epochs=3", shell="2>&-").returncode == 2


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("main", ["--workdir", "--config:", "--allow_config_change"]),
        ("evaluate", ["--workdir", "--seed", "--attacks"]),
        ("table", ["--workdir", "--table", "--trials"]),
    ],
)
def test_help_names_every_flag(module, flags, tmp_path):
    done = call(module, "--help", shell=f"> {tmp_path}/out")
    assert (done.returncode, done.stderr) == (0, "")
    shown = (tmp_path / "out").read_text()
    for flag in flags:
        entry = rf"^ *--(\[no\])?{re.escape(flag[2:])}(?![a-z_])"
        assert re.search(entry, shown, re.MULTILINE), flag
    assert module != "main" or "--config.KEY=VALUE" in shown
    # Those of absl and its like are not.
    assert "--logtostderr" not in shown


def test_help_into_a_closed_pipe_is_not_an_error():
    done = call("main", "--help")
    assert (done.returncode, done.stderr) == (0, "")
