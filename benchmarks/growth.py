"""How the cost of LPA grows with the number of classes, the batch, the steps and the depth.

    python benchmarks/growth.py [--out=FILE.json]

Counts of the compiled program alone, which repeat exactly: nothing is run. "update" is what LPA
adds beyond its passes through the network's tail (means by class, gathers, projections, plans),
compiled with a gradient that is given; "step" is the whole training step, relative to plain
training.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import own_work
import record
from rich.console import Console
from rich.table import Table
import step_cost

import lpa_jax
from lpa_jax import models

BASE = {"classes": 10, "batch": 128, "steps": 3, "depth": 16}
SWEEPS = {
    "classes": (10, 100, 1000, 10_000, 100_000),
    "batch": (32, 64, 128, 256),
    "steps": (1, 2, 3, 5, 8),
    "depth": (10, 16, 22, 28, 40),
}
VALUES = {"group1": (32, 32, 32), "group2": (16, 16, 64), "group3": (8, 8, 128)}


def update_cost(shape, *, classes, batch, steps):
    """Return FLOPs, bytes and peak bytes of LPA's own work at a value `[batch, *shape]`."""
    perturbation = lpa_jax.lpa("site", 0.2, steps=steps, radius="absolute")
    return own_work.cost(perturbation, (batch, *shape), classes=classes, calls=steps)


def step_costs(site, *, classes, batch, steps, depth):
    """Return the cost of a whole step of WRN-depth-2, with and without LPA."""
    model = models.create(f"wrn_{depth}_2", num_classes=classes, mean=(0.5,) * 3, std=(0.25,) * 3)
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    found = {}
    for name, perturbation in (
        ("plain", lpa_jax.chain()),
        ("lpa", lpa_jax.lpa(site, 0.2, steps=steps, radius="absolute")),
    ):
        run, init = step_cost.perturbed_step(model, perturbation, classes)
        state = jax.eval_shape(
            lambda *a, init=init: init(*a, **step_cost.APPLY), variables, images, labels
        )
        # The state is donated, as in a training loop.
        jitted = jax.jit(run, donate_argnums=1)
        compiled = jitted.lower(variables, state, images, labels, key).compile()
        found[f"{name}_flops"] = step_cost.flops(compiled)
        found[f"{name}_peak_bytes"] = step_cost.peak_bytes(compiled)
    return found | {"flops_ratio": found["lpa_flops"] / found["plain_flops"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", nargs="*", default=["group2", "group3"], choices=VALUES)
    parser.add_argument("--sweeps", nargs="*", default=list(SWEEPS), choices=SWEEPS)
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()
    rows = []
    table = Table(title="LPA on WRN-16-2, batch 128, T = 3, 10 classes, but for what is swept")
    for column in ("site", "swept", "update MFLOPs", "update MB moved", "update temporary MB",
                   "step x plain", "step peak MB", "plain peak MB"):  # fmt: skip
        table.add_column(column, justify="right")
    for site in args.sites:
        for name in args.sweeps:
            for number in SWEEPS[name]:
                setting = BASE | {name: number}
                small = {key: value for key, value in setting.items() if key != "depth"}
                update = update_cost(VALUES[site], **small)
                step = step_costs(site, **setting)
                rows.append(
                    {"site": site, "swept": name, **setting, "update": update, "step": step}
                )
                table.add_row(
                    site,
                    f"{name} {number}",
                    f"{update['flops'] / 1e6:.2f}",
                    f"{update['bytes'] / 1e6:.1f}",
                    f"{update['temporary_bytes'] / 1e6:.2f}",
                    f"{step['flops_ratio']:.3f}",
                    f"{step['lpa_peak_bytes'] / 1e6:.0f}",
                    f"{step['plain_peak_bytes'] / 1e6:.0f}",
                )
            table.add_section()
    Console(width=130).print(table)
    record.write(args.out, rows)


if __name__ == "__main__":
    main()
