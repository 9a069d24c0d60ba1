"""Saving and restoring the state of a run by name, with orbax."""

from collections.abc import Mapping
import contextlib
import pathlib
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32
import numpy as np
import orbax.checkpoint as ocp

from lpa_jax.training import files

SUMS = "checksums"
FORMER = "default"
"""Where version 0.1 saved a state, whose arrays had numbers for names."""


@jax.jit
def _sums(leaves: list[Array]) -> UInt32[Array, "leaves"]:
    """Return a checksum of each array, the same wherever its parts are: sums modulo 2**32."""

    def of(leaf):
        bits = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[bits.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(bits, width).astype(jnp.uint32).ravel()
        # Odd factors: a flipped bit shows in the sum, and so do entries that changed places.
        return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1))

    return jnp.stack([of(leaf) for leaf in leaves])


class CheckpointError(RuntimeError):
    """There are checkpoints, but none that can be read."""


def named(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree in nested dictionaries, by the names of its keys and fields.

    Example:
      >>> named({"params": {"kernel": 1}, "moments": (2, 3)})
      {'moments': {'0': 2, '1': 3}, 'params': {'kernel': 1}}
    """
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *above, last = (jax.tree_util.keystr((part,), simple=True) for part in path)
        place = nested
        for name in above:
            place = place.setdefault(name, {})
        place[last] = leaf
    return nested


def like_named(tree: PyTree, nested: Mapping[str, Any]) -> PyTree:
    """Return a tree with the leaves that `named` gives it, the inverse of it.

    Example:
      >>> like_named(({"kernel": 0}, 0), {"0": {"kernel": 1}, "1": 2})
      ({'kernel': 1}, 2)
    """

    def leaf_at(path, _):
        place: Any = nested
        for part in path:
            place = place[jax.tree_util.keystr((part,), simple=True)]
        return place

    return jax.tree_util.tree_map_with_path(leaf_at, tree)


class Checkpoints:
    """The checkpoints of one seed: the newest two, written in the background.

    A checkpoint appears under its name only when it is complete, so a run killed while saving
    restores the one before.

    Args:
      directory: Where they are kept; it is made.
      read_only: Whether they are another's, to be restored and otherwise left alone.

    Raises:
      WriteError: If it cannot be made.
    """

    def __init__(self, directory: pathlib.Path, *, read_only: bool = False):
        """Open the directory."""
        self._directory = directory.absolute()
        # Orbax's own read_only warns of itself; what saves and deletes nothing writes nothing.
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=not read_only)
        with self._writing():
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, items: Mapping[str, PyTree]) -> None:
        """Save trees of arrays, each of which can be restored by itself, as those of `step`.

        Raises:
          WriteError: If they, or the ones before, cannot be written.
        """
        saved = {
            item: ocp.args.StandardSave(named(tree) | {SUMS: np.asarray(_sums(_leaves(tree)))})
            for item, tree in items.items()
        }
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**saved))

    def restore(
        self, like: Mapping[str, PyTree], shardings: Mapping[str, PyTree]
    ) -> dict[str, PyTree] | None:
        """Return the newest items that can be read; None if there are none.

        Where the newest cannot be read, those before are taken, with a warning.

        Args:
          like: For each item that is wanted a tree of the structure, shapes and dtypes.
          shardings: The same structure, where to put each array; it may have been saved from
            other places, on another number of devices.

        Raises:
          CheckpointError: If there are some, but none can be read.
        """

        def shape(leaf, place):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        wanted = {item: jax.tree.map(shape, like[item], shardings[item]) for item in like}
        steps = sorted(self._manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            restored = self._read(step, wanted)
            if restored is not None:
                for unreadable in steps[: 0 if self._read_only else i]:
                    self._manager.delete(unreadable)
                return restored
        if any((self._directory / str(step) / FORMER).exists() for step in steps):
            raise CheckpointError(
                f"The checkpoints in {self._directory} were written by lpa_jax 0.1, in another "
                "form: use that version, or train again in another directory."
            )
        if steps:
            raise CheckpointError(
                f"No checkpoint in {self._directory} can be read: remove that directory to "
                "train again, or resume with the configuration and the versions that wrote it."
            )
        return None

    def _read(self, step: int, wanted: Mapping[str, PyTree]) -> dict[str, PyTree] | None:
        try:
            shapes = {
                item: ocp.args.StandardRestore(
                    named(tree) | {SUMS: np.zeros(len(jax.tree.leaves(tree)), np.uint32)}
                )
                for item, tree in wanted.items()
            }
            found = self._manager.restore(step, args=ocp.args.Composite(**shapes))
            restored = {item: like_named(tree, found[item]) for item, tree in wanted.items()}
            for item, tree in restored.items():
                if not np.array_equal(_sums(_leaves(tree)), found[item][SUMS]):
                    raise ValueError("what was read is not what was saved")
        except Exception as error:  # Of any kind: what reads the files is several libraries.
            reason = str(error).strip().partition("\n")[0]
            logging.warning(
                "The checkpoint of step %d in %s cannot be read; taking the one before. (%s)",
                *(step, self._directory, reason),
            )
            restored = None
        # What one process cannot read none may take.
        if jax.process_count() > 1:
            read = multihost_utils.process_allgather(np.array(restored is not None))
            restored = restored if read.all() else None
        return restored

    def close(self) -> None:
        """Wait until what was saved is written.

        Raises:
          WriteError: If it cannot be.
        """
        with self._writing():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        # Errors of any kind: what writes the files is several libraries.
        return files.writing(f"A checkpoint in {self._directory}", Exception)


def _leaves(tree: PyTree) -> list[Any]:
    """Return the leaves in the order of their names, in which they come back."""
    return jax.tree.leaves(named(tree))
