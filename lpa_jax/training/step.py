"""The jitted training step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree
import optax

from lpa_jax import data
from lpa_jax.perturb.engine import Step
from lpa_jax.training import mesh as meshes
from lpa_jax.training.feed import Batch
from lpa_jax.training.state import add_to_totals, empty_totals, TrainState

APPLY = {"train": True, "mutable": ["batch_stats"]}


def make_init(
    init_fn: Callable[..., PyTree], perturbed: Step, tx: optax.GradientTransformation, shape
) -> Callable[[Int[Array, ""]], TrainState]:
    """Return the function from a seed to the first state, for batches of images of `shape`."""

    def init(seed):
        images, labels = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[0], jnp.int32)
        key = jax.random.key(seed)
        variables = init_fn(key, images[:1], train=False)
        state = perturbed.init(variables, images, labels, **APPLY)
        (_, aux), _, _ = jax.eval_shape(
            lambda *args: perturbed(*args, **APPLY), variables, state, images, labels, key
        )
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            variables=variables,
            opt_state=tx.init(variables["params"]),
            perturbation=state,
            running=empty_totals(aux["metrics"]),
            epoch=empty_totals(aux["metrics"]),
            nonfinite_step=jnp.full((), -1, jnp.int32),
        )

    return init


def make_train_step(
    perturbed: Step,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    shardings: Any,
    take: Callable[..., Batch],
    *,
    padding: int,
    flip: bool,
    looped: bool = False,
) -> Callable[..., TrainState]:
    """Return the jitted function `(state, seed, count, *given) -> state`; it donates the state.

    Args:
      perturbed: From `lpa_jax.value_and_grad`.
      tx: The optimizer.
      mesh: The devices.
      shardings: Where the arrays of the state live, from `state_shardings`.
      take: Picks a step's batch out of what it is given, see `feed.Feed`.
      padding: Of the augmentation, see `data.augment`.
      flip: Likewise.
      looped: Whether a call takes `count` steps, in a loop on the device, or one. (XLA's
        convolutions are several times slower in loops on a CPU.)
    """
    whole = meshes.replicated(mesh)

    def train_step(state, seed, *given):
        augment_key, perturb_key = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), state.step)
        )
        images, labels = take(state.step, *given)
        images = data.augment(augment_key, images, padding=padding, flip=flip)
        # Sharded arrays are gathered for the step, and their gradients scattered after it.
        variables, perturbation = jax.lax.with_sharding_constraint(
            (state.variables, state.perturbation), whole
        )
        (loss, aux), grads, perturbation = perturbed(
            variables, perturbation, data.to_float(images), labels, perturb_key, **APPLY
        )
        grads = jax.lax.with_sharding_constraint(grads, shardings.variables["params"])
        params = state.variables["params"]
        updates, opt_state = tx.update(grads, state.opt_state, params)
        variables = {
            **state.variables,
            **aux["updates"],
            "params": optax.apply_updates(params, updates),
        }
        correct = jnp.argmax(aux["logits"], axis=1) == labels
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates))
        failed = (state.nonfinite_step < 0) & ~finite
        return TrainState(
            step=state.step + 1,
            variables=variables,
            opt_state=opt_state,
            perturbation=perturbation,
            running=add_to_totals(state.running, loss, correct, aux["metrics"]),
            epoch=state.epoch,
            nonfinite_step=jnp.where(failed, state.step, state.nonfinite_step),
        )

    def train_steps(state, seed, count, *given):
        if not looped:
            return train_step(state, seed, *given)
        return jax.lax.fori_loop(0, count, lambda _, state: train_step(state, seed, *given), state)

    return jax.jit(train_steps, donate_argnums=0, out_shardings=shardings)


def state_shardings(mesh: Mesh, like: TrainState) -> Any:
    """Return where each array of a state lives: what is large is split, sums are on all devices."""
    shardings = meshes.sharded(mesh, like)
    whole = jax.tree.map(lambda _: meshes.replicated(mesh), like)
    return shardings._replace(running=whole.running, epoch=whole.epoch)


def make_end_epoch(perturbed: Step, shardings: Any) -> Callable[[TrainState], TrainState]:
    """Return the function that closes an epoch; it donates the state.

    The epoch's sums are kept, new ones begin, and its class statistics are frozen.
    """

    def end_epoch(state):
        return state._replace(
            epoch=state.running,
            running=jax.tree.map(jnp.zeros_like, state.running),
            perturbation=perturbed.end_epoch(state.perturbation),
        )

    return jax.jit(end_epoch, donate_argnums=0, out_shardings=shardings)
