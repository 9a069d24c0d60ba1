"""Train a few steps by every method on these devices, and save what came out.

Run as `python distributed_worker.py OUT.npz DEVICES FSDP [PORT PROCESSES ID]`; test_distributed.py
does, since the number of devices is a process's for life.
"""

import itertools
import json
import pathlib
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lpa_jax
from lpa_jax import data
from lpa_jax.tasks import classification
from lpa_jax.training import checkpoints, feed, fit, mesh, step
from lpa_jax.training.network import Network

STEPS, BATCH = 50, 64
METHODS = {
    "erm": lpa_jax.chain(),
    "lpa": lpa_jax.lpa("group2", 0.1, steps=2),
    "lpa from the host": lpa_jax.lpa("group2", 0.1, steps=2),
    "lpa in a loop": lpa_jax.lpa("group2", 0.1, steps=2),
    "lpl": lpa_jax.lpl(0.3),
    "lpg": lpa_jax.lpg(0.1),
    "manifold_mixup": lpa_jax.manifold_mixup(("inputs", "group1"), 2.0),
    "mixup+lpl": lpa_jax.chain(lpa_jax.mixup(1.0), lpa_jax.lpl(0.3)),
    "dropout": lpa_jax.dropout("group3", 0.3),
    "sam": lpa_jax.sam(0.05),
    "all": lpa_jax.chain(
        lpa_jax.manifold_mixup(("inputs", "group1"), 2.0),
        lpa_jax.lpa("group3", 0.1, steps=1),
        lpa_jax.lpg(0.1),
        lpa_jax.sam(0.05),
    ),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Net(nn.Module):
    """Convolutions and batch normalization; smooth, since a kink makes more of a rounding."""

    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate((32, 64, 128)):
            x = nn.Conv(width, (3, 3), strides=min(i, 1) + 1, name=f"conv{i + 1}")(x)
            x = nn.BatchNorm(not train, momentum=0.9, name=f"group{i + 1}")(x)
            x = nn.tanh(x)
        return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


def count_collectives(compiled):
    """Count the collectives of a compiled program; halves of asynchronous ones count once."""
    text = compiled.as_text()
    return {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in COLLECTIVES}


def main(out, fsdp):
    grid = mesh.make_mesh(BATCH, fsdp)
    gather = jax.jit(lambda tree: tree, out_shardings=mesh.replicated(grid))

    def whole(tree):
        """Return the arrays of a state, from wherever they are, on this host."""
        return [np.asarray(leaf) for leaf in jax.tree.leaves(gather(tree))]

    digits = data.load("digits")
    model = Net()
    tx = optax.sgd(0.01, momentum=0.9)
    results, counts = {}, {}
    for name, perturbation in METHODS.items():
        perturbed = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=10)
        place = "host" if "host" in name else "device"
        source = feed.make_feed(place, digits.train, BATCH, 3 * STEPS, grid)
        at_once = 5 if "loop" in name else 1
        steps = step.make_steps(
            Network(model), classification, perturbed, tx, grid, source.like, source.take,
            augment=data.augmentations("crop=1"), looped=at_once > 1,
        )  # fmt: skip
        state = steps.init(jnp.int32(0))
        numbers = mesh.put((np.int32(0), np.int32(at_once)), mesh.replicated(grid))
        batches = source.open(0, 0)
        compiled = None
        # As many steps a call as divide the twenty of an epoch.
        for _ in range(0, STEPS, at_once):
            *_, given = itertools.islice(batches, at_once)
            if compiled is None:
                compiled = steps.train.lower(state, *numbers, *given).compile()
                counts[name] = count_collectives(compiled)
            # Collectives of steps that wait for one another would wait for too few threads.
            state = jax.block_until_ready(compiled(state, *numbers, *given))
        batches.close()
        results[f"{name}/loss"] = np.asarray(state.running.loss)
        results[f"{name}/params"] = np.concatenate([x.ravel() for x in whole(state.variables)])
        class_stats = state.perturbation.class_stats
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(class_stats)]
        for path, leaf in zip(paths, whole(class_stats), strict=True):
            results[f"{name}/class_stats{jax.tree_util.keystr(path)}"] = leaf

    # The last method's state: its size on one device, and whether it survives a change of devices.
    held = (state.variables["params"], state.opt_state)
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(held)]
    results["bytes"] = np.array(sum(shard.nbytes for shard in shards))
    results["collectives"] = np.array(json.dumps(counts))
    saved = checkpoints.Checkpoints(out.with_suffix(".checkpoint"))
    saved.save(STEPS, state.items())
    saved.close()
    results["state"] = np.concatenate([x.ravel().astype(np.float64) for x in whole(state)])
    for path in sorted(out.parent.glob("*.checkpoint")):
        other = checkpoints.Checkpoints(path)
        restored = whole(fit.restore(other, steps))
        other.close()
        results[f"restored/{path.stem}"] = np.concatenate(
            [leaf.ravel().astype(np.float64) for leaf in restored]
        )
    if jax.process_index() == 0:
        np.savez(out, **results)


if __name__ == "__main__":
    path, devices, fsdp, *others = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if others:
        port, processes, number = map(int, others)
        jax.distributed.initialize(f"localhost:{port}", processes, number)
    main(pathlib.Path(path).absolute(), int(fsdp))
