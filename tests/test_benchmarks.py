"""The benchmarks run, and what they count keeps to its bounds."""

import json
import pathlib
import subprocess
import sys

import growth
import image_reading
import jax
import jax.numpy as jnp
import numpy as np
import own_work
from probes import quick_jit
import pytest
import stop_gradient

import lpa_jax
from lpa_jax import data, models
from lpa_jax.data import decoding

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


def test_the_differentiated_ascent_gives_the_perturbation_of_the_library():
    model = models.SmallCNN(num_classes=5, width=4)
    inputs = jax.random.uniform(jax.random.key(0), (16, 8, 8, 3))
    labels = jnp.arange(16) % 4
    variables = model.init(jax.random.key(1), inputs)
    split = lpa_jax.splits.tail(2, class_counts=[5, 4, 3, 2, 1])
    losses, grads = [], []
    for lpa in (lpa_jax.lpa, stop_gradient.through):
        perturbation = lpa("features", 0.3, radius="relative", split=split)
        step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=5)
        state = step.init(variables, inputs, labels)
        (loss, _), grad, _ = quick_jit(step)(variables, state, inputs, labels, jax.random.key(2))
        losses.append(loss)
        grads.append(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grad)]))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert np.isfinite(grads).all()
    assert not np.allclose(*grads, rtol=1e-2)


def test_images_are_decoded_whole_where_readers_are_compared(tmp_path):
    image_reading.write_photographs(tmp_path, "480x460", 8)
    part = data.random_parts(0, 0, 1.0, 1.0)
    drafted, whole = (
        image_reading.training_examples(tmp_path, draft=draft).images for draft in (True, False)
    )
    expected = decoding.decode(drafted.store.image(3), image_reading.SIDE, part(3))
    np.testing.assert_array_equal(whole.read(np.array([3]), part)[0], expected)
    assert (drafted.read(np.array([3]), part)[0] != expected).any()


def figures(script, arguments, tmp_path):
    """Run a benchmark, and return what it saves."""
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", *arguments, f"--out={out}"]
    env = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    subprocess.run(command, check=True, env=env, cwd=tmp_path)
    written = json.loads(out.read_text())
    assert written["command"].startswith("python ")
    assert {"device", "versions", "commit"} <= set(written)
    return written


@pytest.mark.slow
def test_reading_images_is_measured(tmp_path):
    arguments = ["--rounds=1", "--images=8", "--sizes", "60x45", "--batch=4", "--count=1"]
    arguments += ["--wait_batch=4", "--steps=2", "--files", "1500", "3000"]
    rows = {"speed": [], "wait": [], "memory": []}
    for row in figures("image_reading", arguments, tmp_path)["rows"]:
        rows[row["measured"]].append(row)
    assert [row["reader"] for row in rows["speed"]].count("lpa_jax") == 6
    assert all(row["milliseconds"]["median"] > 0 for row in rows["speed"])
    assert len(rows["wait"]) == 3
    assert all(0 <= row["wait"]["median"] < 1 for row in rows["wait"])
    few, many = rows["memory"]
    # Half as much as the additional images would take if they were held.
    added = (many["decoded_bytes"] - few["decoded_bytes"]) / 2
    assert many["read_bytes"] - few["read_bytes"] < added


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("step_cost", ["--model=wrn_10_1", "--batch=8", "--rounds=1", "--sites", "group3"], 8),
        ("growth", ["--sites", "group3", "--sweeps", "steps"], 5),
        # As many as there are methods, and some forms of them.
        ("own_work", ["--batch=8", "--classes", "10"], None),
        ("collectives", ["--model=wrn_10_1", "--batch=16"], 18),
        ("trace_time", ["--layers=3", "--repeats=1"], 4),
        ("scan_cost", ["--layers=4", "--batch=4", "--rounds=1"], 15),
        ("startup", ["--configs", "digits", "--repeats=1"], 1),
        (
            "throughput",
            ["--model=wrn_10_1", "--batch=8", "--count=3", "--examples=100", "--methods", "lpa",
             "--devices", "2", "--several=2"],
            4,
        ),
        ("stop_gradient", ["--dataset=digits", "--epochs=1", "--seeds=2", "--width=4"], 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_benchmark_saves_its_figures(script, arguments, rows, tmp_path):
    written = figures(script, arguments, tmp_path)
    if rows is None:
        rows = len(own_work.counted_methods(8, 10))
    assert len(written["rows"]) == rows
