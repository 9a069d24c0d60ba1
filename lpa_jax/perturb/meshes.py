"""Meshes with explicit axes, within which a step runs as if they were automatic.

That goes for the arguments of the step. A perturbation that was made with an array on such a mesh,
as a bound, is refused by JAX; give the number, or an array of a single device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def explicit(tree: PyTree) -> Mesh | AbstractMesh | None:
    """Return the mesh with explicit axes that is in force, or on which arrays of a tree lie."""
    lying = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree) if _is_array(leaf))
    for mesh in (jax.sharding.get_abstract_mesh(), *lying):
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def on(mesh: Mesh | AbstractMesh, value: Any = None) -> NamedSharding:
    """Return where a value lies; everywhere, if that is not on the mesh or there is no value."""
    known = jax.typeof(value).sharding if _is_array(value) else None
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
      *given: Its arguments, of which those that are not arrays are closed over.
    """
    leaves, tree = jax.tree.flatten(given)
    places = [place for place, leaf in enumerate(leaves) if _is_array(leaf)]

    def with_arrays(*arrays):
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        return function(*jax.tree.unflatten(tree, filled))

    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    run = jax.sharding.auto_axes(with_arrays, axes=axes, out_sharding=shardings)
    return run(*(leaves[place] for place in places))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)
