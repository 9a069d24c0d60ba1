"""Learning rates by parameter: factors of the schedule's rate, of which 0 freezes."""

from collections.abc import Mapping
import fnmatch
import math
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from jaxtyping import PyTree
import optax

Rates = tuple[tuple[str, float], ...]
"""Patterns of paths of modules or parameters, and the factor of each; the last that fits holds."""


def parse(text: str) -> Rates:
    """Return the factors that a configuration gives.

    Args:
      text: `PATTERN=FACTOR`, joined by `+`. A pattern is of the path of a module or parameter, such
        as `group1/block0/conv1`, with `*`, `?` and `[...]`, and holds for all that is within.

    Raises:
      ValueError: If a factor is no number of at least 0.

    Example:
      >>> parse("*=0.1+head=1")
      (('*', 0.1), ('head', 1.0))
    """
    found = []
    for part in filter(None, text.split("+")):
        pattern, equals, number = part.partition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not (pattern and equals and 0 <= factor < math.inf):
            raise ValueError(
                f"{part!r} is no PATTERN=FACTOR: give the path of a module and a number from 0 on, "
                "as in head=10; 0 freezes."
            )
        found.append((pattern, factor))
    return tuple(found)


def factor(rates: Rates, path: str) -> float:
    """Return the factor of the learning rate of a parameter.

    Example:
      >>> rates = parse("group[12]=0+group2/block1=0.5")
      >>> [factor(rates, f"{path}/conv1/kernel") for path in ("group1", "group2/block1", "group3")]
      [0.0, 0.5, 1.0]
    """
    fits = [number for pattern, number in rates if _fits(pattern, path)]
    return fits[-1] if fits else 1.0


def _fits(pattern: str, path: str) -> bool:
    """Return whether a pattern is of a parameter, or of a module that it is within."""
    names = path.split("/")
    above = ["/".join(names[: i + 1]) for i in range(len(names))]
    return bool(fnmatch.filter(above, pattern))


def divide(params: Mapping[str, Any], rates: Rates) -> tuple[PyTree, PyTree]:
    """Return the parameters that learn, and those that are frozen.

    Example:
      >>> divide({"stem": {"kernel": 1}, "head": {"kernel": 2}}, parse("stem=0"))
      ({'head': {'kernel': 2}}, {'stem': {'kernel': 1}})
    """
    leaves = flatten_dict(params, sep="/")
    still = {path for path in leaves if factor(rates, path) == 0}
    learning = {path: leaf for path, leaf in leaves.items() if path not in still}
    frozen = {path: leaf for path, leaf in leaves.items() if path in still}
    return unflatten_dict(learning, sep="/"), unflatten_dict(frozen, sep="/")


def merge(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> PyTree:
    """Return what `divide` has divided.

    Example:
      >>> merge({"a": {"kernel": 1}}, {"a": {"bias": 2}})
      {'a': {'kernel': 1, 'bias': 2}}
    """
    return unflatten_dict(flatten_dict(params) | flatten_dict(frozen))


def scaled(tx: optax.GradientTransformation, rates: Rates) -> optax.GradientTransformation:
    """Return an optimizer whose updates are multiplied by the factors."""
    if all(number in (0, 1) for _, number in rates):
        return tx

    def scale(updates, params=None):
        del params
        return jax.tree.map_with_path(
            lambda path, leaf: (
                factor(rates, jax.tree_util.keystr(path, simple=True, separator="/")) * leaf
            ),
            updates,
        )

    return optax.chain(tx, optax.stateless(scale))


def unknown(params: Mapping[str, Any], rates: Rates) -> list[str]:
    """Return the patterns that fit no parameter."""
    paths = flatten_dict(params, sep="/")
    return [pattern for pattern, _ in rates if not any(_fits(pattern, path) for path in paths)]
