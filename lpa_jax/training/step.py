"""The jitted functions of a training loop."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree
import optax

from lpa_jax import data
from lpa_jax.core.checks import all_finite
from lpa_jax.core.step import Step
from lpa_jax.tasks import Task
from lpa_jax.training import mesh as meshes
from lpa_jax.training import swad as averages
from lpa_jax.training.feed import Batch
from lpa_jax.training.network import Network
from lpa_jax.training.state import add_to_totals, empty_totals, TrainState

NonFinite = Literal["stop", "skip"]
DROPOUT = 2**20
"""Folded into the key of a step for a dropout of the network's own."""


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
      end_segment: `end_segment(state, loss)` ends a segment of SWAD's average.
      diagnose: `diagnose(state, seed, *given)` takes no step, donates nothing, and returns by name
        and in order whether everything that the next step computes is finite.
    """

    like: TrainState
    shardings: Any
    init: Callable[..., TrainState]
    train: Callable[..., TrainState]
    end_epoch: Callable[[TrainState], TrainState]
    end_segment: Callable[..., TrainState]
    diagnose: Callable[..., OrderedDict[str, Bool[Array, ""]]]


class Together(NamedTuple):
    """The functions of a loop for seeds that are trained together, all of them at the same step.

    Attributes:
      stack: `stack(states)` returns the states of the seeds as one, in order.
      of: `of(state, i)` returns that of the seed at place `i`.
      train: As that of `Steps`, of all the seeds; a given state is donated.
      end_epoch: Likewise.
      end_segment: Likewise, of a loss of each seed `[S]`.
    """

    stack: Callable[[Sequence[TrainState]], TrainState]
    of: Callable[[TrainState, int], TrainState]
    train: Callable[..., TrainState]
    end_epoch: Callable[[TrainState], TrainState]
    end_segment: Callable[..., TrainState]


def make_together(steps: Steps, axes: Sequence[int | None], count: int) -> Together:
    """Return the functions for so many seeds at once; those of one are its own.

    Args:
      steps: The functions for one seed.
      axes: Of what the feed gives, see `feed.Feed`.
      count: Number of seeds.
    """
    if count == 1:
        return Together(
            lambda states: states[0],
            lambda state, _: state,
            steps.train,
            steps.end_epoch,
            lambda state, losses: steps.end_segment(state, losses[0]),
        )
    # They are on one device, whole.
    whole = steps.shardings.step

    def stack(states):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def of(state, i):
        return jax.tree.map(lambda leaf: leaf[i], state)

    into = {"donate_argnums": 0, "out_shardings": whole}
    return Together(
        stack=jax.jit(stack, out_shardings=whole),
        of=jax.jit(of, out_shardings=steps.shardings),
        train=jax.jit(jax.vmap(steps.train, in_axes=(0, 0, None, *axes)), **into),
        end_epoch=jax.jit(jax.vmap(steps.end_epoch), **into),
        end_segment=jax.jit(jax.vmap(steps.end_segment), **into),
    )


def make_steps(
    network: Network,
    task: Task,
    perturbed: Step,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    batch: Batch,
    take: Callable[..., Batch],
    *,
    augment: Sequence[data.Applied] = (),
    looped: bool = False,
    nonfinite: NonFinite = "stop",
    ema_decay: float | None = None,
    swad: averages.Settings | None = None,
) -> Steps:
    """Return the functions of a training loop.

    A step whose loss or update is not finite changes nothing but its own count and, where the run
    continues, that of the perturbation's schedules.

    Args:
      network: The network.
      task: What labels mean.
      perturbed: From `lpa_jax.value_and_grad`.
      tx: The optimizer.
      mesh: The devices.
      batch: Shapes and dtypes of a batch.
      take: Picks a step's batch out of what it is given, see `feed.Feed`.
      augment: What the images go through, see `data.augment`.
      looped: Whether a call of `train` takes `count` steps, in a loop on the device, or one.
        (XLA's convolutions are several times slower in loops on a CPU.)
      nonfinite: `"stop"`: the state stays as it is from the first step that is not finite.
        `"skip"`: the next step is taken from where it began.
      ema_decay: Of an average of the variables, a step; None keeps none.
      swad: Of SWAD's average of the parameters; None keeps none.
    """
    whole = meshes.replicated(mesh)

    def arguments(variables, key):
        return network.train_arguments(variables, jax.random.fold_in(key, DROPOUT))

    # Shared by all that follows, so that it is traced once.
    @jax.jit
    def run(variables, state, images, labels, key, extra):
        kwargs = arguments(variables, key)
        return perturbed(variables, state, images, labels, key, extra=extra, **kwargs)

    def batch_of(state, seed, *given):
        augment_key, perturb_key = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), state.step)
        )
        images, labels, extra = take(state.step, *given)
        if augment:
            images = data.augment(augment_key, images, augment)
        return data.to_float(images), labels, perturb_key, extra

    @jax.jit
    def init(seed):
        images, labels, extra = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), batch)
        images, key = data.to_float(images), jax.random.key(seed)
        variables = network.init(key, images[:1])
        state = perturbed.init(variables, images, labels, **arguments(variables, key))
        # What is traced is shared only if the mesh is the same; values are not moved by this.
        given = (variables, state, images, labels, key, extra)
        (_, aux), _, _ = jax.eval_shape(run, *jax.lax.with_sharding_constraint(given, whole))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            variables=variables,
            opt_state=tx.init(variables["params"]),
            perturbation=state,
            running=empty_totals(aux["metrics"]),
            epoch=empty_totals(aux["metrics"]),
            nonfinite_steps=jnp.zeros((), jnp.int32),
            ema=None if ema_decay is None else jax.tree.map(jnp.copy, variables),
            swad=None if swad is None else averages.init(variables["params"], swad),
        )

    like = jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.int32))
    shardings = meshes.sharded(mesh, like)
    shardings = shardings._replace(
        running=jax.tree.map(lambda _: whole, like.running),
        epoch=jax.tree.map(lambda _: whole, like.epoch),
    )

    def train_step(state, seed, *given):
        images, labels, key, extra = batch_of(state, seed, *given)
        # Sharded arrays are gathered for the step, and their gradients scattered after it.
        variables, perturbation = jax.lax.with_sharding_constraint(
            (state.variables, state.perturbation), whole
        )
        (loss, aux), grads, perturbation = run(variables, perturbation, images, labels, key, extra)
        grads = jax.lax.with_sharding_constraint(grads, shardings.variables["params"])
        params = state.variables["params"]
        updates, opt_state = tx.update(grads, state.opt_state, params)
        variables = {
            **state.variables,
            **aux["updates"],
            "params": optax.apply_updates(params, updates),
        }
        correct = task.correct(aux["logits"], aux["labels"])
        new = state._replace(
            variables=variables,
            opt_state=opt_state,
            perturbation=perturbation,
            running=add_to_totals(state.running, loss, correct, aux["metrics"]),
            ema=None if ema_decay is None else _averaged(state.ema, variables, ema_decay),
            swad=None
            if state.swad is None
            else averages.after_step(state.swad, variables["params"]),
        )
        finite = jnp.isfinite(loss) & all_finite(updates)
        going = (nonfinite == "skip") | (state.nonfinite_steps == 0)
        kept = state.perturbation
        if nonfinite == "skip":
            # Its schedules continue, or the next step would fail in the same way.
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

    def end_segment(state, loss):
        if swad is None or state.swad is None:
            return state
        return state._replace(swad=averages.close(state.swad, loss, swad))

    def diagnose(state, seed, *given):
        *batch, extra = batch_of(state, seed, *given)
        kwargs = arguments(state.variables, batch[-1])
        found, grads = perturbed.diagnose(
            state.variables, state.perturbation, *batch, extra=extra, **kwargs
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
        end_segment=jax.jit(end_segment, **into),
        diagnose=jax.jit(diagnose, out_shardings=whole),
    )


def _averaged(average: PyTree, variables: PyTree, decay: float) -> PyTree:
    """Return the moving average of the variables; what is no float is the last."""

    def move(old, new):
        floating = jnp.issubdtype(new.dtype, jnp.floating)
        return decay * old + (1.0 - decay) * new if floating else new

    return jax.tree.map(move, average, variables)
