"""Reads what a run saved, without the library."""

import jax
import numpy as np
import orbax.checkpoint as ocp


def leaves(checkpoints):
    """Return every leaf of every checkpoint that is kept."""
    with ocp.CheckpointManager(checkpoints) as manager:
        items = ("progress", "training", "variables")
        wanted = ocp.args.Composite(**dict.fromkeys(items, ocp.args.StandardRestore()))
        steps = {s: dict(manager.restore(s, args=wanted)) for s in manager.all_steps()}
    found = jax.tree_util.tree_leaves_with_path(steps)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}
