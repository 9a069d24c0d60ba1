"""The first weights of a run that are not random: from a file, a package or another run."""

from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import PyTree

from lpa_jax.models.pretrained import Arrays
from lpa_jax.models.weights import fitted, SOURCES
from lpa_jax.training import mesh as meshes
from lpa_jax.training.network import Network
from lpa_jax.training.state import TrainState


def _run(workdir: str) -> Arrays:
    # Imported late: a run is built by what imports this.
    from lpa_jax.training.run import load_run

    return load_run(workdir).arrays()


if "run" not in SOURCES:
    SOURCES.register("run", _run)


class Weights(NamedTuple):
    """Pretrained weights that were read.

    Attributes:
      source: Where from, as `load_pretrained` takes it, or `"run:WORKDIR"`.
      arrays: What it holds, by name.
    """

    source: str
    arrays: Arrays

    def fitted(self, network: Network, variables: PyTree) -> PyTree:
        """Return the variables of a network with these weights.

        Args:
          network: The network.
          variables: As `network.init` returns them; what the weights lack, such as the head of
            another number of classes, stays.

        Raises:
          ValueError: If the weights do not fit.
        """
        whole = network.whole(variables)
        return network.divided(fitted(self.arrays, self.source, network.module, whole))


def begin(
    weights: Weights, network: Network, state: TrainState, shardings: TrainState
) -> TrainState:
    """Return a state of no steps that begins with pretrained weights.

    Args:
      weights: The weights.
      network: The network.
      state: With random variables.
      shardings: Of a state.
    """
    variables = state.variables
    if jax.process_count() > 1:
        variables = multihost_utils.process_allgather(variables, tiled=True)
    found = weights.fitted(network, jax.device_get(variables))
    placed = jax.tree.map(meshes.put, jax.device_get(found), shardings.variables)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, placed)
    return state._replace(variables=placed, ema=ema)
