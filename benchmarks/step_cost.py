"""What a training step with a perturbation costs relative to plain cross-entropy.

    python benchmarks/step_cost.py [--model=wrn_16_2] [--batch=128] [--steps=3] [--out=FILE.json]

Compiled FLOPs, bytes and memory repeat exactly; wall-clock ratios are medians of paired runs (every
variant once a round, in turn). "formula" is what arithmetic demands of LPA with T steps at a site:
1 + T * 2 * F_tail / (3 * F), with the FLOPs of a forward pass, and of its tail beyond the site.
"by hooks" is the FLOPs of the way forward hooks would do it: a run of the full network, forward and
back to the site, for each gradient step.
"""

import argparse
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import record
from rich.console import Console
from rich.table import Table

import lpa_jax
from lpa_jax import models
from lpa_jax.api import backend_of
from lpa_jax.core.network import Call

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


def flops(compiled):
    """Return the FLOPs XLA counts in a compiled program."""
    return compiled.cost_analysis()["flops"]


def peak_bytes(compiled):
    """Return the memory a compiled program needs: arguments, results and what lies between."""
    memory = compiled.memory_analysis()
    kinds = ("argument", "output", "temp")
    total = sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
    return total - memory.alias_size_in_bytes


def limits(model, variables, images, labels, site, steps):
    """Return what LPA at a site must cost, and what it costs by hooks, in plain forward FLOPs."""
    network = backend_of(model.apply)(variables)
    call, args = Call(network, APPLY, None, ()), (network.params, network.rest, images, {})
    program = call.trace(*args)
    value = lpa_jax.list_sites(model.apply, variables, images, **APPLY)[site]

    def tail(args, value):
        # What comes before the site is left out of the compiled program.
        return program.walk(args, [site], lambda *_: value)[0]

    def hooked(args, delta):
        def loss_fn(delta):
            logits, _ = program.walk(args, [site], lambda _, value, __: value + delta)
            return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        return jax.grad(loss_fn)(delta)

    def forward(args):
        return network.run(*args[:3], APPLY)[0]

    def cost(function, *arguments):
        # What a function closes over would be folded into the program.
        return flops(jax.jit(function).lower(args, *arguments).compile())

    formula = 1 + steps * 2 * cost(tail, value) / (3 * cost(forward))
    return formula, steps * cost(hooked, value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wrn_16_2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sites", nargs="*", default=["group3", "group2", "group1"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()

    channels = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    model = models.create(args.model, num_classes=10, dtype=jnp.dtype(args.dtype), **channels)
    key = jax.random.key(0)
    images = jax.random.uniform(key, (args.batch, 32, 32, 3))
    labels = jnp.arange(args.batch) % 10
    variables = model.init(key, images[:1], train=False)

    last = args.sites[0]
    perturbations = {
        "empty chain": lpa_jax.chain(),
        "lpl": lpa_jax.lpl(0.5),
        "lpg": lpa_jax.lpg(0.1),
        f"dropout at {last}": lpa_jax.dropout(last, 0.3),
        "manifold mixup": lpa_jax.manifold_mixup(("inputs", last), 2.0),
        "sam": lpa_jax.sam(0.05),
    }
    lpa = functools.partial(lpa_jax.lpa, epsilon=0.2, steps=args.steps, radius="absolute")
    perturbations |= {f"lpa at {site}": lpa(site) for site in args.sites}
    variants = {"plain": (plain_step(model), lambda *_, **__: ())}
    variants |= {name: perturbed_step(model, p, 10) for name, p in perturbations.items()}
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

    plain = compiled["plain"]
    rows = []
    for name, run in compiled.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        row = {
            "step": name,
            "flops": flops(run),
            "flops_ratio": flops(run) / flops(plain),
            "bytes": run.cost_analysis()["bytes accessed"],
            "peak_bytes": peak_bytes(run),
            "seconds": statistics.median(seconds[name]),
            "seconds_ratio": statistics.median(ratios),
            "compile_seconds": compile_seconds[name],
        }
        if name.startswith("lpa at "):
            site = name.removeprefix("lpa at ")
            row["formula"], hooks = limits(model, variables, images, labels, site, args.steps)
            row["by_hooks"] = 1 + hooks / flops(plain)
        rows.append(row)

    table = Table(title=f"{args.model}, {args.dtype}, batch {args.batch}, T = {args.steps}")
    columns = ("step", "GFLOPs", "x plain", "formula", "by hooks", "GB moved", "peak MB",
               "seconds", "x plain", "compile s")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        table.add_row(
            row["step"],
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops_ratio']:.3f}",
            *(f"{row[name]:.3f}" if name in row else "" for name in ("formula", "by_hooks")),
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['seconds']:.4f}",
            f"{row['seconds_ratio']:.3f}",
            f"{row['compile_seconds']:.1f}",
        )
    Console(width=130).print(table)
    record.write(args.out, rows)


if __name__ == "__main__":
    main()
