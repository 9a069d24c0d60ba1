"""What LPA costs at a layer of a scanned stack, relative to the same layer of an unrolled loop.

    python benchmarks/scan_cost.py [--layers=12] [--batch=32] [--steps=3] [--out=FILE.json]

Each is given relative to the plain step of its own model: the loop, the scan, and the scan with its
body rematerialized ("remat"). XLA counts the body of a loop once, however often it runs; so FLOPs
are counted in the jaxpr of the whole step, scans by their turns. What XLA counts of the unrolled
one is shown beside them. All have the same parameters, and loss and gradient are compared with the
loop's. FLOPs and memory repeat exactly; wall-clock ratios are medians of paired runs (every step
once a round, in turn), and compiling is timed once.
"""

import argparse
import functools
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import record
from rich.console import Console
from rich.table import Table
import step_cost
import trace_time

import lpa_jax
from lpa_jax.core import costs

KINDS = {"loop": {}, "scan": {"scanned": True}, "remat": {"scanned": True, "remat": True}}


def models_of(layers=12, width=64):
    """Return the models by their kinds, with the same parameters for each."""
    models = {kind: trace_time.Encoder(layers, width, **how) for kind, how in KINDS.items()}
    patches, _ = trace_time.batch(examples=1)
    scanned = jax.jit(models["scan"].init)(jax.random.key(1), patches)
    loop = {"params": unrolled(scanned["params"])}
    return models, {kind: scanned if model.scanned else loop for kind, model in models.items()}


def unrolled(params):
    """Return the parameters of a scanned model, or their gradient, as those of the loop."""
    stack = params["stack"]["layer"]
    layers = {
        f"layer{number}": jax.tree.map(lambda leaf, number=number: leaf[number], stack)
        for number in range(jax.tree.leaves(stack)[0].shape[0])
    }
    return {name: leaf for name, leaf in params.items() if name != "stack"} | layers


def step_at(model, layers, steps=3):
    """Return a training step with LPA at some layers, none for a plain one, and its init."""
    if not layers:
        return trace_time.plain_step(model), lambda *_: ()
    site = "stack/layer[{}]" if model.scanned else "layer{}"
    names = [site.format(layer) for layer in layers]
    # The default, a moving average, knows nothing of the classes in the first step.
    split = lpa_jax.splits.mean_threshold(window="batch")
    return trace_time.perturbed_step(model, lpa_jax.lpa(names, 0.1, steps=steps, split=split))


def flops(run, *arguments):
    """Return the FLOPs of a function, the bodies of scans counted by their turns."""
    return costs.flops(jax.make_jaxpr(run)(*arguments).jaxpr)


def distance(tree, other):
    """Return how far two trees of arrays are apart, relative to the second."""
    norm = optax.tree.norm
    return float(norm(jax.tree.map(jnp.subtract, tree, other)) / norm(other))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()

    models, variables = models_of(args.layers, args.width)
    patches, labels = trace_time.batch(args.batch)
    last = args.layers - 1
    at = {"plain": (), "first": (0,), "middle": (args.layers // 2,), "last": (last,)}
    at["four"] = tuple(last * part // 3 for part in range(4))
    runs, rows = {}, {}
    for name, layers in at.items():
        for kind, model in models.items():
            run, init = step_at(model, layers, args.steps)
            state = init(variables[kind], patches, labels)
            given = (variables[kind], state, patches, labels, jax.random.key(2))
            lowered = jax.jit(run).lower(*given)
            began = time.perf_counter()
            compiled = lowered.compile()
            row = rows[name, kind] = {
                "step": name,
                "layers": layers,
                "kind": kind,
                "compile_seconds": time.perf_counter() - began,
                "flops": flops(run, *given),
                "peak_bytes": step_cost.peak_bytes(compiled),
            }
            if kind == "loop":
                row["xla_flops"] = step_cost.flops(compiled)
            runs[name, kind] = functools.partial(compiled, *given)

    seconds = {which: [] for which in runs}
    for round_ in range(args.rounds + 1):
        for which, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if round_ > 0:  # The first warms up.
                seconds[which].append(time.perf_counter() - began)

    for (name, kind), row in rows.items():
        plain = rows["plain", kind]
        for count in ("flops", "xla_flops", "peak_bytes"):
            if count in row:
                row[f"{count}_ratio"] = row[count] / plain[count]
        paired = zip(seconds[name, kind], seconds["plain", kind], strict=True)
        row["seconds"] = statistics.median(seconds[name, kind])
        row["seconds_ratio"] = statistics.median(a / b for a, b in paired)
    for name in at:
        loop_loss, loop_grads, _ = runs[name, "loop"]()
        rows[name, "loop"]["loss"] = float(loop_loss)
        for kind in ("scan", "remat"):
            loss, grads, _ = runs[name, kind]()
            rows[name, kind]["loss_difference"] = float(jnp.abs(loss / loop_loss - 1))
            rows[name, kind]["gradient_difference"] = distance(unrolled(grads), loop_grads)

    table = Table(title=f"{args.layers} layers, width {args.width}, batch {args.batch}, T = "
                        f"{args.steps}")  # fmt: skip
    columns = ("LPA at", "kind", "GFLOPs", "x plain", "by XLA", "peak MB", "x plain", "seconds",
               "x plain", "compile s", "loss differs", "gradient")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for row in rows.values():
        table.add_row(
            row["step"],
            row["kind"],
            f"{row['flops'] / 1e9:.3f}",
            f"{row['flops_ratio']:.4f}",
            f"{row['xla_flops_ratio']:.4f}" if "xla_flops_ratio" in row else "",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['peak_bytes_ratio']:.3f}",
            f"{row['seconds']:.3f}",
            f"{row['seconds_ratio']:.2f}",
            f"{row['compile_seconds']:.1f}",
            *(f"{row[f'{name}_difference']:.0e}" if f"{name}_difference" in row else ""
              for name in ("loss", "gradient")),
        )  # fmt: skip
    Console(width=140).print(table)
    record.write(args.out, [*rows.values()], xla_flags=os.environ.get("XLA_FLAGS", ""))


if __name__ == "__main__":
    main()
