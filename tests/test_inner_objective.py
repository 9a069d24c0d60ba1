"""What the loss that a perturbation climbs consists of, and what is refused in climbing it."""

import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
from probes import absolute, quick_jit, watch
import pytest

import lpa_jax

BATCH, CLASSES = 8, networks.NUM_CLASSES
INPUTS = jax.random.normal(jax.random.key(1), (BATCH, 3, 5))
LABELS = jnp.array([0, 1, 2, 0, 1, 1, 0, 0])
COUNTS = (40, 10, 5, 1)
KEY = jax.random.key(2)
MODEL = networks.Nested()
VARIABLES = networks.fill(MODEL, INPUTS)
UP = lpa_jax.splits.all_positive()
LPA = absolute("group1", 0.5, split=UP)
LPL = lpa_jax.lpl(0.5, solver="projected", split=UP)


def take(chain, loss_fn=None):
    """Return the loss, the gradients and the value at `"group1"` after the chain."""
    options = {} if loss_fn is None else {"loss_fn": loss_fn}
    chain = lpa_jax.chain(chain, watch("group1"))
    step = lpa_jax.value_and_grad(MODEL.apply, chain, num_classes=CLASSES, **options)

    @quick_jit
    def run(variables, inputs, labels):
        state = step.init(variables, inputs, labels)
        (loss, _), grads, state = step(variables, state, inputs, labels, KEY)
        return loss, grads, state.perturbations[-1]

    return run(VARIABLES, INPUTS, LABELS)


# --- The loss that is climbed is the loss that is trained on

PRIORS = jnp.log(jnp.array(COUNTS, jnp.float32) / sum(COUNTS))
MARGINS = 0.5 * (min(COUNTS) / jnp.array(COUNTS, jnp.float32)) ** 0.25
# What acts at the logits, and what it makes of logits and targets.
AT_LOGITS = {
    "logit_adjustment": (
        lambda: lpa_jax.logit_adjustment(COUNTS),
        lambda logits, targets: logits + PRIORS,
    ),
    "ldam": (
        lambda: lpa_jax.ldam(COUNTS, 0.5, scale=3.0),
        lambda logits, targets: logits - 3.0 * targets * MARGINS,
    ),
    "additive_margin": (
        lambda: lpa_jax.additive_margin(0.5, scale=3.0),
        lambda logits, targets: logits - 1.5 * targets,
    ),
    "inject_hyperparams": (
        lambda: lpa_jax.at(
            "logits",
            optax.inject_hyperparams(
                functools.partial(lpa_jax.logit_adjustment, class_counts=COUNTS)
            )(tau=1.0),
        ),
        lambda logits, targets: logits + PRIORS,
    ),
    "scale": (lambda: lpa_jax.at("logits", optax.scale(3.0)), lambda logits, targets: 3.0 * logits),
}
CLIMBERS = {
    "lpa": LPA,
    "adversarial": lpa_jax.adversarial("group1", 0.5, norm="l2", steps=2),
}


@pytest.mark.parametrize(
    ("name", "climber"),
    [
        *((name, "lpa") for name in AT_LOGITS),
        # A margin changes the length of an example's gradient, and not its direction.
        *((name, "adversarial") for name in ("logit_adjustment", "scale")),
    ],
)
def test_perturbations_of_the_logits_are_part_of_the_loss_that_is_climbed(name, climber):
    make, formula = AT_LOGITS[name]

    def loss_fn(logits, targets):
        return optax.softmax_cross_entropy(formula(logits, targets), targets)

    got = take(lpa_jax.chain(CLIMBERS[climber], make()))
    chex.assert_trees_all_close(got, take(CLIMBERS[climber], loss_fn), rtol=1e-4, atol=1e-5)
    # What climbs the loss without it goes elsewhere.
    without = take(CLIMBERS[climber])[2]
    assert np.abs(got[2] - without).max() > 1e-3


class Features(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(6, name="hidden")(x))
        x = nn.tanh(nn.Dense(5, name="features")(x))
        return nn.Dense(CLASSES, name="head")(x)


def test_lpa_climbs_the_loss_that_isda_augments():
    """Its covariances are those of the batches before, and the kernel is a constant."""
    model, inputs = Features(), INPUTS[:, 0]
    variables = networks.fill(model, inputs)
    kernel = variables["params"]["head"]["kernel"]
    roots = jax.random.normal(jax.random.key(3), (CLASSES, 5, 5))
    covariances = jnp.einsum("cij,ckj->cik", roots, roots)

    def loss_fn(logits, targets):
        apart = kernel.T[None] - kernel.T[:, None]
        shifts = 0.2 / 2 * jnp.einsum("cjd,cde,cje->cj", apart, covariances, apart)
        return optax.softmax_cross_entropy(logits + targets @ shifts, targets)

    def hidden(*perturbations, **options):
        chain = lpa_jax.chain(absolute("hidden", 0.5, split=UP), *perturbations, watch("hidden"))
        step = lpa_jax.value_and_grad(model.apply, chain, num_classes=CLASSES, **options)
        state = step.init(variables, inputs, LABELS)
        if perturbations:
            before, isda, after = state.perturbations
            isda = isda._replace(covariances=covariances, counts=jnp.ones(CLASSES))
            state = state._replace(perturbations=(before, isda, after))
        return quick_jit(step)(variables, state, inputs, LABELS, KEY)[2].perturbations[-1]

    got = hidden(lpa_jax.isda("features", 0.2, CLASSES))
    chex.assert_trees_all_close(got, hidden(loss_fn=loss_fn), rtol=1e-4, atol=1e-5)
    assert np.abs(got - hidden()).max() > 1e-2


def test_lpl_climbs_the_loss_with_the_later_perturbations_of_the_logits():
    make, formula = AT_LOGITS["logit_adjustment"]

    def loss_fn(logits, targets):
        return optax.softmax_cross_entropy(formula(logits, targets), targets)

    got = take(lpa_jax.chain(LPL, make()))
    chex.assert_trees_all_close(got, take(LPL, loss_fn), rtol=1e-4, atol=1e-5)
    assert np.abs(got[0] - take(lpa_jax.chain(make(), LPL))[0]) < 1e-5


def test_what_uses_the_gradient_at_the_logits_is_excluded_from_the_loss_that_is_climbed():
    # In it every gradient step would contain all of LPL's.
    one, both = take(LPA)[2], take(lpa_jax.chain(LPA, LPL))[2]
    chex.assert_trees_all_close(both, one, rtol=1e-5, atol=1e-6)


def test_class_statistics_are_those_of_the_batch_in_the_loss_that_is_climbed_too():
    """A margin by the confidence of the batch: it is known before the first gradient."""

    def update(value, *, labels, class_stats, **_):
        margins = 3.0 * class_stats.batch.confidence
        return value - jax.nn.one_hot(labels, CLASSES) * margins[labels][:, None]

    margin = lpa_jax.stateless("logits", update, class_level=True)
    plain = lpa_jax.stateless("logits", lambda value, **_: value, class_level=True)
    own = jax.nn.softmax(MODEL.apply(VARIABLES, INPUTS))[jnp.arange(BATCH), LABELS]
    means = [own[c == LABELS].mean() if (c == LABELS).any() else 0.0 for c in range(CLASSES)]
    margins = 3.0 * jnp.array(means)

    def loss_fn(logits, targets):
        return optax.softmax_cross_entropy(logits - targets * margins, targets)

    got = take(lpa_jax.chain(LPA, margin))
    chex.assert_trees_all_close(got, take(lpa_jax.chain(LPA, plain), loss_fn), rtol=1e-4, atol=1e-5)
    assert np.abs(got[2] - take(LPA)[2]).max() > 1e-3


# --- Rounding noise is no direction


class Attention(nn.Module):
    """A vector added to all keys changes no attention."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=self.dtype, name="stem")(x)
        x = nn.MultiHeadDotProductAttention(2, dtype=self.dtype, name="attention")(x)
        return nn.Dense(CLASSES, dtype=self.dtype, name="head")(x.mean(1))


class Normalized(nn.Module):
    """A vector added at all positions is what instance normalization removes."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), dtype=self.dtype, name="before")(x)
        x = nn.relu(nn.InstanceNorm(dtype=self.dtype)(x))
        x = nn.relu(nn.Conv(8, (3,), dtype=self.dtype, name="after")(x))
        return nn.Dense(CLASSES, dtype=self.dtype, name="head")(x.mean(1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("network", "without", "somewhere"),
    [
        (Attention, "attention/key", "attention/value"),
        (Normalized, "before", "after"),
    ],
)
def test_where_a_shift_is_removed_later_nothing_is_perturbed(network, without, somewhere, dtype):
    model = network(dtype)
    inputs = 1.0 + jax.random.normal(jax.random.key(4), (BATCH, 24, 8))
    variables = model.init(jax.random.key(5), inputs)

    @quick_jit
    def norms(variables, inputs):
        found = {}
        for site in (without, somewhere):
            lpa = lpa_jax.lpa(site, 0.5, split=UP)
            step = lpa_jax.value_and_grad(model.apply, lpa, num_classes=CLASSES)
            state = step.init(variables, inputs, LABELS)
            (loss, aux), _, _ = step(variables, state, inputs, LABELS, KEY)
            metrics = aux["metrics"][site]
            # The last class does not occur.
            found[site] = metrics["norm"][:3], metrics["relative"][:3], loss
        return found

    found = norms(variables, inputs)
    norm, _, loss = found[without]
    plain = model.apply(variables, inputs).astype(jnp.float32)
    unmoved = optax.softmax_cross_entropy_with_integer_labels(plain, LABELS).mean()
    assert norm.tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(loss, unmoved, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5)
    assert found[somewhere][1].min() > 0.4
