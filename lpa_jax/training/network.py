"""The network of a run: how it is initialized, trained and used, whatever Flax module it is."""

import inspect
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jaxtyping import Array, PyTree


class Network(NamedTuple):
    """A Flax Linen module, and how the trainer calls it.

    Attributes:
      module: Takes float inputs `[B, ...]` and returns logits `[B, C]`; with an argument `train`,
        if it has one.
    """

    module: nn.Module

    @property
    def _takes_train(self) -> bool:
        return "train" in inspect.signature(type(self.module).__call__).parameters

    @property
    def _evaluating(self) -> dict[str, Any]:
        return {"train": False} if self._takes_train else {}

    def init(self, key: Array, inputs: Array) -> PyTree:
        """Return the first variables."""
        return self.module.init(key, inputs, **self._evaluating)

    def train_arguments(self, variables: PyTree, key: Array) -> dict[str, Any]:
        """Return what a training step passes to `module.apply`.

        Args:
          variables: Of which all but the parameters may change.
          key: Of the step, for a dropout of the network's own.
        """
        mutable = sorted(set(variables) - {"params"})
        arguments: dict[str, Any] = {"rngs": {"dropout": key}}
        arguments |= {"mutable": mutable} if mutable else {}
        return arguments | ({"train": True} if self._takes_train else {})

    def logits(self, variables: PyTree, inputs: Array) -> Array:
        """Return the logits of a trained network."""
        found = self.module.apply(variables, inputs, **self._evaluating)
        return jax.numpy.asarray(found)
