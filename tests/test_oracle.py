"""Identity 13: the library agrees with loops in NumPy, over several steps, to float32 rounding."""

import dataclasses
import functools
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from probes import absolute, before_and_after, quick_jit, watch, watched
import pytest

import lpa_jax
from lpa_jax import data
from lpa_jax.core import class_stats

NUM_CLASSES, BATCH, POSITIONS, DEPTH, WIDTH = 4, 9, 3, 2, 4
FREQUENCIES = [7, 30, 2, 11]
# The second epoch begins with the second batch.
NUM_STEPS, EPOCH_ENDS_AFTER = 3, 0


class Net(nn.Module):
    bend: str = "tanh"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="hidden")(x)
        x = nn.tanh(x) if self.bend == "tanh" else nn.relu(x)
        return nn.Dense(NUM_CLASSES, name="head")(x.reshape(x.shape[0], -1))


@functools.cache
def params_of():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.7, jnp.float32)

    return {
        "hidden": {"kernel": draw(DEPTH, WIDTH), "bias": draw(WIDTH)},
        "head": {"kernel": draw(POSITIONS * WIDTH, NUM_CLASSES), "bias": draw(NUM_CLASSES)},
    }


@functools.cache
def batches():
    """Return batches, each without one of the classes, with padding and a label of its own."""
    rng = np.random.default_rng(1)
    result = []
    for step in range(NUM_STEPS):
        present = [c for c in range(NUM_CLASSES) if c != (step + 2) % NUM_CLASSES]
        labels = rng.choice(present, BATCH).astype(np.int32)
        weights = np.ones(BATCH, np.float32)
        weights[[1, 6 - step]] = 0.0
        inputs = rng.normal(size=(BATCH, POSITIONS, DEPTH)).astype(np.float32)
        result.append((inputs, labels, weights))
    return result


def plan(signs_and_spread, epsilon, delta_epsilon):
    signs, spread = signs_and_spread
    return signs, [epsilon + delta_epsilon * s for s in spread]


@dataclasses.dataclass
class Batch:
    """What the oracle knows of a batch when it perturbs it."""

    network: oracle.Network
    inputs: Any
    targets: Any
    shares: Any
    weights: Any
    values: Any
    logits: Any

    def through_the_tail(self, i, value):
        u = self.network.logits(value)
        return self.network.pull(value, oracle.logit_gradient(u, self.targets[i]))

    def at_the_logits(self, i, value):
        return oracle.logit_gradient(value, self.targets[i])


def ema(statistic="confidence", tau=None):
    return lambda stats: oracle.threshold(stats, statistic, "ema", tau)


def window(name, statistic="confidence"):
    return lambda stats: oracle.threshold(stats, statistic, name)


def inverted(split):
    def negated(stats):
        signs, spread = split(stats)
        return [-sign for sign in signs], spread

    return negated


def lpa(**options):
    """Make the oracle's LPA with options of its own."""

    def perturb(batch, signs, radii):
        return oracle.lpa(
            batch.values,
            batch.through_the_tail,
            batch.shares,
            batch.weights,
            signs,
            radii,
            channels=WIDTH,
            **options,
        )

    return perturb


def lpa_by_example(batch, signs, radii):
    """Every example is its own class, with the sign and the bound of the class it belongs to."""
    own = [oracle.one_hot(i, BATCH) for i in range(BATCH)]
    classes = [share.index(max(share)) for share in batch.shares]
    return oracle.lpa(
        batch.values,
        batch.through_the_tail,
        own,
        batch.weights,
        [signs[c] for c in classes],
        [radii[c] for c in classes],
        channels=WIDTH,
        shared=False,
        relative=True,
    )


def lpl_steps(**options):
    def perturb(batch, signs, radii):
        given = batch.logits, batch.targets, batch.shares, batch.weights
        return oracle.lpl_steps(*given, signs, radii, **options)

    return perturb


def lpl_projected(batch, signs, radii):
    given = batch.logits, batch.at_the_logits, batch.shares, batch.weights
    return oracle.lpa(*given, signs, radii, channels=NUM_CLASSES)


def lpg(batch, signs, radii):
    gradients = [batch.at_the_logits(i, u) for i, u in enumerate(batch.logits)]
    return oracle.lpg(gradients, batch.shares, batch.weights, signs, radii)


@dataclasses.dataclass
class Case:
    """A perturbation of the library, and how the oracle splits the classes and moves them."""

    make: Any
    split: Any
    perturb: Any
    epsilon: float = 0.4
    delta_epsilon: float = 0.0
    bend: str = "tanh"

    def perturbation(self):
        return self.make(self.epsilon, delta_epsilon=self.delta_epsilon)


def of(factory, *arguments, **options):
    return lambda *epsilon, **more: factory(*arguments, *epsilon, **options, **more)


def hidden(**options):
    return of(lpa_jax.lpa, "hidden", **{"radius": "absolute"} | options)


splits = lpa_jax.splits
CASES = {
    "lpa": Case(hidden(), ema(), lpa()),
    "lpa raw, fixed threshold, varied bound": Case(
        hidden(direction="raw", split=splits.threshold(0.4, "accuracy")),
        ema("accuracy", 0.4),
        lpa(normalized=False),
        epsilon=1.0,
        delta_epsilon=3.0,
        bend="relu",
    ),
    "lpa full, epoch": Case(
        hidden(sharing="full", steps=2, split=splits.mean_threshold(window="epoch")),
        window("epoch"),
        lpa(shared=False, steps=2),
        delta_epsilon=0.5,
    ),
    "lpa relative, batch": Case(
        hidden(radius="relative", split=splits.mean_threshold(window="batch")),
        window("batch"),
        lpa(relative=True),
        epsilon=0.2,
        bend="relu",
    ),
    "lpa relative and full": Case(
        hidden(radius="relative", sharing="full"), ema(), lpa(relative=True, shared=False)
    ),
    "lpa low rank": Case(
        hidden(low_rank=1, sharing="full", split=splits.all_positive()),
        lambda stats: ([1.0] * NUM_CLASSES, [0.0] * NUM_CLASSES),
        lpa(low_rank=1, shared=False),
    ),
    "lpa low rank and shared": Case(
        hidden(low_rank=2, split=splits.all_negative()),
        lambda stats: ([-1.0] * NUM_CLASSES, [0.0] * NUM_CLASSES),
        lpa(low_rank=2),
    ),
    # Further than the mean is long: what contracts stops at the origin.
    "lpa norm": Case(hidden(objective="norm"), ema(), lpa(objective="norm"), epsilon=5.0),
    "lpa norm and full": Case(
        hidden(objective="norm", sharing="full", split=splits.mean_threshold("accuracy", "batch")),
        window("batch", "accuracy"),
        lpa(objective="norm", shared=False),
        epsilon=0.6,
    ),
    "lpa by example": Case(
        hidden(granularity="sample", sharing="full", radius="relative"), ema(), lpa_by_example
    ),
    "lpa tail": Case(
        hidden(split=splits.tail(2, FREQUENCIES)),
        lambda stats: oracle.tail(FREQUENCIES, 2),
        lpa(),
        delta_epsilon=0.3,
    ),
    "lpl steps": Case(
        of(lpa_jax.lpl, step_size=0.1, split=splits.tail(1)),
        lambda stats: oracle.tail(stats.frequency, 1),
        lpl_steps(alpha=0.1),
        epsilon=0.5,
        delta_epsilon=0.7,
    ),
    "lpl steps, no more than four": Case(
        of(lpa_jax.lpl, step_size=0.1, steps=4),
        ema(),
        lpl_steps(alpha=0.1, most=4),
        epsilon=0.2,
        delta_epsilon=2.0,
    ),
    "lpl rounded steps": Case(
        of(
            lpa_jax.lpl,
            solver="rounded_steps",
            step_size=0.15,
            split=splits.tail(2, FREQUENCIES, head_scale=0.6),
        ),
        lambda stats: oracle.tail(FREQUENCIES, 2, 0.6),
        lpl_steps(alpha=0.15, rounded=True),
        epsilon=0.0,
        delta_epsilon=1.5,
    ),
    "lpl rounded steps, no more than two": Case(
        of(lpa_jax.lpl, solver="rounded_steps", step_size=0.1, steps=2, split=splits.tail(1)),
        lambda stats: oracle.tail(stats.frequency, 1),
        lpl_steps(alpha=0.1, most=2, rounded=True),
        epsilon=0.03,
        delta_epsilon=0.4,
    ),
    "lpl projected": Case(of(lpa_jax.lpl, solver="projected"), ema(), lpl_projected, 0.7),
    "lpg": Case(of(lpa_jax.lpg), ema(), lpg, 0.3, 0.5),
    "lpg inverted": Case(
        of(lpa_jax.lpg, split=splits.inverted(splits.mean_threshold())),
        inverted(ema()),
        lpg,
        0.3,
        0.5,
    ),
    "lpg iterated": Case(of(lpa_jax.lpg, solver="iterative"), ema(), lpg, 1.5),
}


def jitted(perturbation, bend="tanh"):
    model = Net(bend)
    if isinstance(perturbation, lpa_jax.Perturbation):
        perturbation = watched(perturbation)
    step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=NUM_CLASSES)
    inputs, labels, _ = map(jnp.asarray, batches()[0])
    state = step.init({"params": params_of()}, inputs, labels)

    @quick_jit
    def call(params, state, inputs, labels, weights):
        return step({"params": params}, state, inputs, labels, jax.random.key(0), weights=weights)

    return step, state, call


def see(network, inputs, shares, weights, targets):
    inputs = inputs.astype(np.float64).tolist()
    values = [network.hidden(x) for x in inputs]
    logits = [network.logits(a) for a in values]
    return Batch(network, inputs, targets, shares, weights.tolist(), values, logits)


def hard(labels):
    return [oracle.one_hot(label, NUM_CLASSES) for label in labels]


def flat(values):
    return np.asarray(values, np.float64).reshape(BATCH, -1)


# A float32 has seven digits; what is summed of it has six.
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=2e-6)


def agree(grads, expected):
    close(jax.tree.map(np.asarray, grads), jax.tree.map(np.asarray, expected, is_leaf=is_array))


def is_array(x):
    return isinstance(x, list)


SITES = {"hidden": "hidden", "logits": "logits", "logit_grads": "gradient"}


@pytest.mark.parametrize("name", CASES)
def test_13_the_library_agrees_with_loops(name):
    case = CASES[name]
    perturbation = case.perturbation()
    (site,) = perturbation.sites
    step, state, call = jitted(perturbation, case.bend)
    network = oracle.Network(jax.tree.map(np.float64, params_of()), case.bend)
    stats = oracle.Statistics(NUM_CLASSES)
    for count, (inputs, labels, weights) in enumerate(batches()):
        result = call(params_of(), state, *map(jnp.asarray, (inputs, labels, weights)))
        (loss, aux), grads, state = result
        shares = hard(labels)
        batch = see(network, inputs, shares, weights, shares)
        # What is known of the classes is measured before they are moved.
        stats.observe(batch.logits, shares, batch.weights)
        signs, radii = plan(case.split(stats), case.epsilon, case.delta_epsilon)
        added = case.perturb(batch, signs, radii)
        expected = oracle.outcome(
            network, batch.inputs, shares, batch.weights, **{SITES[site]: added}
        )
        metrics = aux["metrics"][site]
        close(metrics["sign"], np.array(signs, np.float32))
        close(metrics["radius"], np.array(radii, np.float32))
        real = weights > 0
        before, after = before_and_after(perturbation, state)
        close((flat(after) - flat(before))[real], np.array(added)[real])
        close(float(loss), expected[0])
        agree(grads, expected[1])
        stats.end_batch()
        if count == EPOCH_ENDS_AFTER:
            state, _ = step.end_epoch(state), stats.end_epoch()
        for window in ("ema", "running", "epoch"):
            known, sums = getattr(state.class_stats, window), np.array(stats.windows[window])
            means = sums[:, :2] / np.where(sums[:, 2:] > 0, sums[:, 2:], 1.0)
            close(np.array(known[:3]).T, np.c_[means, sums[:, 2]].astype(np.float32))
            assert known.num_seen == (sums[:, 2] > 0).sum()
        close(state.class_stats.frequency, np.array(stats.frequency, np.float32))


# ---------------------------------------------------------------- the other perturbations


def one_step(perturbation, labels=None, weights=None, index=1):
    """Take a step on one of the batches; return the result and what the oracle needs."""
    inputs, own, own_weights = batches()[index]
    labels = own if labels is None else labels
    weights = own_weights if weights is None else weights
    _, state, call = jitted(perturbation)
    result = call(params_of(), state, *map(jnp.asarray, (inputs, labels, weights)))
    network = oracle.Network(jax.tree.map(np.float64, params_of()), "tanh")
    shares = hard(labels) if labels.ndim == 1 else labels.astype(np.float64).tolist()
    return result, see(network, inputs, shares, weights, shares)


def check(result, batch, **done):
    (loss, _), grads, _ = result
    targets = done.pop("targets", batch.targets)
    expected = oracle.outcome(batch.network, batch.inputs, targets, batch.weights, **done)
    close(float(loss), expected[0])
    agree(grads, expected[1])


def test_logit_adjustment_adds_the_log_prior():
    adjustment = lpa_jax.logit_adjustment(FREQUENCIES, 0.7)
    result, batch = one_step(adjustment)
    shift = [0.7 * math.log(f / sum(FREQUENCIES)) for f in FREQUENCIES]
    before, after = before_and_after(adjustment, result[2])
    close(flat(after) - flat(before), np.array([shift] * BATCH))
    check(result, batch, logits=[shift] * BATCH)


def test_ldam_takes_a_margin_off_the_true_logit():
    result, batch = one_step(lpa_jax.ldam(FREQUENCIES, max_margin=0.6, scale=3.0))
    rarest = min(FREQUENCIES) ** -0.25
    margins = [0.6 * f**-0.25 / rarest for f in FREQUENCIES]
    shift = [[-3.0 * m * s for m, s in zip(margins, share, strict=True)] for share in batch.shares]
    check(result, batch, logits=shift)


def smoothed(targets, alpha):
    return [[(1 - alpha) * t + alpha / NUM_CLASSES for t in target] for target in targets]


def test_label_smoothing_mixes_with_the_uniform_distribution():
    result, batch = one_step(lpa_jax.label_smoothing(0.2))
    check(result, batch, targets=smoothed(batch.targets, 0.2))


def test_smoothed_labels_leave_the_classes_as_they_are():
    up = lpa_jax.splits.all_positive()
    lpa = absolute("hidden", 0.5, split=up)
    chain = lpa_jax.chain(lpa_jax.label_smoothing(0.2), lpa)
    result, batch = one_step(chain)
    batch.targets = smoothed(batch.targets, 0.2)
    check(result, batch, hidden=lpa_of(batch, 0.5))


def lpa_of(batch, epsilon, **options):
    signs, radii = [1.0] * NUM_CLASSES, [epsilon] * NUM_CLASSES
    return lpa(**options)(batch, signs, radii)


SOFT = {
    "lpa": (hidden(), lpa(), "hidden"),
    "lpa norm": (hidden(objective="norm"), lpa(objective="norm"), "hidden"),
    "lpl": (of(lpa_jax.lpl, step_size=0.1), lpl_steps(alpha=0.1), "logits"),
    "lpg": (of(lpa_jax.lpg), lpg, "gradient"),
}


@pytest.mark.parametrize("name", SOFT)
def test_soft_labels_share_an_example_among_classes(name):
    make, perturb, site = SOFT[name]
    labels = np.random.default_rng(5).dirichlet(np.ones(NUM_CLASSES), BATCH).astype(np.float32)
    labels[0] = [0, 1, 0, 0]
    result, batch = one_step(make(0.5, split=lpa_jax.splits.all_positive()), labels)
    added = perturb(batch, [1.0] * NUM_CLASSES, [0.5] * NUM_CLASSES)
    check(result, batch, **{site: added})


def test_manifold_mixup_mixes_values_and_targets_at_one_layer():
    # What is padding is taken to have label 0.
    labels = np.array([0, 1, 2, 3, 0, 1, 0, 3, 2], np.int32)
    padding = 4
    weights = np.ones(BATCH, np.float32)
    weights[padding] = 0.0
    inputs = batches()[0][0]
    perturbation = lpa_jax.manifold_mixup(("inputs", "hidden"), 1.0)
    _, state, call = jitted(perturbation)
    network = oracle.Network(jax.tree.map(np.float64, params_of()), "tanh")
    batch = see(network, inputs, hard(labels), weights, hard(labels))
    layers, kept = set(), set()
    for _ in range(6):
        result = call(params_of(), state, *map(jnp.asarray, (inputs, labels, weights)))
        state = result[2]
        _, targets = before_and_after(perturbation, state, "labels")
        factor = float(targets[1, labels[1]])
        # Padding and the example after it stay as they are.
        factors = [1.0 if i in (padding, padding + 1) else factor for i in range(BATCH)]
        mixed_targets = oracle.mixed(hard(labels), factors)
        close(targets, np.array(mixed_targets, np.float32))
        values = {
            site: before_and_after(perturbation, state, site) for site in ("inputs", "hidden")
        }
        changed = [site for site, (before, after) in values.items() if (before != after).any()]
        assert len(changed) == 1
        layers.add(changed[0])
        kept.add(round(factor, 4))
        before, after = values[changed[0]]
        close(flat(after), np.array(oracle.mixed(flat(before).tolist(), factors)))
        if changed[0] == "hidden":
            check(result, batch, targets=mixed_targets, factors=factors)
        else:
            mixed_inputs = np.asarray(after, np.float32)
            check(result, see(network, mixed_inputs, None, weights, mixed_targets))
    assert layers == {"inputs", "hidden"}
    assert len(kept) == 6


def test_after_mixup_an_example_belongs_to_both_its_classes():
    up = lpa_jax.splits.all_positive()
    mixup, lpa = lpa_jax.mixup(1.0), absolute("hidden", 0.5, split=up)
    weights = batches()[1][2]
    chain = lpa_jax.chain(mixup, watch("inputs"), watch("labels"), lpa)
    result, batch = one_step(chain)
    _, mixed_inputs, targets, _ = result[2].perturbations
    shares = np.asarray(targets, np.float64).tolist()
    batch = see(batch.network, np.asarray(mixed_inputs), shares, weights, shares)
    assert any(0 < part < 1 for share in shares for part in share)
    check(result, batch, hidden=lpa_of(batch, 0.5))


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_sharpness_aware_gradients_are_those_at_the_moved_parameters(method):
    result, batch = one_step(getattr(lpa_jax, method)(0.3))
    arguments = batch.inputs, batch.targets, batch.weights
    loss, grads = oracle.outcome(batch.network, *arguments)
    params = jax.tree.map(np.float64, params_of())
    units = jax.tree.map(lambda w: abs(w) + 0.01 if method == "asam" else np.ones_like(w), params)
    grads = jax.tree.map(np.array, grads, is_leaf=is_array)
    scaled = jax.tree.map(np.multiply, units, grads)
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(scaled)))
    moved = jax.tree.map(lambda w, t, g: w + 0.3 * t * g / norm, params, units, scaled)
    _, expected = oracle.outcome(oracle.Network(moved, "tanh"), *arguments)
    close(float(result[0][0]), loss)
    agree(result[1], expected)


@pytest.mark.parametrize(
    ("epsilon", "alpha", "number"),
    [(0.5, 0.01, 50), (0.3, 0.1, 3), (0.7, 0.1, 7), (0.29, 0.1, 2), (0.05, 0.1, 0), (1.0, 0.15, 6)],
)
def test_lpl_takes_as_many_steps_as_the_bound_holds(epsilon, alpha, number):
    perturbation = lpa_jax.lpl(epsilon, step_size=alpha, split=lpa_jax.splits.all_positive())
    value = jnp.zeros((1, 2))
    moved, _ = perturbation.update(
        value,
        perturbation.init(value),
        labels=jnp.zeros(1, jnp.int32),
        targets=jnp.array([[1.0, 0.0]]),
        weights=jnp.ones(1),
        class_stats=class_stats.init(2),
        gradient_fn=lambda value: (jnp.zeros(1), jnp.ones_like(value)),
    )
    assert moved.tolist() == [pytest.approx([number * alpha] * 2)]
    assert perturbation.report("logits", class_stats.init(2), 0)["steps"].tolist() == [number] * 2


def steps_of(perturbation, num_classes):
    """Return the number of steps of each class: as reported, and as taken on logits of zero."""
    stats, classes = class_stats.init(num_classes), jnp.arange(num_classes)
    value = jnp.zeros((num_classes, num_classes))
    moved, _ = perturbation.update(
        value,
        perturbation.init(value),
        labels=classes,
        targets=jnp.eye(num_classes),
        weights=jnp.ones(num_classes),
        class_stats=stats,
        gradient_fn=lambda value: (jnp.zeros(num_classes), jnp.ones_like(value)),
    )
    reported = perturbation.report("logits", stats, 0)["steps"]
    return reported.tolist(), np.abs(moved[:, 0])


def released_steps(counts, num_head, head_scale, steps=10):
    numbers = []
    for c, n in enumerate(counts):
        share = n / counts[0] * head_scale if c < num_head else counts[-1] / n
        numbers.append(max(1, round(share * steps)))
    return numbers


@pytest.mark.parametrize("ratio", [100, 10])
@pytest.mark.parametrize(
    ("num_classes", "size", "num_head", "head_scale"), [(10, 5000, 4, 0.6), (100, 500, 27, 0.2)]
)
def test_lpl_takes_the_steps_of_its_released_code_on_long_tails(
    num_classes, size, num_head, head_scale, ratio
):
    counts = data.long_tail_counts([size] * num_classes, ratio).tolist()
    split = lpa_jax.splits.tail(num_head, counts, head_scale=head_scale)
    perturbation = lpa_jax.lpl(
        0.0, delta_epsilon=1.5, step_size=0.15, solver="rounded_steps", split=split
    )
    expected = released_steps(counts, num_head, head_scale)
    if (num_classes, ratio) == (10, 100):
        assert expected == [6, 4, 2, 1, 1, 1, 2, 4, 6, 10]
    if (num_classes, ratio) == (100, 100):
        # The code that indexes with one less takes ten steps for these.
        assert [round(counts[-1] / n * 10) for n in counts[27:35]] == [0] * 8
        assert expected[27:35] == [1] * 8
    reported, taken = steps_of(perturbation, num_classes)
    assert reported == expected
    np.testing.assert_allclose(taken, 0.15 * np.array(expected), rtol=1e-5)


@pytest.mark.parametrize(
    "alpha", [0.15, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.1, 0.07))]
)
def test_ties_of_rounded_steps_go_to_the_even_number(alpha):
    up = lpa_jax.splits.all_positive()
    for odd in range(1, 40, 2):
        epsilon = odd / 2 * alpha
        perturbation = lpa_jax.lpl(epsilon, step_size=alpha, solver="rounded_steps", split=up)
        assert steps_of(perturbation, 2)[0] == [max(1, round(odd / 2))] * 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"epsilon": 0.0}, 0),
        ({"epsilon": 1e-6}, 1),
        ({"epsilon": 0.24}, 2),
        ({"epsilon": 0.26}, 3),
        ({"epsilon": 50.0, "steps": 4}, 4),
        ({"epsilon": 1e30, "steps": 3}, 3),
        ({"epsilon": 0.5, "split": lpa_jax.splits.mean_threshold()}, 0),
    ],
)
def test_rounded_steps_are_at_least_one_and_none_where_nothing_moves(arguments, expected):
    arguments = {"split": lpa_jax.splits.all_positive()} | arguments
    perturbation = lpa_jax.lpl(step_size=0.1, solver="rounded_steps", **arguments)
    reported, taken = steps_of(perturbation, 2)
    assert reported == [expected] * 2
    np.testing.assert_allclose(taken, 0.1 * expected, rtol=1e-6)
