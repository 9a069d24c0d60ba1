"""Saving and restoring the state of a run, with orbax."""

import contextlib
import pathlib
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import Array, UInt32
import numpy as np
import orbax.checkpoint as ocp

from lpa_jax.training import records

SUMS = "checksums"


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
        self._directory = directory.absolute()
        # Orbax's own read_only warns of itself; what saves and deletes nothing writes nothing.
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=not read_only)
        with self._writing():
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Any) -> None:
        """Save `state`, a pytree of arrays, as that of `step`.

        Raises:
          WriteError: If it, or the one before, cannot be written.
        """
        # Orbax stores arrays by name in plain trees: the structure is the program's to know.
        leaves = jax.tree.leaves(state)
        named = {str(i): leaf for i, leaf in enumerate(leaves)} | {SUMS: np.asarray(_sums(leaves))}
        with self._writing():
            self._manager.save(step, args=ocp.args.StandardSave(named))

    def restore(self, like: Any, shardings: Any) -> Any | None:
        """Return the newest state that can be read; None if there is none.

        Where the newest cannot be read, the one before is taken, with a warning.

        Args:
          like: A pytree of the structure, shapes and dtypes of the state.
          shardings: The same structure, where to put each array; it may have been saved from
            other places, on another number of devices.
        """
        leaves, treedef = jax.tree.flatten(like)
        places = treedef.flatten_up_to(shardings)
        shapes: dict[str, Any] = {
            str(i): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for i, (leaf, place) in enumerate(zip(leaves, places, strict=True))
        }
        shapes[SUMS] = np.zeros(len(leaves), np.uint32)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            restored = self._read(step, shapes)
            if restored is not None:
                for unreadable in steps[: 0 if self._read_only else i]:
                    self._manager.delete(unreadable)
                return treedef.unflatten(restored)
        if steps:
            raise CheckpointError(
                f"No checkpoint in {self._directory} can be read: remove that directory to "
                "begin anew, or go on with the configuration and the versions that wrote it."
            )
        return None

    def _read(self, step: int, shapes: dict[str, Any]) -> list[Any] | None:
        try:
            named = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
            restored = [named[str(i)] for i in range(len(shapes) - 1)]
            if not np.array_equal(_sums(restored), named[SUMS]):
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
        return records.writing(f"A checkpoint in {self._directory}", Exception)
