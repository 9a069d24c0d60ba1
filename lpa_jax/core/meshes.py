"""Meshes with explicit axes, within which a step runs as if they were automatic.

That goes for the arguments of the step. A perturbation that was made with an array on such a mesh,
as a bound, is refused by JAX; give the number, or an array of a single device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def explicit(tree: PyTree) -> Mesh | AbstractMesh | None:
    """Return the mesh with explicit axes that is in force, or on which arrays of a tree lie."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    # One with devices is preferred: arrays that lie elsewhere are put on it.
    devices = (leaf.sharding for leaf in arrays if not isinstance(leaf, core.Tracer))
    meshes = (sharding.mesh for sharding in devices if isinstance(sharding, NamedSharding))
    lying = (jax.typeof(leaf).sharding.mesh for leaf in arrays)
    for mesh in (*meshes, jax.sharding.get_abstract_mesh(), *lying):
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def on(mesh: Mesh | AbstractMesh, value: Any = None) -> NamedSharding:
    """Return where a value lies; everywhere, if that is not on the mesh or there is no value."""
    known = jax.typeof(value).sharding if isinstance(value, jax.Array) else None
    spec = known.spec if known is not None and not known.mesh.empty else PartitionSpec()
    return NamedSharding(mesh, spec)


def run_automatic(
    function: Callable[..., Any], mesh: Mesh | AbstractMesh, shardings: PyTree, *given: PyTree
) -> Any:
    """Return `function(*given)`, run with the explicit axes of a mesh as automatic ones.

    Args:
      function: What to run; the shardings of what it computes are XLA's to choose.
      mesh: From `explicit`.
      shardings: Of what it returns, a prefix of its tree.
      *given: Its arguments, of which those that are not arrays are closed over. If the mesh has
        devices, arrays that lie elsewhere are put on all of them.
    """
    leaves, tree = jax.tree.flatten(given)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    if isinstance(mesh, Mesh):
        for place in places:
            if not isinstance(leaves[place], core.Tracer):
                leaves[place] = jax.device_put(leaves[place], on(mesh, leaves[place]))

    def with_arrays(*arrays):
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        return function(*jax.tree.unflatten(tree, filled))

    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    run = jax.sharding.auto_axes(with_arrays, axes=axes, out_sharding=shardings)
    return run(*(leaves[place] for place in places))
