"""Networks of each library as their users write them: names of sites, steps by hand, training."""

import functools

import chex
from flax import linen, nnx
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import optax
from probes import absolute, quick_jit, residuals
import pytest

import lpa_jax
from lpa_jax import api
from lpa_jax.core.program import Program

BATCH, POSITIONS, WIDTH, CLASSES = 6, 3, 4, 3
X = jax.random.normal(jax.random.key(1), (BATCH, POSITIONS, WIDTH))
Y = jnp.array([0, 1, 2, 0, 1, 1])
KEY, NOISE = jax.random.key(2), jax.random.key(3)
EPSILON, STEPS = 0.3, 3
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
same = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y)


def names_of(model, variables, **kwargs):
    """Return the sites within a network, and why other values are none."""
    found = lpa_jax.list_sites(model, variables, X, **kwargs)
    fixed = ("inputs", "labels", "logits", "logit_grads")
    assert all(value.shape[0] == BATCH for value in found.values())
    return [name for name in found if name not in fixed], found.refused


def run_step(model, variables, perturbation=None, compile=quick_jit, **kwargs):
    """Return loss, what comes with it, and gradients of a step; without a perturbation, plain."""
    chain = lpa_jax.chain() if perturbation is None else perturbation
    step = lpa_jax.value_and_grad(model, chain, num_classes=CLASSES)
    state = step.init(variables, X, Y, **kwargs)
    run = compile(lambda variables, x, y: step(variables, state, x, y, KEY, **kwargs)[:2])
    if isinstance(variables, nnx.Module) and compile is quick_jit:
        # `jax.jit` would make two of a module that has two names.
        graph, arrays = nnx.split(variables)
        merge = functools.partial(nnx.merge, graph)
        run = compile(lambda arrays, x, y: step(merge(arrays), state, x, y, KEY, **kwargs)[:2])
        variables = arrays
    (loss, aux), grads = run(variables, X, Y)
    return loss, aux, grads


def lpa(site):
    """LPA in its plainest form, which is easy to write by hand."""
    split = lpa_jax.splits.all_positive()
    return absolute(site, EPSILON, steps=STEPS, split=split, sharing="full")


def climbed(tail, value):
    """Return what LPA adds to each example, class by class."""
    deltas = jnp.zeros((CLASSES, *value.shape[1:]))
    members = jax.nn.one_hot(Y, CLASSES)
    for _ in range(STEPS):
        gradient = jax.grad(lambda v: cross_entropy(tail(v)).sum())(value + deltas[Y])
        # Only the direction counts: the sum over the members does for their mean.
        ascent = jnp.einsum("bc,b...->c...", members, gradient)

        def norm(x):
            axes = tuple(range(1, x.ndim))
            return jnp.sqrt((x**2).sum(axes, keepdims=True))

        deltas = deltas + 2 * EPSILON / STEPS * ascent / norm(ascent)
        deltas = deltas * jnp.minimum(1.0, EPSILON / norm(deltas))
    return deltas[Y]


def assert_lpa_is_as_by_hand(model, variables, site, params, front, tail, **kwargs):
    """Compare a step with LPA at a site with the network cut there by hand.

    Args:
      model: What `lpa_jax.value_and_grad` takes.
      variables: What its step takes.
      site: The site.
      params: The parameters.
      front: Maps parameters and inputs to the value at the site.
      tail: Maps parameters and that value to the logits.
      **kwargs: What the step takes besides.
    """

    def loss(params, x):
        value, frozen = front(params, x), lax.stop_gradient(params)
        delta = climbed(functools.partial(tail, frozen), lax.stop_gradient(value))
        return cross_entropy(tail(params, value + lax.stop_gradient(delta))).mean()

    got_loss, _, got = run_step(model, variables, lpa(site), **kwargs)
    expected_loss, expected = quick_jit(jax.value_and_grad(loss))(params, X)
    close(got_loss, expected_loss)
    close(got, expected)
    plain = quick_jit(lambda params, x: cross_entropy(tail(params, front(params, x))).mean())
    # By hand and by the library, something was moved.
    assert abs(got_loss - plain(params, X)) > 1e-3


# ---------------------------------------------------------------- NNX: names and steps


def rngs():
    return nnx.Rngs(0)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


class Classifier(nnx.Module):
    """What all networks here end with: the mean over the positions, and a linear layer."""

    def __init__(self):
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs())

    def classify(self, x):
        return self.head(x.mean(1))


class Listed(Classifier):
    def __init__(self):
        super().__init__()
        self.blocks = nnx.List([Block(nnx.Rngs(i)) for i in range(3)])

    def call(self, block, x):
        return block(x)

    def __call__(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return self.classify(x)


class Rematerialized(Listed):
    def call(self, block, x):
        return nnx.remat(lambda block, x: block(x))(block, x)


@nnx.jit
def jitted(block, x):
    return block(x)


class Jitted(Listed):
    def call(self, block, x):
        return jitted(block, x)


class PerExample(Listed):
    def call(self, block, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(None, 0))(block, x)


class RawPerExample(Listed):
    def call(self, block, x):
        return jax.vmap(lambda x: block(x))(x)


class Scanned(Classifier):
    def __init__(self):
        super().__init__()
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs())

    def __call__(self, x):
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.classify(scan(lambda block, x: block(x))(self.blocks, x))


class Shared(Classifier):
    def __init__(self):
        super().__init__()
        self.block = Block(rngs())

    def __call__(self, x):
        return self.classify(self.block(self.block(self.block(x))))


class Tied(Shared):
    """One module under two names goes by the first."""

    def __init__(self):
        super().__init__()
        self.same = self.block

    def __call__(self, x):
        return self.classify(self.block(self.same(self.block(x))))


def blocks_of(model):
    """Return the three blocks of a network as functions of its value."""
    if isinstance(model, Shared):
        return [model.block] * 3
    if isinstance(model, Scanned):
        graph, state = nnx.split(model.blocks)
        return [
            nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state), copy=True)
            for i in range(3)
        ]
    return list(model.blocks)


def assert_nnx_is_as_by_hand(model, site, front, tail):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of_model(function):
        return lambda params, x: function(nnx.merge(graph, params, rest, copy=True), x)

    assert_lpa_is_as_by_hand(model, model, site, params, of_model(front), of_model(tail))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Listed, ["blocks/0", "blocks/1", "blocks/2"]),
        (Rematerialized, ["blocks/0", "blocks/1", "blocks/2"]),
        (Jitted, ["blocks/0", "blocks/1", "blocks/2"]),
        (PerExample, ["blocks/0", "blocks/1", "blocks/2"]),
        (RawPerExample, ["blocks/0", "blocks/1", "blocks/2"]),
        (Scanned, ["blocks[0]", "blocks[1]", "blocks[2]"]),
        (Shared, ["block[0]", "block[1]", "block[2]"]),
        (Tied, ["block[0]", "block[1]", "block[2]"]),
    ],
)
def test_lpa_within_an_nnx_model_equals_lpa_by_hand(kind, names):
    model = kind()
    found, refused = names_of(model, model)
    assert [name for name in found if name in names] == names
    # Nothing besides but the layers within, and what stands for all calls.
    rest = {name.split("[")[0].removesuffix("/linear") for name in found} - {"head"}
    assert rest == {name.split("[")[0] for name in names}
    assert not refused

    def front(model, x):
        first, second, _ = blocks_of(model)
        return second(first(x))

    def tail(model, x):
        return model.classify(blocks_of(model)[2](x))

    assert_nnx_is_as_by_hand(model, names[1], front, tail)


class Recurrent(Classifier):
    def __init__(self):
        super().__init__()
        self.rnn = nnx.RNN(nnx.SimpleCell(WIDTH, WIDTH, rngs=rngs()))

    def __call__(self, x):
        return self.head(self.rnn(x)[:, -1])


def test_a_recurrent_nnx_model_has_sites_at_each_time_and_over_all():
    model = Recurrent()
    found, refused = names_of(model, model)
    assert {f"rnn/cell:0[{turn}]" for turn in range(POSITIONS)} < set(found)
    assert found[-2:] == ["rnn", "head"]
    assert not refused
    assert_nnx_is_as_by_hand(
        model, "rnn", lambda model, x: model.rnn(x), lambda model, x: model.head(x[:, -1])
    )


class Branched(Classifier):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.other = (Block(nnx.Rngs(i)) for i in range(3))

    def __call__(self, x, which=False):
        branches = (lambda one, other, x: one(x), lambda one, other, x: other(x))
        x = nnx.cond(jnp.asarray(which), *branches, self.one, self.other, self.stem(x))
        return self.classify(x)


def test_branches_of_an_nnx_model_are_not_sites_and_values_before_them_are():
    model = Branched()
    found, refused = names_of(model, model)
    assert found == ["stem/linear", "stem", "head"]
    assert set(refused) == {"one", "one/linear", "other", "other/linear"}
    assert all("branch that may not be taken" in why for why in refused.values())
    assert_nnx_is_as_by_hand(
        model,
        "stem",
        lambda model, x: model.stem(x),
        lambda model, x: model.classify(model.other(x)),
    )


class Doubled(Block):
    def __call__(self, x):
        return 2.0 * super().__call__(x)

    def encode(self, x):
        return self(x) - 1.0


class Encoder(Classifier):
    """Calls another method of a layer, and one of its own."""

    def __init__(self):
        super().__init__()
        self.doubled = Doubled(rngs())
        self.idle = Block(rngs())

    def encode(self, x):
        return self.doubled.encode(x)

    def __call__(self, x):
        return self.classify(self.encode(x))


def test_methods_of_nnx_modules_are_named_where_that_is_asked_for():
    model = Encoder()
    found, refused = names_of(model, model)
    # What calls its parent's method is one value.
    assert found == ["doubled/linear", "doubled", "head"]
    assert set(refused) == {"idle", "idle/linear"}
    assert all("not called" in why for why in refused.values())
    found, _ = names_of(model, model, methods=("encode",))
    assert found == ["doubled/linear", "doubled", "doubled.encode", "encode", "head"]


# ---------------------------------------------------------------- NNX: training


class Cnn(nnx.Module):
    def __init__(self):
        keys = nnx.Rngs(0, dropout=1)
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=keys)
        self.norm = nnx.BatchNorm(4, rngs=keys)
        self.dropout = nnx.Dropout(0.3, rngs=keys)
        self.more = nnx.Conv(4, 4, (3, 3), rngs=keys)
        self.head = nnx.Linear(4, CLASSES, rngs=keys)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        x = nnx.relu(self.more(x))
        return self.head(x.mean((1, 2)))


IMAGES = jax.random.normal(jax.random.key(4), (3, BATCH, 5, 5, 2))


def copied(model):
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        nnx.to_pure_dict(nnx.state(model)),
    )


def train(model, step):
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    run = nnx.jit(step)
    return [run(model, optimizer, images) for images in IMAGES]


def test_an_nnx_model_with_an_empty_chain_is_trained_as_by_nnx():
    def plain(model, optimizer, images):
        def loss(model):
            return cross_entropy(model(images)).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    ours, theirs = Cnn(), Cnn()
    perturbed = lpa_jax.value_and_grad(ours, lpa_jax.chain(), num_classes=CLASSES)
    state = perturbed.init(ours, IMAGES[0], Y)

    def step(model, optimizer, images):
        (value, aux), grads, _ = perturbed(model, state, images, Y, KEY)
        optimizer.update(model, grads)
        nnx.update(model, aux["updates"])
        return value

    start = copied(ours)
    same(train(ours, step), train(theirs, plain))
    same(copied(ours), copied(theirs))
    # Each layer, the statistics of batches and the count of dropout have moved.
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), start, copied(ours))
    assert moved["dropout"]["rngs"]["count"]
    assert moved["norm"]["mean"]
    assert moved["conv"]["kernel"]


def test_an_nnx_model_is_not_mutated_by_a_step_and_its_gradient_is_a_state():
    model = Cnn()
    before, kinds = copied(model), [type(module) for _, module in nnx.iter_modules(model)]
    step = lpa_jax.value_and_grad(model, lpa("conv"), num_classes=CLASSES)
    state = step.init(model, IMAGES[0], Y)
    (_, aux), grads, _ = quick_jit(functools.partial(step, model))(state, IMAGES[0], Y, KEY)
    lpa_jax.list_sites(model, model, IMAGES[0])
    chex.assert_trees_all_equal(copied(model), before)
    assert [type(module) for _, module in nnx.iter_modules(model)] == kinds
    assert not any("lpa_jax" in name for _, m in nnx.iter_modules(model) for name in vars(m))
    assert isinstance(grads, nnx.State)
    assert all(isinstance(leaf, nnx.Param) for _, leaf in nnx.to_flat_state(grads))
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(model, nnx.Param))
    # What is to be written back is all that are no parameters.
    others = nnx.state(model, nnx.Not(nnx.Param))
    assert jax.tree.structure(aux["updates"]) == jax.tree.structure(others)


def test_an_nnx_model_may_be_an_argument_of_either_jit():
    model = Listed()
    losses, _, grads = run_step(model, model, lpa("blocks/0"), jax.jit)
    again, _, others = run_step(model, model, lpa("blocks/0"), nnx.jit)
    same((losses, grads), (again, others))


# ---------------------------------------------------------------- Haiku


def linear(params, name, x):
    return x @ params[name]["w"] + params[name]["b"]


def haiku_network(kind):
    """Return a network and its block as functions, the block of parameters under a name."""
    hk = pytest.importorskip("haiku")

    class Inner(hk.Module):
        def __call__(self, x):
            return x + jnp.tanh(hk.Linear(WIDTH, name="linear")(x))

    def network(x):
        x = hk.Linear(WIDTH, name="stem")(x)
        if kind == "stack":
            layer = lambda x: Inner(name="block")(x)  # noqa: E731
            x = hk.experimental.layer_stack(2)(layer)(x)
        else:
            block = Inner(name="block")
            if kind == "plain":
                x = block(block(x))
            elif kind == "remat":
                x = hk.remat(block)(hk.remat(block)(x))
            elif hk.running_init():
                x = block(x)
            else:
                x, _ = hk.scan(lambda x, _: (block(x), None), x, None, length=2)
        return hk.Linear(CLASSES, name="head")(x.mean(1))

    return hk.transform(network)


@pytest.mark.parametrize("kind", ["plain", "remat", "scan", "stack"])
def test_lpa_within_a_haiku_function_equals_lpa_by_hand(kind):
    network = haiku_network(kind)
    params = network.init(jax.random.key(0), X)
    found, _ = names_of(network, params)
    calls = [f"{name}[{i}]" for i in range(2) for name in ("block/linear", "block")]
    assert [name for name in found if "[" in name] == calls
    assert found[0] == "stem"
    assert found[-1] == "head"

    def block(params, turn, x):
        (name,) = (name for name in params if name.endswith("linear"))
        if kind == "stack":
            params = {name: jax.tree.map(lambda leaf: leaf[turn], params[name])}
        return x + jnp.tanh(linear(params, name, x))

    def front(params, x):
        return block(params, 0, linear(params, "stem", x))

    def tail(params, x):
        return linear(params, "head", block(params, 1, x).mean(1))

    assert_lpa_is_as_by_hand(network, params, "block[0]", params, front, tail)


def test_a_haiku_function_with_state_and_a_random_key_is_trained_as_by_haiku():
    hk = pytest.importorskip("haiku")

    def network(x, train):
        x = hk.nets.MLP([WIDTH], activate_final=True, name="mlp")(x)
        x = hk.BatchNorm(True, True, 0.9, name="norm")(x, train)
        x = hk.dropout(hk.next_rng_key(), 0.5, x)
        return hk.Linear(CLASSES, name="head")(x.mean(1))

    network = hk.transform_with_state(network)
    params, state = network.init(jax.random.key(0), X, True)

    def loss(params, x):
        logits, new = network.apply(params, state, NOISE, x, True)
        return cross_entropy(logits).mean(), (logits, new)

    (expected, (logits, new)), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(params, X)
    given = {"train": True, "rng": NOISE}
    zero = lpa_jax.stateless("mlp/~/linear_0", lambda value, **_: value + 0.0)
    for perturbation in (None, zero):
        got, aux, got_grads = run_step(network, (params, state), perturbation, **given)
        same((got, aux["logits"], aux["updates"], got_grads), (expected, logits, new, grads))
    # The new state is taken by the next step.
    later, _, _ = run_step(network, (params, aux["updates"]), **given)
    assert jnp.isfinite(later)
    found, _ = names_of(network, (params, state), **given)
    assert found == ["mlp/~/linear_0", "mlp", "norm", "head"]


# ---------------------------------------------------------------- functions, Equinox


def plain_params():
    draw = jax.random.normal(jax.random.key(5), (2, WIDTH, WIDTH))
    return {"first": draw[0], "second": draw[1, :, :CLASSES]}


def front_of(params, x):
    return jnp.tanh(x @ params["first"])


def tail_of(params, x):
    return jnp.sin(x).mean(1) @ params["second"]


@pytest.mark.parametrize("name", [lpa_jax.tap, lambda name, value: checkpoint_name(value, name)])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, jax.vmap])
def test_lpa_within_a_function_equals_lpa_by_hand(name, wrap):
    def network(params, x):
        return tail_of(params, wrap(lambda x: name("hidden", front_of(params, x)))(x))

    params = plain_params()
    assert names_of(network, params) == (["hidden"], {})
    assert_lpa_is_as_by_hand(network, params, "hidden", params, front_of, tail_of)


def test_lpa_within_an_equinox_model_equals_lpa_by_hand():
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        stem: eqx.nn.Linear
        head: eqx.nn.MLP
        scale: float

        def encode(self, x):
            return self.scale * jax.nn.gelu(jax.vmap(self.stem)(x))

        def classify(self, x):
            return self.head(x.mean(0))

        def __call__(self, x):
            inner = eqx.filter_checkpoint(lambda x: lpa_jax.tap("hidden", self.encode(x)))
            return self.classify(inner(x))

    keys = jax.random.split(jax.random.key(0))
    model = Network(
        eqx.nn.Linear(WIDTH, WIDTH, key=keys[0]),
        eqx.nn.MLP(WIDTH, CLASSES, WIDTH, 1, key=keys[1]),
        2.0,
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def of_examples(method):
        return lambda params, x: jax.vmap(method(eqx.combine(params, static)))(x)

    network = of_examples(lambda model: model)
    assert names_of(network, params) == (["hidden"], {})
    front, tail = of_examples(lambda m: m.encode), of_examples(lambda m: m.classify)
    assert_lpa_is_as_by_hand(network, params, "hidden", params, front, tail)
    _, _, grads = run_step(network, params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


# ---------------------------------------------------------------- rematerialization by names


POLICIES = {
    "only mine": jax.checkpoint_policies.save_only_these_names("mine"),
    "any but mine": jax.checkpoint_policies.save_any_names_but_these("mine"),
}


def chosen(layer, x):
    """Call a layer three times; what comes second is the only value that is worth keeping."""
    x = checkpoint_name(jnp.sin(layer(jnp.sin(layer(x)))), "mine")
    return jnp.sin(layer(x))


class LinenChosen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return chosen(linen.Dense(WIDTH, name="layer"), x)


class LinenRemat(linen.Module):
    policy: str

    @linen.compact
    def __call__(self, x):
        x = linen.remat(LinenChosen, policy=POLICIES[self.policy])(name="chosen")(x)
        return linen.Dense(CLASSES, name="head")(x.mean(1))


class NnxChosen(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs())

    def __call__(self, x):
        return chosen(self.layer, x)


class NnxRemat(Classifier):
    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        self.chosen = NnxChosen()

    def __call__(self, x):
        remat = nnx.remat(lambda chosen, x: chosen(x), policy=POLICIES[self.policy])
        return self.classify(remat(self.chosen, x))


def remat_network(library, policy):
    """Return a network, its variables, and the network without the library."""
    if library == "linen":
        model = LinenRemat(policy)
        variables = model.init(jax.random.key(0), X)
        return model.apply, variables, lambda params: model.apply({"params": params}, X)
    if library == "nnx":
        model = NnxRemat(policy)
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        return model, model, lambda params: nnx.merge(graph, params, rest, copy=True)(X)
    if library == "haiku":
        hk = pytest.importorskip("haiku")

        def network(x):
            layer = hk.Linear(WIDTH, name="layer")
            x = hk.remat(functools.partial(chosen, layer), policy=POLICIES[policy])(x)
            return hk.Linear(CLASSES, name="head")(x.mean(1))

        model = hk.transform(network)
        params = model.init(jax.random.key(0), X)
        return model, params, lambda params: model.apply(params, None, X)

    def function(name, params, x):
        layer = lambda x: name("layer", x @ params["first"])  # noqa: E731
        x = jax.checkpoint(functools.partial(chosen, layer), policy=POLICIES[policy])(x)
        return x.mean(1) @ params["second"]

    unnamed = functools.partial(function, lambda name, value: value)
    named = functools.partial(function, lpa_jax.tap)
    return named, plain_params(), lambda params: unnamed(params, X)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("library", ["linen", "nnx", "haiku", "function"])
def test_a_policy_of_rematerialization_keeps_what_the_user_names_and_nothing_of_ours(
    library, policy
):
    model, variables, plain = remat_network(library, policy)
    network = api.backend_of(model)(variables)
    inputs = (network.rest, X, {})

    def walk(params, wanted=()):
        args = (params, *inputs)
        program = Program.trace(network.run, *args)
        assert {"layer[0]", "chosen/layer[0]"} & {site.name for site in program.sites}
        return program.walk(args, wanted, lambda site, value, tail: value)[0].sum()

    expected = residuals(lambda params: plain(params).sum(), network.params)
    kept = policy == "only mine"
    assert sum("'mine'" in line for line in expected) == kept
    assert residuals(walk, network.params) == expected
    # A region that is cut at a site keeps the value there besides, and still what the user named.
    (site,) = {"layer[0]", "chosen/layer[0]"} & set(names_of(model, variables)[0])
    cut = residuals(functools.partial(walk, wanted=[site]), network.params)
    assert sum("'mine'" in line for line in cut) == kept
    assert len(cut) <= len(expected) + 1


# ---------------------------------------------------------------- Linen


class Activation(linen.Module):
    @linen.compact
    def __call__(self, x):
        return jnp.tanh(x)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        return Activation(name="activation")(linen.Dense(WIDTH, name="dense")(x))


class Siblings(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x):
        kind = linen.jit(LinenBlock) if self.kind == "jit" else LinenBlock
        for i in range(3):
            x = kind(name=f"block{i}")(x)
        return linen.Dense(CLASSES, name="head")(x.mean(1))


def test_siblings_under_jit_in_linen_have_names_of_their_own():
    names = [f"block{i}{part}" for i in range(3) for part in ("/dense", "/activation", "")]
    for kind in ("plain", "jit"):
        model = Siblings(kind)
        variables = model.init(jax.random.key(0), X)
        assert names_of(model.apply, variables) == ([*names, "head"], {})


class LinenEncoder(linen.Module):
    """Layers of which other methods than `__call__` are called."""

    def setup(self):
        self.coder = Coder()
        self.head = linen.Dense(CLASSES)

    def encode(self, x):
        return self.coder.encode(x)

    def __call__(self, x):
        return self.head(self.coder.pool(self.encode(x)))


class Coder(linen.Module):
    def setup(self):
        self.dense = linen.Dense(WIDTH)

    def encode(self, x):
        return jnp.tanh(self.dense(x))

    def pool(self, x):
        return x.mean(1)

    def __call__(self, x):
        return self.pool(self.encode(x))


def test_methods_of_linen_modules_are_named_where_that_is_asked_for():
    model = LinenEncoder()
    variables = model.init(jax.random.key(0), X)
    found, refused = names_of(model.apply, variables)
    assert found == ["coder/dense", "head"]
    assert "no call of it was seen" in refused["coder"]
    found, refused = names_of(model.apply, variables, methods=("encode", "pool"))
    assert found == ["coder/dense", "coder.encode", "encode", "coder.pool", "head"]

    def front(params, x):
        return jnp.tanh(x @ params["coder"]["dense"]["kernel"] + params["coder"]["dense"]["bias"])

    def tail(params, x):
        return x.mean(1) @ params["head"]["kernel"] + params["head"]["bias"]

    step = lpa_jax.value_and_grad(
        model.apply, lpa("coder.encode"), num_classes=CLASSES, methods=("encode", "pool")
    )
    state = step.init(variables, X, Y)
    (loss, _), _, _ = quick_jit(step)(variables, state, X, Y, KEY)
    params = variables["params"]
    value = front(params, X)
    value = value + climbed(functools.partial(tail, params), value)
    close(loss, cross_entropy(tail(params, value)).mean())
