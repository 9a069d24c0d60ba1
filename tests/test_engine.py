"""One step: loss and gradient, the order of sites, keys, state, its cost, and what it refuses."""

import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import networks
from networks import scale, shift
import numpy as np
import optax
from probes import absolute, quick_jit, watch
import pytest

import lpa_jax

BATCH, CLASSES = 8, networks.NUM_CLASSES
INPUTS = jax.random.normal(jax.random.key(1), (BATCH, 3, 5))
LABELS = jnp.array([0, 1, 2, 0, 1, 1, 0, 0])
KEY = jax.random.key(2)
MODEL = networks.Nested()
TRAIN = {"train": True, "mutable": ["batch_stats"]}

fill = functools.partial(networks.fill, inputs=INPUTS)
VARIABLES = fill(MODEL)


def make(perturbation, model=MODEL, **options):
    return lpa_jax.value_and_grad(model.apply, perturbation, num_classes=CLASSES, **options)


def run_step(
    perturbation, *, model=MODEL, variables=VARIABLES, labels=LABELS, weights=None, keep=None, **kw
):
    """Return the result of the first step, or what is to be kept of it: no more is compiled."""
    step = make(perturbation, model)
    state = step.init(variables, INPUTS, labels, **kw)

    @quick_jit
    def run(*arguments, weights):
        result = step(*arguments, weights=weights, **kw)
        return result if keep is None else keep(result)

    return run(variables, state, INPUTS, labels, KEY, weights=weights)


def forward(perturbation, **kwargs):
    """Return what is computed on the way to the loss, and the states of the perturbations."""

    def keep(result):
        (_, aux), _, state = result
        return aux, state.perturbations

    return run_step(perturbation, keep=keep, **kwargs)


def ask(site):
    """Leave the value as it is, and keep what the site's `gradient_fn` says of it."""

    def update(value, state, params=None, *, gradient_fn, **_):
        return value, gradient_fn(value)

    return lpa_jax.Perturbation(site, lambda value: (jnp.zeros(len(value)), value), update)


def dense(params, value):
    return value @ params["kernel"] + params["bias"]


def block(params, value):
    return jnp.tanh(dense(params["dense"], value))


def group(params, value):
    return block(params["block1"], block(params["block0"], value))


def head(params, value):
    return dense(params["fc"], value.mean(1))


def cross_entropy(logits, labels=LABELS):
    targets = jax.nn.one_hot(labels, CLASSES) if labels.ndim == 1 else labels
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=1)


# --- Loss and gradient


@pytest.mark.parametrize(("soft", "weighted"), [(False, False), (True, False), (False, True)])
def test_without_perturbations_it_is_the_gradient_of_the_mean_loss(soft, weighted):
    labels = jax.nn.softmax(2.0 * INPUTS[:, 0, :CLASSES]) if soft else LABELS
    weights = jnp.arange(BATCH) / 3.0 if weighted else None

    def plain(params):
        losses = cross_entropy(MODEL.apply({"params": params}, INPUTS), labels)
        return jnp.average(losses, weights=weights)

    expected = quick_jit(jax.value_and_grad(plain))(VARIABLES["params"])
    (loss, aux), grads, _ = run_step(lpa_jax.chain(), labels=labels, weights=weights)
    chex.assert_trees_all_close((loss, grads), expected, rtol=1e-5, atol=1e-6)
    assert aux["metrics"] == {}
    assert aux["updates"] == {}


def test_a_batch_of_padding_has_loss_and_gradient_zero():
    (loss, _), grads, state = run_step(lpa_jax.chain(), weights=jnp.zeros(BATCH))
    assert loss == 0
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
    assert state.class_stats.frequency.sum() == 0


def test_weights_count_by_their_shares_however_small():
    weights = jnp.arange(BATCH) / 3.0
    expected = run_step(lpa_jax.chain(), weights=weights)[:2]
    (loss, _), grads = run_step(lpa_jax.chain(), weights=1e-20 * weights)[:2]
    chex.assert_trees_all_close((loss, grads), (expected[0][0], expected[1]), rtol=1e-5)


def test_soft_labels_of_padding_may_be_anything():
    labels = jax.nn.softmax(2.0 * INPUTS[:, 0, :CLASSES])
    weights = jnp.ones(BATCH).at[2].set(0.0)
    lpa = lpa_jax.lpa("group2", 0.3, steps=1, split=lpa_jax.splits.all_positive())
    results = [
        run_step(lpa, labels=labels.at[2].set(content), weights=weights)
        for content in (0.25, jnp.nan)
    ]
    chex.assert_tree_all_finite(results)
    chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize(
    ("model", "site", "mode"),
    [(MODEL, "group1", {}), (MODEL, "logits", {}), (networks.BatchNorms(), "block", TRAIN)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_loss_that_is_not_finite_at_padding_is_ignored(model, site, mode):
    weights = jnp.ones(BATCH).at[2].set(0.0)
    labels = jax.nn.one_hot(LABELS, CLASSES)
    variables = fill(model)

    def of_shares(logits, targets):
        # The targets of padding are zeros: 0/0, in the loss and in its gradient.
        return optax.softmax_cross_entropy(logits, targets / targets.sum(axis=1, keepdims=True))

    perturbation = lpa_jax.chain(lpa_jax.adversarial(site, 0.1, steps=2), ask(site))
    results = []
    for loss_fn in (of_shares, optax.softmax_cross_entropy):
        step = make(perturbation, model, loss_fn=loss_fn)
        state = step.init(variables, INPUTS, labels, **mode)
        run = quick_jit(functools.partial(step, weights=weights, **mode))
        (loss, _), grads, state = run(variables, state, INPUTS, labels, KEY)
        results.append((loss, grads, state.perturbations[1]))
    chex.assert_tree_all_finite(results)
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_the_network_beyond_a_site_is_traced_once_for_all_gradient_steps():
    calls = []

    def counted(logits, targets):
        calls.append(None)
        return optax.softmax_cross_entropy(logits, targets)

    split = lpa_jax.splits.all_positive()
    step = make(lpa_jax.lpa("group1", 0.1, steps=3, split=split), loss_fn=counted)
    state = step.init(VARIABLES, INPUTS, LABELS)
    jax.eval_shape(step, VARIABLES, state, INPUTS, LABELS, KEY)
    # And once for the step's own loss.
    assert len(calls) == 2


def test_a_gradient_follows_the_targets_where_the_value_stays():
    def relabel(value, *, site, **_):
        return value if site == "inputs" else jnp.roll(value, 1, axis=0)

    def compare(value, *, gradient_fn, **_):
        return jnp.stack([gradient_fn(value)[0], gradient_fn(value + 0.0)[0]])

    asked = lpa_jax.Perturbation(
        "inputs",
        lambda value: jnp.zeros((2, len(value))),
        lambda value, state, params=None, **extra: (value, compare(value, **extra)),
        class_level=True,
    )
    chain = lpa_jax.chain(lpa_jax.stateless(("inputs", "labels"), relabel), asked)
    _, (_, (again, moved)) = forward(chain)
    chex.assert_trees_all_close(again, moved, rtol=1e-5)


def test_soft_labels_of_half_precision_become_targets_of_single():
    labels = jax.nn.one_hot(LABELS, CLASSES, dtype=jnp.float16)
    _, (targets,) = forward(lpa_jax.chain(watch("labels")), labels=labels)
    assert targets.dtype == jnp.float32


def test_another_loss_takes_the_place_of_cross_entropy_everywhere():
    def squares(logits, targets):
        return jnp.sum((logits - targets) ** 2, axis=1)

    step = make(lpa_jax.chain(ask("group2"), ask("logits")), loss_fn=squares)
    state = step.init(VARIABLES, INPUTS, LABELS)
    (loss, aux), grads, state = quick_jit(step)(VARIABLES, state, INPUTS, LABELS, KEY)
    targets = jax.nn.one_hot(LABELS, CLASSES)

    def plain(params):
        return squares(MODEL.apply({"params": params}, INPUTS), targets).mean()

    expected = quick_jit(jax.value_and_grad(plain))(VARIABLES["params"])
    chex.assert_trees_all_close((loss, grads), expected, rtol=1e-5, atol=1e-6)
    (losses_inside, _), (losses, gradient) = state.perturbations
    chex.assert_trees_all_close(losses_inside, losses, rtol=1e-5)
    chex.assert_trees_all_close(gradient, 2.0 * (aux["logits"] - targets), rtol=1e-5, atol=1e-5)


# --- Sites, one after the other

INNER = ["group1/block0", "group1", "group2/block1", "logits"]


def test_sites_are_perturbed_as_they_are_computed_whatever_the_order_of_the_chain():
    """Each of them scales, then shifts: only within a site does the chain's order count."""
    first = [f(site) for site in INNER for f in (scale, shift)]
    last = [f(site) for site in reversed(INNER) for f in (scale, shift)]
    (loss, aux), grads, _ = run_step(lpa_jax.chain(*first))
    (loss_last, aux_last), grads_last, _ = run_step(lpa_jax.chain(*last))
    assert loss == loss_last
    chex.assert_trees_all_equal(grads, grads_last)
    chex.assert_trees_all_equal(aux, aux_last)
    assert set(aux["metrics"]) == set(INNER)

    params = VARIABLES["params"]
    value = 2.0 * block(params["group1"]["block0"], INPUTS) + 1.0
    value = 2.0 * block(params["group1"]["block1"], value) + 1.0
    value = block(params["group2"]["block0"], value)
    value = 2.0 * block(params["group2"]["block1"], value) + 1.0
    chex.assert_trees_all_close(aux["logits"], head(params, value), atol=1e-5)
    # The logits are given as the network computed them; the loss is that of the perturbed ones.
    expected = cross_entropy(2.0 * head(params, value) + 1.0).mean()
    chex.assert_trees_all_close(loss, expected, rtol=1e-5)


def test_perturbations_of_one_site_act_in_the_order_of_the_chain():
    one, other = scale("group2"), shift("group2")
    (first, _), (second, _) = forward(lpa_jax.chain(one, other)), forward(lpa_jax.chain(other, one))
    params = VARIABLES["params"]
    value = group(params["group2"], group(params["group1"], INPUTS))
    chex.assert_trees_all_close(first["logits"], head(params, 2.0 * value + 1.0), atol=1e-5)
    chex.assert_trees_all_close(second["logits"], head(params, 2.0 * (value + 1.0)), atol=1e-5)


def test_chains_of_chains_are_flat():
    inner = lpa_jax.chain(scale("group2"), shift("group2"))
    assert lpa_jax.chain(inner, watch("logits"))[:2] == inner


def test_later_sites_see_the_changes_at_earlier_sites():
    sites = ["inputs", *INNER]
    perturbation = lpa_jax.chain(*map(watch, sites), *map(shift, sites))
    aux, states = forward(perturbation)
    params, value, expected = VARIABLES["params"], INPUTS, [INPUTS]
    for i in range(4):
        value = block(params[f"group{1 + i // 2}"][f"block{i % 2}"], value + (i != 3))
        expected += [value] if i != 2 else []
    expected.append(head(params, value + 1.0))
    chex.assert_trees_all_close(list(states[:5]), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(aux["logits"], expected[-1], rtol=1e-5, atol=1e-6)


def test_the_gradient_a_site_asks_for_is_that_of_the_losses_beyond_it():
    """Padding takes no part in it, and earlier sites are as they were perturbed."""
    model = networks.Skip()
    variables = fill(model)
    params = variables["params"]
    weights = jnp.array([1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0])
    sites = ["inputs", "trunk", "branch", "logits"]
    perturbation = lpa_jax.chain(*map(ask, sites), shift("trunk"), shift("inputs", 0.5))
    _, states = forward(perturbation, model=model, variables=variables, weights=weights)

    moved = INPUTS + 0.5
    trunk = block(params["trunk"], moved)
    branch = block(params["branch"], trunk + 1.0)

    def beyond_trunk(value):
        return beyond_branch(block(params["branch"], value), value)

    def beyond_branch(value, trunk=trunk + 1.0):
        return head(params, jnp.tanh(trunk + value))

    tails = [
        (lambda value: beyond_trunk(block(params["trunk"], value)), INPUTS),
        (beyond_trunk, trunk),
        (beyond_branch, branch),
        (lambda value: value, beyond_branch(branch)),
    ]
    for site, (tail, value), found in zip(sites, tails, states, strict=False):

        def total(value, tail=tail):
            losses = cross_entropy(tail(value)) * (weights > 0)
            return losses.sum(), losses

        gradient, losses = jax.grad(total, has_aux=True)(value)
        chex.assert_trees_all_close(
            found, (losses, gradient), rtol=1e-4, atol=1e-5, custom_message=site
        )


def test_the_gradient_of_a_site_is_a_constant_in_back_propagation():
    """Though it depends on the parameters, by way of the value, the earlier sites and the tail."""
    model = networks.Skip()
    variables = fill(model)

    def climb(site):
        return lpa_jax.stateless(
            site, lambda value, gradient_fn, **_: value + gradient_fn(value)[1]
        )

    def by_hand(params):
        def climbed(tail, value):
            gradient = jax.grad(lambda value: cross_entropy(tail(value)).sum())(value)
            return value + jax.lax.stop_gradient(gradient)

        def beyond_branch(value, trunk):
            return head(params, jnp.tanh(trunk + value))

        def beyond_trunk(value):
            return beyond_branch(block(params["branch"], value), value)

        trunk = climbed(beyond_trunk, block(params["trunk"], INPUTS))
        branch = block(params["branch"], trunk)
        branch = climbed(functools.partial(beyond_branch, trunk=trunk), branch)
        logits = climbed(lambda value: value, beyond_branch(branch, trunk))
        return cross_entropy(logits).mean()

    perturbation = lpa_jax.chain(climb("trunk"), climb("branch"), climb("logits"))
    (loss, _), grads, _ = run_step(perturbation, model=model, variables=variables)
    expected = quick_jit(jax.value_and_grad(by_hand))(variables["params"])
    chex.assert_trees_all_close((loss, grads), expected, rtol=1e-4, atol=1e-5)


def test_the_gradients_of_the_logits_and_the_parameters_are_sites():
    perturbation = lpa_jax.chain(
        lpa_jax.at("logit_grads", optax.clip(0.2)),
        watch("logit_grads"),
        lpa_jax.at("param_grads", optax.clip_by_global_norm(0.01)),
    )
    (loss, aux), grads, state = run_step(perturbation)

    def plain(params):
        logits = MODEL.apply({"params": params}, INPUTS)
        gradient = jax.nn.softmax(aux["logits"]) - jax.nn.one_hot(LABELS, CLASSES)
        # Of each example, not yet of the mean.
        return jnp.sum(logits * jnp.clip(gradient, -0.2, 0.2)) / BATCH

    expected = quick_jit(jax.grad(plain))(VARIABLES["params"])
    norm = optax.tree.norm(expected)
    assert norm > 0.01
    expected = jax.tree.map(lambda leaf: leaf * 0.01 / norm, expected)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(loss, cross_entropy(aux["logits"]).mean(), rtol=1e-5)
    assert jnp.abs(state.perturbations[1]).max() <= 0.2
    chex.assert_trees_all_close(aux["metrics"]["param_grads"], {"norm": 0.01}, rtol=1e-4)


# --- What else comes back


def test_metrics_report_how_far_each_class_was_moved_and_why():
    split = lpa_jax.splits.tail(1, class_counts=[9, 3, 3, 1])
    perturbation = lpa_jax.chain(absolute("group2", 0.3, sharing="full", split=split))
    aux, _ = forward(perturbation)
    metrics = aux["metrics"]["group2"]
    np.testing.assert_array_equal(metrics["sign"], [-1.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(metrics["radius"], [0.3] * 4)
    np.testing.assert_allclose(metrics["norm"], [0.3, 0.3, 0.3, 0.0], rtol=1e-5)
    np.testing.assert_array_equal(metrics["count"], [4.0, 3.0, 1.0, 0.0])
    value = group(VARIABLES["params"]["group2"], group(VARIABLES["params"]["group1"], INPUTS))
    sizes = jnp.sqrt((value**2).sum((1, 2)))
    expected = [np.mean(0.3 / sizes[c == LABELS]) for c in range(3)]
    np.testing.assert_allclose(metrics["relative"], [*expected, 0.0], rtol=1e-4)


def test_class_statistics_are_those_of_the_logits_that_come_back():
    read = lpa_jax.stateless("logits", lambda value, **_: value, class_level=True)
    perturbation = lpa_jax.chain(shift("group1"), scale("logits"), read)
    weights = jnp.array([1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 1.0])
    (_, aux), _, state = run_step(perturbation, weights=weights)
    members = jax.nn.one_hot(LABELS, CLASSES) * weights[:, None]
    stats = state.class_stats
    safe = jnp.maximum(members.sum(0), 1e-6)
    confidence = jnp.sum(members * jax.nn.softmax(aux["logits"]), axis=0) / safe
    accuracy = members.T @ (aux["logits"].argmax(1) == LABELS) / safe
    np.testing.assert_allclose(stats.running.confidence, confidence, rtol=1e-5)
    np.testing.assert_allclose(stats.running.accuracy, accuracy, rtol=1e-6)
    for weight in (stats.running.weight, stats.ema.weight, stats.frequency):
        np.testing.assert_allclose(weight, members.sum(0), rtol=1e-6)
    assert not stats.epoch.weight.any()


@pytest.mark.parametrize(
    ("chain", "reads"),
    [
        (lpa_jax.chain(), False),
        (lpa_jax.dropout("group1", 0.5), False),
        (lpa_jax.at("group1", optax.clip(0.1)), False),
        (lpa_jax.lpg(0.1), True),
        (lpa_jax.at("logits", lpa_jax.lpl(0.1)), True),
        (lpa_jax.at("logits", optax.chain(lpa_jax.lpl(0.1))), True),
    ],
    ids=["nothing", "dropout", "clip", "lpg", "at lpl", "chained lpl"],
)
def test_class_statistics_are_taken_only_where_something_may_read_them(chain, reads):
    stats = run_step(chain, keep=lambda result: result[2].class_stats)
    assert bool(stats.frequency.sum() > 0) == reads


def test_a_split_by_the_present_batch_sees_the_network_before_any_class_was_moved():
    """But after the sites ahead were perturbed; what outlasts the batch is taken from there too."""
    split = lpa_jax.splits.mean_threshold(window="batch")
    perturbation = lpa_jax.chain(
        scale("group1", -1.0),
        absolute("group2", 0.5, split=split),
        scale("group2", -1.0),
        lpa_jax.lpl(0.5, split=split, solver="projected"),
    )

    def keep(result):
        (_, aux), _, state = result
        return aux, state.class_stats.running.confidence

    aux, running = run_step(perturbation, keep=keep)
    params = VARIABLES["params"]
    unmoved = head(params, group(params["group2"], -group(params["group1"], INPUTS)))

    def confidence(logits):
        own = jax.nn.softmax(logits)[jnp.arange(BATCH), LABELS]
        return np.array([own[c == LABELS].sum() for c in range(CLASSES)])

    def signs(logits):
        means = confidence(logits)[:3] / np.array([4, 3, 1])
        return [*np.sign(means.mean() - means), 0.0]

    for site in ("group2", "logits"):
        np.testing.assert_array_equal(aux["metrics"][site]["sign"], signs(unmoved))
    np.testing.assert_allclose(running, confidence(unmoved) / np.array([4, 3, 1, 1]), rtol=1e-5)
    # The signs would else be the same whichever logits were taken.
    assert signs(unmoved) != signs(MODEL.apply(VARIABLES, INPUTS))
    assert signs(unmoved) != signs(aux["logits"])


def test_batch_statistics_come_back_with_sam_as_without():
    """SAM takes its gradient where LPA has looked again; the statistics are those of the first."""
    model = networks.BatchNorms()
    variables = fill(model)
    params = variables["params"]
    lpa = absolute("block", 0.3, steps=1, split=lpa_jax.splits.all_positive())
    step = make(lpa_jax.chain(lpa), model)
    state = step.init(variables, INPUTS, LABELS, **TRAIN)

    @quick_jit
    def run(params):
        return step({**variables, "params": params}, state, INPUTS, LABELS, KEY, **TRAIN)

    (loss, aux), grads, _ = run(params)
    norm = optax.tree.norm(grads)
    _, expected, _ = run(jax.tree.map(lambda w, g: w + 0.2 * g / norm, params, grads))

    (sam_loss, sam_aux), sam_grads, sam_state = run_step(
        lpa_jax.chain(lpa_jax.sam(0.2), lpa), model=model, variables=variables, **TRAIN
    )
    chex.assert_trees_all_close(sam_grads, expected, rtol=1e-4, atol=1e-6)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, expected, grads)) > 1e-2 * norm
    sam_aux["metrics"].pop("param_grads")
    chex.assert_trees_all_close((sam_loss, sam_aux), (loss, aux), rtol=1e-5, atol=1e-6)
    # What is known of the classes has seen the batch once.
    assert sam_state.class_stats.frequency.sum() == BATCH


# --- Keys, steps and state


def assert_independent_draws(one, other, stddev):
    """Not merely different: the draws of neither tell anything of the other's."""
    assert abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 0.35
    np.testing.assert_allclose([np.std(one), np.std(other)], stddev, rtol=0.35)


def test_one_key_gives_new_draws_at_each_step_and_the_same_draws_at_the_same_step():
    noise = lpa_jax.gaussian_noise("group1", 0.5)
    step = make(lpa_jax.chain(watch("group1"), noise, watch("group1")))
    first = step.init(VARIABLES, INPUTS, LABELS)
    run = quick_jit(lambda state, key: step(VARIABLES, state, INPUTS, LABELS, key))
    one = run(first, KEY)
    chex.assert_trees_all_equal(one, run(first, KEY))

    def drawn(result):
        before, _, after = result[2].perturbations
        return after - before

    # The step of the state counts, not how often the function was called.
    for other in (run(first, jax.random.key(3)), run(one[2], KEY)):
        assert_independent_draws(drawn(one), drawn(other), 0.5)


def test_each_perturbation_of_a_chain_draws_for_itself():
    noise, see = lpa_jax.gaussian_noise("group1", 0.5), watch("group1")
    _, (before, _, between, _, after) = forward(lpa_jax.chain(see, noise, see, noise, see))
    assert_independent_draws(between - before, after - between, 0.5)


@pytest.mark.parametrize(
    "site", ["inputs", "labels", "group1", "logits", "logit_grads", "param_grads"]
)
def test_the_first_state_has_the_shapes_of_the_value_at_its_site(site):
    step = make(lpa_jax.at(site, optax.trace(0.9)))
    state = step.init(VARIABLES, INPUTS, LABELS)
    _, _, new = jax.eval_shape(step, VARIABLES, state, INPUTS, LABELS, KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)


def test_numbers_that_are_schedules_are_taken_at_the_step():
    """Those of ours; an optax transform counts for itself, in its own state."""
    epsilon = {"epsilon": lambda step: 0.1 * (1 + step), "sharing": "full"}
    perturbation = lpa_jax.chain(
        absolute("group2", steps=1, split=lpa_jax.splits.all_positive(), **epsilon),
        lpa_jax.at("logit_grads", optax.scale_by_schedule(lambda count: 1.0 / (1 + count))),
        watch("logit_grads"),
    )
    step = make(perturbation)
    state = step.init(VARIABLES, INPUTS, LABELS)
    run = quick_jit(lambda state: step(VARIABLES, state, INPUTS, LABELS, KEY))
    for count in range(3):
        assert state.step == count
        (_, aux), _, state = run(state)
        np.testing.assert_allclose(aux["metrics"]["group2"]["norm"][0], 0.1 * (1 + count), 1e-5)
        gradient = jax.nn.softmax(aux["logits"]) - jax.nn.one_hot(LABELS, CLASSES)
        np.testing.assert_allclose(state.perturbations[2], gradient / (1 + count), 1e-4, 1e-6)


def test_a_donated_state_is_reused_without_tracing_again_and_epochs_end():
    """With perturbations at every kind of site, some that draw and some that keep a state."""
    model = networks.BatchNorms()
    variables = fill(model)
    split = lpa_jax.splits.mean_threshold(window="epoch")
    perturbation = lpa_jax.chain(
        lpa_jax.mixup(1.0),
        lpa_jax.label_smoothing(0.1),
        absolute(("block", "after"), 0.2, steps=1, split=split),
        lpa_jax.at("fc", optax.add_noise(0.01, 0.55, key=0)),
        lpa_jax.lpg(0.1),
        lpa_jax.at("param_grads", optax.trace(0.9)),
    )
    step = make(perturbation, model)
    state = step.init(variables, INPUTS, LABELS, **TRAIN)

    @functools.partial(quick_jit, donate_argnames=("variables", "state"))
    def run(variables, state, key):
        (loss, aux), grads, state = step(variables, state, INPUTS, LABELS, key, **TRAIN)
        params = jax.tree.map(lambda w, g: w - 0.01 * g, variables["params"], grads)
        return {"params": params, **aux["updates"]}, state, loss, aux["metrics"]

    given = jax.tree.leaves(variables["params"])
    variables, state, loss, metrics = run(variables, state, KEY)
    assert all(leaf.is_deleted() for leaf in given)
    with jax.no_tracing(True):
        variables, state, loss, metrics = run(variables, state, KEY)
    # No epoch has been finished, so that nothing is known of the classes.
    assert not metrics["block"]["sign"].any()
    running = jax.device_get(state.class_stats.running)
    state = step.end_epoch(state)
    chex.assert_trees_all_equal(jax.device_get(state.class_stats.epoch), running)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.class_stats.running))
    with jax.no_tracing(True):
        variables, state, loss, metrics = run(variables, state, KEY)
    assert metrics["block"]["sign"].any()
    chex.assert_trees_all_equal(jax.device_get(state.class_stats.epoch), running)
    assert jnp.isfinite(loss)


def test_eight_devices_agree_with_one():
    """Class means, batch statistics and the ball of each class are those of the whole batch."""
    model = networks.BatchNorms()
    variables = fill(model)
    split = lpa_jax.splits.mean_threshold(window="batch")
    step = make(absolute("block", 0.3, steps=1, split=split), model)
    state = step.init(variables, INPUTS, LABELS, **TRAIN)
    weights = jnp.ones(BATCH).at[3].set(0.0)
    run = quick_jit(functools.partial(step, **TRAIN))
    expected = run(variables, state, INPUTS, LABELS, KEY, weights=weights)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_example, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    *batch, weights = jax.device_put((INPUTS, LABELS, weights), by_example)
    *first, key = jax.device_put((variables, state, KEY), everywhere)
    result = run(*first, *batch, key, weights=weights)
    assert len(result[0][1]["logits"].sharding.device_set) == 8
    chex.assert_trees_all_close(
        jax.device_get(result), jax.device_get(expected), rtol=1e-4, atol=1e-6
    )


# --- What it costs


def flops(perturbation, model, **kwargs):
    """Return the floating point operations XLA counts in a step, of which nothing is computed."""
    step = make(perturbation, model)
    inputs = jax.ShapeDtypeStruct((64, model.width), jnp.float32)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)
    variables = jax.eval_shape(model.init, KEY, inputs)
    state = jax.eval_shape(functools.partial(step.init, **kwargs), variables, inputs, labels)
    run = quick_jit(functools.partial(step, **kwargs))
    return run.lower(variables, state, inputs, labels, KEY).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("norm", "site", "layers_after"),
    [(False, "block5", 0), (True, "block3", 2)],
    ids=["last block", "block between batch norms"],
)
def test_a_step_costs_the_passes_through_the_tail_and_nothing_twice(norm, site, layers_after):
    """With F for a forward pass, `1 + T * 2 F_tail / (3 F)`; a prefix kept twice adds a third."""
    model, kwargs = networks.Mlp(norm=norm), TRAIN if norm else {}
    plain = flops(lpa_jax.chain(), model, **kwargs)
    layer = 2.0 * 64 * model.width**2
    # The first layer has no gradient of its inputs to compute.
    assert plain == pytest.approx((3 * model.depth - 1) * layer, rel=0.02)
    lpa = lpa_jax.lpa(site, 0.1, steps=3, split=lpa_jax.splits.all_positive())
    expected = 1.0 + 3 * 2 * layers_after * layer / plain
    assert flops(lpa, model, **kwargs) / plain == pytest.approx(expected, rel=0.02)


# --- What it refuses


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.at[2].set(CLASSES), r"range from 0 to 4"),
        (np.asarray(LABELS.at[2].set(CLASSES)), r"range from 0 to 4"),
        (LABELS.at[1].set(-2), r"-1 for an example that does not count, but range from -2 to 2"),
        (LABELS[:-1], r"must have shape \(8,\), not \(7,\)"),
        (LABELS[:, None], r"must have shape \(8,\), not \(8, 1\)"),
        (jnp.ones((BATCH, CLASSES + 1)), r"floats \[8, 4\], not float32 \(8, 5\)"),
        (jnp.ones(BATCH), r"floats \[8, 4\], not float32 \(8,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    step = make(lpa_jax.chain())
    state = step.init(VARIABLES, INPUTS, LABELS)
    with pytest.raises(ValueError, match=message):
        step.init(VARIABLES, INPUTS, labels)
    with pytest.raises(ValueError, match=message):
        step(VARIABLES, state, INPUTS, labels, KEY)


@pytest.mark.parametrize("kind", [jnp.int8, jnp.uint8])
def test_labels_of_any_integer_kind_are_read(kind):
    labels = LABELS.astype(kind)
    expected = run_step(lpa_jax.chain(), keep=lambda result: result[0][0])
    got = run_step(lpa_jax.chain(), labels=labels, keep=lambda result: result[0][0])
    assert got == expected


def test_an_example_of_label_minus_one_does_not_count():
    """As with a weight of 0, whatever the input holds."""
    perturbation = lpa_jax.chain(absolute("group1", 0.5), lpa_jax.lpg(0.2))
    weights = jnp.ones(BATCH).at[jnp.array([1, 4])].set(0.0)
    step = make(perturbation)
    state = step.init(VARIABLES, INPUTS, LABELS)

    @quick_jit
    def run(inputs, labels, weights):
        (loss, aux), grads, state_after = step(
            VARIABLES, state, inputs, labels, KEY, weights=weights
        )
        return loss, aux["metrics"], grads, state_after

    expected = run(INPUTS, LABELS, weights)
    ignored = jnp.where(weights > 0, LABELS, -1)
    inputs = jnp.where(weights[:, None, None] > 0, INPUTS, jnp.nan)
    chex.assert_trees_all_close(run(inputs, ignored, jnp.ones(BATCH)), expected, rtol=1e-6)
    # The same where the labels are known, and no weights are given.
    (loss, _), grads, _ = step(VARIABLES, state, inputs, ignored, KEY)
    chex.assert_trees_all_close((loss, grads), (expected[0], expected[2]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("site", ["group1", "labels", "logits", "logit_grads"])
def test_a_perturbation_that_changes_the_shape_is_refused(site):
    step = make(lpa_jax.stateless(site, lambda value, **_: value[:, :1]))
    state = step.init(VARIABLES, INPUTS, LABELS)
    with pytest.raises(lpa_jax.SiteError, match=f"at '{site}' must return a value of the shape"):
        jax.eval_shape(step, VARIABLES, state, INPUTS, LABELS, KEY)


def test_a_perturbation_that_loses_gradients_is_refused():
    step = make(lpa_jax.stateless("param_grads", lambda value, **_: {"fc": value["fc"]}))
    state = step.init(VARIABLES, INPUTS, LABELS)
    with pytest.raises(lpa_jax.SiteError, match="at 'param_grads' must return a value of the"):
        jax.eval_shape(step, VARIABLES, state, INPUTS, LABELS, KEY)


def test_no_disturbance_hides_an_unknown_label():
    step = make(lpa_jax.disturb_label(1.0))
    state = step.init(VARIABLES, INPUTS, LABELS)
    (loss, _), _, _ = quick_jit(step)(VARIABLES, state, INPUTS, LABELS.at[3].set(9), KEY)
    assert np.isnan(loss)


@pytest.mark.parametrize("label", [CLASSES, -2])
def test_an_unknown_label_within_jit_makes_the_loss_nan(label):
    labels = LABELS.at[3].set(label)
    step = make(lpa_jax.chain())
    state = step.init(VARIABLES, INPUTS, LABELS)
    with pytest.raises(ValueError, match=r"\[0, 4\), or be -1"):
        step(VARIABLES, state, INPUTS, labels, KEY)
    (loss, _), _, _ = quick_jit(step)(VARIABLES, state, INPUTS, labels, KEY)
    assert np.isnan(loss)


def test_labels_may_be_a_constant_of_the_compiled_function():
    """They are an array there, but what is computed of it is not; and they are checked."""
    step = make(lpa_jax.chain())
    state = step.init(VARIABLES, INPUTS, LABELS)

    def loss(labels):
        return step(VARIABLES, state, INPUTS, labels, KEY)[0][0]

    assert jax.eval_shape(lambda: loss(LABELS)).shape == ()
    beyond = LABELS + 2
    with pytest.raises(ValueError, match="range from 2 to 4"):
        jax.eval_shape(lambda: loss(beyond))


@pytest.mark.usefixtures("unchecked")
def test_weights_that_do_not_fit_are_refused():
    step = make(lpa_jax.chain())
    state = step.init(VARIABLES, INPUTS, LABELS)
    for bad in (jnp.nan, -1.0, jnp.inf):
        weights = jnp.ones(BATCH).at[2].set(bad)
        with pytest.raises(ValueError, match="weights must be finite and at least 0"):
            step(VARIABLES, state, INPUTS, LABELS, KEY, weights=weights)
        (loss, _), _, _ = quick_jit(step)(VARIABLES, state, INPUTS, LABELS, KEY, weights=weights)
        assert np.isnan(loss)
    with pytest.raises(ValueError, match=r"shape \(8,\), not \(7,\)"):
        step(VARIABLES, state, INPUTS, LABELS, KEY, weights=jnp.ones(BATCH - 1))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("apply_fn", "num_classes", "message"),
    [
        (MODEL.apply, CLASSES + 1, r"num_classes is 5.*logits \[batch, num_classes\]"),
        (networks.Pair().apply, CLASSES, "no array of float logits, but tuple: say which part"),
        (networks.Block().apply, networks.WIDTH, r"returns \(8, 3, 6\)"),
    ],
    ids=["other number of classes", "two outputs", "not one row for each example"],
)
def test_a_network_that_does_not_return_logits_is_refused(apply_fn, num_classes, message):
    model = apply_fn.__self__
    step = lpa_jax.value_and_grad(apply_fn, lpa_jax.chain(), num_classes=num_classes)
    with pytest.raises(ValueError, match=message):
        step.init(fill(model), INPUTS, LABELS)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        lpa_jax.value_and_grad(MODEL.apply, lpa_jax.chain(), num_classes=1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "entry",
    [optax.clip(0.1), "group1", [lpa_jax.lpg(0.1)]],
    ids=["a transform", "a name", "a list"],
)
def test_an_entry_without_a_site_is_refused(entry):
    with pytest.raises(TypeError, match=r"has no site.*lpa_jax\.at"):
        lpa_jax.chain(lpa_jax.lpg(0.1), entry)
    with pytest.raises(TypeError, match=r"has no site.*lpa_jax\.at"):
        lpa_jax.value_and_grad(MODEL.apply, entry, num_classes=CLASSES)


@pytest.mark.usefixtures("unchecked")
def test_at_takes_optax_transforms_alone():
    with pytest.raises(TypeError, match="optax transform"):
        lpa_jax.at("group1", lambda value: value)


def test_a_perturbation_that_has_its_sites_is_placed_nowhere_else():
    mixup = lpa_jax.manifold_mixup("group1", 1.0)
    for site in ("group1", "group2", ("group1", "inputs", "labels")):
        with pytest.raises(lpa_jax.SiteError, match="has sites of its own"):
            lpa_jax.at(site, mixup)
    assert lpa_jax.at(["group1", "labels"], mixup) is mixup


@pytest.mark.parametrize("make_one", [lpa_jax.lpa, lpa_jax.adversarial])
@pytest.mark.parametrize("site", ["labels", "logit_grads", "param_grads"])
def test_ascent_is_refused_at_sites_without_a_loss(make_one, site):
    def run():
        step = make(make_one(site, 0.1))
        return step(VARIABLES, step.init(VARIABLES, INPUTS, LABELS), INPUTS, LABELS, KEY)

    with pytest.raises(
        lpa_jax.SiteError, match=rf"acts at 'inputs', a module or 'logits', not at '{site}'"
    ):
        jax.eval_shape(run)


def test_a_site_named_twice_or_no_site_is_refused():
    with pytest.raises(lpa_jax.SiteError, match="twice"):
        lpa_jax.lpa(("group1", "group2", "group1"), 0.1)
    with pytest.raises(lpa_jax.SiteError, match="at least one"):
        lpa_jax.lpa((), 0.1)


@pytest.mark.parametrize("layers", ["group1", ("inputs", "group1"), ("group1", "group2")])
def test_mixing_moves_the_membership_with_the_targets(layers):
    def see(value, state, params=None, *, labels, targets, **_):
        return value, (labels, targets)

    seen = lpa_jax.Perturbation("logits", lambda value: (value, value), see)
    chain = lpa_jax.chain(lpa_jax.manifold_mixup(layers, 1.0), seen)
    _, (_, (labels, targets)) = forward(chain)
    assert not set(np.unique(labels)) <= {0.0, 1.0}
    chex.assert_trees_all_equal(labels, targets)


@pytest.mark.parametrize("mixing", ["inputs", "group1"])
def test_the_labels_come_back_as_the_examples_were_mixed(mixing):
    mixup = lpa_jax.manifold_mixup((mixing,), alpha=4.0)
    aux, states = forward(lpa_jax.chain(mixup, watch("labels")))
    soft = states[-1]
    assert soft.max(axis=1).min() < 0.9
    chex.assert_trees_all_equal(aux["labels"], soft)


def test_the_labels_come_back_as_they_were_where_only_targets_are_smoothed():
    aux, _ = forward(lpa_jax.label_smoothing(0.2))
    chex.assert_trees_all_equal(aux["labels"], LABELS)
    weights = jnp.ones(BATCH).at[2].set(0.0)
    aux, _ = forward(lpa_jax.label_smoothing(0.2), labels=LABELS.at[5].set(-1), weights=weights)
    # Examples that do not count have no class.
    chex.assert_trees_all_equal(aux["labels"], LABELS.at[jnp.array([2, 5])].set(-1))


def test_mixing_where_a_module_is_called_several_times_is_refused():
    model = networks.Shared()
    step = make(lpa_jax.manifold_mixup("shared", 1.0), model)
    with pytest.raises(lpa_jax.SiteError, match=r"name one, such as 'shared\[0\]'"):
        step.init(fill(model), INPUTS, LABELS)
    make(lpa_jax.manifold_mixup("shared[1]", 1.0), model).init(fill(model), INPUTS, LABELS)


def gradient_asked(site):
    """Use the gradient and nothing else, as a transform of the user's own may."""

    def update(value, *, gradient_fn, **_):
        return value + gradient_fn(value)[1]

    return lpa_jax.stateless(site, update)


WORK = {
    "lpa": lambda site: lpa_jax.lpa(site, 0.1),
    "at lpa": lambda site: lpa_jax.at(site, lpa_jax.lpa(site, 0.1)),
    "injected lpa": lambda site: lpa_jax.at(
        site, optax.inject_hyperparams(lpa_jax.lpa, static_args=("site", "steps"))(site, 0.1)
    ),
    "chained lpa": lambda site: lpa_jax.at(site, optax.chain(lpa_jax.lpa(site, 0.1))),
    "adversarial": lambda site: lpa_jax.adversarial(site, 0.1),
    "a gradient of the user's": gradient_asked,
    "a comparison with labels": lambda site: lpa_jax.stateless(
        site, lambda value, *, labels, **_: value * jnp.sum(labels == 1)
    ),
    "a product with targets": lambda site: lpa_jax.stateless(
        site, lambda value, *, targets, **_: value * (2.0 * targets).sum()
    ),
}

CHAINS = {
    "between": (lambda work, mixup: (work("group1"), mixup(("inputs", "group2"))), False),
    "between, named last": (
        lambda work, mixup: (mixup(("inputs", "group2")), work("group1")),
        False,
    ),
    "ahead at one site": (lambda work, mixup: (work("group1"), mixup(("group1",))), False),
    "after at one site": (lambda work, mixup: (mixup(("group1",)), work("group1")), True),
    "after": (lambda work, mixup: (work("group2"), mixup(("inputs", "group1"))), True),
}


@pytest.mark.parametrize("where", CHAINS)
@pytest.mark.parametrize("work", WORK)
def test_work_on_targets_mixed_before_the_examples_is_refused_however_wrapped(work, where):
    chain, accepted = CHAINS[where]
    mixup = functools.partial(lpa_jax.manifold_mixup, alpha=1.0)

    def run():
        step = make(lpa_jax.chain(*chain(WORK[work], mixup)))
        return step(VARIABLES, step.init(VARIABLES, INPUTS, LABELS), INPUTS, LABELS, KEY)

    if accepted:
        jax.eval_shape(run)
    else:
        with pytest.raises(lpa_jax.SiteError, match="mixed before the examples are"):
            jax.eval_shape(run)


def test_at_the_inputs_ahead_of_mixup_class_level_work_is_refused_and_adversarial_is_not():
    """There the targets are not mixed yet, but the classes would be of the examples before it."""

    def run(work):
        step = make(lpa_jax.chain(work, lpa_jax.mixup(1.0)))
        return step(VARIABLES, step.init(VARIABLES, INPUTS, LABELS), INPUTS, LABELS, KEY)

    jax.eval_shape(lambda: run(lpa_jax.adversarial("inputs", 0.1)))
    for name in ("lpa", "at lpa", "injected lpa", "chained lpa"):
        with pytest.raises(lpa_jax.SiteError, match="mixed before the examples are"):
            jax.eval_shape(functools.partial(run, WORK[name]("inputs")))
