"""How long JAX traces and lowers a training step with perturbations, relative to a plain one.

    python benchmarks/trace_time.py [--layers=12] [--repeats=5] [--out=FILE.json]

That is `jax.jit(step).trace(...).lower()`, without compiling, of a transformer encoder. Every step
is traced anew (`jax.clear_caches`), all of them once a round, in turn; ratios are medians of those
within a round. Seconds are of processor time, which other programs on the machine disturb less; the
wall clock is in the file. A part of it is the second trace of the network, by which the axis of the
batch is found at the sites (`Call.trace_larger`); it is timed by itself.
"""

import argparse
import functools
import pathlib
import statistics
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax
import record
from rich.console import Console
from rich.table import Table

import lpa_jax
from lpa_jax.core.network import Call

CLASSES = 10


class Layer(nn.Module):
    """A layer of an encoder: attention and an MLP, each with a normalization ahead of it.

    Attributes:
      heads: Number of heads.
    """

    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(nn.LayerNorm(name="norm1")(x))
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(width, name="down")(hidden)


class Turn(nn.Module):
    """A layer as the body of a scan."""

    heads: int

    @nn.compact
    def __call__(self, x, _):
        return Layer(self.heads, name="layer")(x), None


class Encoder(nn.Module):
    """A transformer encoder of equal layers: "layer0" to "layer11", or "stack/layer", scanned.

    Attributes:
      layers: Number of layers.
      width: Number of features.
      heads: Number of heads.
      scanned: Whether the layers are the turns of one scan.
      remat: Whether each turn of the scan is computed again on the way back.
    """

    layers: int = 12
    width: int = 64
    heads: int = 4
    scanned: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, patches):
        """Map patches, `[B, positions, values]`, to logits."""
        shape = (patches.shape[1], self.width)
        x = nn.Dense(self.width, name="embed")(patches)
        x = x + self.param("positions", nn.initializers.normal(0.02), shape)
        if self.scanned:
            axes, rngs = {"params": 0}, {"params": True}
            turn = nn.remat(Turn, prevent_cse=False) if self.remat else Turn
            stack = nn.scan(turn, variable_axes=axes, split_rngs=rngs, length=self.layers)
            x, _ = stack(self.heads, name="stack")(x, None)
        else:
            for number in range(self.layers):
                x = Layer(self.heads, name=f"layer{number}")(x)
        return nn.Dense(CLASSES, name="head")(jnp.mean(nn.LayerNorm(name="norm")(x), axis=1))


def batch(examples=32, positions=32):
    """Return inputs of an encoder and labels."""
    patches = jax.random.normal(jax.random.key(0), (examples, positions, 48))
    return patches, jnp.arange(examples) % CLASSES


def plain_step(model):
    """Return loss and gradient as one writes them without this library."""

    def run(variables, state, patches, labels, key):
        del key

        def loss_fn(params):
            logits = model.apply({"params": params}, patches)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        return *jax.value_and_grad(loss_fn)(variables["params"]), state

    return run


def perturbed_step(model, perturbation):
    """Return the loss and gradient with a perturbation, and the function to its first state."""
    step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=CLASSES)

    def run(*arguments):
        (loss, _), grads, state = step(*arguments)
        return loss, grads, state

    return run, step.init


def timed(function, seconds):
    """Return a function that also notes the processor time of each of its calls."""

    @functools.wraps(function)
    def run(*arguments):
        began = time.process_time()
        result = function(*arguments)
        seconds.append(time.process_time() - began)
        return result

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5, help="Rounds, at least 1.")
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()

    model, key = Encoder(args.layers), jax.random.key(1)
    patches, labels = batch()
    variables = model.init(key, patches)
    lpa = functools.partial(lpa_jax.lpa, epsilon=0.1, steps=3)
    names = [f"layer{number}" for number in range(args.layers)]
    several = tuple(names[2::3])
    perturbations = {
        "empty chain": lpa_jax.chain(),
        "lpa at one site": lpa(names[args.layers // 2]),
        f"lpa at {len(several)} sites": lpa(several),
    }
    variants = {"plain": (plain_step(model), ())}
    for name, perturbation in perturbations.items():
        run, init = perturbed_step(model, perturbation)
        variants[name] = run, init(variables, patches, labels)

    again = []
    Call.trace_larger = timed(Call.trace_larger, again)
    rows = {name: {"step": name, "wall_seconds": [], "seconds": [], "second_trace_seconds": []}
            for name in variants}  # fmt: skip
    for round_ in range(args.repeats + 1):
        for name, (run, state) in variants.items():
            jax.clear_caches()
            again.clear()
            wall, began = time.perf_counter(), time.process_time()
            lowered = jax.jit(run).trace(variables, state, patches, labels, key).lower()
            spent, wall = time.process_time() - began, time.perf_counter() - wall
            row = rows[name]
            if round_ > 0:  # The first warms up.
                row["seconds"].append(spent)
                row["wall_seconds"].append(wall)
                row["second_trace_seconds"].append(sum(again))
            row["operations"] = lowered.as_text().count(" = ")

    plain = rows["plain"]["seconds"]
    for row in rows.values():
        row["ratios"] = [a / b for a, b in zip(row["seconds"], plain, strict=True)]

    table = Table(title=f"Tracing and lowering, {args.layers} layers, T = 3")
    for column in ("step", "seconds", "x plain", "second trace", "operations"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows.values():
        median = {
            name: statistics.median(row[name]) for name in ("seconds", "second_trace_seconds")
        }
        table.add_row(
            row["step"],
            f"{median['seconds']:.2f}",
            f"{statistics.median(row['ratios']):.2f}",
            f"{median['second_trace_seconds'] / median['seconds']:.0%}",
            str(row["operations"]),
        )
    Console().print(table)
    record.write(args.out, [*rows.values()])


if __name__ == "__main__":
    main()
