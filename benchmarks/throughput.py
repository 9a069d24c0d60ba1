"""Images a second of the trainer's own hot loop, from start-up to steady state.

    python benchmarks/throughput.py [--model=wrn_16_2] [--methods erm lpa ...] [--out=FILE.json]

Each setting runs in a process of its own, on as many host devices as `--devices` says (or on the
GPU), and in `--several` processes. A step may neither trace nor move anything between host and
device: both are forbidden while the clock runs, and end the benchmark. "wait" is the share of the
time spent on waiting for batches. "of matmul" is the rate of the compiled FLOPs relative to that of
a large matrix product in the same type, measured right after, on all devices.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

METHODS = ("erm", "lpl", "lpg", "lpa", "manifold_mixup", "sam")


def measure(args):
    """Run one setting in this process, and return its row."""
    began = time.perf_counter()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import lpa_jax
    from lpa_jax import data, models
    from lpa_jax.tasks import classification
    from lpa_jax.training import feed, mesh, step
    from lpa_jax.training.network import Network

    if args.host_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.host_devices)
    if args.process is not None:
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.process)
    rng = np.random.default_rng(0)
    examples = data.Examples(
        rng.integers(0, 256, (args.examples, 32, 32, 3), dtype=np.uint8),
        rng.integers(0, 10, args.examples).astype(np.int32),
    )
    chains = {
        "erm": lpa_jax.chain(),
        "lpl": lpa_jax.lpl(0.4),
        "lpg": lpa_jax.lpg(0.1),
        "lpa": lpa_jax.lpa(args.site, 0.1, radius="relative"),
        "manifold_mixup": lpa_jax.manifold_mixup(("inputs", "group1", "group2"), 2.0),
        "sam": lpa_jax.sam(0.05),
    }
    dtype = jnp.dtype(args.dtype)
    model = models.create(args.model, num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3, dtype=dtype)
    grid = mesh.make_mesh(args.batch)
    perturbed = lpa_jax.value_and_grad(model.apply, chains[args.method], num_classes=10)
    tx = optax.sgd(1e-4, momentum=0.9, nesterov=True)
    source = feed.make_feed(args.input, examples, args.batch, 10**6, grid)
    steps = step.make_steps(
        Network(model), classification, perturbed, tx, grid, source.like, source.take,
        augment=data.augmentations("cifar"),
    )  # fmt: skip
    state = steps.init(jnp.int32(0))
    # The clock runs over the end of an epoch, where the next one's order is drawn.
    epoch = args.examples // args.batch
    batches = source.open(0, max(0, epoch - 2 - args.count // 2))
    numbers = mesh.put((np.int32(0), np.int32(1)), mesh.replicated(grid))
    given = next(batches)
    compiled = steps.train.lower(state, *numbers, *given).compile()
    state = jax.block_until_ready(compiled(state, *numbers, *given))
    first_step = time.perf_counter() - began
    # The loop calls what users call, which finds the program anew.
    state = jax.block_until_ready(steps.train(state, *numbers, *next(batches)))

    waited, started = 0.0, time.perf_counter()
    for _ in range(args.count):
        asked = time.perf_counter()
        given = next(batches)
        waited += time.perf_counter() - asked
        with jax.no_tracing(True), jax.transfer_guard("disallow"):
            state = steps.train(state, *numbers, *given)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - started

    side = 4096 if jax.default_backend() == "gpu" else 1024
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(matrix))
    started = time.perf_counter()
    for _ in range(10):
        out = product(matrix)
    jax.block_until_ready(out)
    rate = 10 * 2 * side**3 / (time.perf_counter() - started)
    # XLA counts for one device, and the matrix product ran on one; host devices share the cores.
    sharing = jax.device_count() if jax.default_backend() == "cpu" else 1
    flops = sharing * compiled.cost_analysis()["flops"] * args.count / seconds
    # A kernel that another library's call hides is not counted: a lower bound there.
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "method": args.method,
        "input": "device" if source.resident else "host",
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "images_per_second": args.count * args.batch / seconds,
        "wait": waited / seconds,
        "first_step_seconds": first_step,
        "of_matmul": flops / rate,
        "peak_bytes": peak,
    }


def run(args, method, devices, processes, place):
    """Run one setting in processes of its own, and return its row."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--method", method, "--input", place]
    command += ["--host-devices", str(devices), "--processes", str(processes), "--port", str(port)]
    root = str(pathlib.Path(__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root}
    several = [
        subprocess.Popen(
            [*command, *(["--process", str(i)] if processes > 1 else [])],
            stdout=subprocess.PIPE, env=env, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in several]
    if any(process.returncode for process in several):
        sys.exit(f"{method} on {devices} devices in {processes} processes failed.")
    return json.loads(outputs[0].splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wrn_16_2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--site", default="group3", help="Where LPA stands.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--count", type=int, default=10, help="Steps while the clock runs.")
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--inputs", nargs="*", default=["device", "host"])
    parser.add_argument("--devices", nargs="*", type=int, default=[], help="Host devices: 1 2 4 8.")
    parser.add_argument("--several", type=int, default=0, help="Also on that many processes.")
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    # What the processes it starts are told.
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--input", help=argparse.SUPPRESS)
    for name in ("--host-devices", "--processes", "--process", "--port"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measure(args)))
        return

    import record
    from rich.console import Console
    from rich.table import Table

    rows = [run(args, m, 0, 1, "device") for m in args.methods]
    rows += [run(args, "lpa", 0, 1, place) for place in args.inputs if place != "device"]
    rows += [run(args, "lpa", devices, 1, "device") for devices in args.devices]
    if args.several:
        rows.append(run(args, "lpa", 4, args.several, "device"))
    table = Table(title=f"{args.model}, {args.dtype}, batch {args.batch}, LPA at {args.site}")
    for column in ("method", "input", "devices", "processes", "images/s", "wait %",
                   "first step s", "of matmul %", "peak MB"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        peak = row["peak_bytes"]
        table.add_row(
            *(str(row[key]) for key in ("method", "input", "devices", "processes")),
            f"{row['images_per_second']:.0f}",
            f"{100 * row['wait']:.2f}",
            f"{row['first_step_seconds']:.1f}",
            f"{100 * row['of_matmul']:.1f}",
            "" if peak is None else f"{peak / 1e6:.0f}",
        )
    Console(width=110).print(table)
    record.write(args.out, rows)


if __name__ == "__main__":
    main()
