"""Data parallelism by the user: a step within `shard_map`, `pmap` or `vmap` over a named axis."""

import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import networks
import optax
from probes import absolute, quick_jit
import pytest

import lpa_jax

AXIS, DEVICES, BATCH = "data", 4, 16
KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(1), (BATCH, 5))
# The devices have different classes; class 5 has no example.
Y = jnp.array([0, 1, 1, 0, 2, 3, 3, 3, 0, 4, 4, 1, 2, 2, 2, 2])
CLASSES = 6
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=3e-6)


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, name="first")(x)
        norm = nn.BatchNorm(use_running_average=False, axis_name=self.axis_name, name="norm")
        x = jnp.tanh(norm(x))
        return nn.Dense(CLASSES, name="head")(x)


VARIABLES = networks.fill(Net(), X)
MLP_VARIABLES = {"params": {n: VARIABLES["params"][n] for n in ("first", "head")}}
SPLIT = lpa_jax.splits.all_positive()
COUNTS = [4, 3, 5, 3, 2, 1]
CHAINS = {
    "nothing": lpa_jax.chain(),
    "lpa": absolute("first", epsilon=0.5, split=SPLIT),
    "lpa by class": lpa_jax.lpa("norm", epsilon=0.3),
    "lpl": lpa_jax.lpl(0.5, split=SPLIT),
    "lpg": lpa_jax.lpg(0.2),
    "isda": lpa_jax.isda("norm", 0.5, CLASSES),
    "drw": lpa_jax.drw(COUNTS, start=0),
    "adversarial": lpa_jax.adversarial("first", 0.1, steps=10),
    "several": lpa_jax.chain(lpa_jax.lpa("first", epsilon=0.3), lpa_jax.lpl(0.3), lpa_jax.lpg(0.1)),
}


def shard_map(**options):
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))

    def mapped(function, variables, state, x, y):
        run = jax.shard_map(
            function, mesh=mesh, in_specs=(P(), P(), P(AXIS), P(AXIS)), out_specs=P(), **options
        )
        return quick_jit(run)(variables, state, x, y)

    return mapped


def over_an_axis(transform):
    def mapped(function, variables, state, x, y):
        parts = (leaf.reshape(DEVICES, -1, *leaf.shape[1:]) for leaf in (x, y))
        run = transform(function, axis_name=AXIS, in_axes=(None, None, 0, 0))
        # All devices have the same.
        return jax.tree.map(lambda leaf: leaf[0], run(variables, state, *parts))

    return mapped


MAPPED = {
    "shard_map": shard_map(),
    "shard_map, unchecked": shard_map(check_vma=False),
    "pmap": over_an_axis(jax.pmap),
    "vmap": over_an_axis(lambda function, **options: quick_jit(jax.vmap(function, **options))),
}


def mapped_steps(perturbation, how, model=None, steps=2):
    """Take steps over an axis; return the means of losses and gradients, and the state."""
    model = Net(AXIS) if model is None else model
    step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=CLASSES, axis_name=AXIS)
    state = step.init(VARIABLES, X, Y, mutable=["batch_stats"])

    def train(variables, state, x, y):
        results = []
        for _ in range(steps):
            (loss, aux), grads, state = step(variables, state, x, y, KEY, mutable=["batch_stats"])
            results.append((*jax.lax.pmean((loss, grads), AXIS), aux["updates"]))
        return results, state

    return MAPPED[how](train, VARIABLES, state, X, Y)


def test_padding_that_is_not_even_counts_by_its_weight():
    """The mean over the devices is the weighted mean of all examples."""
    weights = jnp.ones(BATCH).at[jnp.array([0, 1, 2, 7])].set(0.0)

    def train(variables, state, packed, y):
        x, w = packed[:, :5], packed[:, 5]
        (loss, _), grads, _ = step(variables, state, x, y, KEY, weights=w)
        return jax.lax.pmean((loss, grads), AXIS)

    options = {"num_classes": CLASSES}
    model = Mlp()
    chain = lpa_jax.chain(lpa_jax.lpa("first", epsilon=0.3), lpa_jax.lpl(0.3))
    step = lpa_jax.value_and_grad(model.apply, chain, axis_name=AXIS, **options)
    state = step.init(MLP_VARIABLES, X, Y)
    packed = jnp.concatenate([X, weights[:, None]], 1)
    got = MAPPED["shard_map"](train, MLP_VARIABLES, state, packed, Y)
    whole = lpa_jax.value_and_grad(model.apply, chain, **options)
    (loss, _), grads, _ = quick_jit(whole)(MLP_VARIABLES, state, X, Y, KEY, weights=weights)
    close(got, (loss, grads))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(jnp.tanh(nn.Dense(7, name="first")(x)))


def test_devices_draw_for_their_own_examples():
    def keep(value, *, key, **_):
        return value + jax.random.normal(key, value.shape)

    chain = lpa_jax.stateless("first", keep)
    step = lpa_jax.value_and_grad(Mlp().apply, chain, num_classes=CLASSES, axis_name=AXIS)
    same = jnp.tile(X[:4], (4, 1))
    logits = quick_jit(
        jax.vmap(
            lambda x, y: step(MLP_VARIABLES, step.init(MLP_VARIABLES, x, y), x, y, KEY)[0][1][
                "logits"
            ],
            axis_name=AXIS,
        )
    )(same.reshape(4, 4, 5), jnp.zeros((4, 4), jnp.int32))
    for one in range(3):
        assert jnp.abs(logits[one] - logits[one + 1]).max() > 0.1


def test_elr_is_refused_over_an_axis():
    step = lpa_jax.value_and_grad(
        Mlp().apply, lpa_jax.elr(BATCH, 1.0), num_classes=CLASSES, axis_name=AXIS
    )
    state = step.init(MLP_VARIABLES, X, Y)

    def train(variables, state, x, y):
        return step(variables, state, x, y, KEY, extra={"examples": jnp.arange(4)})[0][0]

    with pytest.raises(lpa_jax.SiteError, match="shard the arrays of a jitted step"):
        MAPPED["vmap"](train, MLP_VARIABLES, state, X, Y)


def steps_of_one(perturbation, steps=2):
    """Take steps with the whole batch at once."""
    step = lpa_jax.value_and_grad(Net().apply, perturbation, num_classes=CLASSES)
    state = step.init(VARIABLES, X, Y, mutable=["batch_stats"])

    @quick_jit
    def train(variables, state):
        results = []
        for _ in range(steps):
            (loss, aux), grads, state = step(variables, state, X, Y, KEY, mutable=["batch_stats"])
            results.append((loss, grads, aux["updates"]))
        return results, state

    return train(VARIABLES, state)


@pytest.mark.parametrize("name", CHAINS)
def test_class_level_work_over_an_axis_is_that_of_the_whole_batch(name):
    """Two steps, so that the second works with what the first has measured."""
    close(mapped_steps(CHAINS[name], "shard_map"), steps_of_one(CHAINS[name]))


@pytest.mark.parametrize("how", ["shard_map, unchecked", "pmap", "vmap"])
def test_the_axis_may_be_of_any_transform(how):
    close(mapped_steps(CHAINS["several"], how), steps_of_one(CHAINS["several"]))


def test_sites_are_listed_outside_of_the_axis():
    model = Net(AXIS)
    found = lpa_jax.list_sites(
        model.apply, VARIABLES, X, axis_name=AXIS, apply_kwargs={"mutable": ["batch_stats"]}
    )
    assert list(found)[2:-2] == ["first", "norm", "head"]


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_sam_moves_on_each_device_by_its_own_gradient(how):
    params = {name: VARIABLES["params"][name] for name in ("first", "head")}

    def loss(params, x, y):
        logits = Mlp().apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def by_hand(x, y):
        gradient = jax.grad(loss)(params, x, y)
        size = optax.tree.norm(gradient)
        moved = jax.tree.map(lambda p, g: p + 0.3 * g / size, params, gradient)
        return jax.grad(loss)(moved, x, y)

    each = [by_hand(x, y) for x, y in zip(X.reshape(4, 4, 5), Y.reshape(4, 4), strict=True)]
    expected = jax.tree.map(lambda *grads: sum(grads) / 4, *each)
    step = lpa_jax.value_and_grad(
        Mlp().apply, lpa_jax.sam(0.3), num_classes=CLASSES, axis_name=AXIS
    )
    state = step.init({"params": params}, X, Y)

    def train(params, state, x, y):
        _, grads, _ = step({"params": params}, state, x, y, KEY)
        return jax.lax.pmean(grads, AXIS)

    close(MAPPED[how](train, params, state, X, Y), expected)


def test_an_axis_that_is_not_named_is_refused():
    """The gradient would be the sum of the devices'."""
    step = lpa_jax.value_and_grad(Net(AXIS).apply, lpa_jax.chain(), num_classes=CLASSES)

    def train(variables, state, x, y):
        return step(variables, state, x, y, KEY, mutable=["batch_stats"])[0][0]

    state = lpa_jax.value_and_grad(
        Net(AXIS).apply, lpa_jax.chain(), num_classes=CLASSES, axis_name=AXIS
    ).init(VARIABLES, X, Y, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="axis_name='data'"):
        MAPPED["shard_map"](train, VARIABLES, state, X, Y)


def test_an_axis_that_is_not_in_force_is_refused():
    step = lpa_jax.value_and_grad(
        Net(AXIS).apply, lpa_jax.chain(), num_classes=CLASSES, axis_name=AXIS
    )
    state = step.init(VARIABLES, X, Y, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="not mapped over axis_name"):
        step(VARIABLES, state, X, Y, KEY, mutable=["batch_stats"])
