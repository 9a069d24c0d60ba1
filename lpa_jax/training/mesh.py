"""Where arrays live: a mesh of all devices, batches split over it, large arrays sharded by rule."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
import numpy as np

LARGE = 2**10
"""Arrays of fewer entries are not worth splitting: to gather them costs a message all the same."""


def make_mesh(batch_size: int, fsdp: int = 1) -> Mesh:
    """Return a mesh over the devices of all processes, with the axes `data` and `fsdp`.

    Args:
      batch_size: Examples of a step, which all devices share.
      fsdp: Number of devices that share one copy of the parameters, of the state of the optimizer
        and of the perturbations; 1 for a copy on every device.

    Raises:
      ValueError: If the devices cannot share a batch, or the copies the devices, evenly.
    """
    count = jax.device_count()
    if batch_size % count:
        raise ValueError(
            f"A batch of {batch_size} cannot be shared by {count} devices: set config.batch_size "
            f"to a multiple of {count}."
        )
    if count % fsdp:
        raise ValueError(f"config.fsdp must divide the {count} devices, not {fsdp}.")
    # Explicit axes, make_mesh's default, do not go through Flax's modules.
    return jax.make_mesh((count // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of what is split by example, along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))


def sharded(mesh: Mesh, tree: PyTree) -> PyTree:
    """Return the sharding of each array of a state: large ones are split over `fsdp`.

    An array of at least `LARGE` entries is split along its longest axis that `fsdp` divides.
    """
    count = mesh.shape["fsdp"]

    def rule(leaf: Any) -> NamedSharding:
        divisible = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % count == 0]
        if count == 1 or leaf.size < LARGE or not divisible:
            return replicated(mesh)
        longest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(rule, tree)


def multiple(mesh: Mesh, count: int) -> int:
    """Return the smallest number from `count` on that the devices can share evenly."""
    return -(-count // mesh.size) * mesh.size


def put(values: PyTree, sharding: NamedSharding) -> PyTree:
    """Place arrays of the host, the same in all processes, on the devices of all."""

    def place(value):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(place, values)
