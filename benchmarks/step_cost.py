"""What a training step with LPA costs relative to plain cross-entropy, by site.

    python benchmarks/step_cost.py [--model=wrn_16_2] [--batch=128] [--steps=3] [--out=FILE.json]

Compiled FLOPs repeat exactly; wall-clock ratios are medians of paired runs (every variant once a
round, in turn). The last column is the FLOPs of the way forward hooks would do it: a run of the
full network, forward and back to the site, for each PGD step.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import lpa_jax
from lpa_jax import models

APPLY = {"train": True, "mutable": ["batch_stats"]}


def perturbed_step(model, perturbation, num_classes):
    """Return the loss and gradient with a perturbation, and the function to its first state."""
    step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=num_classes)

    def run(variables, state, images, labels, key):
        (loss, aux), grads, state = step(variables, state, images, labels, key, **APPLY)
        return loss, grads, aux["updates"], state

    return run, step.init


def plain_step(model):
    """Return loss and gradient as one writes them without this library."""

    def run(variables, state, images, labels, key):
        del key

        def loss_fn(params):
            logits, updates = model.apply({**variables, "params": params}, images, **APPLY)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        return loss, grads, updates, state

    return run


def full_network_flops(model, variables, images, labels, site):
    """FLOPs of one PGD step that runs the whole network and differentiates back to the site."""
    from lpa_jax.taps.linen import LinenNetwork

    network = LinenNetwork(model.apply)
    trace = network.trace(variables, images, APPLY)
    tap = next(tap for tap in trace.taps if tap.name == site)

    def run(variables, images, labels, delta):
        def loss_fn(delta):
            _, (value,), _ = network.run(variables, images, {}, (tap,), APPLY)
            logits, _, _ = network.run(variables, images, {tap: value + delta}, (), APPLY)
            return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        return jax.grad(loss_fn)(delta)

    compiled = jax.jit(run).lower(variables, images, labels, jnp.zeros(tap.shape)).compile()
    return flops(compiled)


def flops(compiled):
    """Return the FLOPs XLA counts in a compiled program."""
    return compiled.cost_analysis()["flops"]


def commit():
    """Return the commit checked out, empty where there is none."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(
            command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()
    except OSError:
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wrn_16_2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sites", nargs="*", default=["group3", "group2", "group1"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    parser.add_argument("--commit", default=commit(), help="To record, outside a git checkout.")
    args = parser.parse_args()

    model = models.create(
        args.model,
        num_classes=10,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        dtype=jnp.dtype(args.dtype),
    )
    key = jax.random.key(0)
    images = jax.random.uniform(key, (args.batch, 32, 32, 3))
    labels = jnp.arange(args.batch) % 10
    variables = model.init(key, images[:1], train=False)

    variants = {"plain": (plain_step(model), lambda *_, **__: ())}
    variants["empty chain"] = perturbed_step(model, lpa_jax.chain(), 10)
    for site in args.sites:
        variants[f"lpa at {site}"] = perturbed_step(
            model, lpa_jax.lpa(site, 0.2, steps=args.steps), 10
        )
    compiled, states, compile_seconds = {}, {}, {}
    for name, (run, init) in variants.items():
        states[name] = init(variables, images, labels, **APPLY)
        began = time.perf_counter()
        compiled[name] = jax.jit(run).lower(variables, states[name], images, labels, key).compile()
        compile_seconds[name] = time.perf_counter() - began

    seconds = {name: [] for name in variants}
    for round_ in range(args.rounds + 1):
        for name, run in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(run(variables, states[name], images, labels, key))
            if round_ > 0:  # The first warms up.
                seconds[name].append(time.perf_counter() - began)

    plain = flops(compiled["plain"])
    rows = []
    for name in variants:
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        row = {
            "step": name,
            "gflops": flops(compiled[name]) / 1e9,
            "flops_ratio": flops(compiled[name]) / plain,
            "seconds": statistics.median(seconds[name]),
            "seconds_ratio": statistics.median(ratios),
            "compile_seconds": compile_seconds[name],
        }
        if name.startswith("lpa at "):
            extra = full_network_flops(
                model, variables, images, labels, name.removeprefix("lpa at ")
            )
            row["full_network_flops_ratio"] = 1 + args.steps * extra / plain
        rows.append(row)

    title = f"{args.model}, {args.dtype}, batch {args.batch}, T = {args.steps}"
    table = Table(title=title)
    for column in ("step", "GFLOPs", "x plain", "seconds", "x plain", "full network per step"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        full = row.get("full_network_flops_ratio")
        table.add_row(
            row["step"],
            f"{row['gflops']:.1f}",
            f"{row['flops_ratio']:.3f}",
            f"{row['seconds']:.4f}",
            f"{row['seconds_ratio']:.3f}",
            f"{full:.3f}" if full else "",
        )
    Console().print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps(
                {
                    "command": shlex.join(["python", *sys.argv]),
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    "commit": args.commit,
                    "rows": rows,
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
