"""The benchmarks run, and what they count keeps to its bounds."""

import json
import pathlib
import subprocess
import sys

import growth
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("site", ["group2", "group3"])
def test_the_work_of_a_step_does_not_grow_with_the_number_of_classes(site):
    few, many = (
        growth.update_cost(growth.VALUES[site], classes=classes, batch=128, steps=3)
        for classes in (10, 100_000)
    )
    assert many["flops"] <= 1.10 * few["flops"]
    assert many["bytes"] <= 1.10 * few["bytes"]
    # One perturbation for each of 100,000 classes and 64 channels would take 26 MB.
    assert many["temporary_bytes"] <= 1e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("step_cost", ["--model=wrn_10_1", "--batch=8", "--rounds=1", "--sites", "group3"], 8),
        ("growth", ["--sites", "group3", "--sweeps", "steps"], 5),
        ("collectives", ["--model=wrn_10_1", "--batch=16"], 9),
        ("startup", ["--configs", "digits"], 1),
        (
            "throughput",
            ["--model=wrn_10_1", "--batch=8", "--count=3", "--examples=100", "--methods", "lpa",
             "--devices", "2", "--several=2"],
            4,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_benchmark_leaves_its_figures(script, arguments, rows, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", *arguments, f"--out={out}"]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)})
    written = json.loads(out.read_text())
    assert len(written["rows"]) == rows
    assert written["command"].startswith("python ")
    assert {"device", "versions", "commit"} <= set(written)
