"""Which collectives a training step needs on several devices, and how much they carry.

    python benchmarks/collectives.py [--devices=8] [--fsdp=1] [--out=FILE.json]

Read off the compiled program on host devices: nothing is run. Bytes are those of the results, for
one device; what is listed under a method is all of its step, plain training's included. What stands
in a loop is listed once: LPL's default solver takes floor(epsilon / step_size) such steps.
"""

import argparse
import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from rich.console import Console
from rich.table import Table

import lpa_jax
from lpa_jax import data, models
from lpa_jax.tasks import classification
from lpa_jax.training import feed, mesh, step
from lpa_jax.training.network import Network

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2}


def collectives(text):
    """Return `{kind: [count, bytes]}` for the text of a compiled program."""
    found = {}
    for kind in KINDS:
        # XLA's CPU backend has no asynchronous ones, which are a start and a done each.
        for types in re.findall(rf"= (\S.*?) {kind}\(", text):
            sizes = [
                WIDTHS[width] * math.prod(int(n) for n in dims.split(",") if n)
                for width, dims in re.findall(r"(\w+)\[([\d,]*)\]", types)
                if width in WIDTHS
            ]
            entry = found.setdefault(kind, [0, 0])
            entry[0] += 1
            entry[1] += sum(sizes)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wrn_16_2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)

    lpa = functools.partial(lpa_jax.lpa, epsilon=0.1, radius="absolute")
    group2, group3 = (functools.partial(lpa, site) for site in ("group2", "group3"))
    both = lpa(("group2", "group3"))
    chains = {
        "erm": lpa_jax.chain(),
        "lpa at group3, T = 1": group3(steps=1),
        "lpa at group3, T = 3": group3(),
        "lpa at group3, T = 3, relative": group3(radius="relative"),
        "lpa at group3, T = 3, full": group3(sharing="full"),
        "lpa at group3, T = 3, low rank": group3(low_rank=1),
        "lpa at group3, T = 3, by example": group3(granularity="sample"),
        "lpa at group2, T = 3": group2(),
        "adaptive lpa at group2 and group3": lpa_jax.adaptive(both, every=100),
        "adversarial at group3, T = 3": lpa_jax.adversarial("group3", 0.1, steps=3),
        "lpl, a step": lpa_jax.lpl(0.4),
        "lpl, projected, T = 3": lpa_jax.lpl(0.4, solver="projected"),
        "lpg": lpa_jax.lpg(0.1),
        "manifold mixup": lpa_jax.manifold_mixup(("inputs", "group1", "group2"), 2.0),
        "dropout": lpa_jax.dropout("group3", 0.3),
        "isda": lpa_jax.isda("features", 0.5, args.classes),
        "elr": lpa_jax.elr(50_000, 3.0),
        "sam": lpa_jax.sam(0.05),
    }
    grid = mesh.make_mesh(args.batch, args.fsdp)
    model = models.create(args.model, num_classes=args.classes, mean=(0.5,) * 3, std=(0.25,) * 3)
    tx = optax.sgd(0.1, momentum=0.9)
    whole = mesh.replicated(grid)
    images = jax.ShapeDtypeStruct((50_000, 32, 32, 3), jnp.uint8, sharding=whole)
    labels = jax.ShapeDtypeStruct((50_000,), jnp.int32, sharding=whole)
    order = jax.ShapeDtypeStruct((390, args.batch), jnp.int32, sharding=mesh.batched(grid, 1))
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    tiny = data.Examples(
        np.zeros((args.batch, 32, 32, 3), np.uint8), np.zeros(args.batch, np.int32)
    )
    source = feed.make_feed("device", tiny, args.batch, 1, grid)
    rows = []
    setting = f"{args.model}, batch {args.batch}, {args.classes} classes, {args.devices} devices"
    table = Table(title=f"{setting}, fsdp {args.fsdp}: collectives of a step (kB)")
    for column in ("method", *KINDS):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, perturbation in chains.items():
        perturbed = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=args.classes)
        steps = step.make_steps(
            Network(model), classification, perturbed, tx, grid, source.like, source.take,
            augment=data.augmentations("cifar"),
        )  # fmt: skip
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            steps.like,
            steps.shardings,
        )
        compiled = steps.train.lower(state, number, number, (images, labels, {}), order).compile()
        found = collectives(compiled.as_text())
        rows.append({"method": name, "collectives": found})
        cells = (found.get(kind) for kind in KINDS)
        table.add_row(name, *(f"{c[0]} ({c[1] / 1e3:.1f})" if c else "" for c in cells))
    Console(width=120).print(table)
    record.write(args.out, rows, fsdp=args.fsdp, classes=args.classes)


if __name__ == "__main__":
    main()
