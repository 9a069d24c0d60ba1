"""Perturbations that change nothing and remember what they saw, to look inside a step."""

import functools

import jax
import jax.numpy as jnp

import lpa_jax

# Tiny programs: what XLA would gain by optimizing them is lost many times over in compiling.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


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
