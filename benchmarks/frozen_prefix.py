"""What fine-tuning costs whole, with a frozen prefix, and with a prefix that is run once.

    python benchmarks/frozen_prefix.py [--dataset=domains:PATH] [--method=erm] [--out=FILE.json]

EfficientNet-Lite0 with its pretrained weights at 224 pixels: a step that trains all of it, one with
all frozen up to the sixth group, and one that begins with the kept outputs of that group. Compiled
FLOPs repeat exactly; seconds are medians of paired rounds. The frozen step and the one on kept
outputs must move the same parameters alike: the largest difference of their updates is shown,
relative to the largest update of each parameter. Outputs are kept of the examples of one batch.
"""

import argparse
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import record
from rich.console import Console
from rich.table import Table

from lpa_jax.configs import finetune
from lpa_jax.training import build, fit, prefix

ROWS = {
    "whole": {"model.cached": None, "optimizer.rates": ""},
    "frozen": {"model.cached": None},
    "run once": {},
}


def parts_of(dataset, method, batch, size, changes):
    """Return the parts of a run on the first examples of a data set."""
    config = finetune.get_config(f"method={method}")
    config.update_from_flattened_dict(
        {"dataset": dataset, "image_size": size, "batch_size": batch, "eval_batch_size": batch,
         "limit": batch, "validation_fraction": 0.0, "cache": "memory", "writers": (),
         "optimizer.weight_decay": 0.0, "schedule.name": "constant", **changes}
    )  # fmt: skip
    return build.build(config)


def made(parts):
    """Return the compiled step, and what it is called with."""
    weights = fit.read_weights(parts)
    if parts.plan.cached:
        variables = fit.pretrained_variables(parts, weights)
        parts = prefix.without_prefix(parts, variables, Console(quiet=True))
    compiled = fit.compile_parts(parts, fit.make_devices(parts), weights)
    state = fit.pretrained.begin(
        weights, parts.network, compiled.steps.init(jnp.int32(0)), compiled.steps.shardings
    )
    batch = next(compiled.feed.open(0, 0))
    step = compiled.steps.train.lower(state, jnp.int32(0), jnp.int32(1), *batch).compile()
    return step, jax.device_get(state), batch


def run(step, state, batch):
    """Return the state after a step; its argument is given up."""
    state = jax.tree.map(jnp.array, state)
    jax.block_until_ready(state)
    began = time.perf_counter()
    after = jax.block_until_ready(step(state, jnp.int32(0), jnp.int32(1), *batch))
    return after, time.perf_counter() - began


def difference(first, second):
    """Return the largest difference of two trees, relative to each leaf's largest entry."""
    return max(
        float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", help="As config.dataset takes it.")
    parser.add_argument("--method", default="erm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="Side of an image in pixels.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()

    steps = {
        name: made(parts_of(args.dataset, args.method, args.batch, args.size, changes))
        for name, changes in ROWS.items()
    }
    seconds, updates = {name: [] for name in steps}, {}
    for round_ in range(args.rounds + 1):
        for name, (step, state, batch) in steps.items():
            after, took = run(step, state, batch)
            if round_ > 0:  # The first warms up.
                seconds[name].append(took)
            before, moved = state.variables["params"], jax.device_get(after.variables["params"])
            updates[name] = jax.tree.map(np.subtract, moved, before)

    rows = []
    for name, (step, _, _) in steps.items():
        ratios = [a / b for a, b in zip(seconds["whole"], seconds[name], strict=True)]
        rows.append(
            {
                "step": name,
                "flops": step.cost_analysis()["flops"],
                "seconds": statistics.median(seconds[name]),
                "times_quicker": statistics.median(ratios),
            }
        )
    apart = difference(updates["frozen"], updates["run once"])
    table = Table(title=f"EfficientNet-Lite0, {args.method}, batch {args.batch}, {args.size} px")
    for column in ("step", "GFLOPs", "seconds", "times quicker than whole"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        table.add_row(
            row["step"], f"{row['flops'] / 1e9:.2f}", f"{row['seconds']:.4f}",
            f"{row['times_quicker']:.1f}",
        )  # fmt: skip
    Console().print(table)
    print(f"Updates of the frozen step and of the one on kept outputs differ by {apart:.1e}.")
    settings = {name: getattr(args, name) for name in ("method", "batch", "size", "rounds")}
    record.write(args.out, rows, settings=settings, difference_of_updates=apart)


if __name__ == "__main__":
    main()
