"""The first weights of a run that are not random: from a file, a package or another run."""

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from lpa_jax.models.weights import load_pretrained, SOURCES
from lpa_jax.training import mesh as meshes
from lpa_jax.training.network import Network
from lpa_jax.training.state import TrainState


def _run(workdir: str) -> dict[str, np.ndarray]:
    # Imported late: a run is built by what imports this.
    from lpa_jax.training.run import load_run

    variables = jax.device_get(load_run(workdir).variables)
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(variables, sep="/").items()}


if "run" not in SOURCES:
    SOURCES.register("run", _run)


def load(source: str, network: Network, key: jax.Array, inputs: PyTree) -> PyTree:
    """Return the variables of a network with pretrained weights, as `network.init` has them.

    Args:
      source: As `load_pretrained` takes it, or `"run:WORKDIR"`.
      network: The network.
      key: Draws what the weights lack, the head of another number of classes.
      inputs: A batch, `[B, ...]`, or shapes.

    Raises:
      ValueError: If the weights cannot be read, or do not fit.
    """
    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs)
    variables = jax.jit(lambda key: network.whole(network.init(key, inputs)))(key)
    return network.divided(load_pretrained(source, network.module, variables))


def begin(state: TrainState, variables: PyTree, shardings: TrainState) -> TrainState:
    """Return a state of no steps that begins with other variables."""
    placed = jax.tree.map(meshes.put, jax.device_get(variables), shardings.variables)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, placed)
    return state._replace(variables=placed, ema=ema)
