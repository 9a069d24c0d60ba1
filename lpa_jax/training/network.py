"""The network of a run: how it is initialized, trained and used, whatever Flax module it is."""

from collections.abc import Callable
import contextlib
import inspect
from typing import Any, NamedTuple

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lpa_jax.training import rates

FROZEN = "frozen"
"""The collection of the parameters that do not learn."""


class Begin(NamedTuple):
    """Where a network begins whose inputs are the output of one of its modules.

    It is the whole network, in which that module returns the inputs: what leads to it is then
    unused, and the compiler drops it.

    Attributes:
      site: Path of the module.
      shape: Shape of an image.
      dtype: Of images.
    """

    site: str
    shape: tuple[int, ...]
    dtype: Any


class Network(NamedTuple):
    """A Flax Linen module, and how the trainer calls it.

    Attributes:
      module: Takes float inputs `[B, ...]` and returns logits `[B, C]`; with an argument `train`,
        if it has one.
      factors: Of the learning rate. Parameters with the factor 0 are in a collection of their own,
        so that nothing is derived by them, and nothing kept of them in an optimizer.
      begins: Where it begins, if not with images.
    """

    module: nn.Module
    factors: rates.Rates = ()
    begins: Begin | None = None

    @property
    def takes_train(self) -> bool:
        """Whether the module has an argument `train`."""
        return "train" in inspect.signature(type(self.module).__call__).parameters

    @property
    def _evaluating(self) -> dict[str, Any]:
        return {"train": False} if self.takes_train else {}

    @property
    def _freezes(self) -> bool:
        return any(number == 0 for _, number in self.factors)

    def init(self, key: Array, inputs: Array) -> PyTree:
        """Return the first variables."""
        if self.begins is not None:
            inputs = _no_images(self.begins, 1)
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
        if not self._freezes and self.begins is None:
            return self.module.apply

        def apply(variables, inputs, **kwargs):
            variables = self.whole(variables)
            if self.begins is None:
                return self.module.apply(variables, inputs, **kwargs)
            with visiting(self.begins.site, lambda value: inputs.astype(value.dtype)):
                images = _no_images(self.begins, len(inputs))
                return self.module.apply(variables, images, **kwargs)

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
        return arguments | ({"train": True} if self.takes_train else {})

    def logits(self, variables: PyTree, inputs: Array) -> Array:
        """Return the logits of a trained network."""
        return jnp.asarray(self.apply(variables, inputs, **self._evaluating))


def visiting(site: str, visit: Callable[[Any], Any]) -> contextlib.AbstractContextManager[None]:
    """Let a module return what `visit` makes of its output, wherever it is called within.

    Args:
      site: Path of the module.
      visit: `visit(output) -> output`.
    """

    def replace(run, args, keywords, context):
        result = run(*args, **keywords)
        here = context.method_name == "__call__" and "/".join(context.module.path) == site
        return visit(result) if here else result

    return nn.intercept_methods(replace)


def _no_images(begins: Begin, number: int) -> Array:
    return jnp.zeros((number, *begins.shape), begins.dtype)
