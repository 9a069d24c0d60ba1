"""Saving and restoring the state of a run, with orbax."""

import pathlib
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp


class CheckpointError(RuntimeError):
    """There are checkpoints, but none that can be read."""


class Checkpoints:
    """The checkpoints of one seed: the newest two, written in the background.

    A checkpoint appears under its name only when it is complete, so a run killed while saving
    restores the one before.

    Args:
      directory: Where they are kept; made when the first is saved.
    """

    def __init__(self, directory: pathlib.Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Save `state`, a pytree of arrays, as that of `step`."""
        # Orbax stores arrays by name in plain trees: the structure is the program's to know.
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        self._manager.save(step, args=ocp.args.StandardSave(leaves))

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
        shapes = {
            str(i): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for i, (leaf, place) in enumerate(zip(leaves, places, strict=True))
        }
        steps = sorted(self._manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            restored = self._read(step, shapes)
            if restored is not None:
                for unreadable in steps[:i]:
                    self._manager.delete(unreadable)
                return treedef.unflatten([restored[str(i)] for i in range(len(leaves))])
        if steps:
            raise CheckpointError(
                f"No checkpoint in {self._manager.directory} can be read: remove that directory to "
                "begin anew, or go on with the versions that wrote it."
            )
        return None

    def _read(self, step: int, shapes: Any) -> Any | None:
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        except Exception as error:  # Of any kind: what reads the files is several libraries.
            reason = str(error).strip().partition("\n")[0]
            logging.warning(
                "The checkpoint of step %d in %s cannot be read; taking the one before. (%s)",
                *(step, self._manager.directory, reason),
            )
            restored = None
        # What one process cannot read none may take.
        if jax.process_count() > 1:
            read = multihost_utils.process_allgather(np.array(restored is not None))
            restored = restored if read.all() else None
        return restored

    def close(self) -> None:
        """Wait until what was saved is written."""
        self._manager.wait_until_finished()
        self._manager.close()
