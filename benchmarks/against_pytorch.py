"""Images a second of this library and of PyTorch: the same network, batch and machine, one run.

    python benchmarks/against_pytorch.py [--model=wrn_16_2] [--site=group2] [--out=FILE.json]

Three training steps, each with its update by SGD: plain cross-entropy, LPL and LPA. PyTorch's LPA
is written with a forward hook, as one does there: it adds the perturbation to the layer's output,
and the full network runs, from the inputs forward and from the loss back to the layer, for each PGD
step. PyTorch is timed eager and compiled and in both memory formats; the fastest is the rival.

Both start from the same parameters and batch, and nothing is timed before loss, logits,
perturbation and gradients agree. Every variant runs once a round, in turn; ratios are of runs of
the same round. It needs PyTorch, and runs on a GPU where both frameworks have one.
"""

import argparse
import functools
import os
import pathlib
import statistics
import time

# The two frameworks share a GPU's memory, most of which JAX would else reserve.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from rich.console import Console
from rich.table import Table

import lpa_jax
from lpa_jax import memory, models

try:
    import torch
except ImportError as error:
    raise SystemExit("This benchmark needs PyTorch: pip install torch.") from error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
APPLY = {"train": True, "mutable": ["batch_stats"]}
NUM_CLASSES = 10
MEAN, STD = 0.5, 0.25
EPSILON = {"plain": 0.0, "lpl": 0.5, "lpa": 0.2}
VARIANTS = {
    "torch eager": {},
    "torch eager, channels last": {"memory_format": torch.channels_last},
    "torch compiled": {"compiled": True},
    "torch compiled, channels last": {"compiled": True, "memory_format": torch.channels_last},
}
# What changes the speed from outside.
ENVIRONMENT = ("XLA_FLAGS", "OMP_NUM_THREADS", "GLIBC_TUNABLES", "LD_PRELOAD")
SGD = {"momentum": 0.9, "nesterov": True}
LEARNING_RATE, WEIGHT_DECAY = 0.1, 5e-4
# That both compute the same is seen in float64. With fewer bits a rounding moves activations across
# the kink of a relu, and gradients by as much as such an example weighs; there, only gross
# differences count (on GPUs, float32 is rounded to TF32 by both).
TOLERANCE = {"float64": 1e-5, "float32": 0.05, "bfloat16": 0.3}


class Block(torch.nn.Module):
    """`lpa_jax.models.layers.PreActBlock`."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.norm1 = torch.nn.BatchNorm2d(channels)
        self.conv1 = torch.nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm2 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if channels != width or stride > 1:
            self.shortcut = torch.nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, inputs):
        active = torch.relu(self.norm1(inputs))
        x = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return x + (inputs if self.shortcut is None else self.shortcut(active))


class WideResNet(torch.nn.Module):
    """`lpa_jax.models.WideResNet`, with modules of the same names."""

    def __init__(self, num_blocks, widen_factor):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
        channels = 16
        for i in range(3):
            group, width = torch.nn.Sequential(), 2**i * 16 * widen_factor
            for j in range(num_blocks):
                group.add_module(f"block{j}", Block(channels, width, 2 if i > 0 and j == 0 else 1))
                channels = width
            self.add_module(f"group{i + 1}", group)
        self.norm = torch.nn.BatchNorm2d(channels)
        self.head = torch.nn.Linear(channels, NUM_CLASSES)

    def forward(self, images):
        x = self.stem((images - MEAN) / STD)
        x = self.group3(self.group2(self.group1(x)))
        features = torch.relu(self.norm(x)).to(self.head.weight.dtype).mean(dim=(2, 3))
        with torch.autocast(DEVICE, enabled=False):
            return self.head(features)


def in_torch(tree):
    """Return the arrays of a Flax tree by PyTorch's names and in its layouts."""
    renamed = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    arrays = {}
    for (*modules, name), leaf in traverse_util.flatten_dict(tree).items():
        array = np.asarray(leaf)
        axes = (3, 2, 0, 1) if array.ndim == 4 else None  # None reverses them.
        arrays[".".join([*modules, renamed.get(name, name)])] = array.transpose(axes)
    return arrays


def torch_network(model, variables):
    """Return the PyTorch network with the parameters and statistics of the Flax one."""
    network = WideResNet((model.depth - 4) // 6, model.widen_factor)
    state = network.state_dict()
    arrays = in_torch(variables["params"]) | in_torch(variables["batch_stats"])
    missing = {name for name in state if not name.endswith("num_batches_tracked")} ^ set(arrays)
    if missing:
        raise RuntimeError(f"The two networks differ in {sorted(missing)}.")
    network.load_state_dict(state | {name: torch.tensor(a) for name, a in arrays.items()})
    return network.train()


class TorchTraining:
    """Training by one of the methods, as one writes it in PyTorch.

    After a step the gradients are where PyTorch leaves them, and `loss`, `logits` and `delta`, the
    perturbation of every class, are those of the step.
    """

    def __init__(
        self, method, model, variables, images, labels, site, shape, steps, *,
        dtype, compiled=False, memory_format=torch.contiguous_format,
    ):  # fmt: skip
        place = {"device": DEVICE, "memory_format": memory_format}
        place["dtype"] = torch.float64 if dtype == "float64" else torch.float32
        self.network = torch_network(model, variables).to(**place)
        self.images = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2).to(**place)
        self.labels = torch.tensor(np.asarray(labels), dtype=torch.int64, device=DEVICE)
        self.method, self.shape, self.steps = method, shape, steps
        self.autocast = {"dtype": torch.bfloat16, "enabled": dtype == "bfloat16"}
        self.shift = self.delta = None
        self.network.get_submodule(site).register_forward_hook(self._add_shift)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, **SGD
        )
        self.forward = torch.compile(self.network) if compiled else self.network

    def _add_shift(self, module, inputs, output):
        del module, inputs
        return output if self.shift is None else output + self.shift.to(output.dtype)

    def _logits(self, shift=None):
        self.shift = shift
        with torch.autocast(DEVICE, **self.autocast):
            return self.forward(self.images)

    def _ascend(self, logits_at):
        """Find the perturbation of every class by projected gradient steps."""
        epsilon, stride = EPSILON[self.method], 2 * EPSILON[self.method] / self.steps
        delta = torch.zeros(self.shape, device=DEVICE)
        for _ in range(self.steps):
            delta.requires_grad_()
            logits = logits_at(delta[self.labels])
            loss = torch.nn.functional.cross_entropy(logits, self.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, delta)
            with torch.no_grad():
                delta = delta + stride * gradient / norms(gradient).clamp(min=1e-12)
                delta = delta * (epsilon / norms(delta)).clamp(max=1)
        return delta.detach()

    def step(self):
        if self.method == "lpa":
            # Nothing is kept or differentiated ahead of the layer, nor for the parameters.
            self.network.requires_grad_(False)
            self.delta = self._ascend(self._logits)
            self.network.requires_grad_(True)
            logits = moved = self._logits(self.delta[self.labels])
        else:
            logits = moved = self._logits()
        if self.method == "lpl":
            fixed = logits.detach()
            self.delta = self._ascend(lambda shift: fixed + shift)
            moved = logits + self.delta[self.labels]
        loss = torch.nn.functional.cross_entropy(moved, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss, self.logits = loss.detach(), logits.detach()

    def wait(self):
        if DEVICE == "cuda":
            torch.cuda.synchronize()


def norms(rows):
    """Return the l2 norm of each row, shaped to broadcast against the rows."""
    return rows.flatten(1).norm(dim=1).reshape((-1,) + (1,) * (rows.ndim - 1))


class JaxTraining:
    """Training by one of the methods with this library."""

    def __init__(self, model, perturbation, variables, images, labels):
        perturbed = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=NUM_CLASSES)
        tx = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, **SGD))

        def step(training, images, labels, key):
            variables, opt_state, state = training
            (loss, aux), grads, state = perturbed(variables, state, images, labels, key, **APPLY)
            updates, opt_state = tx.update(grads, opt_state, variables["params"])
            params = optax.apply_updates(variables["params"], updates)
            return ({"params": params, **aux["updates"]}, opt_state, state), loss

        # The step may overwrite what it was given, so it is given copies.
        variables = jax.tree.map(jnp.copy, variables)
        opt_state = tx.init(variables["params"])
        state = perturbed.init(variables, images, labels, **APPLY)
        self.training, self.loss = (variables, opt_state, state), None
        self.batch = (images, labels, jax.random.key(1))
        self.compiled = jax.jit(step, donate_argnums=0)

    def step(self):
        self.training, self.loss = self.compiled(self.training, *self.batch)

    def wait(self):
        jax.block_until_ready((self.training, self.loss))


def jax_reference(model, site, perturbation, variables, images, labels):
    """Return loss, logits, gradients and each class's perturbation at the first step."""
    # An optax transform that keeps the value it sees, before and after the perturbation.
    keep = optax.GradientTransformation(lambda value: value, lambda value, *_: (value, value))
    around = lpa_jax.at(site, keep)
    step = lpa_jax.value_and_grad(
        model.apply, lpa_jax.chain(around, perturbation, around), num_classes=NUM_CLASSES
    )
    state = step.init(variables, images, labels, **APPLY)
    run = jax.jit(lambda *batch: step(*batch, **APPLY))
    (loss, aux), grads, state = run(variables, state, images, labels, jax.random.key(1))
    before, after = state.perturbations[0], state.perturbations[-1]
    first = np.unique(labels, return_index=True)[1]
    # A channel's entry is added at every position: their mean is free of most of the rounding.
    positions = tuple(range(1, before.ndim - 1))
    delta = jnp.mean(after - before, axis=positions, dtype=jnp.float32)[first]
    return {"loss": loss, "logits": aux["logits"], "perturbation": delta} | in_torch(grads)


def difference(ours, theirs):
    """Return the largest difference of two arrays, relative to the largest entry."""
    ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
    return float(np.max(np.abs(ours - theirs)) / max(np.max(np.abs(ours)), 1e-12))


def check(what, reference, training, dtype):
    """Take PyTorch's first step, and print how far it is from this library's.

    Raises:
      SystemExit: If that is too far for the same computation.
    """
    training.step()
    theirs = {"loss": training.loss, "logits": training.logits}
    if training.delta is not None:
        theirs["perturbation"] = training.delta.flatten(1)[np.unique(training.labels.cpu())]
    far = {name: difference(reference[name], value.cpu()) for name, value in theirs.items()}
    if dtype == "float64":
        far["gradients"] = max(
            difference(reference[name], parameter.grad.cpu())
            for name, parameter in training.network.named_parameters()
        )
    sizes = ", ".join(f"{name} {size:.1e}" for name, size in far.items())
    print(f"{what}, {dtype}, relative difference: {sizes}", flush=True)
    if not max(far.values()) <= TOLERANCE[dtype]:
        raise SystemExit("The two compute different things, so nothing is timed.")
    return far


def measure(trainings, rounds, repeats):
    """Return the seconds of a step in each round, in which every training runs in turn."""
    seconds = {name: [] for name in trainings}
    for round_ in range(rounds + 1):
        for name, training in trainings.items():
            began = time.perf_counter()
            for _ in range(repeats):
                training.step()
            training.wait()
            if round_ > 0:  # The first warms up.
                seconds[name].append((time.perf_counter() - began) / repeats)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wrn_16_2", help="A wide residual network.")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="PGD steps T.")
    parser.add_argument("--site", default="group2", help="Where LPA perturbs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="Training steps in each round.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    args = parser.parse_args()

    # As the command lines do; PyTorch, which is in the same process, has it too.
    memory.keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # Let it look for the fastest convolutions.
    options = {"num_classes": NUM_CLASSES, "mean": (MEAN,), "std": (STD,)}
    model = models.create(args.model, dtype=jnp.dtype(args.dtype), **options)
    if not isinstance(model, models.WideResNet):
        parser.error(f"only wide residual networks are written in PyTorch here, not {args.model}")
    if (DEVICE == "cuda") != (jax.default_backend() == "gpu"):
        parser.error("only one framework has the GPU; hide it from both by CUDA_VISIBLE_DEVICES=")
    images = jax.random.uniform(jax.random.key(0), (args.batch, 32, 32, 3))
    labels = jnp.arange(args.batch) % NUM_CLASSES
    variables = model.init(jax.random.key(0), images[:1], train=False)
    channels = lpa_jax.list_sites(model.apply, variables, images, **APPLY)[args.site].shape[-1]
    ascent = {"steps": args.steps, "split": lpa_jax.splits.all_positive()}
    lpl = lpa_jax.lpl(EPSILON["lpl"], solver="projected", **ascent)
    lpa = lpa_jax.lpa(args.site, EPSILON["lpa"], radius="absolute", **ascent)
    methods = {
        "plain": ("logits", lpa_jax.chain(), ()),
        "lpl": ("logits", lpl, (NUM_CLASSES, NUM_CLASSES)),
        "lpa": (args.site, lpa, (NUM_CLASSES, channels, 1, 1)),
    }

    rows, differences = [], {}
    for method, (site, perturbation, shape) in methods.items():
        batch = (variables, images, labels)
        written = functools.partial(
            TorchTraining, method, model, *batch, args.site, shape, args.steps
        )
        with jax.enable_x64(True):
            exact = jax_reference(model.clone(dtype=jnp.float64), site, perturbation, *batch)
        differences[method] = check(method, exact, written(dtype="float64"), "float64")
        reference = jax_reference(model, site, perturbation, *batch)
        trainings = {"lpa_jax": JaxTraining(model, perturbation, *batch)}
        for variant, how in VARIANTS.items():
            training = written(dtype=args.dtype, **how)
            try:
                check(f"{method} by {variant}", reference, training, args.dtype)
            except Exception as error:
                # Compilation needs a C++ or GPU compiler, which not every machine has.
                if not how.get("compiled"):
                    raise
                print(f"{method} by {variant} does not run here: {error}")
                continue
            trainings[variant] = training
        seconds = measure(trainings, args.rounds, args.repeats)
        medians = {variant: statistics.median(times) for variant, times in seconds.items()}
        rival = min(set(medians) - {"lpa_jax"}, key=medians.get)
        for variant, times in seconds.items():
            ratios = [a / b for a, b in zip(times, seconds["lpa_jax"], strict=True)]
            rows.append(
                {
                    "step": method,
                    "variant": variant,
                    "seconds": medians[variant],
                    "images_per_second": args.batch / medians[variant],
                    "time_ratio": statistics.median(ratios),
                    "rival": variant == rival,
                }
            )

    title = f"{args.model}, {args.dtype}, batch {args.batch}, T = {args.steps}, LPA at {args.site}"
    caption = "Bold: this library, and the fastest PyTorch."
    table = Table(title=title, caption=caption)
    for column in ("step", "variant", "seconds", "images/s", "x lpa_jax"):
        table.add_column(column, justify="left" if column in ("step", "variant") else "right")
    for row in rows:
        table.add_row(
            row["step"],
            row["variant"],
            f"{row['seconds']:.4f}",
            f"{row['images_per_second']:.1f}",
            f"{row['time_ratio']:.3f}",
            style="bold" if row["rival"] or row["variant"] == "lpa_jax" else None,
        )
    Console().print(table)
    record.write(
        args.out,
        rows,
        torch=torch.__version__,
        torch_threads=torch.get_num_threads(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        differences=differences,
    )


if __name__ == "__main__":
    main()
