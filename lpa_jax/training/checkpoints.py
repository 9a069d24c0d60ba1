"""Saving and restoring the state of a run, with orbax."""

import pathlib
from typing import Any

from absl import logging
import jax
import orbax.checkpoint as ocp


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

        A damaged checkpoint is removed, with a warning, and the one before it taken.

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
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
            except Exception as error:  # Of any kind: what reads the files is several libraries.
                reason = str(error).strip().partition("\n")[0]
                logging.warning(
                    "The checkpoint of step %d in %s is damaged; taking the one before. (%s)",
                    *(step, self._manager.directory, reason),
                )
                self._manager.delete(step)
            else:
                return treedef.unflatten([restored[str(i)] for i in range(len(leaves))])
        return None

    def close(self) -> None:
        """Wait until what was saved is written."""
        self._manager.wait_until_finished()
        self._manager.close()
