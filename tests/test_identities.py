"""What must hold whatever the network: the identities that need no other implementation.

The numbers are those of the list of identities; number 12, agreement with optax's SAM, is in
`test_outside.py`, and number 13, agreement with loops in NumPy, in `test_oracle.py`.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from probes import absolute, before_and_after, quick_jit, watch, watched
import pytest

import lpa_jax

NUM_CLASSES = 5
KEY = jax.random.key(11)
# Class 4 does not occur.
LABELS = np.array([0, 1, 2, 3, 0, 1, 2, 0, 3, 0], np.int32)
MEMBERS = [[i for i, label in enumerate(LABELS) if label == c] for c in range(4)]
# Up, down, up, left alone, and the class that does not occur.
MIXED = (1, -1, 1, 0, 1)
EPSILON = 0.25


def split_of(signs):
    signs = jnp.asarray(signs, jnp.float32)
    return lpa_jax.splits.Split(
        lambda _, classes: signs.at[classes].get(mode="clip"),
        lambda _, classes: jnp.zeros(classes.shape),
    )


class Net(nn.Module):
    """`[B, 2, 2, 3]` to logits: "hidden" has a bent tail, "features" a linear one."""

    num_classes: int = NUM_CLASSES

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, name="hidden")(x))
        x = nn.Dense(6, name="features")(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(x)


class Linear(nn.Module):
    num_classes: int = NUM_CLASSES

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


NET = Net()


@functools.cache
def setting(model=NET):
    inputs = jax.random.normal(jax.random.key(1), (len(LABELS), 2, 2, 3))
    return jax.jit(model.init)(jax.random.key(2), inputs), inputs


@functools.cache
def plain():
    """Return logits, loss and gradient of plain cross-entropy, without the library."""
    variables, inputs = setting()

    def loss(params):
        logits = NET.apply({"params": params}, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return jnp.mean(losses), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return logits, loss, grads


def steps_of(perturbations, model, arguments):
    """Take a step with each of several perturbations."""
    variables, inputs, labels, weights = arguments
    results = []
    for perturbation in perturbations:
        step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=model.num_classes)
        state = step.init(variables, inputs, labels)
        results.append(step(variables, state, inputs, labels, KEY, weights=weights))
    return results


def run(*perturbations, model=NET):
    """Take a step with each of several perturbations, in one program."""
    variables, inputs = setting(model)
    steps = quick_jit(lambda *arguments: steps_of(perturbations, model, arguments))
    return steps(variables, inputs, jnp.asarray(LABELS), jnp.ones(len(LABELS)))


def change(perturbation, result):
    before, after = before_and_after(perturbation, result[2])
    return np.asarray(after, np.float64) - np.asarray(before, np.float64)


close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- all methods in one program

METHODS = {
    "lpa": lambda e, **k: absolute("hidden", e, sharing="full", **k),
    "lpa-raw": lambda e, **k: absolute("hidden", e, sharing="full", direction="raw", **k),
    "lpa-low-rank": lambda e, **k: absolute("hidden", e, sharing="full", low_rank=1, **k),
    "lpa-features": lambda e, **k: absolute("features", e, **k),
    "lpa-sample": lambda e, **k: absolute("features", e, granularity="sample", **k),
    "lpa-norm": lambda e, **k: absolute("features", e, objective="norm", **k),
    "lpl-projected": lambda e, **k: lpa_jax.lpl(e, solver="projected", **k),
    "lpl-steps": lambda e, **k: lpa_jax.lpl(e / 2**0.5, step_size=0.02, **k),
    "lpg": lambda e, **k: lpa_jax.lpg(e, **k),
    "lpg-iterative": lambda e, **k: lpa_jax.lpg(e, solver="iterative", **k),
}
# The others do not look at the loss.
OF_THE_LOSS = [name for name in METHODS if not name.startswith(("lpg", "lpa-norm"))]
BY_CLASS = [name for name in METHODS if name != "lpa-sample"]
# Their steps have the length of the gradient, and need not reach the edge of the ball.
SHORT = ("lpa-raw", "lpl-steps")
FEW = ("lpa", "lpl-steps", "lpg")


def methods(names, epsilon, signs):
    return {name: METHODS[name](epsilon, split=split_of(signs)) for name in names}


@functools.cache
def program(names, model=NET):
    @quick_jit
    def steps(epsilon, signs, *arguments):
        chains = [
            lpa_jax.chain(watch(p.sites[0]), p, watch(p.sites[0]), watch("logits"))
            for p in methods(names, epsilon, signs).values()
        ]
        return steps_of(chains, model, arguments)

    return steps


def run_all(
    names=tuple(METHODS),
    *,
    epsilon=EPSILON,
    signs=MIXED,
    model=NET,
    variables=None,
    inputs=None,
    labels=LABELS,
    weights=None,
):
    """Take a step with each of the methods; return the results by name."""
    inputs = setting()[1] if inputs is None else inputs
    variables = setting()[0] if variables is None else variables
    weights = jnp.ones(inputs.shape[0]) if weights is None else weights
    call = program(names, model)
    signs = jnp.asarray(signs, jnp.float32)
    results = call(jnp.float32(epsilon), signs, variables, inputs, jnp.asarray(labels), weights)
    return dict(zip(names, results, strict=True))


@functools.cache
def at_mixed_signs():
    return run_all()


def moved(result):
    before, _, after, _ = result[2].perturbations
    return np.asarray(after, np.float64) - np.asarray(before, np.float64)


def site_of(name):
    return METHODS[name](0.1).sites[0]


def losses_by_class(logits):
    losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, LABELS))
    return np.array([losses[members].mean() for members in MEMBERS])


def class_means(values):
    values = np.asarray(values, np.float64).reshape(len(LABELS), -1)
    return np.array([values[members].mean(axis=0) for members in MEMBERS])


# ---------------------------------------------------------------- the identities


def test_01_lpa_at_the_logits_is_projected_lpl():
    split = split_of(MIXED)
    pairs = [
        (
            absolute("logits", 0.5, split=split, **steps),
            lpa_jax.lpl(0.5, solver="projected", split=split, **steps),
        )
        for steps in ({"steps": 4}, {})
    ]
    results = run(*(watched(perturbation) for pair in pairs for perturbation in pair))
    close(results[0], results[1])
    close(results[2], results[3])


def test_02_lpa_before_a_linear_head_is_a_shift_of_the_logits():
    variables, inputs = setting()
    lpa = absolute("features", 0.5, split=split_of(MIXED))
    (((loss, aux), grads, state),) = run(watched(lpa))
    before, after = before_and_after(lpa, state)
    delta = after - before

    def shifted(params):
        logits = NET.apply({"params": params}, inputs) + delta @ params["head"]["kernel"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, LABELS))

    close((loss, grads), jax.jit(jax.value_and_grad(shifted))(variables["params"]))
    # The logits move by no more than epsilon times the operator norm of the head.
    kernel = np.asarray(variables["params"]["head"]["kernel"])
    shift = np.linalg.norm(np.asarray(aux["logits"] - plain()[0]), axis=1)
    assert (shift <= np.linalg.norm(kernel, 2) * 0.5 * (1 + 1e-5)).all()
    assert shift.max() > 0.01


def test_03_at_zero_strength_it_is_plain_cross_entropy():
    logits, loss, grads = plain()
    # A schedule may come out below zero: that is no bound to perturb within either.
    zeros = [*run_all(epsilon=0.0).values(), *run_all(epsilon=-0.1).values()]
    for (got_loss, aux), got_grads, _ in (*zeros, *run(lpa_jax.chain())):
        close((aux["logits"], got_loss, got_grads), (logits, loss, grads))


@pytest.mark.parametrize("name", METHODS)
def test_04_no_class_leaves_its_ball_and_absent_and_neutral_classes_stay(name):
    result = at_mixed_signs()[name]
    metrics = result[0][1]["metrics"][site_of(name)]
    norms = np.asarray(metrics["norm"])
    assert (norms <= EPSILON * (1 + 1e-5)).all()
    assert (norms[:3] > 0.01).all()
    assert norms[3] == norms[4] == 0.0
    deltas = moved(result)
    lengths = np.linalg.norm(deltas.reshape(len(LABELS), -1), axis=1)
    assert (lengths <= EPSILON * (1 + 1e-5)).all()
    assert (deltas[MEMBERS[3]] == 0).all()
    if name in BY_CLASS:
        for members in MEMBERS:
            close(deltas[members], np.repeat(deltas[members[:1]], len(members), axis=0))
    radius = EPSILON / 2**0.5 if name == "lpl-steps" else EPSILON
    assert metrics["radius"].tolist() == pytest.approx([radius] * NUM_CLASSES)
    assert metrics["sign"].tolist() == list(MIXED)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SHORT])
def test_04_normalized_steps_reach_the_edge_of_the_ball(name):
    norms = at_mixed_signs()[name][0][1]["metrics"][site_of(name)]["norm"]
    assert norms[:3].tolist() == pytest.approx([EPSILON] * 3, rel=1e-5)


@pytest.mark.parametrize("signs", [MIXED, (1,) * 5, (-1,) * 5], ids=["mixed", "up", "down"])
def test_05_a_small_push_raises_or_lowers_the_loss_class_by_class(signs):
    results = run_all(epsilon=0.05, signs=signs)
    before = losses_by_class(plain()[0])
    for name in OF_THE_LOSS:
        rise = losses_by_class(results[name][2].perturbations[-1]) - before
        for sign, change in zip(signs, rise, strict=False):
            assert change * sign > 1e-5 if sign else abs(change) <= 1e-6, name


def test_05_the_norm_objective_expands_and_contracts():
    before, _, after, _ = at_mixed_signs()["lpa-norm"][2].perturbations
    means = class_means(before)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    factors = 1 + np.array([[1], [-1], [1], [0]]) * EPSILON / lengths
    close(class_means(after), means * factors)


def test_06_one_step_on_a_linear_softmax_model_is_the_closed_form():
    model = Linear()
    variables, inputs = setting(model)
    kernel = np.asarray(variables["params"]["head"]["kernel"], np.float64)
    logits = jax.jit(model.apply)(variables, inputs)
    errors = jax.nn.softmax(logits) - jax.nn.one_hot(LABELS, NUM_CLASSES)
    gradients = {"logits": class_means(errors), "inputs": class_means(errors) @ kernel.T}
    cases = {
        (site, direction): absolute(
            site, 0.2, steps=1, split=split_of(MIXED), sharing="full", direction=direction
        )
        for site in gradients
        for direction in ("normalized", "raw")
    }
    inside = 0
    results = run(*map(watched, cases.values()), model=model)
    for ((site, direction), perturbation), result in zip(cases.items(), results, strict=True):
        gradient = gradients[site]
        lengths = np.linalg.norm(gradient, axis=1, keepdims=True)
        # The one step is 2 epsilon long where the gradient has length 1.
        step = 0.4 * (gradient / lengths if direction == "normalized" else gradient)
        step_lengths = np.linalg.norm(step, axis=1, keepdims=True)
        inside += np.sum(step_lengths < 0.2)
        expected = step * np.minimum(1, 0.2 / step_lengths) * np.array([[1], [-1], [1], [0]])
        close(class_means(change(perturbation, result)), expected)
    # Some of the raw steps end within the ball, some are projected.
    assert 0 < inside < 8


@pytest.mark.parametrize("epsilon", [0.1, 5.0])
def test_07_lpg_is_its_iteration_and_the_gradient_of_a_surrogate(epsilon):
    variables, inputs = setting()
    logits, plain_loss, _ = plain()
    results = run_all(epsilon=epsilon)
    closed, iterated = results["lpg"], results["lpg-iterative"]
    close(closed[1], iterated[1])
    close(moved(closed), moved(iterated))
    means = class_means(jax.nn.softmax(logits) - jax.nn.one_hot(LABELS, NUM_CLASSES))
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    reach = np.array([[epsilon], [-min(epsilon, lengths[1, 0])], [epsilon], [0.0]])
    delta = (reach * means / lengths)[LABELS]
    close(moved(closed), delta)

    def surrogate(params):
        logits = NET.apply({"params": params}, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return jnp.mean(losses + jnp.sum(jnp.asarray(delta, jnp.float32) * logits, axis=1))

    close(closed[1], jax.jit(jax.grad(surrogate))(variables["params"]))
    # The loss that is reported is the plain one.
    close(closed[0][0], plain_loss)


def outcome(result, kept, columns=NUM_CLASSES):
    """Return what a step comes to for the examples `kept`: their changes, loss, gradient."""
    (loss, _), grads, state = result
    deltas = moved(result)[np.asarray(kept)]
    of_class = (
        state.class_stats
        if columns is None
        else jax.tree.map(lambda s: s[:columns] if s.ndim else s, state.class_stats)
    )
    return deltas, loss, grads, of_class


def test_08_the_order_of_the_batch_does_not_matter():
    _, inputs = setting()
    order = np.random.default_rng(0).permutation(len(LABELS))
    results = run_all(inputs=inputs[order], labels=LABELS[order])
    for name in METHODS:
        got = outcome(results[name], np.argsort(order))
        close(got, outcome(at_mixed_signs()[name], range(len(LABELS))))


def test_09_padding_changes_nothing():
    _, inputs = setting()
    padding = jax.random.normal(jax.random.key(5), (3, 2, 2, 3))
    results = run_all(
        FEW,
        inputs=jnp.concatenate([inputs[:4], padding, inputs[4:]]),
        labels=np.concatenate([LABELS[:4], [4, 0, 1], LABELS[4:]]).astype(np.int32),
        weights=jnp.ones(13).at[4:7].set(0.0),
    )
    for name in FEW:
        got = outcome(results[name], [0, 1, 2, 3, *range(7, 13)])
        close(got, outcome(at_mixed_signs()[name], range(len(LABELS))))


def test_09_classes_that_never_occur_change_nothing():
    # More classes than examples: those present are then found by sorting.
    many = 30
    more = many - NUM_CLASSES
    params = dict(setting()[0]["params"])
    params["head"] = {
        "kernel": jnp.pad(params["head"]["kernel"], ((0, 0), (0, more))),
        # Logits that the softmax does not see.
        "bias": jnp.pad(params["head"]["bias"], (0, more), constant_values=-1e4),
    }
    wide_signs = (*MIXED, *[1] * more)
    results = run_all(FEW, model=Net(many), variables={"params": params}, signs=wide_signs)
    for name in FEW:
        (loss, aux), grads, state = results[name]
        norm = aux["metrics"][site_of(name)]["norm"]
        assert norm.shape == (many,)
        assert (norm[4:] == 0).all()
        grads["head"] = jax.tree.map(lambda g: g[..., :NUM_CLASSES], grads["head"])
        deltas, *others = outcome(((loss, aux), grads, state), range(len(LABELS)))
        expected, *expected_others = outcome(at_mixed_signs()[name], range(len(LABELS)))
        close(deltas[..., : expected.shape[-1]], expected)
        assert (deltas[..., expected.shape[-1] :] == 0).all()
        close(others, expected_others)


def test_10_one_device_is_eight():
    # Several at once, and more classes than examples; `test_contract.py` has them one by one.
    model = Net(20)
    inputs = jax.random.normal(jax.random.key(1), (16, 2, 2, 3))
    labels = jnp.arange(16, dtype=jnp.int32) * 7 % 20
    variables = jax.jit(model.init)(jax.random.key(2), inputs)
    up = lpa_jax.splits.all_positive()
    lpa = absolute("features", 0.2, steps=2, split=up)
    chain = lpa_jax.chain(lpa, lpa_jax.lpg(0.2, split=up))
    step = lpa_jax.value_and_grad(model.apply, chain, num_classes=20)
    state = step.init(variables, inputs, labels)
    call = quick_jit(step)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    many = call(
        *jax.device_put((variables, state), whole), *jax.device_put((inputs, labels), split), KEY
    )
    assert len(many[0][0].devices()) == 8
    close(jax.device_get(call(variables, state, inputs, labels, KEY)), jax.device_get(many))


def test_11_manifold_mixup_of_the_inputs_is_mixup_and_unmixed_it_is_plain():
    @quick_jit
    def steps(alpha, *arguments):
        mixups = lpa_jax.manifold_mixup(("inputs",), alpha), lpa_jax.mixup(alpha)
        return steps_of(mixups, NET, arguments)

    arguments = (*setting(), jnp.asarray(LABELS), jnp.ones(len(LABELS)))
    manifold, mixup = steps(jnp.float32(1.0), *arguments)
    close(manifold, mixup)
    _, loss, grads = plain()
    assert abs(mixup[0][0] - loss) > 0.01
    # With alpha 0 lambda is 1.
    for (got, _), got_grads, _ in steps(jnp.float32(0.0), *arguments):
        close((got, got_grads), (loss, grads))


# ---------------------------------------------------------------- several sites


def test_each_site_has_its_own_bound():
    assert lpa_jax.layer_scale(1.0, 3) == pytest.approx((0.49, 0.7, 1.0))
    bounds = lpa_jax.layer_scale(0.4, 2, beta=0.5)
    assert bounds == pytest.approx((0.2, 0.4))
    split = lpa_jax.splits.all_positive()
    lpa = absolute(("hidden", "features"), bounds, split=split, sharing="full")
    (((_, aux), _, _),) = run(lpa)
    for site, bound in zip(lpa.sites, bounds, strict=True):
        assert aux["metrics"][site]["norm"][:4].tolist() == pytest.approx([bound] * 4, rel=1e-5)
        assert aux["metrics"][site]["radius"].tolist() == pytest.approx([bound] * 5)


def test_adaptive_perturbs_the_site_where_the_loss_moves_most():
    variables, inputs = setting()
    labels = jnp.asarray(LABELS)
    up = lpa_jax.splits.all_positive()
    # The bounds are such that the second site moves the loss furthest.
    bounds = {"hidden": 0.01, "features": 2.0, "logits": 0.1}
    single = [absolute(site, bound, steps=1, split=up) for site, bound in bounds.items()]
    alone = run(*(lpa_jax.chain(lpa, watch("logits")) for lpa in single))
    before = losses_by_class(plain()[0])
    rises = [losses_by_class(result[2].perturbations[-1]) - before for result in alone]
    lpa = absolute(tuple(bounds), tuple(bounds.values()), steps=1, split=up)
    adaptive = lpa_jax.adaptive(lpa, every=3)
    step = lpa_jax.value_and_grad(NET.apply, adaptive, num_classes=NUM_CLASSES)
    call = quick_jit(step)
    state = step.init(variables, inputs, labels)
    scores = [np.abs(rise).sum() for rise in rises]
    assert np.argmax(scores) == 1
    _, unmoved, unmoved_grads = plain()
    for count in range(5):
        (loss, aux), grads, state = call(variables, state, inputs, labels, KEY)
        (inner,) = state.perturbations
        # Steps 0 and 3 measure each site against no perturbation, whichever is chosen.
        measuring = count % 3 == 0
        expected = (unmoved, unmoved_grads) if measuring else (alone[1][0][0], alone[1][1])
        close((loss, grads), expected)
        for index, site in enumerate(bounds):
            moved = index == 1 and not measuring
            assert (aux["metrics"][site]["norm"].max() > 0) == moved
        np.testing.assert_allclose(inner.scores, scores, rtol=1e-4)
        assert int(inner.chosen) == (0 if count == 0 else 1)
