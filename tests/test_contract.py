"""What every perturbation promises, tested for all of them: a new one comes with its row."""

from collections.abc import Callable
import dataclasses
import functools
import math
import re
from typing import Any

import chex
import flax.linen as nn
import jax
from jax import ShapeDtypeStruct
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from probes import absolute, avals, fading, Line, line_of, quick_jit, storable, watched
import pytest

import lpa_jax
from lpa_jax.core import class_stats
from lpa_jax.methods import METHODS

NUM_CLASSES = 6
BATCH = 16
EXTRA = {
    "examples": jnp.asarray(np.random.default_rng(3).permutation(2 * BATCH)[:BATCH]),
    "domains": jnp.arange(BATCH) % 4,
}
COUNTS = [40, 10, 20, 5, 30, 2]
ALL = lpa_jax.splits.all_positive()
DOWN = lpa_jax.splits.all_negative()
# Entries of "first" that share one entry of a perturbation.
POSITIONS = math.sqrt(16)


def lpa(label, amount=0.3, ball: Any = POSITIONS, site: Any = "first", **arguments):
    arguments = {"site": site, "steps": 2, "split": ALL, "radius": "absolute"} | arguments
    sites = (site,) if isinstance(site, str) else site
    return Line(f"lpa-{label}", lpa_jax.lpa, sites, "epsilon", amount, arguments, ball)


def clipping(sharpness):
    return lpa_jax.gradient_clipping(1.0 / sharpness)


def mixup_cutmix(alpha):
    return lpa_jax.mixup_cutmix(alpha, alpha)


def logits(factory, strength, amount, *, label="", **arguments):
    ball = arguments.pop("ball", None)
    name = factory.__name__ + label
    return Line(name, factory, ("logits",), strength, amount, arguments, ball)


def adversarial(norm, site, **arguments):
    arguments |= {"site": site, "norm": norm, "steps": 2}
    order = np.inf if norm == "linf" else 2
    make = lpa_jax.adversarial
    return Line(f"adversarial-{norm}", make, (site,), "epsilon", 0.1, arguments, 1.0, order)


def adaptive(epsilon):
    return lpa_jax.adaptive(absolute(("first", "second"), epsilon, steps=1, split=ALL), every=3)


def add_noise(eta):
    return optax.add_noise(eta, 0.55, key=0)


def clip(sharpness):
    return optax.clip(1.0 / sharpness)


VARIANTS = [
    Line(
        "lpa",
        lpa_jax.lpa,
        ("first",),
        "epsilon",
        0.3,
        {"site": "first", "split": lpa_jax.splits.mean_threshold("accuracy")},
        "relative",
    ),
    lpa("raw", direction="raw", split=DOWN),
    lpa("full", sharing="full", ball=1.0),
    lpa("absolute"),
    lpa("low-rank", low_rank=1, sharing="full", ball=1.0),
    lpa("norm", objective="norm", split=lpa_jax.splits.mean_threshold(window="epoch")),
    lpa("sample", granularity="sample", radius="relative", ball="relative-sample"),
    lpa("inputs", site="inputs"),
    lpa("logits", site="logits", ball=1.0, split=lpa_jax.splits.mean_threshold(window="batch")),
    lpa("several", site=("first", "second")),
    lpa("loop", site="second", steps=10, ball=1.0, split=lpa_jax.splits.threshold(0.5)),
    # Step 0 measures, and perturbs nothing.
    Line("adaptive", adaptive, ("first", "second"), "epsilon", 0.3, {}, POSITIONS, step=1),
    logits(lpa_jax.lpl, "epsilon", 0.3, ball=math.sqrt(2)),
    logits(lpa_jax.lpl, "epsilon", 0.3, label="-projected", solver="projected", ball=1.0),
    logits(
        lpa_jax.lpl, "epsilon", 0.3, label="-rounded", solver="rounded_steps", ball=math.sqrt(2)
    ),
    Line("lpg", lpa_jax.lpg, ("logit_grads",), "epsilon", 0.3, {}, 1.0),
    Line(
        "lpg-inverted",
        lpa_jax.lpg,
        ("logit_grads",),
        "epsilon",
        0.3,
        {"split": lpa_jax.splits.inverted(lpa_jax.splits.mean_threshold())},
        1.0,
    ),
    Line(
        "lpg-iterative",
        lpa_jax.lpg,
        ("logit_grads",),
        "epsilon",
        0.3,
        {"solver": "iterative", "split": lpa_jax.splits.tail(2, COUNTS)},
        1.0,
    ),
    adversarial("linf", "inputs", bounds=(-1.0, 1.0)),
    adversarial("l2", "second"),
    Line(
        "isda-diagonal",
        lpa_jax.isda,
        ("second", "logits"),
        "strength",
        2.0,
        {"site": "second", "num_classes": NUM_CLASSES, "diagonal": True},
    ),
    Line(
        "reweight-normalized",
        lpa_jax.reweight,
        ("logit_grads",),
        "beta",
        0.9,
        {"class_counts": COUNTS, "normalize": True},
    ),
    Line("gradient_clipping", clipping, ("param_grads",), "sharpness", 20.0, schedule=False),
    # The domains have as many examples each, and so weigh the same without strength.
    Line("group_dro", lpa_jax.group_dro, ("logit_grads",), "eta", 0.5, {"num_domains": 4}),
    Line("mixup_cutmix", mixup_cutmix, ("inputs", "labels"), "alpha", 1.0),
    Line("at-add_noise", add_noise, ("first",), "eta", 0.1, schedule=False),
    Line("at-clip", clip, ("logit_grads",), "sharpness", 20.0, schedule=False),
]
NAMED = {line.label for line in VARIANTS}
FACTS = {
    "class_counts": COUNTS,
    "mean": (0.1, -0.2),
    "num_classes": NUM_CLASSES,
    "num_domains": 4,
    "num_examples": 2 * BATCH,
}
# A method without a strength has a line above.
ROWS = [line_of(name, FACTS) for name in METHODS if name not in NAMED]
TABLE = [*VARIANTS, *ROWS]
LABELS = [line.label for line in TABLE]


def each(lines):
    return pytest.mark.parametrize("line", lines, ids=lambda line: line.label)


each_line = each(TABLE)
each_scheduled_line = each([line for line in TABLE if line.schedule])
each_bounded_line = each([line for line in TABLE if line.ball is not None])
# A line that varies another one, such as lpa-full, compiles for eight devices among the slow tests.
each_line_on_devices = each(
    [pytest.param(line, marks=pytest.mark.slow) if "-" in line.label else line for line in TABLE]
)

# Of those that compile for eight devices, these are of each kind: class-level, mixing, by domain.
MESHED = ("lpa", "lpl", "lpg", "mixup", "coral", "dann", "sam")
some_lines_on_a_mesh = each(
    [line if line.label in MESHED else pytest.param(line, marks=pytest.mark.slow) for line in TABLE]
)


class Net(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first", dtype=self.dtype)(x)
        x = nn.tanh(x).mean(axis=(1, 2))
        x = nn.Dense(5, name="second", dtype=self.dtype)(x)
        return nn.Dense(NUM_CLASSES, name="head", dtype=self.dtype)(nn.tanh(x))


def batch():
    """Return inputs in [-1, 1] and labels among which the last class does not occur."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.uniform(-1, 1, (BATCH, 4, 4, 2)), jnp.float32)
    return inputs, jnp.asarray(rng.permutation(np.arange(BATCH) % (NUM_CLASSES - 1)), jnp.int32)


def seen():
    """Return statistics in which classes lie on both sides of every threshold."""
    confidence = jnp.array([0.9, 0.2, 0.6, 0.7, 0.1, 0.0])
    weight = jnp.array([10.0] * 5 + [0.0])
    means = class_stats.Means(confidence, 0.8 * confidence, weight, num_seen=jnp.int32(5))
    frequency = jnp.array(COUNTS, jnp.float32)
    return class_stats.init(NUM_CLASSES)._replace(
        frequency=frequency, ema=means, epoch=jax.tree.map(jnp.copy, means)
    )


NET = Net()


def step_of(perturbation, model=NET):
    return lpa_jax.value_and_grad(model.apply, perturbation, num_classes=NUM_CLASSES)


@dataclasses.dataclass
class Case:
    """A line, its jitted step, and what it was given and gave at step 0."""

    line: Line
    call: Callable[..., Any]
    variables: Any
    fresh: Any
    state: Any
    result: Any

    def run(self, strength=None, state=None, **given):
        inputs, labels = batch()
        strength = self.line.amount if strength is None else strength
        given = {"inputs": inputs, "labels": labels, "weights": jnp.ones(BATCH)} | given
        state = self.state if state is None else state
        return self.call(jnp.float32(strength), self.variables, state, **given)

    @property
    def next_state(self):
        return self.result[2]

    def before(self, site, result=None):
        return (result or self.result)[2].perturbations[self.line.sites.index(site)]

    def after(self, site, result=None):
        at = len(self.line.sites) + 1 + self.line.sites.index(site)
        return (result or self.result)[2].perturbations[at]


@functools.cache
def variables_of():
    return jax.jit(NET.init)(jax.random.key(1), batch()[0])


@functools.cache
def plain(perturbation=()):
    @quick_jit
    def call(step_count, variables, inputs, labels, weights):
        step = step_of(lpa_jax.chain(perturbation))
        state = step.init(variables, inputs, labels)._replace(step=step_count, class_stats=seen())
        return step(variables, state, inputs, labels, jax.random.key(7), weights=weights)

    return call(jnp.int32(0), variables_of(), *batch(), jnp.ones(BATCH))


def measured():
    """Return the state after a step that only reads the class statistics."""
    read = lpa_jax.stateless("logits", lambda value, **_: value, class_level=True)
    return plain(read)[2]


def jitted(make):
    @quick_jit
    def call(strength, variables, state, inputs, labels, weights):
        step = step_of(watched(make(strength)))
        given = {"weights": weights, "extra": EXTRA}
        return step(variables, state, inputs, labels, jax.random.key(7), **given)

    return call


@functools.cache
def case_of(label):
    line = TABLE[LABELS.index(label)]
    call = jitted(lambda strength: line.make(fading(line, strength)))
    fresh = step_of(watched(line.make(line.amount))).init(variables_of(), *batch())
    state = fresh._replace(class_stats=seen(), step=jnp.int32(line.step))
    case = Case(line, call, variables_of(), fresh, state, None)
    case.result = case.run()
    return case


def distances(line, before, after):
    axes = tuple(range(1, before.ndim))
    change = np.abs(np.asarray(after, np.float64) - np.asarray(before, np.float64))
    return change.max(axes) if line.norm == np.inf else np.sqrt((change**2).sum(axes))


def norms(values):
    return np.sqrt((np.asarray(values, np.float64).reshape(BATCH, -1) ** 2).sum(1))


# ---------------------------------------------------------------- what one step does


@each_line
def test_positive_strength_changes_the_gradient(line):
    case = case_of(line.label)
    plain_grads, grads = plain()[1], case.result[1]
    chex.assert_tree_all_finite(storable(case.result))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(grads, plain_grads, rtol=1e-4, atol=1e-7)


@each_line
def test_zero_strength_is_plain_training(line):
    case = case_of(line.label)
    result = case.run(strength=0.0)
    (loss, aux), grads, state = result
    (plain_loss, plain_aux), plain_grads, plain_state = plain()
    # The value is the same to the last bit, what follows up to the order XLA sums it in.
    for site in line.sites:
        chex.assert_trees_all_equal(case.after(site, result), case.before(site, result))
    got = loss, aux["logits"], grads
    expected = plain_loss, plain_aux["logits"], plain_grads
    if line.make(line.amount).class_level:
        got, expected = (*got, state.class_stats), (*expected, measured().class_stats)
    else:
        chex.assert_trees_all_equal(state.class_stats, plain_state.class_stats)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


@each_scheduled_line
def test_a_schedule_is_evaluated_at_the_step(line):
    case = case_of(line.label)
    # The schedule is 0 at the next step.
    later = case.state._replace(step=case.state.step + 1)
    (loss, _), grads, _ = case.run(state=later)
    plain_result = plain()
    expected = plain_result[0][0], plain_result[1]
    chex.assert_trees_all_close((loss, grads), expected, rtol=1e-5, atol=1e-7)


@each_bounded_line
def test_no_example_leaves_its_ball(line):
    case = case_of(line.label)
    _, labels = batch()
    for site in line.sites:
        before, after = case.before(site), case.after(site)
        moved = distances(line, before, after)
        if line.ball == "relative":
            limit = np.array([norms(before)[labels == label].mean() for label in labels])
        elif line.ball == "relative-sample":
            limit = norms(before)
        elif site == "second":
            limit = np.ones(BATCH)
        else:
            limit = np.full(BATCH, line.ball)
        limit = line.amount * limit
        # A float32 sum has lost this much of what was added.
        lost = 1e-6 * np.abs(before).max() * math.sqrt(before[0].size)
        assert (moved <= limit * (1 + 1e-5) + lost).all()
        assert moved.max() > 0.5 * limit.max() or line.label in ("lpa-raw", "adaptive")
        norm = np.asarray(case.result[0][1]["metrics"][site]["norm"])
        if line.norm == 2 and line.ball != "relative-sample":
            bound = max(limit) if line.ball != "relative" else limit.max()
            assert (norm <= bound * (1 + 1e-5)).all()


@each_line
def test_metrics_are_class_means_of_the_change(line):
    case = case_of(line.label)
    metrics = case.result[0][1]["metrics"]
    assert set(metrics) == set(line.sites)
    for site in line.sites:
        if site == "param_grads":
            squares = [np.sum(np.square(leaf)) for leaf in jax.tree.leaves(case.result[1])]
            assert float(metrics[site]["norm"]) == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
            continue
        hard = np.eye(NUM_CLASSES)[np.asarray(batch()[1])]
        mixed = line.mixes and site != "inputs"
        shares = np.asarray(case.after("labels")) if mixed else hard
        before, after = np.asarray(case.before(site)), np.asarray(case.after(site))
        norm, size = norms(after - before), norms(before)
        for label in range(NUM_CLASSES):
            members = [i for i in range(BATCH) if shares[i, label] > 0]
            count = sum(shares[i, label] for i in members)
            means = [
                sum(shares[i, label] * values[i] for i in members) / count if count else 0.0
                for values in (norm, norm / size)
            ]
            got = {
                name: float(metrics[site][name][label]) for name in ("norm", "relative", "count")
            }
            expected = dict(zip(got, [*means, count], strict=True))
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


@each_line
def test_an_absent_class_is_not_perturbed(line):
    case = case_of(line.label)
    metrics = case.result[0][1]["metrics"]
    for site in set(line.sites) - {"param_grads"}:
        for name in ("norm", "relative", "count"):
            assert metrics[site][name][NUM_CLASSES - 1] == 0.0
            assert metrics[site][name].dtype == jnp.float32


@each_line
def test_padding_may_hold_anything(line):
    case = case_of(line.label)
    inputs, labels = batch()
    weights = jnp.ones(BATCH).at[jnp.array([2, 3, 9])].set(0.0)
    padding = weights == 0
    results = []
    for content, classes in ((0.5, labels), (jnp.nan, (labels + 2) % NUM_CLASSES)):
        garbage = jnp.where(padding[:, None, None, None], content, inputs)
        classes = jnp.where(padding, classes, labels)
        (loss, aux), grads, state = case.run(inputs=garbage, labels=classes, weights=weights)
        own = storable(state.perturbations[len(line.sites)])
        values = [
            jax.tree.map(
                lambda v: jnp.where(padding.reshape((-1,) + (1,) * (v.ndim - 1)), 0, v),
                case.after(site, ((loss, aux), grads, state)),
            )
            for site in line.sites
            if site != "param_grads"
        ]
        results.append((loss, grads, aux["metrics"], state.class_stats, own, values))
    chex.assert_tree_all_finite(results)
    chex.assert_trees_all_equal(*results)


# ---------------------------------------------------------------- state and compilation


@each_line
def test_the_state_keeps_its_structure_and_types(line):
    case = case_of(line.label)
    second = case.run(state=case.next_state)[2]
    assert avals(case.fresh) == avals(case.state) == avals(case.next_state) == avals(second)
    steps = [int(state.step) for state in (case.state, case.next_state, second)]
    assert steps == [line.step, line.step + 1, line.step + 2]


@each_line
def test_a_fresh_state_can_be_donated(line):
    case = case_of(line.label)
    # Donating one buffer twice is an error of XLA's at run time.
    leaves = [leaf for leaf in jax.tree.leaves(storable(case.fresh)) if leaf.size]
    places = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(places)) == len(places)


@each_line
def test_a_second_and_third_step_trace_nothing(line):
    case = case_of(line.label)
    state = case.run(state=case.next_state)[2]
    with jax.no_tracing(True):
        case.run(strength=0.5 * line.amount, state=state)


@each_line_on_devices
def test_eight_devices_under_optax_wrappers_agree_with_one_without(line):
    case = case_of(line.label)
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=axes)
    split, whole = (jax.NamedSharding(mesh, jax.P(*axis)) for axis in (("data",), ()))
    inputs, labels = jax.device_put(batch(), split)
    weights = jax.device_put(jnp.ones(BATCH), split)
    call = jitted(line.wrapped)
    state = step_of(watched(line.wrapped(line.amount))).init(variables_of(), *batch())
    state = state._replace(class_stats=seen(), step=jnp.int32(line.step))
    strength, variables, state = jax.device_put(
        (jnp.float32(line.amount), variables_of(), state), whole
    )
    (loss, aux), grads, new = call(strength, variables, state, inputs, labels, weights)
    assert len(loss.devices()) == 8
    ((one_loss, one_aux), one_grads, one_new) = case.result
    at = len(line.sites)
    chex.assert_trees_all_close(
        jax.device_get((loss, aux["logits"], grads)),
        jax.device_get((one_loss, one_aux["logits"], one_grads)),
        rtol=1e-5,
        atol=1e-6,
    )
    # A wrapper hides whether the statistics are read; those nothing reads may be taken later.
    if getattr(line.make(line.amount), "report", None) is not None:
        stats = jax.device_get((new.class_stats, one_new.class_stats))
        chex.assert_trees_all_close(*stats, rtol=1e-5, atol=1e-6)
    seen_values = [s.perturbations[:at] + s.perturbations[at + 1 :] for s in (new, one_new)]
    chex.assert_trees_all_close(*jax.device_get(seen_values), rtol=1e-5, atol=1e-6)
    assert avals(state) == avals(new)


# ---------------------------------------------------------------- traced, not compiled


class Read(class_stats.ClassStats):
    """Class statistics that tell whether they are read."""

    asked = False

    def __getattribute__(self, name):
        if name in class_stats.ClassStats._fields:
            self.asked = True
        return super().__getattribute__(name)


def direct(line, dtype, stats=None, gradient_fn=None):
    """Return the shapes of a site's value and of what `update` makes of it."""
    perturbation = line.make(line.amount)
    site = line.sites[0]
    inputs, labels = batch()
    known = lpa_jax.list_sites(NET.apply, variables_of(), inputs)
    if site == "param_grads":
        value = jax.tree.map(lambda p: ShapeDtypeStruct(p.shape, dtype), variables_of()["params"])
    else:
        value = ShapeDtypeStruct(known[site].shape, dtype)

    def losses(value):
        return jnp.zeros(BATCH), value

    def update(value):
        return perturbation.update(
            value,
            perturbation.init(value),
            value if site == "param_grads" else variables_of()["params"],
            site=site,
            key=jax.random.key(0),
            step=jnp.int32(0),
            labels=labels,
            targets=jax.nn.one_hot(labels, NUM_CLASSES),
            weights=jnp.ones(BATCH),
            **EXTRA,
            class_stats=seen() if stats is None else stats,
            gradient_fn=gradient_fn or losses,
            logits=jnp.zeros((BATCH, NUM_CLASSES)),
            losses=jnp.zeros(BATCH),
            never_heard_of="this",
        )[0]

    return value, jax.eval_shape(update, value)


@each_line
def test_update_keeps_the_type_and_ignores_unknown_arguments(line):
    # Targets are always float32.
    for dtype in (jnp.float32,) if line.sites == ("labels",) else (jnp.float32, jnp.bfloat16):
        value, new = direct(line, dtype)
        chex.assert_trees_all_equal_shapes_and_dtypes(value, new)


@each_line
def test_declarations_match_what_update_does(line):
    perturbation, stats, asked = line.make(line.amount), Read(*seen()), []

    def gradient_fn(value):
        asked.append(value)
        return jnp.zeros(BATCH), value

    direct(line, jnp.float32, stats, gradient_fn)
    assert perturbation.needs_gradient == bool(asked)
    assert perturbation.mixes == (len(line.sites) > 1 and "labels" in line.sites)
    # Whatever a split reads, what it decides is reported with the statistics.
    assert perturbation.class_level == (stats.asked or perturbation.report is not None)


@each_line
def test_a_bfloat16_network_has_float32_losses_and_gradients(line):
    model = Net(jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(1), batch()[0])
    step = step_of(watched(line.make(line.amount)), model)

    def run(variables, inputs, labels):
        state = step.init(variables, inputs, labels)
        key = jax.random.key(0)
        return state, step(variables, state, inputs, labels, key, extra=EXTRA)

    state, ((loss, _), grads, new) = jax.eval_shape(run, variables, *batch())
    assert loss.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, variables["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)


# ---------------------------------------------------------------- under JAX's strict modes


def traced(line, model=NET):
    """Trace a step from its first state to the next, computing nothing."""
    step = step_of(line.make(line.amount), model)
    variables = jax.eval_shape(model.init, jax.random.key(1), batch()[0])

    def run(variables, inputs, labels):
        state = step.init(variables, inputs, labels)
        given = {"weights": jnp.ones(BATCH), "extra": EXTRA}
        return step(variables, state, inputs, labels, jax.random.key(0), **given)

    return jax.eval_shape(run, variables, *batch())


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
# What optax computes of its own count is not ours to change.
@each([line for line in TABLE if line.label != "at-add_noise"])
def test_nothing_is_promoted_under_strict_promotion(line, dtype):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        traced(line, Net(dtype))
        value, new = direct(line, jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(value, new)


@each_line
def test_no_tracer_leaks(line):
    with jax.checking_leaks():
        traced(line)


@each_line
def test_debug_nans_finds_none(line):
    case = case_of(line.label)
    with jax.debug_nans(True):
        case.run()


@some_lines_on_a_mesh
def test_a_mesh_with_explicit_axes_agrees_with_one_device(line):
    case = case_of(line.label)
    mesh = jax.make_mesh((8,), ("data",))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axis)) for axis in (("data",), ()))
    inputs, labels, weights = jax.device_put((*batch(), jnp.ones(BATCH)), split)
    variables, state = jax.device_put((case.variables, case.state), whole)
    strength = jnp.float32(line.amount)
    (loss, aux), grads, new = case.call(strength, variables, state, inputs, labels, weights)
    ((one_loss, one_aux), one_grads, one_new) = case.result
    got, expected = jax.device_get(
        (
            storable((loss, aux["logits"], aux["metrics"], grads, new)),
            storable((one_loss, one_aux["logits"], one_aux["metrics"], one_grads, one_new)),
        )
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    assert jax.typeof(aux["logits"]).sharding.spec == jax.P("data", None)
    assert avals(state) == avals(new)


@pytest.mark.parametrize(
    "compiled",
    [pytest.param(False, marks=pytest.mark.slow, id="eager"), pytest.param(True, id="jit")],
)
def test_arrays_on_one_device_are_moved_to_the_explicit_mesh(compiled):
    line = TABLE[LABELS.index("lpl-projected")]
    step = step_of(line.make(line.amount))
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    inputs, labels = batch()
    state = step.init(variables_of(), inputs, labels)
    call = quick_jit(step) if compiled else step
    key = jax.random.key(0)
    one = call(variables_of(), state, inputs, labels, key)
    # A state fresh from `init` and the key are on one device.
    given = jax.device_put((inputs, labels), split)
    if compiled:
        state, key = jax.device_put((state, key), jax.NamedSharding(mesh, jax.P()))
    variables = jax.device_put(variables_of(), jax.NamedSharding(mesh, jax.P()))
    many = call(variables, state, *given, key)
    chex.assert_trees_all_close(jax.device_get(many), jax.device_get(one), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- refusals and completeness


BAD = [-0.1, math.nan, math.inf, -math.inf, True, "0.1", None]


@pytest.mark.parametrize("number", BAD, ids=repr)
@each_scheduled_line
@pytest.mark.usefixtures("unchecked")
def test_bad_numbers_are_refused(line, number):
    with pytest.raises(ValueError, match=r"must be"):
        line.make(number)


def refused(factory, *arguments, **keywords):
    # The address of a function differs between the processes that collect the tests.
    named = re.sub(" at 0x[0-9a-f]+", "", str(keywords))
    name = getattr(factory, "func", factory).__name__
    return pytest.param(factory, arguments, keywords, id=f"{name}-{named}")


@pytest.mark.parametrize(
    ("factory", "arguments", "keywords"),
    [
        *(
            refused(lpa_jax.lpa, "first", 0.1, **bad)
            for bad in (
                {"steps": 0},
                {"steps": 1.0},
                {"steps": True},
                {"direction": "up"},
                {"sharing": "none"},
                {"radius": "huge"},
                {"objective": "profit"},
                {"granularity": "batch"},
                {"low_rank": 0},
                {"delta_epsilon": -1.0},
                {"delta_epsilon": math.nan},
            )
        ),
        *(
            refused(lpa_jax.lpl, 0.1, **bad)
            for bad in (
                {"solver": "guess"},
                {"steps": 0},
                {"step_size": 0.0},
                {"step_size": 0},
                {"step_size": -0.1},
                {"delta_epsilon": math.inf},
            )
        ),
        refused(lpa_jax.lpg, 0.1, solver="guess"),
        refused(lpa_jax.lpg, 0.1, delta_epsilon=-0.1),
        refused(lpa_jax.adversarial, "inputs", 0.1, norm="l3"),
        refused(lpa_jax.adversarial, "inputs", 0.1, steps=0),
        refused(lpa_jax.adversarial, "inputs", 0.1, step_size=-1.0),
        refused(lpa_jax.adversarial, "inputs", 0.1, bounds=(1.0, 0.0)),
        refused(lpa_jax.adversarial, "inputs", 0.1, bounds=(0.0,)),
        refused(lpa_jax.gaussian_noise, "param_grads", 0.1),
        refused(lpa_jax.dropout, "labels", 0.1),
        refused(lpa_jax.manifold_mixup, ("logit_grads",), alpha=1.0),
        refused(lpa_jax.manifold_mixup, (), alpha=1.0),
        refused(lpa_jax.dropblock, "param_grads", 0.1, block_size=2),
        refused(lpa_jax.dropblock, "first", 0.1, block_size=0),
        refused(lpa_jax.dropblock, "first", 1.0, block_size=2),
        refused(lpa_jax.dropout, "first", rate=1.0),
        refused(lpa_jax.dropout, "first", rate=1.5),
        refused(lpa_jax.label_smoothing, alpha=1.1),
        refused(lpa_jax.disturb_label, rate=1.1),
        refused(lpa_jax.logit_adjustment, class_counts=[3, 0]),
        refused(lpa_jax.logit_adjustment, class_counts=[]),
        refused(lpa_jax.ldam, class_counts=[3, -1]),
        refused(lpa_jax.ldam, class_counts=[3, 1], scale=-1.0),
        refused(lpa_jax.additive_margin, margin=0.1, scale=-1.0),
        refused(lpa_jax.isda, "labels", 0.5, num_classes=3),
        refused(lpa_jax.isda, "logits", 0.5, num_classes=3),
        refused(lpa_jax.isda, "first", 0.5, num_classes=1),
        refused(lpa_jax.isda, "first", 0.5, num_classes=3, num_steps=0),
        refused(lpa_jax.reweight, [3, 0]),
        refused(lpa_jax.reweight, [3, 1], beta=1.1),
        refused(lpa_jax.drw, [3, 1], start=-1),
        refused(lpa_jax.drw, [3, 1], start=1.0),
        refused(lpa_jax.elr, 0, strength=1.0),
        refused(lpa_jax.elr, 10, strength=1.0, beta=1.1),
        refused(lpa_jax.cutmix, alpha=1.0, probability=1.1),
        refused(lpa_jax.mixup_cutmix, mixup_alpha=-0.1, cutmix_alpha=1.0),
        refused(lpa_jax.mixup_cutmix, mixup_alpha=0.8, cutmix_alpha=-1.0),
        refused(lpa_jax.mixup_cutmix, mixup_alpha=0.8, cutmix_alpha=1.0, switch=1.1),
        refused(lpa_jax.shake, "labels", strength=0.1),
        refused(lpa_jax.shake, "first", strength=1.1),
        refused(lpa_jax.gradient_clipping, -1.0),
        refused(lpa_jax.gradient_noise, 0.1, gamma=-1.0),
        refused(lpa_jax.asam, 0.1, eta=-0.1),
        refused(lpa_jax.coral, "first", 1.0, num_domains=1),
        refused(lpa_jax.mmd, "logits", 1.0, num_domains=2),
        *(
            refused(lpa_jax.dann, "first", 0.1, **({"num_domains": 2} | bad))
            for bad in (
                {"num_domains": 1},
                {"learning_rate": -0.1},
                {"discriminator_steps": 0},
                {"grad_penalty": -1.0},
                {"weight_decay": math.nan},
                {"beta1": 1.0},
                {"width": 0},
                {"depth": 1},
                {"dropout": 1.0},
                {"seed": -1},
            )
        ),
        refused(lpa_jax.group_dro, 0.1, num_domains=1.0),
        refused(lpa_jax.vrex, 1.0, num_domains=2, anneal_steps=-1),
        refused(lpa_jax.irm, 1.0, num_domains=0),
        refused(lpa_jax.irm, 1.0, num_domains=2, anneal_steps=0.5),
        refused(lpa_jax.rsc, "first", features=1.1),
        refused(lpa_jax.rsc, "first", batch=-0.1),
        refused(lpa_jax.rsc, "inputs"),
        refused(lpa_jax.adaptive, lpa_jax.lpa(("first", "second"), 0.1), every=1),
        refused(lpa_jax.adaptive, lpa_jax.lpa("first", 0.1), every=2),
        refused(lpa_jax.lpa, ("first", "second"), (0.1,)),
        refused(lpa_jax.lpa, ("first", "second"), (0.1, -0.1)),
        refused(lpa_jax.layer_scale, 0.1, num_sites=0),
        refused(lpa_jax.layer_scale, 0.1, num_sites=2, beta=1.5),
        refused(lpa_jax.layer_scale, 0.1, num_sites=2, beta=0.0),
        refused(lpa_jax.splits.mean_threshold, statistic="charm"),
        refused(lpa_jax.splits.mean_threshold, window="year"),
        refused(lpa_jax.splits.threshold, tau=1.5),
        refused(lpa_jax.splits.threshold, tau=math.nan),
        refused(lpa_jax.splits.tail, num_head=-1),
        refused(lpa_jax.splits.tail, num_head=1.0),
        refused(lpa_jax.splits.tail, num_head=1, class_counts=[1, 0]),
        refused(lpa_jax.splits.tail, num_head=1, head_scale=-0.1),
        refused(lpa_jax.splits.tail, num_head=1, head_scale=math.nan),
        refused(lpa_jax.splits.tail, num_head=1, head_scale=lambda step: 1.0),
        refused(lpa_jax.splits.inverted, "tail"),
        *(
            refused(factory, 0.1, split=split)
            for factory in (lpa_jax.lpl, lpa_jax.lpg, functools.partial(lpa_jax.lpa, "first"))
            for split in ("mean_threshold", lpa_jax.splits.mean_threshold)
        ),
        *(
            refused(lpa_jax.ldam, counts)
            for counts in ({0: 5, 1: 3}, [[5], [3]], [5.0, math.inf], 5, [])
        ),
        refused(lpa_jax.splits.inverted, lpa_jax.splits.mean_threshold),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_choices_are_refused(factory, arguments, keywords):
    with pytest.raises(ValueError, match=r"must|entries|several|twice|at least|acts at|needs a"):
        factory(*arguments, **keywords)


@pytest.mark.parametrize(
    "factory",
    [
        lpa_jax.ldam,
        lpa_jax.logit_adjustment,
        lpa_jax.reweight,
        functools.partial(lpa_jax.drw, start=3),
        functools.partial(lpa_jax.splits.tail, 1),
    ],
    ids=["ldam", "logit_adjustment", "reweight", "drw", "tail"],
)
def test_a_class_without_training_examples_is_named(factory):
    for counts in ([5, 3, 0, 1], (5, 3, -1, 0), (5.0, 3.0, math.nan, 1.0)):
        message = rf"positive, but class 2 has {counts[2]}: give it a training example, or leave"
        with pytest.raises(ValueError, match=message):
            factory(class_counts=counts)


def test_the_table_has_a_line_for_every_public_factory():
    no_perturbation = {
        "Perturbation",
        "SiteError",
        "chain",
        "layer_scale",
        "list_sites",
        "stateless",
        "tap",
        "value_and_grad",
    }
    public = {
        name
        for name, value in vars(lpa_jax).items()
        if callable(value) and not name.startswith("_") and name not in no_perturbation
    }
    assert public == {label.split("-")[0] for label in LABELS}
    assert set(METHODS) == public - {"adaptive", "at"}


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "perturbation",
    [
        lpa_jax.chain(lpa_jax.lpa("first", 0.3), lpa_jax.lpg(0.1)),
        adaptive(0.3),
        lpa_jax.chain(lpa_jax.isda("second", 0.5, NUM_CLASSES), lpa_jax.elr(BATCH, 3.0)),
        lpa_jax.dann("second", 1.0, 4),
        lpa_jax.at("first", optax.add_noise(0.01, 0.55, key=0)),
        lpa_jax.at("logits", optax.inject_hyperparams(lpa_jax.lpl)(optax.constant_schedule(0.1))),
    ],
    ids=["stateless", "adaptive", "isda and elr", "dann", "add_noise", "inject_hyperparams"],
)
def test_the_state_survives_a_checkpoint_bit_for_bit(perturbation, tmp_path):
    step = step_of(perturbation)
    state = step.init(variables_of(), *batch())
    state = storable(state._replace(step=jnp.int32(3), class_stats=seen()))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        empty = jax.tree.map(jnp.zeros_like, state)
        restored = checkpointer.restore(tmp_path / "state", empty)
    chex.assert_trees_all_equal(restored, state)
    assert avals(restored) == avals(state)
