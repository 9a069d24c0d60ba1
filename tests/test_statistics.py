"""Class membership, random draws, and numbers at the edge of what a float32 can hold."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from probes import quick_jit
import pytest

import lpa_jax
from lpa_jax.core import class_plan, class_stats, membership, pgd
from lpa_jax.tasks.classification import softmax_statistic

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)

# ---------------------------------------------------------------- membership

LABELS = jnp.array([5, 2, 5, 0, 2, 5, 7], jnp.int32)
# Fractions too: a weight is a number, not a mask.
WEIGHTS = jnp.array([1.0, 1.0, 0.0, 1.0, 0.5, 2.0, 0.0])
# Fewer classes than examples, and more: the two ways of finding the rows.
SIZES = [8, 100]


def by_class(values, members, num_classes):
    """Write values by row, `[R, ...]`, into a table by class."""
    table = np.zeros((num_classes, *values.shape[1:]))
    for row, label in enumerate(np.asarray(members.classes)):
        if members.counts[row] > 0:
            table[label] = values[row]
    return table


@pytest.mark.parametrize("size", SIZES)
def test_integer_labels_and_their_one_hot_rows_are_the_same_classes(size):
    values = jax.random.normal(jax.random.key(0), (7, 3, 2))
    table = jax.random.normal(jax.random.key(1), (7, size))
    per_class = jax.random.normal(jax.random.key(2), (size, 3))

    @quick_jit
    def work(labels):
        members = membership.by_class(labels, WEIGHTS, size)
        by_row = [members.counts, members.total(values), members.mean(values), members.own(table)]
        by_example = members.to_examples(members.take_class(per_class))
        by_class = members.put(jnp.full(size, -1.0), members.counts)
        return members, by_row, (by_example, by_class)

    hard, hard_rows, hard_rest = work(LABELS)
    soft, soft_rows, soft_rest = work(jax.nn.one_hot(LABELS, size))
    close(hard_rest, soft_rest)
    for hard_values, soft_values in zip(hard_rows, soft_rows, strict=True):
        close(by_class(hard_values, hard, size), by_class(soft_values, soft, size))


@pytest.mark.parametrize("size", SIZES)
def test_means_are_by_weight_and_zero_for_absent_classes(size):
    members = membership.by_class(LABELS, WEIGHTS, size)
    values = jnp.arange(7.0)
    means = by_class(members.mean(values), members, size)
    expected = np.zeros(size)
    expected[[0, 2, 5]] = 3, (1 + 0.5 * 4) / 1.5, (0 + 2 * 5) / 3
    close(means, expected)
    # Class 7 has padding alone.
    counts = members.put(jnp.zeros(size), members.counts)
    assert counts.tolist() == [1, 0, 1.5, 0, 0, 3, 0, 0, *[0] * (size - 8)]


@pytest.mark.parametrize("labels", [LABELS, jax.nn.one_hot(LABELS, 8)], ids=["hard", "soft"])
def test_padding_may_hold_not_a_number(labels):
    members = membership.by_class(labels, WEIGHTS, 8)
    values = jnp.where(WEIGHTS[:, None] > 0, jnp.ones((7, 2)), jnp.nan)
    table = jnp.where(WEIGHTS[:, None] > 0, jnp.ones((7, 8)), jnp.nan)
    chex.assert_tree_all_finite((members.mean(values), members.own(table)))


def test_each_example_can_be_its_own_row():
    for labels in (LABELS, 0.6 * jax.nn.one_hot(LABELS, 8) + 0.05):
        members = membership.by_example(labels, WEIGHTS)
        values = jnp.arange(1.0, 8.0)
        assert members.classes.tolist() == LABELS.tolist()
        assert members.to_examples(values).tolist() == values.tolist()
        assert members.mean(values).tolist() == [1, 2, 0, 4, 5, 6, 0]


def test_the_work_does_not_grow_with_the_number_of_classes():
    size, width = 1000, 7

    def work(values):
        members = membership.by_class(LABELS, WEIGHTS, size)
        assert members.counts.shape == (len(LABELS),)
        return members.to_examples(members.mean(values))

    jaxpr = jax.make_jaxpr(work)(jnp.ones((len(LABELS), width)))
    sizes = [var.aval.size for equation in jaxpr.eqns for var in equation.outvars]
    assert max(sizes) <= len(LABELS) * width


def test_labels_may_be_constants_of_the_traced_program():
    step = lpa_jax.value_and_grad(Net().apply, lpa_jax.chain(), num_classes=3)
    variables, inputs, labels = setting()
    state = step.init(variables, inputs, labels)
    given = quick_jit(step)(variables, state, inputs, labels, jax.random.key(0))

    @quick_jit
    def closed(inputs):
        return step(variables, state, inputs, labels, jax.random.key(0))

    close(closed(inputs), given)


# ---------------------------------------------------------------- splits


def known(confidence, weight):
    weight = jnp.array(weight)
    confidence = jnp.where(weight > 0, jnp.array(confidence), 0.0)
    num_seen = jnp.sum(weight > 0, dtype=jnp.int32)
    means = class_stats.Means(confidence, jnp.zeros_like(weight), weight, num_seen)
    return class_stats.init(len(weight))._replace(ema=means)


def test_a_class_at_the_mean_and_one_never_seen_are_not_perturbed():
    stats = known([0.2, 0.5, 0.8, 0.9], [3.0, 5.0, 2.0, 0.0])
    split = lpa_jax.splits.mean_threshold()
    assert split.signs(stats, jnp.arange(4)).tolist() == [1, 0, -1, 0]
    assert split.spread(stats, jnp.arange(4)).tolist() == pytest.approx([0.3, 0, 0.3, 0])
    fixed = lpa_jax.splits.threshold(0.5)
    assert fixed.signs(stats, jnp.arange(4)).tolist() == [1, 0, -1, 0]


@pytest.mark.parametrize("number", [3, 7, 10])
def test_classes_learned_equally_well_are_not_perturbed(number):
    # In float32 the sum of seven thirds is not seven times a third.
    stats = known([1 / 3] * number, [3.0] * number)
    assert lpa_jax.splits.mean_threshold().signs(stats, jnp.arange(number)).tolist() == [0] * number


def test_statistics_that_differ_by_rounding_are_equal():
    stats = known([0.5 + 3e-6, 0.5 - 3e-6, 0.5 + 1e-4, 0.5 - 1e-4], [1.0] * 4)
    split = lpa_jax.splits.threshold(0.5)
    assert split.signs(stats, jnp.arange(4)).tolist() == [0, 0, -1, 1]


@pytest.mark.parametrize("window", ["ema", "epoch"])
def test_a_class_that_was_hard_long_ago_is_not(window):
    """A mean in float32 stops short of what it comes ever closer to."""
    labels, right = jnp.repeat(jnp.arange(4), 5), jnp.repeat(jnp.eye(4), 5, axis=0)
    members = membership.by_class(labels, jnp.ones(20), 4)

    def batch(stats, logits):
        stats = class_stats.observe_batch(stats, logits, members, softmax_statistic)
        return class_stats.end_batch(stats, members), None

    @quick_jit
    def learned():
        wrong = right.at[:5].set(jnp.roll(right[:5], 1, axis=1))
        # An epoch forgets nothing, and sees the class err in no batch.
        hard = jnp.broadcast_to(wrong, (300 if window == "ema" else 0, 20, 4))
        stats, _ = jax.lax.scan(batch, class_stats.init(4), hard)
        stats, _ = jax.lax.scan(batch, stats, jnp.broadcast_to(right, (3000, 20, 4)))
        return class_stats.end_epoch(stats)

    split = lpa_jax.splits.mean_threshold("accuracy", window)
    assert split.signs(learned(), jnp.arange(4)).tolist() == [0, 0, 0, 0]


def test_nothing_is_known_at_the_first_step():
    stats = class_stats.init(4)
    for split in (
        lpa_jax.splits.mean_threshold(),
        lpa_jax.splits.threshold(0.5),
        lpa_jax.splits.tail(2),
    ):
        assert split.signs(stats, jnp.arange(4)).tolist() == [0] * 4
        assert split.spread(stats, jnp.arange(4)).tolist() == [0] * 4


@pytest.mark.parametrize(
    "split",
    [
        lpa_jax.splits.mean_threshold(),
        lpa_jax.splits.threshold(0.6),
        lpa_jax.splits.tail(2, [3, 9, 1, 2], head_scale=0.5),
        lpa_jax.splits.all_positive(),
    ],
)
def test_an_inverted_split_has_the_other_signs_and_the_same_bounds(split):
    stats, classes = known([0.2, 0.5, 0.8, 0.9], [3.0, 5.0, 2.0, 0.0]), jnp.arange(4)
    inverted = lpa_jax.splits.inverted(split)
    assert inverted.signs(stats, classes).tolist() == [-s for s in split.signs(stats, classes)]
    assert inverted.spread(stats, classes).tolist() == split.spread(stats, classes).tolist()
    twice = lpa_jax.splits.inverted(inverted)
    assert twice.signs(stats, classes).tolist() == split.signs(stats, classes).tolist()


def test_with_an_inverted_split_lpg_dampens_the_class_with_the_highest_loss():
    stats = known([0.9, 0.1, 0.8, 0.7], [5.0] * 4)
    labels = jnp.arange(4)
    gradients = jax.nn.softmax(jnp.zeros((4, 4))) - jnp.eye(4)
    inverted = lpa_jax.splits.inverted(lpa_jax.splits.mean_threshold())
    sizes = []
    for split in (None, inverted):
        lpg = lpa_jax.lpg(0.2, split=split)
        moved, _ = lpg.update(
            gradients,
            lpg.init(gradients),
            labels=labels,
            targets=jnp.eye(4),
            weights=jnp.ones(4),
            class_stats=stats,
        )
        sizes.append(jnp.linalg.norm(moved, axis=1) - jnp.linalg.norm(gradients, axis=1))
    np.testing.assert_allclose(sizes[0], [-0.2, 0.2, -0.2, -0.2], rtol=1e-4)
    np.testing.assert_allclose(sizes[1], [0.2, -0.2, 0.2, 0.2], rtol=1e-4)


def test_head_classes_of_the_tail_split_have_a_scale_of_their_own():
    stats, classes = class_stats.init(4), jnp.arange(4)
    split = lpa_jax.splits.tail(2, [50, 100, 10, 5], head_scale=0.6)
    np.testing.assert_allclose(split.spread(stats, classes), [0.3, 0.6, 0.5, 1.0], rtol=1e-6)


def test_constant_splits_have_one_bound():
    stats = class_stats.init(4)
    for split, sign in ((lpa_jax.splits.all_positive(), 1), (lpa_jax.splits.all_negative(), -1)):
        assert split.signs(stats, jnp.arange(4)).tolist() == [sign] * 4
        assert split.spread(stats, jnp.arange(4)).tolist() == [0] * 4


@pytest.mark.parametrize("size", SIZES)
def test_a_row_without_members_has_neither_sign_nor_bound(size):
    planner = class_plan.planner(0.5, 0.0, lpa_jax.splits.all_positive())
    members = membership.by_class(LABELS, WEIGHTS, size)
    plan = planner.of(members, class_stats.init(size), 0)
    assert plan.sign.tolist() == (members.counts > 0).tolist()
    assert plan.radius.tolist() == (0.5 * (members.counts > 0)).tolist()


# ---------------------------------------------------------------- projected steps


each_scale = pytest.mark.parametrize("scale", [1e-35, 1e-10, 1.0, 1e18, 1e37])


@each_scale
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_any_size_have_a_direction_and_a_norm(scale, dtype):
    rows = (scale * jnp.array([[3.0, 4.1], [0.0, -2.0], [0.0, 0.0]])).astype(dtype)
    exact = np.asarray(rows, np.float64)
    norms = np.linalg.norm(exact, axis=1)
    expected = exact / np.where(norms > 0, norms, 1.0)[:, None]
    np.testing.assert_allclose(pgd.unit(rows), expected, rtol=1e-6)
    np.testing.assert_allclose(pgd.norms(rows), norms, rtol=1e-6)
    tree = {"a": rows[0], "b": rows[1:]}
    np.testing.assert_allclose(pgd.tree_norm(tree), np.linalg.norm(exact), rtol=1e-6)


def test_nothing_has_no_length():
    assert pgd.norms(jnp.zeros((2, 0))).tolist() == [0, 0]
    assert pgd.tree_norm({"a": jnp.zeros(3), "b": jnp.zeros((2, 0))}) == 0


@each_scale
def test_rows_of_any_size_are_projected(scale):
    rows = scale * jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3.0, 4.0]])
    radii = scale * jnp.array([1.0, 1.0, 1.0, 0.0])
    expected = scale * np.array([[0.6, 0.8], [0.3, 0.4], [0, 0], [0, 0]], np.float32)
    np.testing.assert_allclose(pgd.project(rows, radii), expected, rtol=1e-6)


@each_scale
@pytest.mark.parametrize("normalized", [True, False])
def test_gradients_of_any_size_are_climbed(scale, normalized):
    uphill = scale * jnp.array([[3.0, 4.0], [0.0, 0.0]])
    delta = pgd.ascend(
        lambda _: uphill, jnp.zeros((2, 2)), jnp.ones(2), jnp.full(2, 0.5), 3, normalized=normalized
    )
    # Three raw steps of a third of twice the radius each, or as far as the ball goes.
    length = 0.5 if normalized else 0.5 * min(2 * 5 * scale, 1.0)
    np.testing.assert_allclose(delta, [[0.6 * length, 0.8 * length], [0.0, 0.0]], rtol=1e-5)


@each_scale
def test_sam_moves_by_its_radius_whatever_the_size_of_the_gradient(scale):
    params, grads = {"a": jnp.zeros(2), "b": jnp.ones(1)}, {"a": jnp.ones(2), "b": jnp.ones(1)}
    sam = lpa_jax.sam(0.3)
    moved, _ = sam.update(
        jax.tree.map(lambda grad: scale * grad, grads),
        sam.init(grads),
        params,
        gradient_fn=lambda params: (0.0, params),
    )
    close(moved, jax.tree.map(lambda weight: weight + 0.3 / 3**0.5, params))


def test_stretching_stops_at_the_origin():
    mean = jnp.array([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    signs, radii = jnp.array([1.0, -1.0, -1.0, 0.0, 1.0]), jnp.array([2.0, 2.0, 9.0, 2.0, 2.0])
    moved = pgd.stretch(mean, signs, radii)
    close(moved, jnp.array([[1.2, 1.6], [-1.2, -1.6], [-3.0, -4.0], [0.0, 0.0], [0.0, 0.0]]))


def test_steps_uphill_go_up_and_see_values_of_their_own_type():
    values, seen = jnp.full((1, 2), 0.5, jnp.bfloat16), set()

    def gradient(moved):
        seen.add(moved.dtype)
        return jnp.array([[3.0, -4.0]], jnp.bfloat16)

    start = jnp.zeros((1, 2), jnp.float32)
    moved = pgd.climb_within(gradient, values, start, 0.25, 0.25, 2, "l2", None)
    np.testing.assert_allclose(moved, [[0.15, -0.2]], rtol=2e-2)
    assert moved.dtype == jnp.float32
    assert seen == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("steps", [1, 3, pgd.UNROLL, pgd.UNROLL + 2])
@pytest.mark.parametrize("normalized", [True, False])
def test_unrolled_and_looped_steps_are_the_same(steps, normalized):
    target = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
    start, signs, radii = jnp.zeros((2, 2)), jnp.array([1.0, -1.0]), jnp.array([0.5, 3.0])

    # It turns, so that a step beyond the ball would show in the next.
    turn = jnp.array([[1.0, 2.0], [-2.0, 1.0]])

    def gradient(delta):
        return delta @ turn - target

    delta = np.zeros((2, 2))
    for _ in range(steps):
        for row in range(2):
            away = delta[row] @ np.asarray(turn) - np.asarray(target[row])
            size = signs[row] * 2 * radii[row] / steps
            delta[row] += size * away / (np.linalg.norm(away) if normalized else 1.0)
            delta[row] *= min(1.0, radii[row] / np.linalg.norm(delta[row]))
    ascend = functools.partial(pgd.ascend, normalized=normalized)
    close(quick_jit(lambda: ascend(gradient, start, signs, radii, steps))(), delta)


# ---------------------------------------------------------------- degenerate batches


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="hidden")(x))
        return nn.Dense(3, name="head")(x)


@functools.cache
def setting():
    inputs = jax.random.normal(jax.random.key(0), (6, 5))
    labels = jnp.array([0, 1, 2, 0, 1, 0], jnp.int32)
    return jax.jit(Net().init)(jax.random.key(1), inputs), inputs, labels


@functools.cache
def everything():
    """Return the step of a chain of all that divides or scales by something, compiled."""
    counts = [1e4, 10.0, 1.0]
    up, tail = lpa_jax.splits.all_positive(), lpa_jax.splits.tail(1)
    steps = {"steps": 2, "split": up}
    chain = lpa_jax.chain(
        lpa_jax.adversarial("inputs", 0.1, norm="l2"),
        lpa_jax.lpa("hidden", 0.3, low_rank=1, **steps),
        lpa_jax.lpa("hidden", 0.3, radius="relative", **steps),
        lpa_jax.lpa("hidden", 0.3, objective="norm", split=tail, delta_epsilon=0.1),
        lpa_jax.lpa("hidden", 0.3, granularity="sample", **steps),
        lpa_jax.shake("hidden", 0.5),
        lpa_jax.isda("hidden", 0.5, 3),
        lpa_jax.isda("hidden", 0.5, 3, diagonal=True, num_steps=2),
        lpa_jax.additive_margin(0.5, scale=2.0),
        lpa_jax.lpl(0.3, split=lpa_jax.splits.mean_threshold(window="batch")),
        lpa_jax.lpl(0.3, solver="projected", split=up),
        lpa_jax.lpg(0.3, split=up),
        lpa_jax.lpg(0.3, split=lpa_jax.splits.all_negative(), solver="iterative"),
        lpa_jax.reweight(counts, 1.0),
        lpa_jax.drw(counts, start=1),
        lpa_jax.lpl(0.3, solver="rounded_steps", step_size=0.1, split=up),
        lpa_jax.elr(6, 3.0),
        lpa_jax.gradient_clipping(0.1),
        lpa_jax.sam(0.1),
        lpa_jax.asam(0.1, eta=0.0),
    )
    step = lpa_jax.value_and_grad(Net().apply, chain, num_classes=3)

    @quick_jit
    def call(variables, inputs, labels, weights):
        state = step.init(variables, inputs, labels)
        for _ in range(2):
            given = {"weights": weights, "extra": {"examples": jnp.arange(6)}}
            result = step(variables, state, inputs, labels, jax.random.key(0), **given)
            state = result[2]
        return result

    return call


def scaled(factor):
    variables, inputs, labels = setting()
    return jax.tree.map(lambda w: factor * w, variables), inputs, labels, jnp.ones(6)


DEGENERATE = {
    "zero gradients": lambda: scaled(0.0),
    "huge logits": lambda: scaled(1e4),
    "tiny parameters": lambda: scaled(1e-30),
    "constant features": lambda: (setting()[0], jnp.ones((6, 5)), setting()[2], jnp.ones(6)),
    "zero inputs": lambda: (setting()[0], jnp.zeros((6, 5)), setting()[2], jnp.ones(6)),
    "one class": lambda: (*setting()[:2], jnp.zeros(6, jnp.int32), jnp.ones(6)),
    "one example": lambda: (*setting(), jnp.zeros(6).at[2].set(1.0)),
    "padding alone": lambda: (*setting(), jnp.zeros(6)),
}


@pytest.mark.guarantee("degenerate-batches")
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_batches_give_numbers(name):
    chex.assert_tree_all_finite(everything()(*DEGENERATE[name]()))


def test_padding_alone_teaches_nothing():
    (loss, _), grads, state = everything()(*DEGENERATE["padding alone"]())
    assert loss == 0
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
    chex.assert_trees_all_equal(state.class_stats, class_stats.init(3))


# ---------------------------------------------------------------- random draws


def draws(perturbation, value, number, **extra):
    """Apply a perturbation with as many keys."""

    def update(key):
        state = perturbation.init(value)
        return perturbation.update(value, state, key=key, weights=jnp.ones(len(value)), **extra)[0]

    return quick_jit(jax.vmap(update))(jax.random.split(jax.random.key(3), number))


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    drawn = draws(lpa_jax.dropout("hidden", 0.3), jnp.full((50, 8), 2.0), 50)
    assert np.unique(drawn).tolist() == pytest.approx([0.0, 2 / 0.7])
    assert (drawn == 0).mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_where_all_is_dropped_there_is_no_gradient(dtype):
    drop = lpa_jax.dropout("hidden", lambda step: jnp.float32(1.0))

    def total(value):
        return jnp.sum(drop.update(value, drop.init(value), key=jax.random.key(0))[0])

    value, gradient = jax.value_and_grad(total)(jnp.ones((2, 3), dtype))
    assert value == 0
    assert (gradient == 0).all()


def test_dropblock_zeroes_whole_blocks_and_keeps_each_mean():
    size = 3
    drawn = np.asarray(
        draws(lpa_jax.dropblock("hidden", 0.2, size), jnp.full((4, 8, 7, 3), 2.0), 50)
    ).reshape(200, 8, 7, 3)
    dropped = drawn == 0
    covered = np.zeros_like(dropped)
    for row in range(8 - size + 1):
        for column in range(7 - size + 1):
            block = np.s_[:, row : row + size, column : column + size]
            whole = dropped[block].all(axis=(1, 2), keepdims=True)
            covered[block] |= whole
    assert (dropped == covered).all()
    # Blocks overlap: somewhat fewer entries are dropped than the rate says.
    assert 0.15 < dropped.mean() < 0.2
    assert drawn.mean(axis=(1, 2, 3)) == pytest.approx(2.0, rel=1e-5)
    # Every example and channel has its own blocks.
    assert (dropped[..., 0] != dropped[..., 1]).any(axis=(1, 2)).mean() > 0.5
    assert (dropped[0::2] != dropped[1::2]).any(axis=(1, 2, 3)).mean() > 0.5


def test_blocks_of_one_are_dropout():
    dropped = draws(lpa_jax.dropblock("hidden", 0.3, 1), jnp.ones((4, 8, 8, 3)), 50) == 0
    assert dropped.mean() == pytest.approx(0.3, abs=0.01)


def test_an_example_that_is_dropped_whole_is_zero():
    drawn = draws(lpa_jax.dropblock("hidden", 0.9, 2), jnp.ones((4, 2, 2, 1)), 20)
    assert ((drawn == 0).all(axis=(2, 3, 4)) | (drawn == 1).all(axis=(2, 3, 4))).all()
    assert (drawn == 0).mean() == pytest.approx(0.9, abs=0.1)


def test_dropblock_refuses_values_without_room():
    block = lpa_jax.dropblock("hidden", 0.1, 3)
    for value in (jnp.ones((2, 8)), jnp.ones((2, 8, 2, 1))):
        with pytest.raises(ValueError, match="dropblock at 'hidden' needs"):
            block.update(value, block.init(value), key=jax.random.key(0))


def test_noise_is_normal():
    drawn = draws(lpa_jax.gaussian_noise("inputs", 0.2), jnp.ones((50, 8)), 50)
    assert drawn.mean() == pytest.approx(1, abs=0.01)
    assert drawn.std() == pytest.approx(0.2, rel=0.02)


def test_disturbed_labels_are_drawn_from_all_classes():
    targets = jax.nn.one_hot(jnp.zeros(400, jnp.int32), 5)
    drawn = draws(lpa_jax.disturb_label(0.5), targets, 20)
    assert (drawn.sum(axis=-1) == 1).all()
    assert drawn.mean(axis=(0, 1)) == pytest.approx([0.6, 0.1, 0.1, 0.1, 0.1], abs=0.02)


@pytest.mark.parametrize("alpha", [0.2, 2.0])
def test_mixup_draws_lambda_from_a_beta_distribution(alpha):
    targets = jnp.eye(2)
    drawn = draws(lpa_jax.mixup(alpha), targets, 2000, site="labels")
    kept = drawn[:, 0, 0]
    assert kept.mean() == pytest.approx(0.5, abs=0.03)
    assert kept.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    close(drawn[:, 1, 1], kept)


def test_manifold_mixup_draws_each_layer_equally_often():
    mixup, value = lpa_jax.manifold_mixup(("inputs", "a", "b"), 1.0), jnp.eye(2)
    mixed = [
        (draws(mixup, value, 600, site=site) != value).any(axis=(1, 2))
        for site in ("inputs", "a", "b")
    ]
    assert (np.sum(mixed, axis=0) == 1).all()
    assert np.mean(mixed, axis=1) == pytest.approx([1 / 3] * 3, abs=0.06)
