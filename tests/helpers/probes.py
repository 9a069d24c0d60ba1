"""Perturbations that change nothing and remember what they saw, to look inside a step."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import inspect
import io
from typing import Any

import jax
from jax.ad_checkpoint import print_saved_residuals
import jax.numpy as jnp
import optax

import lpa_jax
from lpa_jax.methods import METHODS

# Tiny programs: what XLA would gain by optimizing them is lost many times over in compiling.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
# With a bound in the units of the value, for checks against plain formulas.
absolute = functools.partial(lpa_jax.lpa, radius="absolute")


def watch(site):
    """Keep the value at `site` as the state."""

    def keep(value, state, params=None, **_):
        return value, jax.tree.map(jax.lax.stop_gradient, value)

    return lpa_jax.Perturbation(site, lambda value: jax.tree.map(jnp.zeros_like, value), keep)


def watched(perturbation):
    """Chain a watch before and a watch after `perturbation` at each of its sites."""
    return lpa_jax.chain(
        *map(watch, perturbation.sites), perturbation, *map(watch, perturbation.sites)
    )


def before_and_after(perturbation, state, site=None):
    """Return the value that `perturbation`, watched, was given at a site, and what it returned."""
    index = 0 if site is None else perturbation.sites.index(site)
    states = state.perturbations
    return states[index], states[len(perturbation.sites) + 1 + index]


def avals(tree):
    """Return what jit compares: a change of any of these between steps means tracing again."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


def storable(tree):
    """Replace typed keys, which orbax does not store, by their data."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def residuals(function, *args):
    """Return what back-propagation through a function keeps, in words."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_saved_residuals(function, *args)
    return sorted(line.split(" from ")[0] for line in out.getvalue().splitlines())


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the contract table.

    `strength` is the argument of `factory` that makes it the identity where it is 0, `amount` a
    value at which it is not. `ball` bounds the change of an example, in units of the amount: its
    `norm`, or with "relative" its share of the class-mean norm of the value.
    """

    label: str
    factory: Callable[..., Any]
    sites: tuple[str, ...]
    strength: str
    amount: float
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    ball: float | str | None = None
    norm: float = 2
    # Whether the strength may be a schedule; optax's own transforms take plain numbers.
    schedule: bool = True
    # The step that the tests take.
    step: int = 0

    @property
    def mixes(self):
        return len(self.sites) > 1 and "labels" in self.sites

    def make(self, number):
        return self.place(self.factory(**self.arguments, **{self.strength: number}))

    def place(self, transform):
        """Place an optax transform, or what is left of a perturbation after an optax wrapper."""
        placed = isinstance(transform, lpa_jax.Perturbation)
        return transform if placed else lpa_jax.at(self.sites, transform)

    def wrapped(self, strength):
        """Make the same through `inject_hyperparams` and `optax.chain`."""
        # What optax counts are updates, and there is one at every site of a step.
        schedule = fading(self, strength) if len(self.sites) == 1 else lambda _: strength
        # Every number that is not static becomes an array, `steps` too.
        static = set(inspect.signature(self.factory).parameters) - {self.strength}
        inject = optax.inject_hyperparams(self.factory, static_args=static)
        transform = inject(**self.arguments, **{self.strength: schedule})
        return self.place(optax.chain(transform, optax.identity()))


# What suits the tests' tiny networks and batches better than the defaults of a method's row.
SUITED = {
    "adversarial": {"bounds": None},
    "cutmix": {"probability": 1.0},
    "cutout": {"size": 2.0, "mean": (0.1, -0.2)},
    "dann": {"width": 8, "discriminator_steps": 2, "grad_penalty": 0.5, "weight_decay": 0.1},
    "disturb_label": {"rate": 0.5},
    "domain_mixup": {"alpha": 1.0},
    "dropblock": {"rate": 0.3, "block_size": 2},
    "gradient_noise": {"eta": 0.1},
    "isda": {"strength": 2.0},
    "mixstyle": {"alpha": 1.0, "probability": 1.0},
}


def line_of(name, facts, layers=("first", "second")):
    """Return the line of a method, made of its row.

    Args:
      name: Name of the method, whose row tells its strength.
      facts: Those of `methods.FACTS` that do not come of the length of a run.
      layers: What stands for the layers of the row: one of values `[B, H, W, C]`, and one of
        `[B, D]` for the network's features.
    """
    row = METHODS[name]
    taken = inspect.signature(row.factory).parameters
    arguments = {key: value for key, value in facts.items() if key in taken}
    arguments |= {**row.defaults, **SUITED.get(name, {})}
    # From the first step on.
    arguments |= dict.fromkeys(row.shares, 0)

    def placed(site):
        return site if site == "inputs" else layers[site == "features"]

    if "site" in arguments:
        arguments["site"] = placed(arguments["site"])
    if "sites" in arguments:
        arguments["sites"] = tuple(dict.fromkeys(map(placed, arguments["sites"])))
    sites = row.factory(**{row.strength: taken[row.strength].default, **arguments}).sites
    amount = arguments.pop(row.strength, taken[row.strength].default)
    return Line(name, row.factory, sites, row.strength, amount, arguments)


def fading(line, strength):
    """Return a schedule that is `strength` at the line's step and 0 from the next."""
    return optax.linear_schedule(strength, 0.0, 1, line.step) if line.schedule else strength
