"""Where arrays live: one mesh over all devices, batches split along `data`."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lpa_jax.training.config import ConfigError


def data_mesh(batch_size: int) -> Mesh:
    """Return a mesh over all devices, with the one axis `data`.

    Raises:
      ConfigError: If the devices cannot share a batch evenly.
    """
    count = jax.device_count()
    if batch_size % count:
        raise ConfigError(
            f"A batch of {batch_size} cannot be shared by {count} devices: set config.batch_size "
            f"to a multiple of {count}."
        )
    # Explicit axes, make_mesh's default, do not go through Flax's modules.
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what is split by example."""
    return NamedSharding(mesh, PartitionSpec("data"))
