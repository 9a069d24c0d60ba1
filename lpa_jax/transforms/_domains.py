"""The domains of the examples, as the methods of domain generalization use them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from lpa_jax.core import membership
from lpa_jax.core.arguments import at_step, check_count, check_number, Number
from lpa_jax.core.perturbation import check_activations, INPUTS, LOGITS, SiteError


def checked(name: str, domains: Array | None, weights: Shaped[Array, "batch"]) -> Array:
    """Return the domains of the examples, int32 `[B]`.

    Raises:
      ValueError: If there are none, or they are not integers `[B]`.
    """
    if domains is None:
        raise ValueError(
            f"{name} needs the domain of each example: give the step extra={{'domains': domains}}, "
            "integers [B]."
        )
    if domains.shape != weights.shape or not jnp.issubdtype(domains.dtype, jnp.integer):
        raise ValueError(
            f"{name} needs an integer for each example in extra['domains'], not "
            f"{domains.dtype} {domains.shape}."
        )
    return domains.astype(jnp.int32)


def by_domain(
    name: str,
    domains: Array | None,
    weights: Float[Array, "batch"],
    num_domains: int,
    axis_name: tuple[str, ...],
) -> membership.Membership:
    """Return which domains the examples belong to.

    The weight of an example whose domain is none of `num_domains` is NaN where it is real, and so
    are then all counts: a wrong number makes the gradient NaN, and is not taken for another domain.
    """
    domains = checked(name, domains, weights)
    fits = (domains >= 0) & (domains < num_domains) | (weights <= 0)
    domains = jnp.where(fits & (weights > 0), domains, 0)
    members = membership.by_class(domains, weights, num_domains, axis_name)
    wrong = members.summed(jnp.sum(jnp.where(fits, 0.0, 1.0)))
    counts = jnp.where(wrong > 0, jnp.nan, members.counts)
    return dataclasses.replace(members, counts=counts)


def everywhere(array: Array, axis_name: tuple[str, ...]) -> Array:
    """Return the parts of an array `[B, ...]` that all devices have, one after the other."""
    return jax.lax.all_gather(array, axis_name, tiled=True) if axis_name else array


def turns(
    rows: Int[Array, "batch"], real: Bool[Array, "batch"], axis_name: tuple[str, ...] = ()
) -> Int[Array, "batch"]:
    """Return how many real examples of the same row come before each in the global batch."""
    all_rows, all_real = (everywhere(array, axis_name) for array in (rows, real))
    places = jnp.arange(rows.shape[0])
    if axis_name:
        places += rows.shape[0] * jax.lax.axis_index(axis_name)
    before = jnp.arange(all_rows.shape[0])[None] < places[:, None]
    before &= (rows[:, None] == all_rows[None]) & all_real[None]
    return jnp.sum(before.astype(jnp.int32), axis=1)


def scales(members: membership.Membership) -> Float[Array, "rows"]:
    """Return what makes the mean over the examples that over a row: n / n_m, and 0 without any."""
    counts = members.counts
    return jnp.where(counts == 0, 0.0, jnp.sum(counts) / jnp.where(counts == 0, 1.0, counts))


def annealed(number: Number, anneal_steps: int, step: Any) -> Float[Array, ""]:
    """Return the weight of a penalty: 1 for a number of steps, and then what is given."""
    return jnp.where(jnp.asarray(step) < anneal_steps, 1.0, at_step(number, step))


def check_layer(name: str, site: str) -> None:
    """Raise `SiteError` unless the site is a layer before the logits."""
    check_activations(name, [site])
    if site in (INPUTS, LOGITS):
        raise SiteError(f"{name} acts at a layer before the head, not at {site!r}.")


def check_features(name: str, site: str, value: Array) -> None:
    """Raise `SiteError` unless the value at a site is `[B, D]`."""
    if value.ndim != 2:
        raise SiteError(
            f"{name} needs features [B, D], such as what the head takes in, but {site!r} holds "
            f"{value.shape}."
        )


def check_penalty(name: str, site: str, gamma: Number, num_domains: int) -> None:
    """Raise an error unless these are arguments of a penalty on the features of domains."""
    check_layer(name, site)
    check_number("gamma", gamma)
    check_count("num_domains", num_domains, low=2)


def real_features(
    value: Float[Array, "batch features"], weights: Float[Array, "batch"]
) -> tuple[Float[Array, "batch"], Float[Array, "batch features"]]:
    """Return 1 for each example that is no padding, and float32 features that are 0 for padding."""
    real = (weights > 0).astype(jnp.float32)
    features = jax.lax.stop_gradient(value).astype(jnp.float32)
    return real, jnp.where(real[:, None] > 0, features, 0.0)


def pulled(
    value: Float[Array, "batch features"],
    gradient: Float[Array, "batch features"],
    weights: Float[Array, "batch"],
    axis_name: tuple[str, ...],
) -> Float[Array, "batch features"]:
    """Return the value as it is; back-propagation adds to its gradient that of a penalty.

    Args:
      value: The value at a site.
      gradient: Of the penalty on the global batch, float32.
      weights: Of the examples; padding has no gradient.
      axis_name: Axes of devices, the mean over which is the gradient of the step.
    """
    if axis_name:
        gradient = gradient * jax.lax.psum(1, axis_name)
    gradient = jnp.where(weights[:, None] > 0, jax.lax.stop_gradient(gradient), 0.0)
    return _with_gradient(value, gradient.astype(value.dtype))


@jax.custom_vjp
def _with_gradient(value: Array, gradient: Array) -> Array:
    del gradient
    return value


def _forward(value, gradient):
    return value, gradient


def _backward(gradient, cotangent):
    return cotangent + gradient, jnp.zeros_like(gradient)


_with_gradient.defvjp(_forward, _backward)
