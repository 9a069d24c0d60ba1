"""Taps into Flax models that know nothing of them: sites, capture, replacement, statistics."""

import functools
import re

import chex
from flax import linen as nn
from flax.core import DenyList, freeze
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import networks
from networks import scale, shift
import numpy as np
from probes import quick_jit, watch
import pytest

import lpa_jax
from lpa_jax.core import class_stats

BATCH, POSITIONS, FEATURES = 8, 3, 5
INPUTS = jax.random.normal(jax.random.key(1), (BATCH, POSITIONS, FEATURES))
# Classes of unequal size, and class 3 absent.
LABELS = np.array([0, 1, 2, 0, 1, 1, 0, 0])
MEMBERS = [np.flatnonzero(c == LABELS) for c in range(networks.NUM_CLASSES)]
KEY = jax.random.key(2)
EPSILON, STEPS = 0.3, 3

# What is known of the classes: below a threshold of 0.5, above it, never seen, below it.
CONFIDENCE, SEEN = [0.2, 0.9, 0.0, 0.2], [1.0, 1.0, 0.0, 1.0]
SPLITS = {
    "all positive": (lpa_jax.splits.all_positive(), (1.0, 1.0, 1.0, 1.0)),
    "threshold": (lpa_jax.splits.threshold(0.5), (1.0, -1.0, 0.0, 1.0)),
}

fill = functools.partial(networks.fill, inputs=INPUTS)


def run_step(model, perturbation, variables, inputs=INPUTS, keep=lambda result: result, **kwargs):
    """Return what is to be kept of the result of one step, the classes being known as above."""
    apply_fn = getattr(model, "apply", model)
    step = lpa_jax.value_and_grad(apply_fn, perturbation, num_classes=networks.NUM_CLASSES)
    labels = jnp.asarray(LABELS)
    state = step.init(variables, inputs, labels, **kwargs)
    confidence, weight = jnp.array(CONFIDENCE), jnp.array(SEEN)
    seen = class_stats.Means(confidence, confidence, weight, jnp.sum(weight > 0, dtype=jnp.int32))
    state = state._replace(class_stats=state.class_stats._replace(ema=seen))
    # What is not kept is not compiled.
    run = quick_jit(lambda *arguments: keep(step(*arguments, **kwargs)))
    return run(variables, state, inputs, labels, KEY)


def run_forward(model, perturbation, variables, inputs=INPUTS, **kwargs):
    """Return logits, mutated variables and the states of the perturbations."""

    def keep(result):
        (_, aux), _, state = result
        return aux["logits"], aux["updates"], state.perturbations

    return run_step(model, perturbation, variables, inputs, keep, **kwargs)


def sites_of(model, variables, inputs=INPUTS, **kwargs):
    """Return names and shapes of the sites inside the network, without the batch dimension."""
    found = lpa_jax.list_sites(model.apply, variables, inputs, **kwargs)
    fixed = ("inputs", "labels", "logits", "logit_grads")
    assert tuple(found)[:2] + tuple(found)[-2:] == fixed
    assert all(value.shape[0] == BATCH for value in found.values())
    return {name: value.shape[1:] for name, value in found.items() if name not in fixed}


# --- Written by hand: the network as functions of one value, and the paper's steps class by class.


def dense(params, value):
    return value @ params["kernel"] + params["bias"]


def block(params):
    return lambda value: jnp.tanh(dense(params["dense"], value))


def stem(params):
    return lambda value: jnp.tanh(dense(params["stem"], value))


def head(params):
    return lambda value: dense(params["fc"], value.mean(1))


def stack_parts(params):
    return [stem(params), block(params["block0"]), block(params["block1"]), head(params)]


def reversed_parts(params):
    return [stem(params), block(params["block1"]), block(params["block0"]), head(params)]


def shared_parts(params):
    return [stem(params), block(params["shared"]), block(params["shared"]), head(params)]


def encoder_parts(params):
    """Take the layer of the transformer as a model of its own."""
    embed = params["embed"]["embedding"]
    layer = functools.partial(networks.EncoderLayer().apply, {"params": params["layer0"]})
    norm = params["norm"]

    def classify(value):
        value = (value - value.mean(-1, keepdims=True)) / jnp.sqrt(value.var(-1)[..., None] + 1e-6)
        return head(params)(value * norm["scale"] + norm["bias"])

    return [lambda tokens: embed[tokens], layer, classify]


def cross_entropy(logits):
    return -jax.nn.log_softmax(logits)[jnp.arange(BATCH), LABELS]


def delta_by_hand(tail, value, signs, sharing):
    """Return what LPA adds to each example."""
    positions = tuple(range(value.ndim - 2)) if sharing == "channel" else ()
    deltas = [jnp.zeros(value.shape[1:]).sum(positions, keepdims=True) for _ in MEMBERS]

    def of_examples():
        return jnp.stack([jnp.broadcast_to(d, value.shape[1:]) for d in deltas])[LABELS]

    for _ in range(STEPS):
        gradient = jax.grad(lambda v: cross_entropy(tail(v)).sum())(value + of_examples())
        for c, members in enumerate(MEMBERS):
            if len(members):
                ascent = gradient[members].mean(0).sum(positions, keepdims=True)
                ascent = ascent / jnp.sqrt((ascent**2).sum())
                d = deltas[c] + signs[c] * 2 * EPSILON / STEPS * ascent
                norm = jnp.sqrt((d**2).sum())
                deltas[c] = jnp.where(norm > EPSILON, d * EPSILON / norm, d)
    return of_examples()


@functools.partial(quick_jit, static_argnames=("parts", "perturbed", "sharing"))
def lpa_by_hand(params, signs, inputs, *, parts, perturbed, sharing):
    """Return loss and gradients with LPA after each of the parts that are numbered."""

    def compose(functions, value):
        return functools.reduce(lambda value, function: function(value), functions, value)

    def loss(params):
        value = inputs
        frozen = parts(jax.lax.stop_gradient(params))
        for i, part in enumerate(parts(params)):
            value = part(value)
            if i in perturbed:
                tail = functools.partial(compose, frozen[i + 1 :])
                delta = delta_by_hand(tail, jax.lax.stop_gradient(value), signs, sharing)
                value = value + jax.lax.stop_gradient(delta)
        return cross_entropy(value).mean()

    return jax.value_and_grad(loss)(params)


def assert_lpa_is_as_by_hand(
    model,
    site,
    parts,
    perturbed,
    *,
    split="threshold",
    sharing="channel",
    params=None,
    inputs=INPUTS,
    also=(),
    **kwargs,
):
    """Compare loss and gradients; return the perturbed values at `also`, updates and metrics.

    The `params` are those of the `parts`, if the model's are not the same.
    """
    as_model = functools.partial(networks.as_stack, kind=getattr(model, "kind", "plain"))
    variables = fill(model, inputs=inputs) if params is None else {"params": as_model(params)}
    params = variables["params"] if params is None else params
    split, signs = SPLITS[split]
    perturbation = lpa_jax.lpa(
        site, EPSILON, steps=STEPS, split=split, sharing=sharing, radius="absolute"
    )
    perturbation = lpa_jax.chain(perturbation, *map(watch, also))
    (loss, aux), grads, state = run_step(model, perturbation, variables, inputs, **kwargs)

    by_hand = functools.partial(lpa_by_hand, parts=parts, perturbed=perturbed, sharing=sharing)
    expected_loss, expected = by_hand(params, signs, inputs)
    chex.assert_trees_all_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    if jax.tree.structure(expected) != jax.tree.structure(grads):
        expected = as_model(expected)
    chex.assert_trees_all_close(grads, expected, atol=1e-5, rtol=1e-5)
    # The network's own output is what comes of the perturbed values.
    chex.assert_trees_all_close(cross_entropy(aux["logits"]).mean(), expected_loss, atol=1e-5)
    return state.perturbations[1:], aux["updates"], aux["metrics"]


# --- LPA, against the same written by hand

STACK_PARAMS = fill(networks.Stack("plain"))["params"]


@pytest.mark.parametrize("kind", networks.KINDS)
@pytest.mark.parametrize(("sharing", "split"), [("channel", "threshold"), ("full", "all positive")])
def test_lpa_at_a_block_equals_lpa_by_hand(kind, sharing, split):
    model = networks.Stack(kind)
    site = "block0" if kind in networks.BLOCKS else "layers[0]"
    _, _, metrics = assert_lpa_is_as_by_hand(
        model, site, stack_parts, (1,), split=split, sharing=sharing, params=STACK_PARAMS
    )
    copies = POSITIONS**0.5 if sharing == "channel" else 1.0
    moved = [EPSILON * copies, EPSILON * copies, 0.0 if split == "threshold" else EPSILON, 0.0]
    np.testing.assert_allclose(metrics[site]["norm"], moved, rtol=1e-4)


@pytest.mark.parametrize(("sharing", "split"), [("channel", "all positive"), ("full", "threshold")])
def test_sharing_and_split_are_free_of_each_other(sharing, split):
    model, options = networks.Stack(), {"split": split, "sharing": sharing}
    assert_lpa_is_as_by_hand(model, "block1", stack_parts, (2,), params=STACK_PARAMS, **options)


@pytest.mark.parametrize("kind", networks.LAYERS)
@pytest.mark.parametrize(("site", "perturbed"), [("layers", (1, 2)), ("layers[1]", (2,))])
def test_a_scanned_stack_is_perturbed_at_all_its_layers_or_at_one(kind, site, perturbed):
    model = networks.Stack(kind)
    _, _, metrics = assert_lpa_is_as_by_hand(
        model, site, stack_parts, perturbed, params=STACK_PARAMS
    )
    assert list(metrics) == [f"layers[{i - 1}]" for i in perturbed]


def test_a_scan_that_runs_backwards_is_perturbed_in_that_order():
    model = networks.Stack("scan", reverse=True)
    names = [n for n in sites_of(model, fill(model)) if n.startswith("layers[")]
    assert names == ["layers[1]", "layers[0]"]
    assert_lpa_is_as_by_hand(model, "layers", reversed_parts, (1, 2), params=STACK_PARAMS)


@pytest.mark.parametrize("kind", ["plain", "remat of jit"])
def test_a_shared_module_is_perturbed_at_each_call(kind):
    model = networks.Shared(kind)
    _, _, metrics = assert_lpa_is_as_by_hand(model, "shared", shared_parts, (1, 2))
    assert list(metrics) == ["shared[0]", "shared[1]"]


@pytest.mark.parametrize("call", [0, 1])
def test_a_shared_module_can_be_perturbed_at_one_call(call):
    model = networks.Shared("jit")
    _, _, metrics = assert_lpa_is_as_by_hand(model, f"shared[{call}]", shared_parts, (1 + call,))
    assert list(metrics) == [f"shared[{call}]"]


def test_lpa_perturbs_a_transformer_of_tokens():
    tokens = jnp.arange(BATCH * 5).reshape(BATCH, 5) % 11
    model = networks.Transformer(num_layers=1)
    assert_lpa_is_as_by_hand(model, "embed", encoder_parts, (0,), inputs=tokens)


# --- Sites


@pytest.mark.parametrize("kind", networks.BLOCKS)
def test_sites_have_the_paths_of_the_modules_whatever_transforms_them(kind):
    model = networks.Stack(kind)
    assert list(sites_of(model, fill(model)).items()) == [
        ("stem", (3, 6)),
        ("block0/dense", (3, 6)),
        ("block0", (3, 6)),
        ("block1/dense", (3, 6)),
        ("block1", (3, 6)),
        ("fc", (4,)),
    ]


LAYER_SITES = ["layers/dense", "layers/dense[0]", "layers", "layers[0]"]
LAYER_SITES += ["layers/dense[1]", "layers[1]"]
GROUP_SITES = ["block0/dense", "block0", "block1/dense", "block1"]
HEADS = ["query", "key", "value"]
LAYER0_SITES = [f"layer0/attention/{name}" for name in [*HEADS, "out"]]
LAYER0_SITES = ["layer0/norm1", *LAYER0_SITES, "layer0/attention", "layer0/norm2"]
LAYER0_SITES += ["layer0/up", "layer0/down", "layer0"]
SITES = {
    networks.Stack("scan"): ["stem", *LAYER_SITES, "fc"],
    networks.Stack("scan of remat"): ["stem", *LAYER_SITES, "fc"],
    networks.Shared(): [
        *("stem", "shared/dense", "shared/dense[0]", "shared", "shared[0]"),
        *("shared/dense[1]", "shared[1]", "fc"),
    ],
    networks.Inherited(): ["doubled/dense", "doubled", "fc"],
    # Only calls make a site: "fc" is one, though its method "pool" runs before it.
    networks.Setup(): [
        *("blocks_0/dense", "blocks_0", "blocks_1/dense", "blocks_1"),
        *("fc/gate", "fc/dense", "fc"),
    ],
    networks.BatchNorms(): ["ahead", "block/dense", "block/norm", "block", "after", "fc"],
    networks.Dropouts(): ["ahead", "block/dense", "block", "after", "fc"],
    # A child comes ahead of the parent that returns its output; modules that hand on the same value
    # come in the order of their calls, here "wrapper" first.
    networks.Identities(): ["wrapper/child", "wrapper", "alone", "fc"],
    # Modules "inputs" and "logits" give way to the sites of those names.
    networks.Reserved(): ["out", "perturbation"],
    networks.Recurrent(): [
        *(
            site
            for step in range(3)
            for name in ("cell/i", "cell/h", "cell:0", "cell:1")
            for site in ((name, f"{name}[0]") if step == 0 else (f"{name}[{step}]",))
        ),
        "rnn",
        "fc",
    ],
    networks.Nested(): [
        *(f"group1/{name}" for name in GROUP_SITES),
        "group1",
        *(f"group2/{name}" for name in GROUP_SITES),
        "group2",
        "fc",
    ],
    networks.Transformer(num_layers=1): ["embed", *LAYER0_SITES, "norm", "fc"],
}


@pytest.mark.parametrize("model", SITES, ids=lambda model: type(model).__name__)
def test_sites_are_named_in_the_order_of_computation(model):
    assert list(sites_of(model, fill(model))) == SITES[model]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("blok0", "block0"),
        ("block0/dens", "block0/dense"),
        ("block0[1]", "block0"),
        ("logit", "logits"),
    ],
)
def test_an_unknown_site_is_an_error_that_names_the_near_ones(wrong, near):
    model = networks.Stack()
    variables, perturbation = fill(model), lpa_jax.gaussian_noise(wrong, 0.1)
    step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=networks.NUM_CLASSES)
    with pytest.raises(lpa_jax.SiteError, match=rf"no site '{re.escape(wrong)}'.*\b{near}\b"):
        step.init(variables, INPUTS, jnp.asarray(LABELS))


def test_an_unknown_site_is_an_error_also_at_the_step_itself():
    """The arguments of the network may have changed since `init`."""
    model = networks.Stack()
    good, bad = (
        lpa_jax.value_and_grad(
            model.apply, lpa_jax.gaussian_noise(site, 0.1), num_classes=networks.NUM_CLASSES
        )
        for site in ("block0", "block2")
    )
    variables = fill(model)
    state = good.init(variables, INPUTS, jnp.asarray(LABELS))
    with pytest.raises(lpa_jax.SiteError, match="block0"):
        bad(variables, state, INPUTS, jnp.asarray(LABELS), KEY)


def test_layers_of_a_scan_are_sites_whatever_collections_it_carries():
    model = networks.Stack("scan", scanned=("params",))
    carried = networks.Stack("scan")
    assert sites_of(model, fill(model)) == sites_of(carried, fill(carried))


# --- Values captured and replaced


@pytest.mark.parametrize(
    "model",
    [
        networks.Stack("remat of jit"),
        networks.Shared("jit"),
        networks.Inherited(),
        networks.Setup(),
        networks.Identities(),
        networks.Transformer(num_layers=1),
        networks.Recurrent(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_the_values_captured_are_those_flax_captures(model):
    variables = fill(model)
    several = {name.split("[")[0] for name in sites_of(model, variables) if "[" in name}
    names = [name for name in sites_of(model, variables) if name not in several]
    result = run_forward(model, lpa_jax.chain(*map(watch, names)), variables)

    capture = functools.partial(model.apply, capture_intermediates=True)
    logits, collections = quick_jit(capture)(variables, INPUTS)
    expected = {}
    for path, calls in flatten_dict(collections["intermediates"]).items():
        site = "/".join(path[:-1])
        # The value of a `super().__call__` comes ahead of the one the module returns.
        calls = calls if site in several else calls[-1:]
        for i, value in enumerate(calls):
            expected[f"{site}[{i}]" if site in several else site] = value
    captured = dict(zip(names, result[2], strict=True))
    # Within a scan Flax captures nothing.
    known = [name for name in names if name in expected]
    assert len(known) > 1
    captured = {name: captured[name] for name in known}
    chex.assert_trees_all_close(captured, {name: expected[name] for name in known}, atol=1e-5)
    chex.assert_trees_all_close(result[0], logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["jit", "scan of remat"])
def test_the_values_captured_are_those_of_the_very_block(kind):
    """Blocks under `nn.jit` share a trace, and those under `nn.scan` a path."""
    model, scanned = networks.Stack(kind), kind in networks.LAYERS
    names = ["layers[0]", "layers[1]"] if scanned else ["block0", "block1"]
    variables = {"params": networks.as_stack(STACK_PARAMS, kind)}
    _, _, values = run_forward(model, lpa_jax.chain(*map(watch, names)), variables)
    first, *blocks, _ = stack_parts(STACK_PARAMS)
    expected = [blocks[0](first(INPUTS)), blocks[1](blocks[0](first(INPUTS)))]
    chex.assert_trees_all_close(list(values), expected, atol=1e-5)


def logits_of(model, perturbation, variables=None, **kwargs):
    variables = fill(model) if variables is None else variables
    logits, _, _ = run_forward(model, perturbation, variables, **kwargs)
    return logits, variables["params"]


def test_a_module_that_calls_its_parent_class_is_one_site():
    logits, params = logits_of(networks.Inherited(), shift("doubled"))
    value = 2.0 * block(params["doubled"])(INPUTS) + 1.0
    chex.assert_trees_all_close(logits, head(params)(value), atol=1e-5)


def test_modules_made_in_setup_are_perturbed_when_helpers_call_them():
    logits, params = logits_of(networks.Setup(), lpa_jax.chain(shift("blocks_0"), shift("fc", 2.0)))
    value = block(params["blocks_1"])(block(params["blocks_0"])(INPUTS) + 1.0)
    value = jnp.tanh(dense(params["fc"]["gate"], value)).mean(1)
    chex.assert_trees_all_close(logits, dense(params["fc"]["dense"], value) + 2.0, atol=1e-5)


def test_modules_that_return_the_same_value_are_perturbed_in_the_order_of_their_calls():
    perturbation = lpa_jax.chain(
        *(scale("alone"), shift("alone", -2.0)),
        *(scale("wrapper", 0.5), shift("wrapper")),
        shift("wrapper/child"),
    )
    logits, params = logits_of(networks.Identities(), perturbation)
    value = dense(params["wrapper"]["child"], INPUTS) + 1.0
    value = 2.0 * (0.5 * value + 1.0) - 2.0
    chex.assert_trees_all_close(logits, head(params)(jnp.tanh(value)), atol=1e-5)


def test_modules_named_like_sites_leave_those_sites_as_they_are():
    perturbation = lpa_jax.chain(shift("out"), shift("perturbation"), watch("logits"))
    logits, params = logits_of(networks.Reserved(), perturbation)
    value = jnp.tanh(dense(params["inputs"], INPUTS))
    value = jnp.tanh(dense(params["out"], value) + 1.0)
    value = jnp.tanh(dense(params["perturbation"], value) + 1.0)
    expected = 3.0 * dense(params["logits"], value.mean(1))
    chex.assert_trees_all_close(logits, expected, atol=1e-5)


def test_a_scan_within_which_nothing_can_be_reached_can_be_perturbed_as_a_whole():
    model = networks.Recurrent()
    variables = fill(model)
    logits, params = logits_of(model, shift("rnn"), variables)
    clean, _ = logits_of(model, lpa_jax.chain(), variables)
    expected = clean + params["fc"]["kernel"].sum(0)
    chex.assert_trees_all_close(logits, expected, atol=1e-5)


def test_a_module_called_twice_inside_a_scanned_layer_is_never_perturbed_at_the_wrong_call():
    """Its four values have two names, if any; taking one for another would go unnoticed."""
    model = networks.Repeated()
    variables = fill(model)
    if "layers/inner" in sites_of(model, variables):
        logits, params = logits_of(model, shift("layers/inner"), variables)
        value = INPUTS
        for layer in range(2):
            inner = jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"]["inner"])
            for _ in range(2):
                value = jnp.tanh(dense(inner, value) + 1.0)
        chex.assert_trees_all_close(logits, head(params)(value), atol=1e-5)
    # The layers themselves are sites in either case.
    assert "layers[1]" in sites_of(model, variables)


def test_a_plain_apply_before_and_after_is_not_affected():
    """What Flax keeps of a trace under `nn.jit` must serve neither for the other."""
    model = networks.Stack("jit")
    variables = fill(model)
    before = model.apply(variables, INPUTS)
    logits, _ = logits_of(model, shift("block0"), variables)
    after, updates = model.apply(variables, INPUTS, mutable=["intermediates"])
    np.testing.assert_array_equal(before, after)
    assert not updates
    assert np.abs(logits - after).max() > 1e-2


def test_a_wrapped_apply_can_pick_the_logits_of_a_network_with_two_outputs():
    def apply(*args, **kwargs):
        logits, _ = networks.Pair().apply(*args, **kwargs)
        return logits

    variables = fill(networks.Pair())
    logits, params = logits_of(apply, shift("block"), variables)
    expected = head(params)(block(params["block"])(INPUTS) + 1.0)
    chex.assert_trees_all_close(logits, expected, atol=1e-5)


def test_frozen_variables_give_frozen_gradients():
    model = networks.Setup()
    variables = fill(model)
    _, grads, _ = run_step(model, shift("blocks_0"), variables)
    _, frozen, _ = run_step(model, shift("blocks_0"), freeze(variables))
    assert jax.tree.structure(frozen) == jax.tree.structure(freeze(grads))
    chex.assert_trees_all_equal(frozen, freeze(grads))


# --- Batch statistics


def norm(params, value):
    centered = value - value.mean((0, 1))
    return centered / jnp.sqrt(value.var((0, 1)) + 1e-5) * params["scale"] + params["bias"]


def averages(before, value):
    """Update running averages as Flax does by default, once."""
    moments = {"mean": value.mean((0, 1)), "var": value.var((0, 1))}
    return {name: 0.99 * before[name] + 0.01 * moment for name, moment in moments.items()}


def norm_parts(params):
    return [
        lambda value: norm(params["ahead"], value),
        lambda value: norm(params["block"]["norm"], dense(params["block"]["dense"], value)),
        lambda value: head(params)(jnp.tanh(norm(params["after"], value))),
    ]


def expected_averages(variables, ahead=0.0, block=None):
    """Return the averages when the output of "ahead" is shifted and that of "block" given."""
    params, before = variables["params"], variables["batch_stats"]
    value = norm(params["ahead"], INPUTS) + ahead
    inner = dense(params["block"]["dense"], value)
    block = norm(params["block"]["norm"], inner) if block is None else block
    return {
        "ahead": averages(before["ahead"], INPUTS),
        "block": {"norm": averages(before["block"]["norm"], inner)},
        "after": averages(before["after"], block),
    }


@pytest.mark.parametrize("kind", networks.NORM_BLOCKS)
def test_batch_statistics_are_clean_ahead_of_the_site_and_perturbed_after_it(kind):
    model = networks.BatchNorms(kind)
    kwargs = {"train": True, "mutable": ["batch_stats"]}
    (value,), updates, _ = assert_lpa_is_as_by_hand(
        model, "block", norm_parts, (1,), sharing="full", also=["block"], **kwargs
    )
    # Each is updated once, from what the network of the training loss computes: the passes in which
    # LPA looks for its perturbation leave no trace.
    variables = fill(model)
    expected = expected_averages(variables, block=value)
    chex.assert_trees_all_close(updates, {"batch_stats": expected}, atol=1e-6, rtol=1e-5)
    clean = expected_averages(variables)
    assert np.abs(expected["after"]["mean"] - clean["after"]["mean"]).max() > 1e-5


def test_with_a_bound_of_zero_the_batch_statistics_are_those_of_a_plain_pass():
    model = networks.BatchNorms()
    variables, kwargs = fill(model), {"train": True, "mutable": ["batch_stats"]}
    perturbation = lpa_jax.lpa("block", 0.0, split=lpa_jax.splits.all_positive())
    logits, updates, _ = run_forward(model, perturbation, variables, **kwargs)
    expected = quick_jit(functools.partial(model.apply, **kwargs))(variables, INPUTS)
    chex.assert_trees_all_close((logits, updates), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "mutable",
    [["batch_stats"], ("batch_stats",), "batch_stats", True, DenyList("params")],
    ids=repr,
)
def test_statistics_come_back_however_the_collections_are_named(mutable):
    """Two sites, so that every module's statistics come from a pass of their own."""
    model = networks.BatchNorms()
    variables = fill(model)
    perturbation = lpa_jax.chain(shift("block", 2.0), shift("ahead"))
    _, updates, _ = run_forward(model, perturbation, variables, train=True, mutable=mutable)
    assert "params" not in updates
    value = norm(variables["params"]["ahead"], INPUTS) + 1.0
    value = norm_parts(variables["params"])[1](value) + 2.0
    expected = expected_averages(variables, ahead=1.0, block=value)
    chex.assert_trees_all_close(updates, {"batch_stats": expected}, rtol=1e-5, atol=1e-6)


def test_without_mutable_nothing_comes_back():
    model = networks.BatchNorms()
    _, updates, _ = run_forward(model, shift("block"), fill(model))
    assert updates == {}


def test_layers_of_a_scan_have_each_its_own_batch_statistics():
    model = networks.ScannedNorms()
    variables, kwargs = fill(model), {"train": True, "mutable": ["batch_stats"]}
    logits, updates, _ = run_forward(model, shift("layers[0]"), variables, **kwargs)
    value, expected = INPUTS, []
    for i in range(2):
        params, before = jax.tree.map(
            lambda leaf, i=i: leaf[i],
            (variables["params"]["layers"], variables["batch_stats"]["layers"]["norm"]),
        )
        inner = dense(params["dense"], value)
        expected.append({"norm": averages(before, inner)})
        value = norm(params["norm"], inner) + (1.0 if i == 0 else 0.0)
    expected = {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)}
    chex.assert_trees_all_close(updates, {"batch_stats": expected}, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(logits, head(variables["params"])(value), atol=1e-5)


# --- Dropout

DROPOUT = {"train": True, "rngs": {"dropout": jax.random.key(7)}}


def test_dropout_draws_the_same_masks_in_every_pass():
    model = networks.Dropouts()
    variables = fill(model)
    capture = functools.partial(model.apply, capture_intermediates=True, **DROPOUT)
    _, kept = quick_jit(capture)(variables, INPUTS)
    kept = kept["intermediates"]
    masks = {name: kept[name]["__call__"][0] != 0 for name in ("ahead", "after")}
    assert all(0.2 < mask.mean() < 0.8 for mask in masks.values())

    def parts(params):
        return [
            lambda value: jnp.where(masks["ahead"], 2.0 * value, 0.0),
            block(params["block"]),
            lambda value: head(params)(jnp.where(masks["after"], 2.0 * value, 0.0)),
        ]

    assert_lpa_is_as_by_hand(model, "block", parts, (1,), **DROPOUT)


def test_with_a_bound_of_zero_dropout_is_exactly_that_of_a_plain_pass():
    model = networks.Dropouts()
    variables = fill(model)
    perturbation = lpa_jax.lpa("block", 0.0, split=lpa_jax.splits.all_positive())
    logits, _, _ = run_forward(model, perturbation, variables, **DROPOUT)
    expected = quick_jit(functools.partial(model.apply, **DROPOUT))(variables, INPUTS)
    np.testing.assert_array_equal(logits, expected)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        shared = nn.Dense(4, name="shared")
        return shared(nn.tanh(shared(x))), None


class TwiceInEveryLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "perturbation": 0}
        layers = nn.scan(Twice, variable_axes=axes, split_rngs={"params": True}, length=3)
        return nn.Dense(3, name="head")(layers(name="layers")(x, None)[0])


def test_every_call_in_every_layer_has_a_name_of_its_own():
    model, inputs = TwiceInEveryLayer(), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), inputs)
    names = [n for n in lpa_jax.list_sites(model.apply, variables, inputs) if "shared" in n]
    assert names == ["layers/shared", *(f"layers/shared[{i}]" for i in range(6))]


@pytest.mark.slow
def test_sites_are_found_however_arrays_lie_on_an_explicit_mesh():
    model = nn.Sequential([nn.Dense(16), nn.Dense(3)])
    inputs = jnp.ones((8, 5))
    variables = model.init(jax.random.key(0), inputs)
    expected = lpa_jax.list_sites(model.apply, variables, inputs)
    mesh = jax.make_mesh((8,), ("data",))
    by_row, by_column = (
        jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), (None, "data"))
    )
    variables["params"]["layers_0"]["kernel"] = jax.device_put(
        variables["params"]["layers_0"]["kernel"], by_column
    )
    inputs, labels = jax.device_put((inputs, jnp.arange(8) % 3), by_row)
    assert lpa_jax.list_sites(model.apply, variables, inputs) == expected
    step = lpa_jax.value_and_grad(model.apply, lpa_jax.lpl(0.1), num_classes=3)
    state = step.init(variables, inputs, labels)
    (loss, _), grads, _ = step(variables, state, inputs, labels, jax.random.key(0))
    assert np.isfinite(loss)
    assert grads["layers_0"]["kernel"].sharding.spec == by_column.spec


class Tuples(nn.Module):
    """A module that returns several arrays, and one in a branch that may not be taken."""

    @nn.compact
    def __call__(self, x):
        x, total = TwoValues(name="block")(x)
        branch = nn.Dense(x.shape[-1], name="branch")
        if self.is_initializing():
            branch(x)
        x = nn.cond(total.sum() > 0, lambda _, x: branch(x), lambda _, x: x, self, x)
        return nn.Dense(networks.NUM_CLASSES, name="fc")(x.mean(1)) + total


class TwoValues(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        return x, x.sum((1, 2))[:, None]


def test_each_array_of_a_module_that_returns_several_is_a_site():
    model = Tuples()
    variables = fill(model)
    assert list(sites_of(model, variables)) == ["block/Dense_0", "block:0", "block:1", "fc"]
    plain = model.apply(variables, INPUTS)
    moved, _ = logits_of(model, shift("block:1"), variables)
    # Its sum goes to the logits, and, its sign being the same, to nothing else.
    np.testing.assert_allclose(moved, plain + 1.0, rtol=1e-5, atol=1e-5)


def test_a_value_that_cannot_be_a_site_is_named_with_the_reason():
    model = Tuples()
    step = lpa_jax.value_and_grad(
        model.apply, lpa_jax.gaussian_noise("branch", 0.1), num_classes=networks.NUM_CLASSES
    )
    with pytest.raises(lpa_jax.SiteError, match="'branch' is no site: it lies in a branch that"):
        step.init(fill(model), INPUTS, jnp.asarray(LABELS))
