"""The network of a run: how it is initialized, trained and used, whatever Flax module it is."""

import inspect
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jaxtyping import Array, PyTree

from lpa_jax.training import rates

FROZEN = "frozen"
"""The collection of the parameters that do not learn."""


class Network(NamedTuple):
    """A Flax Linen module, and how the trainer calls it.

    Attributes:
      module: Takes float inputs `[B, ...]` and returns logits `[B, C]`; with an argument `train`,
        if it has one.
      factors: Of the learning rate. Parameters with the factor 0 are in a collection of their own,
        so that nothing is derived by them, and nothing kept of them in an optimizer.
    """

    module: nn.Module
    factors: rates.Rates = ()

    @property
    def _takes_train(self) -> bool:
        return "train" in inspect.signature(type(self.module).__call__).parameters

    @property
    def _evaluating(self) -> dict[str, Any]:
        return {"train": False} if self._takes_train else {}

    @property
    def _freezes(self) -> bool:
        return any(number == 0 for _, number in self.factors)

    def init(self, key: Array, inputs: Array) -> PyTree:
        """Return the first variables."""
        return self.divided(self.module.init(key, inputs, **self._evaluating))

    def divided(self, variables: PyTree) -> PyTree:
        """Return the module's variables with those that are frozen apart."""
        if not self._freezes:
            return variables
        params, frozen = rates.divide(variables["params"], self.factors)
        return {**variables, "params": params, FROZEN: frozen}

    def whole(self, variables: PyTree) -> PyTree:
        """Return the module's variables."""
        if FROZEN not in variables:
            return variables
        others = {name: tree for name, tree in variables.items() if name != FROZEN}
        return others | {"params": rates.merge(variables["params"], variables[FROZEN])}

    @property
    def apply(self) -> Any:
        """What is called with variables, inputs and the arguments of a training step."""
        if not self._freezes:
            return self.module.apply

        def apply(variables, inputs, **kwargs):
            return self.module.apply(self.whole(variables), inputs, **kwargs)

        return apply

    def train_arguments(self, variables: PyTree, key: Array) -> dict[str, Any]:
        """Return what a training step passes to `apply`.

        Args:
          variables: Of which all but the parameters may change.
          key: Of the step, for a dropout of the network's own.
        """
        mutable = sorted(set(variables) - {"params", FROZEN})
        arguments: dict[str, Any] = {"rngs": {"dropout": key}}
        arguments |= {"mutable": mutable} if mutable else {}
        return arguments | ({"train": True} if self._takes_train else {})

    def logits(self, variables: PyTree, inputs: Array) -> Array:
        """Return the logits of a trained network."""
        found = self.module.apply(self.whole(variables), inputs, **self._evaluating)
        return jax.numpy.asarray(found)
