"""A traced program: its sites and their order, replacing values, tails, cuts of remat and scan."""

import functools

import chex
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from probes import quick_jit, residuals
import pytest

from lpa_jax.core.program import MARK, Program, tap

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
W = jnp.array([[0.5, -0.2, 0.1], [0.3, 0.8, -0.4], [-0.6, 0.2, 0.9]])
STACK = jnp.stack([W, 0.5 * W.T, W @ W, -W])


def layer(w, x):
    return jnp.tanh(x @ w)


def loop(stack, x, names=True):
    for i in range(len(stack)):
        x = layer(stack[i], x)
        x = tap(f"layer{i}", x) if names else x
    return x.sum(axis=1)


def scan(stack, x, *, remat=False, reverse=False, unroll=1):
    def turn(x, w):
        x = tap("layer", layer(w, x))
        return x, x.sum()

    turn = jax.checkpoint(turn, prevent_cse=False) if remat else turn
    x, sums = lax.scan(turn, x, stack, reverse=reverse, unroll=unroll)
    return x.sum(axis=1) + 0.0 * sums.sum()


def keep(site, value, tail):
    return value


def double(site, value, tail):
    return 2.0 * value


def climb(site, value, tail):
    """Take a step uphill, as a perturbation does."""
    return value + lax.stop_gradient(jax.grad(lambda value: tail(value).sum())(value))


def walked(function, *args, wanted, visit=keep):
    """Return loss and gradient of a walk, compiled."""

    def loss(*args):
        result = Program.trace(function, *args).walk(args, wanted, visit)
        return jnp.sum(result**2)

    return quick_jit(jax.value_and_grad(loss))(*args)


def plain(function, *args):
    return quick_jit(jax.value_and_grad(lambda *args: jnp.sum(function(*args) ** 2)))(*args)


close = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)

NETWORKS = {
    "loop": loop,
    "jit": jax.jit(loop),
    "remat": jax.checkpoint(loop),
    "jit of remat of jit": jax.jit(jax.checkpoint(jax.jit(loop))),
    "scan": scan,
    "scan of remat": functools.partial(scan, remat=True),
    "scan, unrolled": functools.partial(scan, unroll=2),
    "remat of scan": jax.checkpoint(scan),
}


def name_of(network, place):
    return f"layer[{place}]" if "scan" in network else f"layer{place}"


@pytest.mark.parametrize("network", NETWORKS)
def test_sites_are_found_in_order(network):
    program = Program.trace(NETWORKS[network], STACK, X)
    assert [site.name for site in program.sites] == [name_of(network, i) for i in range(4)]
    assert {site.shape for site in program.sites} == {(4, 3)}
    assert not program.unreachable


@pytest.mark.parametrize("wanted", [[], [1], [3], [0, 2], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_walk_that_keeps_all_values_is_the_function(network, wanted):
    function = NETWORKS[network]
    names = [name_of(network, place) for place in wanted]
    close(walked(function, STACK, X, wanted=names), plain(function, STACK, X))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("visit", [double, climb])
def test_a_value_is_replaced_at_its_site_alone(network, place, visit):
    def by_hand(stack, x):
        for i in range(4):
            x = layer(stack[i], x)
            if i == place:
                x = visit(None, x, functools.partial(rest, lax.stop_gradient(stack), i + 1))
        return x.sum(axis=1)

    def rest(stack, start, x):
        for i in range(start, 4):
            x = layer(stack[i], x)
        return x.sum(axis=1)

    seen = []

    def visited(site, value, tail):
        seen.append(site.name)
        return visit(site, value, tail)

    name = name_of(network, place)
    got = walked(NETWORKS[network], STACK, X, wanted=[name], visit=visited)
    close(got, plain(by_hand, STACK, X))
    assert set(seen) == {name}


def test_a_later_site_sees_the_change_at_an_earlier_site():
    got = walked(loop, STACK, X, wanted=["layer0", "layer2"], visit=double)

    def by_hand(stack, x):
        for i in range(4):
            x = layer(stack[i], x) * (2.0 if i in (0, 2) else 1.0)
        return x.sum(axis=1)

    close(got, plain(by_hand, STACK, X))


def test_turns_of_a_reversed_scan_are_visited_as_they_are_computed():
    function = functools.partial(scan, reverse=True)
    program = Program.trace(function, STACK, X)
    assert [site.name for site in program.sites] == [f"layer[{i}]" for i in (3, 2, 1, 0)]
    for wanted in (["layer[1]"], ["layer[0]", "layer[3]"], ["layer"]):
        close(walked(function, STACK, X, wanted=wanted), plain(function, STACK, X))

    def by_hand(stack, x):
        for i in (3, 2, 1, 0):
            x = layer(stack[i], x) * (2.0 if i == 1 else 1.0)
        return x.sum(axis=1)

    close(walked(function, STACK, X, wanted=["layer[1]"], visit=double), plain(by_hand, STACK, X))


def test_stacked_outputs_of_a_scan_are_reassembled():
    def stacked(stack, x):
        return lax.scan(lambda x, w: (tap("layer", layer(w, x)), (x, w.sum())), x, stack)

    args = (STACK, X)
    program = Program.trace(stacked, *args)
    for wanted in (["layer[0]"], ["layer[3]"], ["layer[1]", "layer[2]"], ["layer"]):
        close(program.walk(args, wanted, keep), stacked(*args))


def test_calls_of_one_function_are_numbered():
    shared = jax.jit(lambda w, x: tap("shared", layer(w, x)))

    def twice(w, x):
        return shared(w, shared(w, x)).sum(axis=1)

    program = Program.trace(twice, W, X)
    assert [site.name for site in program.sites] == ["shared[0]", "shared[1]"]
    got = program.walk((W, X), ["shared[1]"], double)
    close(got, (2.0 * layer(W, layer(W, X))).sum(axis=1))


def test_arrays_of_a_tree_are_sites_of_their_own():
    def network(w, x):
        h, extra = tap("block", (layer(w, x), {"sum": x.sum(axis=1)}))
        return h.sum(axis=1) + extra["sum"]

    program = Program.trace(network, W, X)
    assert [(site.name, site.shape) for site in program.sites] == [
        ("block:0", (4, 3)), ("block:1", (4,)),
    ]  # fmt: skip
    close(program.walk((W, X), ["block:1"], double), layer(W, X).sum(axis=1) + 2 * X.sum(axis=1))


def test_constants_literals_and_arguments_may_be_values_and_results():
    def network(w, x):
        named = tap("argument", x)
        inner = jax.jit(lambda scale, x: (tap("inner", x * scale), scale, 1.0))
        value, scale, one = inner(2.0, named)
        return value @ w + W[0], scale, one, x, named, 3.0

    args = (W, X)
    program = Program.trace(network, *args)
    for wanted in ([], ["argument"], ["inner"], ["argument", "inner"]):
        close(program.walk(args, wanted, keep), network(*args))


def unreachable(kind):
    def inside(x):
        return tap("inside", jnp.tanh(x))

    with_rule = jax.custom_vjp(inside)
    with_rule.defvjp(lambda x: (inside(x), x), lambda x, g: (g,))
    with_derivative = jax.custom_jvp(inside)
    with_derivative.defjvp(lambda p, t: (inside(*p), t[0]))
    return {
        "while": lambda x: lax.fori_loop(0, x.shape[0] // 2, lambda i, x: inside(x), x),
        "cond": lambda x: lax.cond(x.sum() > 0, inside, jnp.cos, x),
        "custom_vjp": with_rule,
        "custom_jvp": with_derivative,
        "integers": lambda x: x * tap("inside", jnp.argmax(x, axis=1))[:, None],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cond", "branch that may not be taken"),
        ("custom_vjp", "derivative of its own"),
        ("custom_jvp", "derivative of its own"),
        ("integers", "it is int32"),
    ],
)
def test_values_that_cannot_be_replaced_are_named_with_the_reason(kind, reason):
    function = unreachable(kind)
    network = lambda w, x: tap("after", function(x @ w)).sum(axis=1)  # noqa: E731
    program = Program.trace(network, W, X)
    assert [site.name for site in program.sites] == ["after"]
    assert reason in program.unreachable["inside"]
    close(walked(network, W, X, wanted=["after"]), plain(network, W, X))


def test_a_loop_whose_turns_are_not_known_is_named():
    def network(w, x, turns):
        return lax.fori_loop(0, turns, lambda i, x: tap("inside", layer(w, x)), x)

    program = Program.trace(network, W, X, 3)
    assert "number of turns is not known" in program.unreachable["inside"]
    close(program.walk((W, X, 3), [], keep), network(W, X, 3))


# ---------------------------------------------------------------- what it costs


def count(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("network", ["loop", "jit"])
def test_each_piece_is_computed_once_and_a_gradient_costs_the_tail(network, place):
    wide = jnp.stack([jnp.eye(64)] * 4), jnp.ones((32, 64))
    product = 2 * 32 * 64 * 64

    def loss(visit, *args):
        program = Program.trace(NETWORKS[network], *args)
        return jnp.sum(program.walk(args, [f"layer{place}"], visit) ** 2)

    none, kept, climbed = (
        count(jax.grad(functools.partial(loss, visit)), *wide) / product
        for visit in (lambda site, value, tail: value, keep, climb)
    )
    assert kept == none
    # Forward and backward through the products after the site.
    assert climbed - kept == pytest.approx(2 * (3 - place), abs=0.2)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_cost_after_a_site_is_counted(network):
    wide = jnp.stack([jnp.eye(64)] * 4), jnp.ones((32, 64))
    costs = Program.trace(NETWORKS[network], *wide).costs()
    got = [costs[name_of(network, place)] for place in range(4)]
    assert got == pytest.approx([0.75, 0.5, 0.25, 0.0], abs=0.01)


def test_a_convolution_is_counted():
    def network(kernel, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = tap("before", x * 2.0)
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    args = jnp.ones((3, 3, 8, 16)), jnp.ones((2, 8, 8, 8))
    share = Program.trace(network, *args).costs()["before"]
    flops = 2 * (2 * 8 * 8 * 16) * 3 * 3 * 8
    assert share == pytest.approx(flops / (flops + 2 * 2 * 8 * 8 * 8), rel=1e-3)


# ---------------------------------------------------------------- remat


POLICIES = {
    "only the user's": jax.checkpoint_policies.save_only_these_names("mine"),
    "any but the user's": jax.checkpoint_policies.save_anything_except_these_names("mine"),
    "any of these": jax.checkpoint_policies.save_any_names_but_these("mine"),
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_names_of_sites_do_not_reach_a_policy_of_rematerialization(policy):
    unnamed = jax.checkpoint(
        lambda w, x: jnp.sin(checkpoint_name(jnp.sin(jnp.sin(x @ w) @ w), "mine") @ w),
        policy=POLICIES[policy],
    )
    named = jax.checkpoint(
        lambda w, x: tap(
            "second",
            jnp.sin(checkpoint_name(jnp.sin(tap("first", jnp.sin(x @ w)) @ w), "mine") @ w),
        ),
        policy=POLICIES[policy],
    )

    def walk(w, x):
        return Program.trace(named, w, x).walk((w, x), [], keep)

    assert residuals(lambda w: walk(w, X).sum(), W) == residuals(lambda w: unnamed(w, X).sum(), W)
    assert MARK not in str(jax.make_jaxpr(walk)(W, X))


def test_both_parts_of_a_region_stay_rematerialized():
    def walk(stack):
        return Program.trace(NETWORKS["remat"], stack, X).walk((stack, X), ["layer1"], keep)

    text = str(jax.make_jaxpr(walk)(STACK))
    assert text.count("remat") + text.count("checkpoint") == 2
