"""From the start of the process to its first training step, cold and started again.

    python benchmarks/startup.py [--configs digits cifar10] [--method=lpa] [--out=FILE.json]

Each configuration is started twice, in processes of their own that share one directory for JAX's
persistent compilation cache (JAX_COMPILATION_CACHE_DIR), empty at first, and that several times
over, of which the median is shown. Importing, which no cache makes shorter, is in both, and shown
by itself. Random images of CIFAR's shape stand in for CIFAR. The batch is small: the programs have
as many operations, and are done with sooner.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import record
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).parent.parent
CLASSES = {"cifar10": 10, "cifar100": 100}


def random_cifar(path, num_classes):
    """Write a set of CIFAR's shape, one image of each class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = rng.integers(0, 256, (num_classes, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(num_classes)
    np.savez(path, **arrays)


def start(config, method, cache, directory):
    """Run one step; return the seconds from the start of the process until the first runs."""
    command = [
        sys.executable,
        "-m",
        "lpa_jax.main",
        f"--config=configs/{config}.py:method={method}",
    ]
    command += [
        "--config.epochs=1",
        "--config.limit=8",
        "--config.batch_size=8",
        "--config.validation_fraction=0.0",
    ]
    command += ["--config.eval_batch_size=8", f"--workdir={directory}"]
    if config in CLASSES:
        path = pathlib.Path(cache) / f"{config}.npz"
        random_cifar(path, CLASSES[config])
        command.append(f"--config.dataset=npz:{path}")
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    began = time.time()
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((pathlib.Path(directory) / "summary.json").read_text())
    return summary["first_step_time"] - began


def importing():
    """Return the seconds from the start of a process until it has imported what a run needs."""
    program = "import time, lpa_jax.training.loop; print(time.time())"
    began = time.time()
    return float(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT)) - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="*", default=["digits", "cifar10", "cifar100"])
    parser.add_argument("--method", default="lpa")
    parser.add_argument("--repeats", type=int, default=3, help="Starts of each, at least 1.")
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()
    imports = [importing() for _ in range(args.repeats)]
    rows = []
    for config in args.configs:
        row = {"config": config, "method": args.method, "cold": [], "warm": []}
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as cache:
                for turn in ("cold", "warm"):
                    row[turn].append(start(config, args.method, cache, f"{cache}/{turn}"))
        rows.append(row | {"importing": imports})
    imported = statistics.median(imports)
    table = Table(title=f"Seconds until the first step runs, {imported:.1f} of them for importing")
    for column in ("config", "method", "cold", "with the cache", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        cold, warm = statistics.median(row["cold"]), statistics.median(row["warm"])
        numbers = (f"{cold:.1f}", f"{warm:.1f}", f"{cold / warm:.1f}")
        table.add_row(row["config"], row["method"], *numbers)
    Console().print(table)
    record.write(args.out, rows)


if __name__ == "__main__":
    main()
