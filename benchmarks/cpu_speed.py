"""What keeping memory, and the quicker convolutions, make of the training step on a CPU.

    python benchmarks/cpu_speed.py [--model=wrn_16_2] [--rounds=5] [--out=FILE.json]
    python benchmarks/cpu_speed.py --model=efficientnet_lite_0 --size=224 --batch=16 --site=group7

Each variant is a process of its own that waits for its turn; every variant runs once a round, and
ratios are of runs of the same round. "before": memory is given back and XLA's kernel gradient is
used. "memory kept": see `lpa_jax.memory`. "both": also `lpa_jax.models.conv_general_dilated`.
"both, N processes": as many as there are cores, each bound to one, at the same time.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

VARIANTS = {
    "before": {"keep": False, "quick": False},
    "memory kept": {"keep": True, "quick": False},
    "both": {"keep": True, "quick": True},
}


def serve(args):
    """Take a step whenever a line comes in, and answer with its seconds and page faults."""
    if args.keep:
        from lpa_jax import memory

        memory.keep_freed_memory()
    import jax
    import jax.numpy as jnp
    from step_cost import APPLY, perturbed_step, plain_step

    import lpa_jax
    from lpa_jax import models

    if not args.quick:
        models.layers.conv_general_dilated = jax.lax.conv_general_dilated
    model = models.create(args.model, num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)
    images = jax.random.uniform(jax.random.key(0), (args.batch, args.size, args.size, 3))
    labels = jnp.arange(args.batch) % 10
    variables = model.init(jax.random.key(0), images[:1], train=False)
    run, init = plain_step(model), lambda *_, **__: ()
    if args.step == "lpa":
        run, init = perturbed_step(model, lpa_jax.lpa(args.site, 0.2), 10)
    state = init(variables, images, labels, **APPLY)
    key = jax.random.key(1)
    step = jax.jit(run).lower(variables, state, images, labels, key).compile()
    for line in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began = time.perf_counter()
        for _ in range(int(line)):
            jax.block_until_ready(step(variables, state, images, labels, key))
        seconds = time.perf_counter() - began
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(json.dumps([seconds / int(line), faults / int(line)]), flush=True)


class Server:
    """A process that takes steps when it is asked to."""

    def __init__(self, args, step, cores, *, keep, quick):
        names = ("model", "size", "site", "batch")
        words = [*(f"--{name}={getattr(args, name)}" for name in names), f"--step={step}"]
        words += ["--keep"] * keep + ["--quick"] * quick
        root = str(pathlib.Path(__file__).parent.parent)
        ours = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        os.sched_setaffinity(0, ours)

    def ask(self, steps):
        print(steps, file=self.process.stdin, flush=True)

    def answer(self):
        return json.loads(self.process.stdout.readline())


def measure(args, step):
    """Return the rows of one step, every variant once a round."""
    cores = sorted(os.sched_getaffinity(0))
    both = VARIANTS["both"]
    servers = {name: [Server(args, step, cores, **how)] for name, how in VARIANTS.items()}
    servers[f"both, {len(cores)} processes"] = [Server(args, step, [c], **both) for c in cores]
    rates, faults = ({name: [] for name in servers} for _ in range(2))
    for round_ in range(args.rounds + 1):
        for name, several in servers.items():
            for server in several:
                server.ask(args.steps)
            answers = [server.answer() for server in several]
            if round_ > 0:  # The first compiles and warms up.
                rates[name].append(sum(args.batch / seconds for seconds, _ in answers))
                faults[name].append(statistics.mean(count for _, count in answers))
    for several in servers.values():
        for server in several:
            server.process.stdin.close()
            server.process.wait()
    return [
        {
            "step": step,
            "variant": name,
            "images_per_second": statistics.median(rates[name]),
            "ratio": statistics.median(
                a / b for a, b in zip(rates[name], rates["before"], strict=True)
            ),
            "page_faults": statistics.median(faults[name]),
        }
        for name in servers
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wrn_16_2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="Side of an image in pixels.")
    parser.add_argument("--site", default="group2", help="Where LPA acts.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="Training steps in each round.")
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    # What the processes it starts are told.
    parser.add_argument("--step", choices=["plain", "lpa"], help=argparse.SUPPRESS)
    for name in ("--keep", "--quick"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        serve(args)
        return

    import record
    from rich.console import Console
    from rich.table import Table

    rows = measure(args, "plain") + measure(args, "lpa")
    table = Table(
        title=f"{args.model}, {args.size} px, float32, batch {args.batch}, LPA at {args.site}",
        caption="images a second",
    )
    for column in ("step", "variant", "images/s", "x before", "page faults a step"):
        table.add_column(column, justify="left" if column in ("step", "variant") else "right")
    for row in rows:
        table.add_row(
            row["step"],
            row["variant"],
            f"{row['images_per_second']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['page_faults']:.0f}",
        )
    Console().print(table)
    record.write(args.out, rows)


if __name__ == "__main__":
    main()
