"""One device, several, and several processes: the same numbers, and states that move between."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

import lpa_jax
from lpa_jax import data
from lpa_jax.training.metric_log import scalars

HERE = pathlib.Path(__file__).parent
# Devices of a process, devices that share a copy of the state, processes.
LAYOUTS = {
    "one": (1, 1, 1),
    "two": (2, 1, 1),
    "four": (4, 1, 1),
    "eight": (8, 1, 1),
    "two_processes": (4, 1, 2),
    "sharded": (8, 8, 1),
    "sharded_processes": (4, 8, 2),
}

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Train on every layout, in processes of their own."""
    directory = tmp_path_factory.mktemp("distributed")
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    loaded = {}
    # The first comes once more at the end, to restore what the others saved.
    for name, layout in [*LAYOUTS.items(), ("one_again", LAYOUTS["one"])]:
        devices, fsdp, processes = map(str, layout)
        out = directory / f"{name}.npz"
        command = [sys.executable, HERE / "helpers" / "distributed_worker.py", out, devices, fsdp]
        port = str(free_port())
        several = processes != "1"
        running = [
            subprocess.Popen([*command, *([port, processes, str(i)] if several else [])], env=env)
            for i in range(int(processes))
        ]
        try:
            assert [process.wait(timeout=1200) for process in running] == [0] * len(running)
        finally:
            for process in running:
                process.kill()
        with np.load(out) as file:
            loaded[name] = dict(file)
    return loaded


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_every_method_trains_to_the_same_numbers_as_on_one_device(results, name):
    for key, expected in results["one"].items():
        if key.endswith(("loss", "params")) or "class_stats" in key:
            got, atol = results[name][key], 1e-4
            if key.endswith("accuracy"):
                # One example of a class may lie on the edge between right and wrong.
                weight = results["one"][key.replace("accuracy", "weight")]
                got, expected, atol = got * weight, expected * weight, 1.01
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=atol, err_msg=f"{name} {key}")


def test_a_copy_of_the_state_is_shared_evenly(results):
    whole, shared = results["one"]["bytes"], results["sharded"]["bytes"]
    # Small arrays stay whole on every device.
    assert whole / 8 <= shared <= 1.1 * whole / 8
    assert results["eight"]["bytes"] == whole
    assert results["sharded_processes"]["bytes"] == shared


def test_checkpoints_move_between_devices_and_processes_bit_for_bit(results):
    names = list(results)
    moves = 0
    for reader in names:
        for writer in names[: names.index(reader) + 1]:
            restored = results[reader][f"restored/{writer}"]
            np.testing.assert_array_equal(restored, results[writer]["state"])
            moves += 1
    assert moves == len(names) * (len(names) + 1) // 2


def test_a_step_communicates_only_what_it_must(results):
    counts = json.loads(str(results["eight"]["collectives"]))
    none = dict.fromkeys(counts["erm"], 0)
    plain = counts["erm"]["all-reduce"]
    # Two for each batch normalization, forward and back, and the gradient in a few.
    assert 0 < plain <= 16
    assert counts["erm"] == none | {"all-reduce": plain}
    # The class statistics and one sum by class.
    for method in ("lpl", "lpg"):
        few = counts[method]["all-reduce"]
        assert counts[method] == none | {"all-reduce": few}
        assert few <= plain + 4
    # Mixing takes the neighbor's last example, and no gather.
    assert counts["manifold_mixup"]["collective-permute"] > 0
    assert counts["manifold_mixup"]["all-gather"] == 0


def test_the_command_line_trains_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "lpa_jax.main", "--config=configs/digits.py:method=lpa,smoke"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    root = HERE.parent
    subprocess.run([*command, f"--workdir={tmp_path / 'one'}"], cwd=root, env=env, check=True)
    address = f"--coordinator_address=localhost:{free_port()}"
    command += [f"--workdir={tmp_path / 'two'}", address, "--num_processes=2"]
    running = [
        subprocess.Popen(
            [*command, f"--process_id={i}"], cwd=root, env=env, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    shown = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    # The first process speaks for both.
    assert "test accuracy %" in shown[0]
    assert "accuracy" not in shown[1]
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    (session,) = two["seeds"][0]["sessions"]
    assert session["device"].startswith("2 x")
    # What two processes trained is loaded by one.
    run = lpa_jax.load_run(tmp_path / "two")
    test = run.dataset.splits["test"]
    accuracy = np.mean(np.argmax(np.asarray(run.logits(test.images)), axis=1) == test.labels)
    assert accuracy == two["seeds"][0]["metrics"]["test"]["accuracy"]
    ours, theirs = (scalars(summary["metrics"]) for summary in (two, one))
    for name in theirs:
        if name.endswith("/mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2)


def test_two_processes_read_disjoint_shards_of_image_files(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 40), ("val", 10), ("test", 10)):
        for name, level in (("cat", 60), ("dog", 180)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(rng.normal(level, 40, (20, 30, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    command = [
        sys.executable, "-m", "lpa_jax.main", "--config=configs/digits.py:method=lpa,smoke",
        f"--config.dataset=folder:{tmp_path / 'images'}", "--config.image_size=16",
        "--config.augment=imagenet", "--config.batch_size=16", "--config.epochs=3",
        "--config.writers=()", "--import=reads",
    ]  # fmt: skip
    root = HERE.parent
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE / "helpers")}

    def start(name, *more):
        reads = {"READS": str(tmp_path / f"{name}{len(more) and more[-1][-1]}.txt")}
        arguments = [*command, f"--workdir={tmp_path / name}", *more]
        return subprocess.Popen(arguments, cwd=root, env=env | reads)

    address = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    running = [start("two", *address, f"--process_id={i}") for i in range(2)]
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    assert start("one").wait(timeout=600) == 0

    run = lpa_jax.load_run(tmp_path / "two")
    orders = [data.train_batches(0, epoch, run.dataset.train.labels, 16) for epoch in range(3)]
    order = np.concatenate(orders)
    for name, shard in (("two0", order[:, :8]), ("two1", order[:, 8:]), ("one0", order)):
        lines = (tmp_path / f"{name}.txt").read_text().splitlines()
        # Threads read several batches at once, in any order.
        assert sorted(lines) == sorted(" ".join(map(str, rows)) for rows in shard)
    both = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    one, two = (scalars(summary["metrics"]) for summary in both)
    for name in one:
        if name.endswith("/mean"):
            assert two[name] == pytest.approx(one[name], rel=1e-2)


@pytest.mark.guarantee("same-processes")
def test_processes_with_other_data_are_refused(tmp_path):
    labels = np.arange(64, dtype=np.uint8) % 2
    command = [
        sys.executable, "-m", "lpa_jax.main", f"--config={HERE.parent}/configs/digits.py:smoke",
        "--config.dataset=npz:data.npz", "--config.epochs=1", "--config.batch_size=32",
        f"--workdir={tmp_path / 'run'}", "--num_processes=2",
        f"--coordinator_address=localhost:{free_port()}",
    ]  # fmt: skip
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
    running = []
    for i in range(2):
        images = np.full((64, 8, 8, 1), i, np.uint8)
        (tmp_path / str(i)).mkdir()
        path = tmp_path / str(i) / "data.npz"
        np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
        process = subprocess.Popen(
            [*command, f"--process_id={i}"],
            cwd=path.parent, env=env, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 2, errors
        assert "The processes of this run differ in their data: give all" in errors
    assert not (tmp_path / "run").exists()
