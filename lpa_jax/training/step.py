"""The jitted training step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree, UInt8
import optax

from lpa_jax import data
from lpa_jax.perturb.engine import Step
from lpa_jax.training import mesh as meshes
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
    *,
    padding: int,
    flip: bool,
) -> Callable[..., TrainState]:
    """Return the jitted step `(state, seed, images, labels, indices) -> state`.

    The whole training set lives on every device as uint8; a step gathers its batch, augments it
    and learns from it. The state given is donated.
    """

    def train_step(
        state: TrainState,
        seed: Int[Array, ""],
        images: UInt8[Array, "n height width channels"],
        labels: Int[Array, "n"],
        indices: Int[Array, "batch"],
    ) -> TrainState:
        augment_key, perturb_key = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), state.step)
        )
        batch = jax.lax.with_sharding_constraint(images[indices], meshes.batched(mesh))
        batch = data.augment(augment_key, batch, padding=padding, flip=flip)
        (loss, aux), grads, perturbation = perturbed(
            state.variables,
            state.perturbation,
            data.to_float(batch),
            labels[indices],
            perturb_key,
            **APPLY,
        )
        params = state.variables["params"]
        updates, opt_state = tx.update(grads, state.opt_state, params)
        variables = {
            **state.variables,
            **aux["updates"],
            "params": optax.apply_updates(params, updates),
        }
        correct = jnp.argmax(aux["logits"], axis=1) == labels[indices]
        failed = (state.nonfinite_step < 0) & ~jnp.isfinite(loss)
        return TrainState(
            step=state.step + 1,
            variables=variables,
            opt_state=opt_state,
            perturbation=perturbation,
            running=add_to_totals(state.running, loss, correct, aux["metrics"]),
            epoch=state.epoch,
            nonfinite_step=jnp.where(failed, state.step, state.nonfinite_step),
        )

    return jax.jit(train_step, donate_argnums=0, out_shardings=meshes.replicated(mesh))


def end_epoch(perturbed: Step, state: TrainState) -> TrainState:
    """Close the epoch: its sums are kept, new ones begin, and its class statistics are frozen."""
    return state._replace(
        epoch=state.running,
        running=jax.tree.map(jnp.zeros_like, state.running),
        perturbation=perturbed.end_epoch(state.perturbation),
    )
