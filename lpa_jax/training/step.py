"""The jitted functions of a training loop."""

from collections import OrderedDict
from collections.abc import Callable
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree
import optax

from lpa_jax import data
from lpa_jax.core import membership
from lpa_jax.core.checks import all_finite
from lpa_jax.core.step import Step
from lpa_jax.training import mesh as meshes
from lpa_jax.training.feed import Batch
from lpa_jax.training.state import add_to_totals, empty_totals, TrainState

APPLY = {"train": True, "mutable": ["batch_stats"]}
NonFinite = Literal["stop", "skip"]


class Steps(NamedTuple):
    """What a training loop calls; all is jitted, and a given state is donated.

    Attributes:
      like: Shapes and types of a state.
      shardings: Where the arrays of a state live: what is large is split, sums are on all devices.
      init: `init(seed)` returns the first state.
      train: `train(state, seed, count, *given)` takes `count` steps (one, unless looped) with what
        the feed gives.
      end_epoch: `end_epoch(state)` keeps the epoch's sums, begins new ones, and freezes the
        epoch's class statistics.
      diagnose: `diagnose(state, seed, *given)` takes no step, donates nothing, and returns by name
        and in order whether everything that the next step computes is finite.
    """

    like: TrainState
    shardings: Any
    init: Callable[..., TrainState]
    train: Callable[..., TrainState]
    end_epoch: Callable[[TrainState], TrainState]
    diagnose: Callable[..., OrderedDict[str, Bool[Array, ""]]]


def make_steps(
    init_fn: Callable[..., PyTree],
    perturbed: Step,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    shape: tuple[int, ...],
    take: Callable[..., Batch],
    *,
    padding: int,
    flip: bool,
    looped: bool = False,
    nonfinite: NonFinite = "stop",
) -> Steps:
    """Return the functions of a training loop.

    A step whose loss or update is not finite changes nothing but its own count and, where the run
    goes on, that of the perturbation's schedules.

    Args:
      init_fn: The model's `init`.
      perturbed: From `lpa_jax.value_and_grad`.
      tx: The optimizer.
      mesh: The devices.
      shape: Of the images of a batch, `[B, H, W, channels]`.
      take: Picks a step's batch out of what it is given, see `feed.Feed`.
      padding: Of the augmentation, see `data.augment`.
      flip: Likewise.
      looped: Whether a call of `train` takes `count` steps, in a loop on the device, or one.
        (XLA's convolutions are several times slower in loops on a CPU.)
      nonfinite: `"stop"`: the state stands still at the first step that is not finite. `"skip"`:
        the next step is taken from where it began.
    """
    whole = meshes.replicated(mesh)
    # Shared by all that follows, so that it is traced once.
    run = jax.jit(functools.partial(perturbed, **APPLY))

    def batch_of(state, seed, *given):
        augment_key, perturb_key = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), state.step)
        )
        images, labels, examples = take(state.step, *given)
        images = data.augment(augment_key, images, padding=padding, flip=flip)
        return data.to_float(images), labels, perturb_key, examples

    @jax.jit
    def init(seed):
        images, labels = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[0], jnp.int32)
        examples = jnp.arange(shape[0], dtype=jnp.int32)
        key = jax.random.key(seed)
        variables = init_fn(key, images[:1], train=False)
        state = perturbed.init(variables, images, labels, **APPLY)
        # What is traced is shared only if the mesh is the same; values are not moved by this.
        given = (variables, state, images, labels, key, examples)
        *given, examples = jax.lax.with_sharding_constraint(given, whole)
        (_, aux), _, _ = jax.eval_shape(run, *given, extra={"examples": examples})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            variables=variables,
            opt_state=tx.init(variables["params"]),
            perturbation=state,
            running=empty_totals(aux["metrics"]),
            epoch=empty_totals(aux["metrics"]),
            nonfinite_steps=jnp.zeros((), jnp.int32),
        )

    like = jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.int32))
    shardings = meshes.sharded(mesh, like)
    shardings = shardings._replace(
        running=jax.tree.map(lambda _: whole, like.running),
        epoch=jax.tree.map(lambda _: whole, like.epoch),
    )

    def train_step(state, seed, *given):
        images, labels, key, examples = batch_of(state, seed, *given)
        # Sharded arrays are gathered for the step, and their gradients scattered after it.
        variables, perturbation = jax.lax.with_sharding_constraint(
            (state.variables, state.perturbation), whole
        )
        (loss, aux), grads, perturbation = run(
            variables, perturbation, images, labels, key, extra={"examples": examples}
        )
        grads = jax.lax.with_sharding_constraint(grads, shardings.variables["params"])
        params = state.variables["params"]
        updates, opt_state = tx.update(grads, state.opt_state, params)
        variables = {
            **state.variables,
            **aux["updates"],
            "params": optax.apply_updates(params, updates),
        }
        correct = membership.share_of(aux["labels"], jnp.argmax(aux["logits"], axis=1))
        new = state._replace(
            variables=variables,
            opt_state=opt_state,
            perturbation=perturbation,
            running=add_to_totals(state.running, loss, correct, aux["metrics"]),
        )
        finite = jnp.isfinite(loss) & all_finite(updates)
        going = (nonfinite == "skip") | (state.nonfinite_steps == 0)
        kept = state.perturbation
        if nonfinite == "skip":
            # Its schedules go on, or the next step would fail in the same way.
            kept = kept._replace(step=perturbation.step)
        state = jax.tree.map(
            lambda new, old: jnp.where(finite & going, new, old),
            new,
            state._replace(perturbation=kept),
        )
        nonfinite_steps = state.nonfinite_steps + (going & ~finite)
        going = going & (finite | (nonfinite == "skip"))
        return state._replace(step=state.step + going, nonfinite_steps=nonfinite_steps)

    def train(state, seed, count, *given):
        if not looped:
            return train_step(state, seed, *given)
        return jax.lax.fori_loop(0, count, lambda _, state: train_step(state, seed, *given), state)

    def end_epoch(state):
        return state._replace(
            epoch=state.running,
            running=jax.tree.map(jnp.zeros_like, state.running),
            perturbation=perturbed.end_epoch(state.perturbation),
        )

    def diagnose(state, seed, *given):
        *batch, examples = batch_of(state, seed, *given)
        found, grads = perturbed.diagnose(
            state.variables, state.perturbation, *batch, extra={"examples": examples}, **APPLY
        )
        updates, _ = tx.update(grads, state.opt_state, state.variables["params"])
        found["the update"] = all_finite(updates)
        return found

    into = {"donate_argnums": 0, "out_shardings": shardings}
    return Steps(
        like=like,
        shardings=shardings,
        init=jax.jit(init, out_shardings=shardings),
        train=jax.jit(train, **into),
        end_epoch=jax.jit(end_epoch, **into),
        diagnose=jax.jit(diagnose, out_shardings=whole),
    )
