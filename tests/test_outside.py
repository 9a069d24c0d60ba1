"""Agreement with other people's implementations: foolbox's attacks, optax's SAM and smoothing."""

import functools
import warnings

import chex
import eagerpy
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from probes import quick_jit
import pytest

import lpa_jax

with warnings.catch_warnings():
    # foolbox imports from where SciPy kept its filters once.
    message = "Please import `gaussian_filter` from the `scipy.ndimage` namespace"
    warnings.filterwarnings("ignore", message, DeprecationWarning)
    import foolbox

NUM_CLASSES = 4
LABELS = jnp.array([0, 1, 2, 3, 0, 1, 2], jnp.int32)
BOUNDS = (0.0, 1.0)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(NUM_CLASSES, name="head")(x)


@functools.cache
def setting():
    # Some pixels so near 0 and 1 that the attack is clipped.
    pixels = np.random.default_rng(0).uniform(-0.1, 1.1, (len(LABELS), 3, 2, 1)).clip(0, 1)
    inputs = jnp.asarray(pixels, jnp.float32)
    model = Net()
    return model, jax.jit(model.init)(jax.random.key(0), inputs), inputs


def losses(params, inputs):
    logits = setting()[0].apply({"params": params}, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)


def gradient_fn(inputs):
    params = setting()[1]["params"]
    loss, pullback = jax.vjp(functools.partial(losses, params), inputs)
    return loss, pullback(jnp.ones_like(loss))[0]


def ours(epsilon, **options):
    perturbation = lpa_jax.adversarial("inputs", epsilon, bounds=BOUNDS, **options)
    inputs = setting()[2]
    update = quick_jit(
        lambda inputs: perturbation.update(
            inputs, perturbation.init(inputs), gradient_fn=gradient_fn
        )[0]
    )
    return update(inputs)


def theirs(attack, epsilon):
    model, variables, inputs = setting()

    def logits(images):
        return model.apply(variables, images)

    wrapped = foolbox.models.JAXModel(logits, bounds=BOUNDS)
    criterion = foolbox.criteria.Misclassification(eagerpy.astensor(LABELS))
    return attack.run(wrapped, inputs, criterion, epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [0.03, 0.3])
def test_one_step_is_the_fast_gradient_sign_of_foolbox(epsilon):
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    close(ours(epsilon), theirs(attack, epsilon))


@pytest.mark.parametrize("steps", [3, 12])
def test_linf_steps_are_the_projected_gradient_descent_of_foolbox(steps):
    # Twelve steps run in a loop, three are unrolled; the walk meets the ball and the bounds.
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.02, steps=steps, random_start=False)
    close(ours(0.05, steps=steps, step_size=0.02), theirs(attack, 0.05))


@pytest.mark.parametrize("steps", [3, 12])
def test_l2_steps_are_the_projected_gradient_descent_of_foolbox(steps):
    attack = foolbox.attacks.L2PGD(abs_stepsize=0.2, steps=steps, random_start=False)
    close(ours(0.5, steps=steps, step_size=0.2, norm="l2"), theirs(attack, 0.5))


def test_the_default_step_is_that_of_the_relative_step_of_foolbox():
    attack = foolbox.attacks.L2PGD(rel_stepsize=2.5 / 4, steps=4, random_start=False)
    close(ours(0.5, steps=4, norm="l2"), theirs(attack, 0.5))


def test_the_attack_takes_place_in_the_training_step():
    model, variables, inputs = setting()
    attack = lpa_jax.adversarial("inputs", 0.05, steps=3, step_size=0.02, bounds=BOUNDS)
    step = lpa_jax.value_and_grad(model.apply, attack, num_classes=NUM_CLASSES)
    state = step.init(variables, inputs, LABELS)
    (loss, aux), grads, _ = quick_jit(step)(variables, state, inputs, LABELS, jax.random.key(0))
    attacked = ours(0.05, steps=3, step_size=0.02)

    def mean_loss(params):
        return jnp.mean(losses(params, attacked))

    close((loss, grads), quick_jit(jax.value_and_grad(mean_loss))(variables["params"]))
    close(aux["logits"], jax.jit(model.apply)(variables, attacked))


def test_label_smoothing_is_that_of_optax():
    targets = jax.nn.one_hot(LABELS, NUM_CLASSES)
    smooth = lpa_jax.label_smoothing(0.3)
    close(smooth.update(targets, smooth.init(targets))[0], optax.smooth_labels(targets, 0.3))


def test_sam_steps_are_those_of_optax():
    # A whole training run: three steps of SGD with momentum around the perturbed gradient.
    model, variables, inputs = setting()
    params = variables["params"]
    tx = optax.sgd(0.5, momentum=0.9)
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.5))
    reference = optax.contrib.sam(tx, adversary, sync_period=2, opaque_mode=True)
    step = lpa_jax.value_and_grad(model.apply, lpa_jax.sam(0.5), num_classes=NUM_CLASSES)

    def gradient(params, _=0):
        return jax.grad(lambda params: jnp.mean(losses(params, inputs)))(params)

    @quick_jit
    def advance(ours, theirs, labels):
        params, state, opt_state = ours
        _, grads, state = step({"params": params}, state, inputs, labels, jax.random.key(0))
        updates, opt_state = tx.update(grads, opt_state, params)
        ours = optax.apply_updates(params, updates), state, opt_state
        params, state = theirs
        updates, state = reference.update(gradient(params), state, params, grad_fn=gradient)
        return ours, (optax.apply_updates(params, updates), state)

    ours = params, step.init(variables, inputs, LABELS), tx.init(params)
    theirs = params, reference.init(params)
    for _ in range(3):
        ours, theirs = advance(ours, theirs, LABELS)
    close(ours[0], theirs[0])
