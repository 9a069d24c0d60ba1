"""Networks drawn at random, in Linen and in NNX: what must hold of any of them.

A network is drawn as a tree of parts, each a layer, a transformation or a plain operation of JAX.
From the tree alone follows what its sites must be.
"""

import random
from typing import Any, NamedTuple

import chex
from flax import linen, nnx
from flax.traverse_util import flatten_dict
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import optax
from probes import quick_jit
import pytest

import lpa_jax

BATCH, POSITIONS, WIDTH, CLASSES = 5, 3, 4, 3
TURNS = 2
INPUTS = np.random.default_rng(1).normal(size=(BATCH, POSITIONS, WIDTH))
LABELS = jnp.array([0, 1, 2, 0, 1], jnp.int32)
DROPOUT_KEY, KEY = jax.random.key(3), jax.random.key(2)

# What a part may need: that its layers may change their state, and that values are [B, T, W].
STATE, BATCHED = "state", "batched"


class Kind(NamedTuple):
    """How many parts a kind of part contains, what it needs, and what is lost inside of it."""

    parts: int = 1
    needs: str | None = None
    loses: tuple[str, ...] = ()


RAW = Kind(loses=(STATE,))
KINDS = {
    "dense": Kind(0),
    "named": Kind(0),
    "conv": Kind(0),
    "norm": Kind(0, STATE),
    "dropout": Kind(0, STATE),
    "constant": Kind(0),
    "chain": Kind(2),
    "pair": Kind(),
    "pick": Kind(),
    "shared": Kind(),
    "scan": Kind(),
    "reversed scan": Kind(),
    "iterate": RAW,
    "remat": Kind(),
    "remat saving products": Kind(),
    "remat saving names": Kind(),
    "jit": Kind(),
    "switch": Kind(2, loses=(STATE,)),
    "vmap": Kind(loses=(STATE, BATCHED)),
    "ensemble": Kind(loses=(STATE, BATCHED)),
    "raw remat": RAW,
    "raw jit": RAW,
    "raw vmap": Kind(loses=(STATE, BATCHED)),
    "raw scan": RAW,
    "raw loop": RAW,
    "raw while": RAW,
    "raw map": Kind(needs=BATCHED, loses=(STATE, BATCHED)),
    "custom_jvp": RAW,
    "custom_vjp": RAW,
    "time first": Kind(needs=BATCHED, loses=(BATCHED,)),
    "merged": Kind(needs=BATCHED, loses=(BATCHED,)),
}
LEAVES = [kind for kind, (parts, _, _) in KINDS.items() if parts == 0]
POLICIES = {
    "remat": None,
    "remat saving products": jax.checkpoint_policies.dots_saveable,
    "remat saving names": jax.checkpoint_policies.save_only_these_names("mine"),
}
Spec = tuple[Any, ...]


def draw(rng: random.Random, depth: int, have: frozenset[str], kind: str | None = None) -> Spec:
    """Draw a part: its kind, and the parts inside of it."""
    known = KINDS if depth else LEAVES
    possible = [k for k in known if KINDS[k].needs is None or KINDS[k].needs in have]
    kind = rng.choice(possible) if kind is None else kind
    have = have.difference(KINDS[kind].loses)
    return (kind, *(draw(rng, max(depth - 1, 0), have) for _ in range(KINDS[kind].parts)))


def draw_network(number: int) -> Spec:
    """Draw a network; as the number goes up, each kind has its turn on the outside."""
    kind = list(KINDS)[number % len(KINDS)]
    return draw(random.Random(number), 2, frozenset((STATE, BATCHED)), kind)


# ---------------------------------------------------------------- raw operations of JAX


def raw(kind, call, x):
    """Apply a function by a transformation of JAX that knows nothing of layers."""
    match kind:
        case "raw remat":
            return jax.checkpoint(call)(x)
        case "raw jit":
            return jax.jit(call)(x)
        case "raw vmap":
            return jax.vmap(call)(x)
        case "raw scan":
            return jax.lax.scan(lambda x, _: (call(x), None), x, None, length=TURNS)[0]
        case "raw loop":
            return jax.lax.fori_loop(0, TURNS, lambda _, x: call(x), x)
        case "raw while":
            # Nothing goes backward through such a loop.
            done = lambda state: state[0] < TURNS  # noqa: E731
            turn = lambda state: (state[0] + 1, call(state[1]))  # noqa: E731
            return x + jax.lax.while_loop(done, turn, (0, jax.lax.stop_gradient(x)))[1]
        case "raw map":
            return jax.lax.map(call, x)
        case "time first":
            return call(x.swapaxes(0, 1)).swapaxes(0, 1)
        case "merged":
            return call(x.reshape(-1, WIDTH)).reshape(x.shape)
    raise ValueError(kind)


def own_rule(kind, call):
    """Give a function of parameters and a value a derivative of its own, which is the same."""
    if kind == "custom_jvp":
        ruled = jax.custom_jvp(call)
        ruled.defjvp(lambda primals, tangents: jax.jvp(call, primals, tangents))
    else:
        ruled = jax.custom_vjp(call)
        ruled.defvjp(
            lambda params, x: jax.vjp(call, params, x),
            lambda pullback, cotangent: pullback(cotangent),
        )
    return ruled


def merge_picked(picked, x):
    return x + jax.nn.one_hot(picked, WIDTH)


def constant(params):
    return jax.tree.map(jax.lax.stop_gradient, params)


def taken():
    """Return the branch that is taken; the trace does not know it."""
    return jnp.asarray(1)


# ---------------------------------------------------------------- in Linen


class LinenPart(linen.Module):
    spec: Spec

    @linen.compact
    def __call__(self, x):
        kind, *parts = self.spec
        match kind:
            case "dense":
                return jnp.tanh(linen.Dense(WIDTH, name="dense")(x))
            case "named":
                return jnp.tanh(checkpoint_name(linen.Dense(WIDTH, name="dense")(x), "mine"))
            case "conv":
                return jnp.tanh(linen.Conv(WIDTH, (2,), name="conv")(x))
            case "norm":
                x = linen.Dense(WIDTH, use_bias=False, name="dense")(x)
                return linen.BatchNorm(use_running_average=False, name="norm")(x)
            case "dropout":
                x = linen.Dense(WIDTH, name="dense")(x)
                return linen.Dropout(0.3, deterministic=False, name="dropout")(x)
            case "constant":
                return x + linen.Dense(WIDTH, name="constant")(jnp.ones((1, WIDTH)))
            case "chain":
                return LinenPart(parts[1], name="b")(LinenPart(parts[0], name="a")(x))
            case "pair":
                x, more = LinenPair(parts[0], name="pair")(x)
                return x * more["gate"]
            case "pick":
                return merge_picked(*LinenPick(parts[0], name="pick")(x))
            case "shared":
                part = LinenPart(parts[0], name="a")
                return part(part(x))
            case "scan" | "reversed scan":
                layers = linen.scan(
                    LinenLayer,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True, "dropout": True},
                    length=TURNS,
                    reverse=kind == "reversed scan",
                )
                return layers(parts[0], name="layers")(x, None)[0]
            case "iterate":
                layers = linen.scan(
                    LinenLayer,
                    variable_broadcast="params",
                    split_rngs={"params": False},
                    length=TURNS,
                )
                return layers(parts[0], name="layers")(x, None)[0]
            case "remat" | "remat saving products" | "remat saving names":
                part = linen.remat(LinenPart, policy=POLICIES[kind])
                return part(parts[0], name="a")(x)
            case "jit":
                part = linen.jit(LinenPart)
                return part(parts[0], name="b")(part(parts[0], name="a")(x))
            case "vmap":
                part = linen.vmap(
                    LinenPart, variable_axes={"params": None}, split_rngs={"params": False}
                )
                return part(parts[0], name="a")(x)
            case "ensemble":
                part = linen.vmap(
                    LinenPart,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    in_axes=None,
                    axis_size=2,
                )
                return part(parts[0], name="a")(x).mean(0)
            case "switch":
                a, b = LinenPart(parts[0], name="a"), LinenPart(parts[1], name="b")
                if self.is_initializing():
                    return b(a(x))
                branches = [lambda _, x: a(x), lambda _, x: b(x)]
                return linen.switch(taken(), branches, self, x)
            case "custom_jvp" | "custom_vjp":
                part = LinenPart(parts[0], parent=None)
                params = self.param("a", lambda key: part.init(key, x)["params"])
                call = own_rule(kind, lambda params, x: part.apply({"params": params}, x))
                return call(params, x)
        if self.is_initializing():
            return LinenPart(parts[0], name="a")(x)
        frozen = kind == "raw while"
        part = linen.map_variables(LinenPart, "params", constant) if frozen else LinenPart
        part = part(parts[0], name="a")
        return raw(kind, lambda x: part(x), x)


class LinenLayer(linen.Module):
    spec: Spec

    @linen.compact
    def __call__(self, x, _):
        return LinenPart(self.spec, name="a")(x), None


class LinenPair(linen.Module):
    spec: Spec

    @linen.compact
    def __call__(self, x):
        x = LinenPart(self.spec, name="a")(x)
        return x, {"gate": linen.Dense(WIDTH, name="gate")(x)}


class LinenPick(linen.Module):
    spec: Spec

    @linen.compact
    def __call__(self, x):
        x = LinenPart(self.spec, name="a")(x)
        return jnp.argmax(x, axis=-1), x


class LinenNetwork(linen.Module):
    spec: Spec

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(WIDTH, name="stem")(x)
        x = LinenPart(self.spec, name="body")(x)
        return linen.Dense(CLASSES, name="head")(x.mean(1))


# ---------------------------------------------------------------- in NNX


@nnx.jit
def nnx_jitted(part, x):
    return part(x)


def nnx_stacked(make, rngs):
    return nnx.split_rngs(splits=TURNS)(nnx.vmap(make))(rngs)


class NnxPart(nnx.Module):
    def __init__(self, spec, rngs):
        self.spec = spec
        kind, *parts = spec
        match kind:
            case "dense" | "named":
                self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            case "conv":
                self.conv = nnx.Conv(WIDTH, WIDTH, (2,), rngs=rngs)
            case "norm":
                self.dense = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
                self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            case "dropout":
                self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
                self.dropout = nnx.Dropout(0.3, rngs=rngs)
            case "constant":
                self.constant = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            case "pair":
                self.pair = NnxPair(parts[0], rngs)
            case "pick":
                self.pick = NnxPick(parts[0], rngs)
            case "scan" | "reversed scan":
                self.layers = nnx_stacked(lambda rngs: NnxLayer(parts[0], rngs), rngs)
            case "iterate":
                self.layers = NnxLayer(parts[0], rngs)
            case "ensemble":
                self.a = nnx_stacked(lambda rngs: NnxPart(parts[0], rngs), rngs)
            case _:
                self.a = NnxPart(parts[0], rngs)
                if kind in ("chain", "switch", "jit"):
                    self.b = NnxPart(parts[-1], rngs)

    def __call__(self, x):
        kind = self.spec[0]
        match kind:
            case "dense":
                return jnp.tanh(self.dense(x))
            case "named":
                return jnp.tanh(checkpoint_name(self.dense(x), "mine"))
            case "conv":
                return jnp.tanh(self.conv(x))
            case "norm":
                return self.norm(self.dense(x))
            case "dropout":
                return self.dropout(self.dense(x))
            case "constant":
                return x + self.constant(jnp.ones((1, WIDTH)))
            case "chain":
                return self.b(self.a(x))
            case "pair":
                x, more = self.pair(x)
                return x * more["gate"]
            case "pick":
                return merge_picked(*self.pick(x))
            case "shared":
                return self.a(self.a(x))
            case "scan" | "reversed scan":
                scan = nnx.scan(
                    in_axes=(0, nnx.Carry), out_axes=nnx.Carry, reverse=kind == "reversed scan"
                )
                return scan(lambda layer, x: layer(x))(self.layers, x)
            case "iterate":
                scan = nnx.scan(length=TURNS, in_axes=(None, nnx.Carry), out_axes=nnx.Carry)
                return scan(lambda layer, x: layer(x))(self.layers, x)
            case "remat" | "remat saving products" | "remat saving names":
                return nnx.remat(lambda part, x: part(x), policy=POLICIES[kind])(self.a, x)
            case "jit":
                return nnx_jitted(self.b, nnx_jitted(self.a, x))
            case "vmap":
                return nnx.vmap(lambda part, x: part(x), in_axes=(None, 0))(self.a, x)
            case "ensemble":
                return nnx.vmap(lambda part, x: part(x), in_axes=(0, None))(self.a, x).mean(0)
            case "switch":
                branches = [lambda a, b, x: a(x), lambda a, b, x: b(x)]
                return nnx.switch(taken(), branches, self.a, self.b, x)
            case "custom_jvp" | "custom_vjp":
                graph, params = nnx.split(self.a)
                call = lambda params, x: nnx.merge(graph, params, copy=True)(x)  # noqa: E731
                return own_rule(kind, call)(params, x)
        if self.a.spec[0] in LEAVES and kind != "raw while":
            return raw(kind, lambda x: self.a(x), x)
        # What NNX transforms is to be made inside of another transformation.
        graph, params = nnx.split(self.a)
        params = constant(params) if kind == "raw while" else params
        return raw(kind, lambda x: nnx.merge(graph, params, copy=True)(x), x)


class NnxLayer(nnx.Module):
    def __init__(self, spec, rngs):
        self.a = NnxPart(spec, rngs)

    def __call__(self, x):
        return self.a(x)


class NnxPair(nnx.Module):
    def __init__(self, spec, rngs):
        self.a = NnxPart(spec, rngs)
        self.gate = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        return x, {"gate": self.gate(x)}


class NnxPick(nnx.Module):
    def __init__(self, spec, rngs):
        self.a = NnxPart(spec, rngs)

    def __call__(self, x):
        x = self.a(x)
        return jnp.argmax(x, axis=-1), x


class NnxNetwork(nnx.Module):
    def __init__(self, spec, rngs):
        self.stem = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.body = NnxPart(spec, rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(self.stem(x)).mean(1))


# ---------------------------------------------------------------- both, opened in one way


def numbers(path, leaf):
    """Draw the numbers of a leaf: no bias is 0 and no scale 1, so that errors show."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(4), leaf.shape) if leaf.shape else jax.random.key(4)
    name = [str(getattr(key, "key", key)) for key in path if "value" not in str(key)][-1]
    rng = np.random.default_rng(sum(map(ord, str(path))))
    values = 0.6 * rng.normal(size=leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        values = np.zeros(leaf.shape)
        return jnp.asarray(values, leaf.dtype)
    return jnp.asarray(1.0 + values**2 if name in ("var", "scale") else values)


class Opened(NamedTuple):
    """A network, for the library and by itself.

    Attributes:
      model: What `lpa_jax.value_and_grad` takes.
      variables: What its step takes.
      kwargs: What its step takes besides.
      plain: The network without the library, `params -> (logits, mutated state)`.
      params: The parameters.
      modules: Paths of the modules that have parameters.
    """

    model: Any
    variables: Any
    kwargs: dict[str, Any]
    plain: Any
    params: Any
    modules: set[str]


def open_linen(spec: Spec) -> Opened:
    model = LinenNetwork(spec)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    variables = jax.eval_shape(model.init, keys, INPUTS)
    variables = jax.tree_util.tree_map_with_path(numbers, variables)
    kwargs = {"rngs": {"dropout": DROPOUT_KEY}, "mutable": ["batch_stats"]}

    def plain(params):
        return model.apply({**variables, "params": params}, INPUTS, **kwargs)

    params = variables["params"]
    modules = {"/".join(path[:i]) for path in flatten_dict(params) for i in range(1, len(path))}
    return Opened(model.apply, variables, kwargs, plain, params, modules)


def open_nnx(spec: Spec) -> Opened:
    abstract = nnx.eval_shape(lambda: NnxNetwork(spec, nnx.Rngs(0)))
    graph, params, rest = nnx.split(abstract, nnx.Param, ...)
    params, rest = jax.tree_util.tree_map_with_path(numbers, (params, rest))

    def plain(params):
        model = nnx.merge(graph, params, rest, copy=True)
        logits = model(INPUTS)
        return logits, nnx.state(model, nnx.Not(nnx.Param))

    modules = {
        "/".join(map(str, path[:i])) for path, _ in nnx.to_flat_state(params)
        for i in range(1, len(path))
    }  # fmt: skip
    model = nnx.merge(graph, params, rest, copy=True)
    return Opened(model, model, {}, plain, params, modules)


LIBRARIES = {"linen": open_linen, "nnx": open_nnx}


# ---------------------------------------------------------------- what the sites must be


class Value(NamedTuple):
    """A value that is named: when it is computed, its name, its shape, and whether it is a site."""

    when: tuple[int, ...]
    given: str
    shape: tuple[int, ...] | None
    reachable: bool


def in_turn(*parts: list[Value], reverse: bool = False) -> list[Value]:
    """Say that parts are computed one after the other."""
    order = range(len(parts))[:: -1 if reverse else 1]
    return [
        value._replace(when=(turn, *value.when))
        for turn, part in zip(order, parts, strict=True)
        for value in part
    ]


def values_of(
    spec: Spec, path: str, shape: tuple[int, ...] | None, reachable: bool, rules_named: bool
) -> list[Value]:
    """Return the named values of a part, in the order in which they are numbered.

    Args:
      spec: The part.
      path: Its path.
      shape: Of what it is given and returns; None where no axis is that of the batch.
      reachable: Whether its values can be replaced.
      rules_named: Whether values in functions with derivatives of their own have their paths.
    """
    kind, *parts = spec

    def one(name="", shape=shape, reachable=reachable):
        return [Value((), f"{path}{name}", shape, reachable)]

    def inside(name, spec=parts[0] if parts else None, shape=shape, reachable=reachable):
        return values_of(spec, f"{path}/{name}", shape, reachable, rules_named)

    match kind:
        case "dense":
            found = [one("/dense")]
        case "named":
            found = [one("/dense"), [Value((), "mine", shape, reachable)]]
        case "conv":
            found = [one("/conv")]
        case "norm":
            found = [one("/dense"), one("/norm")]
        case "dropout":
            found = [one("/dense"), one("/dropout")]
        case "constant":
            found = [one("/constant", shape=None)]
        case "chain":
            found = [inside("a", parts[0]), inside("b", parts[1])]
        case "pair":
            found = [inside("pair/a"), one("/pair/gate"), one("/pair:0"), one("/pair:1")]
        case "pick":
            found = [inside("pick/a"), one("/pick:0", reachable=False), one("/pick:1")]
        case "shared":
            found = [inside("a")] * 2
        case "scan" | "reversed scan" | "iterate":
            layer = in_turn(inside("layers/a"), one("/layers"))
            found = [in_turn(*[layer] * TURNS, reverse=kind == "reversed scan")]
        case "jit":
            found = [inside("a"), inside("b")]
        case "switch":
            found = [inside(n, p, reachable=False) for n, p in zip("ab", parts, strict=True)]
        case "custom_jvp" | "custom_vjp":
            found = [inside("a", reachable=False)] if rules_named else []
        case "raw while":
            found = [inside("a", reachable=False)]
        case "raw scan" | "raw loop":
            found = [in_turn(*[inside("a")] * TURNS)]
        case "raw map":
            found = [in_turn(*[inside("a", shape=None)] * BATCH)]
        case "ensemble":
            found = [inside("a", shape=None if shape is None else (2, *shape))]
        case "time first":
            found = [inside("a", shape=(POSITIONS, BATCH, WIDTH))]
        case "merged":
            found = [inside("a", shape=None)]
        case _:
            found = [inside("a")]
    return in_turn(*found, one())


def expected_sites(spec: Spec, rules_named: bool) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each site within a network, in the order of computation."""
    stem = [Value((), "stem", INPUTS.shape, True)]
    head = [Value((), "head", (BATCH, CLASSES), True)]
    values = in_turn(stem, values_of(spec, "body", INPUTS.shape, True, rules_named), head)
    values = [value for value in values if value.reachable]
    times = [value.given for value in values]
    found = []
    for place, (when, given, shape, _) in enumerate(values):
        number = f"[{times[:place].count(given)}]" if times.count(given) > 1 else ""
        found += [(when, given + number, shape)] if shape is not None else []
    return {name: shape for _, name, shape in sorted(found)}


# ---------------------------------------------------------------- what must hold


@pytest.fixture(autouse=True)
def in_double_precision():
    """Keep rounding apart from errors: batch normalization of few values makes much of it."""
    with jax.enable_x64(True):
        yield


def noises(sites: dict[str, tuple[int, ...]], amounts: jax.Array) -> Any:
    """Chain noise at each site, of the given amounts."""

    def noise(site, amount):
        # By numbers that differ from entry to entry: a norm would take out a shift.
        def move(value, **_):
            entries = jnp.arange(value.size, dtype=value.dtype).reshape(value.shape)
            return value + amount * jnp.sin(2.0 + 3.0 * entries)

        return lpa_jax.stateless(site, move)

    return lpa_jax.chain(*(noise(site, amounts[i]) for i, site in enumerate(sites)))


def climb(site: str, amount: jax.Array) -> lpa_jax.Perturbation:
    """Move a value by its gradient, and keep how steep that was."""

    def update(value, state, params=None, *, gradient_fn, **_):
        _, gradient = gradient_fn(value)
        # At each of the calls that go by one name.
        return value + amount * gradient, state + jnp.sum(gradient**2)

    return lpa_jax.Perturbation(site, lambda value: jnp.zeros(()), update)


class Outcome(NamedTuple):
    loss: Any
    logits: Any
    grads: Any
    updates: Any


def stepped(network: Opened, perturbation, variables):
    """Return what a step returns, and the states of its perturbations."""
    step = lpa_jax.value_and_grad(network.model, perturbation, num_classes=CLASSES)
    state = step.init(variables, INPUTS, LABELS, **network.kwargs)
    (loss, aux), grads, state = step(variables, state, INPUTS, LABELS, KEY, **network.kwargs)
    outcome = Outcome(loss, aux["logits"], grads, aux["updates"])
    return outcome, aux["metrics"], state.perturbations


def plainly(network: Opened, params) -> Outcome:
    def loss(params):
        logits, updates = network.plain(params)
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return losses.mean(), (logits, updates)

    (loss, (logits, updates)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return Outcome(loss, logits, grads, updates)


def assert_same(got: Outcome, expected: Outcome) -> None:
    """Compare to 1e-6, gradients of the largest of them."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    size = max([1.0, *(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected.grads))])

    def compare(got, expected):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, expected = jax.random.key_data(got), jax.random.key_data(expected)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * size)

    jax.tree.map(compare, got, expected)


def base(name: str) -> str:
    """Return the path of the module whose value has a name."""
    return name.split("[")[0].split(":")[0]


def check(library: str, spec: Spec, number: int, *, grads: bool) -> None:
    network = LIBRARIES[library](spec)
    listed = lpa_jax.list_sites(network.model, network.variables, INPUTS, **network.kwargs)
    sites = expected_sites(spec, rules_named=library == "nnx")

    # The sites are those that follow from the tree, in order, with their shapes.
    fixed = ("inputs", "labels", "logits", "logit_grads")
    numbered = {name for name in listed if name.split("[")[0] in sites or name in sites}
    found = {name: value.shape for name, value in listed.items() if name in sites}
    assert list(found.items()) == list(sites.items())
    # Besides, what is called several times goes by the name of all its calls.
    assert set(listed) - set(sites) - set(fixed) == {
        name.split("[")[0] for name in sites if "[" in name
    } - numbered.intersection(sites)
    # All other modules with parameters are named, with the reason.
    for module in network.modules.difference(map(base, sites)):
        assert any(why for name, why in listed.refused.items() if base(name) == module), module
    # That of a name for several calls is their sum.
    several = {name.split("[")[0] for name in listed.costs if name.endswith("]")}
    costs = [cost for name, cost in listed.costs.items() if name not in several]
    assert costs == sorted(costs, reverse=True)
    assert 0 <= costs[-1] <= costs[0] <= 1

    # Training by the library without a perturbation, and with one of no strength, is plain.
    rng = random.Random(number)
    site = rng.choice([name for name in listed if name not in fixed])

    def all_at_once(variables, params, amount):
        outcome, _, (steep,) = stepped(network, climb(site, amount), variables)
        return (
            plainly(network, params),
            stepped(network, lpa_jax.chain(), variables)[0],
            outcome,
            steep,
        )

    run = quick_jit(all_at_once)
    plain, empty, unmoved, steep = run(network.variables, network.params, jnp.array(0.0))
    assert_same(empty, plain)
    assert_same(unmoved, plain)
    # The gradient at the site tells how the loss changes; through a loop it does not go backward.
    if "raw while" not in str(spec):
        step = 0.01 / np.sqrt(max(float(steep), 1e-12))
        ahead, behind = (
            run(network.variables, network.params, jnp.array(by))[2].loss * BATCH
            for by in (step, -step)
        )
        np.testing.assert_allclose((ahead - behind) / (2 * step), steep, rtol=0.05, atol=1e-5)

    # Each site moves the loss, and what was moved is reported.
    def noisy(variables, amounts):
        outcome, metrics, _ = stepped(network, noises(sites, amounts), variables)
        # To compile the way back through all of the cuts takes as long as all else.
        return outcome if grads else outcome._replace(grads=None), metrics

    run = quick_jit(noisy)
    outcome, metrics = run(network.variables, jnp.zeros(len(sites)))
    assert_same(outcome, plain if grads else plain._replace(grads=None))
    for i, site in enumerate(sites):
        moved, metrics = run(network.variables, jnp.eye(len(sites))[i])
        assert list(metrics) == sorted(sites)
        change = abs(moved.loss - plain.loss) / plain.loss
        assert change > 1e-5, site
        chex.assert_tree_all_finite((moved.loss, moved.grads))
        for name, reported in metrics.items():
            assert (reported["norm"] > 0).all() == (name == site), name


# Each kind of part that contains others once, in one of the two libraries; half of them are slow.
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=pytest.mark.slow) if number % 4 < 2 else number
        for number in range(len(LEAVES), len(KINDS))
    ],
)
def test_what_must_hold_of_any_network(number):
    library = list(LIBRARIES)[number % 2]
    check(library, draw_network(number), number, grads=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(KINDS), 5 * len(KINDS)))
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_must_hold_of_many_networks(library, number):
    check(library, draw_network(number), number, grads=True)
