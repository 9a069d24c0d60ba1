"""Chains, shapes and numbers drawn at random, hostile ones among them: what must hold for all."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import chex
import flax.linen as nn
from hypothesis import given, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import optax
from probes import Line, line_of, quick_jit, storable
import pytest

import lpa_jax
from lpa_jax import losses
from lpa_jax.core import pgd
from lpa_jax.methods import METHODS

# The same draws each time, however long they take, and no record of them in the tree. A chain that
# fails has few lines as it is; to make it smaller each trial would have to be compiled.
draws = functools.partial(
    settings, derandomize=True, deadline=None, database=None, phases=[Phase.generate]
)


# ---------------------------------------------------------------- one row of numbers

# Their squares need not be numbers any more. Below these a float32 loses digits, or all of them.
SMALL, LARGE = 2.0**-100, 2.0**126
positive = st.floats(SMALL, LARGE, width=32)
number = st.one_of(st.just(0.0), positive, positive.map(lambda x: -x))
rows = arrays.arrays(np.float32, (2, 3), elements=number)
radii = arrays.arrays(np.float32, 2, elements=number.map(abs))


def lengths(values):
    return np.linalg.norm(np.asarray(values, np.float64).reshape(len(values), -1), axis=1)


@draws(max_examples=500)
@given(rows)
def test_norms_and_directions_of_any_row(rows):
    rows64 = rows.astype(np.float64)
    norms, unit = map(np.asarray, pgd_jitted()[0](rows))
    np.testing.assert_allclose(norms, lengths(rows), rtol=1e-5)
    size = lengths(rows)[:, None]
    expected = np.divide(rows64, size, where=size > 0, out=np.zeros_like(rows64))
    np.testing.assert_allclose(unit, expected, rtol=1e-5, atol=1e-30)


@draws(max_examples=500)
@given(rows, radii)
def test_any_row_is_projected_onto_any_ball(rows, radii):
    projected = np.asarray(pgd_jitted()[1](rows, radii))
    size = lengths(rows)
    # One that is inside stays as it is, to the last bit.
    inside = size < radii * (1 - 1e-5)
    np.testing.assert_array_equal(projected[inside], rows[inside])
    assert (projected[radii == 0] == 0).all()
    outside = size > radii * (1 + 1e-5)
    expected = rows.astype(np.float64) * (radii / np.where(outside, size, 1.0))[:, None]
    error = np.abs(projected - expected)
    # A row is shrunk by a float32, which may be 0.
    tolerance = 1e-5 * radii + np.where(radii < 1e-37 * size, radii, 0.0)
    assert (error <= tolerance[:, None])[outside].all()
    assert (lengths(projected) <= radii * (1 + 1e-5)).all()


@draws(max_examples=500)
@given(rows, radii)
def test_any_mean_is_stretched_and_shrunk(rows, radii):
    size = lengths(rows)
    for sign, expected in ((1.0, size + radii), (-1.0, np.maximum(size - radii, 0.0))):
        moved = np.asarray(pgd_jitted()[2](rows, np.full(2, sign, np.float32), radii), np.float64)
        chex.assert_tree_all_finite(moved)
        assert (lengths(moved) <= radii * (1 + 1e-5)).all()
        scale = np.maximum(size, radii)
        # A mean of zero has no direction to be stretched in.
        expected = np.where(size > 0, expected, 0.0)
        error = np.abs(lengths(rows + moved) - expected)
        assert (error <= 1e-5 * scale).all()


@functools.cache
def pgd_jitted():
    return (
        quick_jit(lambda rows: (pgd.norms(rows), pgd.unit(rows))),
        quick_jit(pgd.project),
        quick_jit(pgd.stretch),
    )


@functools.cache
def binary_jitted():
    def total(logits, targets):
        values = losses.softmax_binary_cross_entropy(logits, targets)
        return values.sum(), values

    return quick_jit(jax.value_and_grad(total, has_aux=True))


@draws(max_examples=500)
@given(
    arrays.arrays(np.float32, (1, 3), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.0), (0.2, 0.3, 0.5)]),
)
def test_binary_cross_entropy_of_any_logits(logits, target):
    (_, (value,)), gradient = binary_jitted()(logits, np.array([target], np.float32))
    chex.assert_tree_all_finite(gradient)
    u = logits[0].astype(np.float64)

    def log_sum(values):
        return max(values) + math.log(sum(math.exp(v - max(values)) for v in values))

    expected = 0.0
    for c, t in enumerate(target):
        others = [x for i, x in enumerate(u) if i != c]
        expected -= (t * (u[c] - log_sum(u)) + (1 - t) * (log_sum(others) - log_sum(u))) / 3
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------- what is drawn: a setting

POSITIONS, CHANNELS = 4, 3
# Of the training set that a batch is drawn from.
EXAMPLES = 8
DOMAINS = 3


class Setting(NamedTuple):
    """What a program is compiled for."""

    batch: int
    classes: int
    dtype: Any
    bend: str
    soft: bool
    loss: Any


SIZES = [(5, 3), (6, 2), (3, 8), (1, 4)]
"""Examples and classes."""


@st.composite
def any_setting(draw):
    batch, classes = draw(st.sampled_from(SIZES))
    return Setting(
        batch,
        classes,
        draw(st.sampled_from([jnp.float32, jnp.bfloat16])),
        draw(st.sampled_from(["tanh", "relu"])),
        draw(st.booleans()),
        draw(st.sampled_from([None, losses.softmax_binary_cross_entropy])),
    )


class Net(nn.Module):
    classes: int
    bend: str
    dtype: Any

    @nn.compact
    def __call__(self, x):
        bend = jnp.tanh if self.bend == "tanh" else nn.relu
        x = bend(nn.Dense(CHANNELS, name="first", dtype=self.dtype)(x))
        x = x.reshape(x.shape[0], -1)
        x = bend(nn.Dense(4, name="second", dtype=self.dtype)(x))
        return nn.Dense(self.classes, name="head", dtype=self.dtype)(x)


# ---------------------------------------------------------------- what is drawn: a chain

WHERE = ("inputs", "first", "second", "logits")
# One so small that its square is 0.
EPSILONS = st.sampled_from([0.0, 1e-30, 0.01, 0.1, 0.3, 5.0, 1e4])


def mixup_cutmix(alpha):
    return lpa_jax.mixup_cutmix(alpha, alpha)


DRAWN_ONCE = (
    lpa_jax.manifold_mixup, lpa_jax.mixup, lpa_jax.dropout, lpa_jax.dropblock,
    lpa_jax.gaussian_noise, lpa_jax.disturb_label, optax.add_noise, lpa_jax.cutmix, lpa_jax.cutout,
    lpa_jax.shake, mixup_cutmix,
)  # fmt: skip
"""What draws for each place of a batch, or pairs each example with the one before it."""


@st.composite
def any_split(draw, classes):
    statistic = draw(st.sampled_from(["confidence", "accuracy"]))
    window = draw(st.sampled_from(["ema", "epoch", "batch"]))
    counts = draw(st.sampled_from([None, [10.0**i for i in range(classes)]]))
    tau = draw(st.sampled_from([0.0, 0.5, 1.0]))
    # Made later: an error then shows what was drawn.
    return draw(
        st.sampled_from(
            [
                None,
                ("all_positive",),
                ("all_negative",),
                ("mean_threshold", statistic, window),
                ("threshold", tau, statistic, window),
                ("tail", draw(st.integers(0, classes + 1)), counts),
            ]
        )
    )


def made(line, strength, factor):
    arguments = dict(line.arguments)
    if "delta_epsilon" in arguments:
        arguments["delta_epsilon"] *= factor
    if arguments.get("split"):
        name, *given = arguments["split"]
        arguments["split"] = getattr(lpa_jax.splits, name)(*given)
    return dataclasses.replace(line, arguments=arguments).make(strength)


def several(epsilon, **arguments):
    bounds = tuple(epsilon * beta for beta in lpa_jax.layer_scale(1.0, 2))
    return lpa_jax.lpa(("first", "second"), bounds, **arguments)


def adaptive(epsilon, **arguments):
    return lpa_jax.adaptive(several(epsilon, **arguments), every=2)


def clip(sharpness):
    return optax.clip(1.0 / sharpness)


def clip_by_global_norm(sharpness):
    return optax.clip_by_global_norm(1.0 / sharpness)


def clipping(sharpness):
    return lpa_jax.gradient_clipping(1.0 / sharpness)


def trace(decay):
    return optax.trace(decay)


def chained(epsilon, **arguments):
    return optax.chain(lpa_jax.lpa("second", epsilon, **arguments), optax.identity())


@st.composite
def a_class_level_line(draw, setting):
    arguments: dict[str, Any] = {"split": draw(any_split(setting.classes))}
    arguments["delta_epsilon"] = draw(st.sampled_from([0.0, 0.5, 1e4]))
    amount = draw(EPSILONS)
    factory = draw(
        st.sampled_from(
            [lpa_jax.lpa, lpa_jax.lpa, several, adaptive, chained, lpa_jax.lpl, lpa_jax.lpg]
        )
    )
    if factory is lpa_jax.lpg:
        arguments["solver"] = draw(st.sampled_from(["closed_form", "iterative"]))
        return Line("lpg", factory, ("logit_grads",), "epsilon", amount, arguments, 1.0)
    if factory is lpa_jax.lpl:
        arguments["solver"] = draw(st.sampled_from(["projected", "steps"]))
        # A step for each hundredth of 1e4 would take long.
        arguments["steps"] = draw(st.sampled_from([1, 3, 10]))
        ball = 1.0
        if arguments["solver"] == "steps":
            ball = math.sqrt(2)
            arguments["step_size"] = draw(st.sampled_from([0.01, 1.0]))
        return Line("lpl", factory, ("logits",), "epsilon", amount, arguments, ball)
    arguments |= {
        "steps": draw(st.sampled_from([1, 2, 10])),
        "direction": draw(st.sampled_from(["normalized", "raw"])),
        "sharing": draw(st.sampled_from(["channel", "full"])),
        "radius": draw(st.sampled_from(["absolute", "relative"])),
        "low_rank": draw(st.sampled_from([None, None, 1, 2])),
        "objective": draw(st.sampled_from(["loss", "loss", "norm"])),
        "granularity": draw(st.sampled_from(["class", "sample"])),
    }
    if arguments["radius"] == "relative":
        # Several times the value at one site after the other are soon more than a float32 holds.
        amount, arguments["delta_epsilon"] = min(amount, 5.0), min(arguments["delta_epsilon"], 0.5)
    if factory is lpa_jax.lpa:
        site = draw(st.sampled_from(WHERE))
        arguments["site"] = site
        return Line("lpa", factory, (site,), "epsilon", amount, arguments, "lpa")
    places = ("second",) if factory is chained else ("first", "second")
    name = factory.__name__
    return Line(name, factory, places, "epsilon", amount, arguments, "lpa", schedule=False)


KINDS = 27
"""Of lines that `another_line` draws by hand; those of the other methods follow, of their rows."""
BY_HAND = {
    "additive_margin", "adversarial", "asam", "cutmix", "cutout", "disturb_label", "dropblock",
    "dropout", "drw", "elr", "gaussian_noise", "gradient_clipping", "gradient_noise", "isda",
    "label_smoothing", "ldam", "logit_adjustment", "lpa", "lpg", "lpl", "manifold_mixup", "mixup",
    "mixup_cutmix", "reweight", "sam", "shake",
}  # fmt: skip
# Without strength it is no plain training, unless the domains have as many examples each.
LEFT_OUT = {"group_dro"}
OF_ROWS = [name for name in METHODS if name not in BY_HAND | LEFT_OUT]


def facts_of(classes):
    return {
        "class_counts": [10.0**i for i in range(classes)],
        "mean": (0.1, -0.2),
        "num_classes": classes,
        "num_domains": DOMAINS,
        "num_examples": EXAMPLES,
    }


# Made here: the tests' type checker draws at random, which is not allowed while a line is drawn.
ROW_LINES = {
    classes: [line_of(name, facts_of(classes)) for name in OF_ROWS] for _, classes in SIZES
}


@st.composite
def a_line_of_a_row(draw, line):
    """Draw the strength of a method of which nothing is known but its row."""
    interval = METHODS[line.label].ranges.get(line.strength, (line.amount,))
    return dataclasses.replace(line, amount=draw(st.sampled_from([0.0, *interval[:2]])))


@st.composite
def another_line(draw, setting, kind=None):
    """Draw a line that is not by class, of any kind or of the one given by its number."""
    counts = [10.0**i for i in range(setting.classes)]
    place = draw(st.sampled_from(WHERE))
    layers = draw(st.sampled_from([("inputs",), ("first",), ("inputs", "first", "second")]))
    attack = {
        "site": place,
        "steps": draw(st.sampled_from([1, 2, 10])),
        "norm": draw(st.sampled_from(["linf", "l2"])),
        "step_size": draw(st.sampled_from([None, 0.1])),
    }
    order = np.inf if attack["norm"] == "linf" else 2
    margin = {"class_counts": counts, "scale": 1.0}
    adjust = {"class_counts": counts}
    blocks = {"site": "first", "block_size": draw(st.sampled_from([1, 2]))}
    eta = {"gamma": 0.55, "key": 0}
    share = draw(st.sampled_from([0.0, 0.3, 0.999, 1.0]))
    amount = draw(EPSILONS)
    deferred = adjust | {"start": draw(st.sampled_from([0, 2]))}
    average = {"num_examples": EXAMPLES, "beta": draw(st.sampled_from([0.0, 0.7, 1.0]))}
    spread = {
        "site": "second",
        "num_classes": setting.classes,
        "num_steps": draw(st.sampled_from([None, 4])),
        "diagonal": draw(st.booleans()),
    }
    lines = [
        Line("mixup", lpa_jax.mixup, ("inputs", "labels"), "alpha", amount),
        Line(
            "manifold_mixup", lpa_jax.manifold_mixup, (*layers, "labels"), "alpha",
            amount, {"sites": layers},
        ),
        Line("dropout", lpa_jax.dropout, (place,), "rate", share, {"site": place}),
        Line("dropblock", lpa_jax.dropblock, ("first",), "rate", share, blocks),
        Line(
            "noise", lpa_jax.gaussian_noise, (place,), "stddev", min(amount, 5.0),
            {"site": place},
        ),
        Line(
            "adversarial", lpa_jax.adversarial, (place,), "epsilon", amount, attack,
            "attack", order,
        ),
        Line("smoothing", lpa_jax.label_smoothing, ("labels",), "alpha", share),
        Line("disturb", lpa_jax.disturb_label, ("labels",), "rate", share),
        Line(
            "adjustment", lpa_jax.logit_adjustment, ("logits",), "tau", min(amount, 1e4),
            adjust,
        ),
        Line("ldam", lpa_jax.ldam, ("logits",), "max_margin", min(amount, 1e4), margin),
        Line("sam", lpa_jax.sam, ("param_grads",), "rho", min(amount, 5.0)),
        Line(
            "asam", lpa_jax.asam, ("param_grads",), "rho", min(amount, 5.0),
            {"eta": draw(st.sampled_from([0.0, 0.01]))},
        ),
        Line("clip", clip, (draw(st.sampled_from((*WHERE, "logit_grads"))),), "sharpness",
             amount, schedule=False),
        Line("trace", trace, ("param_grads",), "decay", share, schedule=False),
        Line(
            "global-norm", clip_by_global_norm, ("param_grads",), "sharpness", amount,
            schedule=False,
        ),
        Line(
            "add_noise", optax.add_noise, (place,), "eta", min(amount, 5.0), eta,
            schedule=False,
        ),
        Line("cutmix", lpa_jax.cutmix, ("inputs", "labels"), "alpha", amount),
        Line("mixup_cutmix", mixup_cutmix, ("inputs", "labels"), "alpha", amount),
        Line("cutout", lpa_jax.cutout, ("inputs",), "size", amount, {"mean": (0.1, -0.2)}),
        Line("shake", lpa_jax.shake, (place,), "strength", share, {"site": place}),
        Line("isda", lpa_jax.isda, ("second", "logits"), "strength", amount, spread),
        Line("additive_margin", lpa_jax.additive_margin, ("logits",), "margin", amount),
        Line("reweight", lpa_jax.reweight, ("logit_grads",), "beta", share, adjust),
        Line("drw", lpa_jax.drw, ("logit_grads",), "beta", share, deferred),
        Line("elr", lpa_jax.elr, ("logit_grads",), "strength", amount, average),
        Line(
            "clipping", clipping, ("param_grads",), "sharpness", amount, schedule=False
        ),
        Line(
            "gradient_noise", lpa_jax.gradient_noise, ("param_grads",), "eta", amount
        ),
    ]  # fmt: skip
    assert len(lines) == KINDS
    lines += [draw(a_line_of_a_row(line)) for line in ROW_LINES[setting.classes]]
    return draw(st.sampled_from(lines)) if kind is None else lines[kind]


def fit(lines):
    """Return whether no class-level line comes before the last layer of a mixing one."""
    order = [*WHERE, "logit_grads", "param_grads"]

    # At one site the order of the chain decides.
    def places(rank):
        return [(order.index(site), rank) for site in lines[rank].sites if site != "labels"]

    mixing = [rank for rank, line in enumerate(lines) if line.mixes]
    by_class = [
        rank
        for rank, line in enumerate(lines)
        if line.ball == "lpa" and line.factory is not chained
    ]
    last = max((place for rank in mixing for place in places(rank)), default=(0, 0))
    return all(place >= last for rank in by_class for place in places(rank))


@st.composite
def any_program(draw, kind=None):
    """Draw a setting and a chain, in which there is a line of the kind given, if any."""
    setting = draw(any_setting())
    line = st.one_of(a_class_level_line(setting), another_line(setting))
    first = line if kind is None else another_line(setting, kind)
    lines = st.tuples(first, st.lists(line, max_size=2)).map(lambda drawn: [drawn[0], *drawn[1]])
    lines = draw(lines.filter(fit))
    scheduled = [line.schedule and draw(st.booleans()) for line in lines]
    return setting, tuple(lines), tuple(scheduled)


# ---------------------------------------------------------------- what is drawn: a batch


class Batch(NamedTuple):
    """What a program is run on; `tame` if a rounding is not made larger by it."""

    variables: Any
    inputs: Any
    labels: Any
    weights: Any
    examples: Any
    tame: bool


@st.composite
def any_batch(draw, setting):
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    size, classes = setting.batch, setting.classes
    content = draw(st.sampled_from(["normal"] * 4 + ["zeros", "ones", "huge", "tiny", "extreme"]))
    fill = {
        "normal": lambda shape: rng.normal(size=shape),
        "zeros": np.zeros,
        "ones": np.ones,
        "huge": lambda shape: 1e4 * rng.normal(size=shape),
        "tiny": lambda shape: 1e-30 * rng.normal(size=shape),
        # The layers make it nearly the largest that a bfloat16 holds.
        "extreme": lambda shape: 1e30 * rng.choice([-1.0, 1.0], size=shape),
    }[content]
    inputs = fill((size, 2, 2, 2)).astype(np.float32)
    factor = draw(st.sampled_from([1.0] * 4 + [0.0, 1e-30, 1e2]))
    net = Net(setting.classes, setting.bend, setting.dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0), inputs)
    variables = jax.tree.map(
        lambda leaf: (factor * 0.7 * rng.normal(size=leaf.shape)).astype(np.float32), shapes
    )
    if draw(st.booleans()):
        labels = rng.integers(0, classes, size).astype(np.int32)
    else:
        # One class has all examples, the others none.
        labels = np.full(size, rng.integers(classes), np.int32)
    if setting.soft:
        kind = draw(st.sampled_from(["drawn", "hard", "uniform"]))
        hard = np.eye(classes)[labels]
        drawn = rng.dirichlet(np.full(classes, 0.3), size)
        labels = {"drawn": drawn, "hard": hard, "uniform": np.ones_like(hard) / classes}[kind]
        labels = labels.astype(np.float32)
    weighting = draw(st.sampled_from(["ones", "ones", "fractions", "some", "one", "none", "tiny"]))
    weights = {
        "ones": np.ones(size),
        "fractions": rng.uniform(0.1, 2.0, size),
        "some": rng.integers(0, 2, size),
        "one": np.eye(size)[0],
        "none": np.zeros(size),
        "tiny": np.full(size, 1e-20),
    }[weighting]
    # One may be in a batch several times.
    examples = rng.integers(0, EXAMPLES, size)
    tame = content == "normal" and factor == 1.0
    return Batch(variables, inputs, labels, weights.astype(np.float32), examples, tame)


# ---------------------------------------------------------------- what is done


class Seen(NamedTuple):
    """What a perturbation was given at a site, and what it made of it."""

    before: Any
    after: Any
    labels: Any
    targets: Any
    plan: Any


class Watching(NamedTuple):
    """State of a watched perturbation."""

    inner: Any
    seen: dict[str, Seen]


def watch(perturbation):
    """Keep what a perturbation does, beside its state."""

    def update(value, state, params=None, *, site, **extra):
        new, inner = perturbation.update(value, state.inner, params, site=site, **extra)
        report = getattr(perturbation, "report", None)
        plan = report and report(site, extra["class_stats"], extra["step"])
        seen = Seen(value, new, extra["labels"], extra["targets"], plan)
        seen = jax.lax.stop_gradient(seen)
        return new, Watching(inner, {**state.seen, site: seen})

    return lpa_jax.Perturbation(
        perturbation.sites,
        lambda value: Watching(perturbation.init(value), {}),
        update,
        perturbation.report,
        mixes=perturbation.mixes,
        class_level=perturbation.class_level,
        needs_gradient=perturbation.needs_gradient,
    )


def compiled(setting, lines, scheduled):
    """Return the first state, and the program `(factor on all strengths, state, batch) -> ...`."""
    net = Net(setting.classes, setting.bend, setting.dtype)

    def make(factor):
        def number(line, timed):
            strength = factor * line.amount
            return (lambda step: strength / (1.0 + step)) if timed else strength

        timed = zip(lines, scheduled, strict=True)
        chain = lpa_jax.chain(*(watch(made(line, number(line, t), factor)) for line, t in timed))
        return lpa_jax.value_and_grad(
            net.apply,
            chain,
            num_classes=setting.classes,
            loss_fn=setting.loss,
        )

    def plain(params, batch):
        """Compute loss and logits without the library."""
        real = batch.weights > 0
        inputs = jnp.where(real[:, None, None, None], batch.inputs, 0.0)
        labels = batch.labels
        if labels.ndim == 1:
            labels = jax.nn.one_hot(labels, setting.classes)
        labels = jnp.where(real[:, None], labels, 0.0)
        logits = net.apply({"params": params}, inputs).astype(jnp.float32)
        per_example = (setting.loss or optax.softmax_cross_entropy)(logits, labels)
        total = jnp.sum(batch.weights)
        share = batch.weights / jnp.where(total > 0, total, 1.0)
        return jnp.sum(jnp.where(real, share * per_example, 0.0))

    @quick_jit
    def run(factor, state, batch):
        step = make(factor)
        inner = state.perturbations
        state = state._replace(perturbations=tuple(Watching(state, {}) for state in inner))
        key = jax.random.key(5)
        given = batch.variables, state, batch.inputs, batch.labels, key
        extra = {"examples": batch.examples, "domains": batch.examples % DOMAINS}
        result, grads, new = step(*given, weights=batch.weights, extra=extra)
        states = new.perturbations
        new = new._replace(perturbations=tuple(state.inner for state in states))
        expected = jax.value_and_grad(plain)(batch.variables["params"], batch)
        return (*result, grads, new), [state.seen for state in states], expected

    def first(batch):
        step = make(jnp.float32(1.0))
        state = step.init(batch.variables, jnp.asarray(batch.inputs), jnp.asarray(batch.labels))
        return state._replace(perturbations=tuple(s.inner for s in state.perturbations))

    return run, first


def column(per_example, like):
    return per_example.reshape((-1,) + (1,) * (like.ndim - 1))


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(storable(tree)))


def tamed(setting, lines):
    """Return whether a chain makes no rounding larger, so that the order of sums is no matter."""
    return setting.dtype == jnp.float32 and all(
        line.amount <= 0.3
        and line.arguments.get("delta_epsilon", 0.0) <= 0.5
        and line.factory not in DRAWN_ONCE
        # It may draw or pair as well.
        and line.label not in OF_ROWS
        for line in lines
    )


def check_close(got, expected, rtol, slack=0.0):
    """Compare trees of arrays up to a share of the largest number in each, and to `slack`."""

    def compare(got, expected):
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        largest = np.abs(expected).max(initial=0.0)
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * largest + slack)

    jax.tree.map(compare, storable(got), storable(expected))


def rounding(batch):
    """Return what rounding leaves of gradients that are 0: they are sums of products of these."""
    weight = max(np.abs(leaf).max() for leaf in jax.tree.leaves(batch.variables))
    return 1e-6 * max(np.abs(batch.inputs).max(), 1.0) * max(weight, 1.0) ** 2


def check_statistics(before, after, batch):
    seen = after.class_stats
    np.testing.assert_allclose(seen.batch.weight.sum(), batch.weights.sum(), rtol=1e-5)
    grown = seen.frequency - before.class_stats.frequency
    np.testing.assert_allclose(grown, seen.batch.weight, rtol=1e-5, atol=1e-5)
    for means in (seen.ema, seen.running, seen.batch):
        assert means.num_seen == (means.weight > 0).sum()
        for statistic in (means.confidence, means.accuracy):
            assert (statistic >= 0).all()
            assert (statistic <= (means.weight > 0) * (1 + 1e-5)).all()


def reach(setting, line, site, seen, weights):
    """Return how far each example may be moved, `[B]`, and that without its class's share."""
    arguments = line.arguments
    epsilon = line.amount * (lpa_jax.layer_scale(1.0, 2)[0] if several_at(line, site) else 1.0)
    most = epsilon + arguments.get("delta_epsilon", 0.0)
    real = weights > 0
    shares = np.asarray(seen.labels)
    if shares.ndim == 1:
        shares = np.eye(setting.classes)[shares]
    if seen.plan is not None:
        radius = np.asarray(seen.plan["radius"], np.float64)
        assert (radius <= most * (1 + 1e-5)).all()
        if not arguments["delta_epsilon"]:
            np.testing.assert_allclose(radius, most, rtol=1e-5)
        assert set(np.asarray(seen.plan["sign"]).tolist()) <= {-1.0, 0.0, 1.0}
        radius = radius * (np.asarray(seen.plan["sign"]) != 0)
    else:
        radius = np.full(setting.classes, most)
    sizes = lengths(np.where(column(real, seen.before), seen.before, 0))
    if arguments.get("granularity") == "sample":
        limit = radius[shares.argmax(axis=1)]
        limit = limit * sizes if arguments["radius"] == "relative" else limit
    else:
        if arguments.get("radius") == "relative":
            counts = weights @ shares
            means = (weights * sizes) @ shares / np.where(counts > 0, counts, 1.0)
            radius = radius * means
        limit = shares @ radius
    # One entry of the perturbation is added at every position.
    spatial = seen.before.ndim == 4 and arguments.get("sharing") == "channel"
    if spatial and arguments["radius"] == "absolute":
        limit = limit * math.sqrt(POSITIONS)
    if line.ball not in ("lpa", "attack"):
        limit = limit * line.ball
    return limit


def several_at(line, site):
    return line.factory in (several, adaptive) and site == "first"


def check_bounds(setting, line, site, seen, weights):
    real = weights > 0
    if not real.any():
        return
    before = np.asarray(seen.before, np.float64)[real]
    after = np.asarray(seen.after, np.float64)[real]
    change = (after - before).reshape(len(before), -1)
    # What a sum rounds off, by the digits of its type.
    digits = float(jnp.finfo(seen.after.dtype).eps)
    lost = digits * np.abs(before).max(initial=0.0) * math.sqrt(change.shape[1])
    moved = np.linalg.norm(change, ord=line.norm, axis=1)
    if line.ball == "attack":
        limit = np.full(len(moved), line.amount)
    else:
        limit = reach(setting, line, site, seen, weights)[real]
    assert (moved <= limit * (1 + max(1e-5, 2 * digits)) + lost).all(), (line, site, moved, limit)
    if line.ball != "attack":
        # A class whose bound or sign is 0 is not moved at all.
        assert (moved[limit == 0] == 0).all()


def check_directions(setting, line, seen, weights):
    """A convex loss rises along its gradient however far one goes, and falls by small steps."""
    labels, real = np.asarray(seen.labels), np.asarray(weights) > 0
    if labels.ndim == 2 or seen.plan is None or not real.any():
        return
    signs = np.asarray(seen.plan["sign"])
    shares = np.eye(setting.classes)[labels] * weights[:, None]
    shares = shares / np.maximum(shares.sum(axis=0), 1e-300)

    def by_class(per_example):
        return shares.T @ np.where(column(real, per_example), per_example, 0)

    present = shares.sum(axis=0) > 0
    if line.factory is lpa_jax.lpg:
        radius = np.asarray(seen.plan["radius"], np.float64)
        before, after = (
            lengths(by_class(np.asarray(value, np.float64))) for value in (seen.before, seen.after)
        )
        expected = np.where(signs > 0, before + radius, np.maximum(before - radius, 0.0))
        expected = np.where(signs == 0, before, expected)
        # So small a gradient may be a rounding of none, which has no direction.
        present &= before > 1e-6
        assert (np.abs(after - expected) <= 1e-5 * (1.0 + radius))[present].all()
        return
    if setting.loss is not None or line.arguments.get("objective") == "norm":
        return
    targets = np.asarray(seen.targets, np.float64)

    def mean_losses(value):
        u = np.asarray(value, np.float64)
        u = u - u.max(axis=1, keepdims=True)
        return by_class((targets * (np.log(np.exp(u).sum(1, keepdims=True)) - u)).sum(1))

    before, after = mean_losses(seen.before), mean_losses(seen.after)
    largest = np.abs(np.asarray([seen.before, seen.after], np.float64)[:, real]).max()
    slack = 1e-5 + 1e-6 * largest
    up, down = present & (signs > 0), present & (signs < 0)
    assert (after[up] >= before[up] - slack).all()
    if line.arguments.get("solver") == "steps":
        assert (after[down] <= before[down] + slack).all()


def length(tree):
    return math.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)))


def check_clipping(line, seen):
    before, limit = length(seen.before), 1.0 / line.amount if line.amount else math.inf
    if before <= limit * (1 - 1e-5):
        jax.tree.map(np.testing.assert_array_equal, seen.after, seen.before)
    else:
        after = length(seen.after)
        assert after <= limit * (1 + 1e-4)
        # The length of a longer gradient may exceed a float32: it becomes 0.
        assert after >= min(before, limit) * (1 - 1e-4) or before > 2.0**120


def too_large(lines, seen, states, batch, expected):
    """Return whether squares that a transform has to take may exceed a float32."""
    weight = np.abs(batch.variables["params"]["head"]["kernel"]).max()
    for line, by_site, state in zip(lines, seen, states, strict=True):
        if line.factory is clip_by_global_norm:
            # Optax's, whose limit at strength 0 is inf, and so is the norm that it takes.
            gradients = (by_site["param_grads"].before, expected[1])
            if max(map(length, gradients)) > 2.0**60:
                return True
        if line.label in OF_ROWS:
            # Whether it takes squares, products of three, or ratios of them, is not known.
            values = jax.tree.leaves([one.before for one in by_site.values()])
            if max(np.abs(np.float64(value)).max() for value in values) > 2.0**40:
                return True
        if line.factory is lpa_jax.isda:
            # The margins are products of four numbers; the squares of two it remembers.
            if np.abs(np.float64(by_site["second"].before)).max() > 2.0**60:
                return True
            spread = np.abs(np.float64(state.covariances)).max()
            if line.amount * spread * (CHANNELS * 4 * weight) ** 2 > 2.0**100:
                return True
    return False


def padded_otherwise(setting, batch):
    """Fill the padding with something else: not numbers, other labels, and no example at all."""
    padding = batch.weights == 0
    inputs = np.where(padding[:, None, None, None], np.nan, batch.inputs)
    if setting.soft:
        labels = np.where(padding[:, None], np.nan, batch.labels)
    else:
        labels = np.where(padding, (batch.labels + 1) % setting.classes, batch.labels)
    examples = np.where(padding, EXAMPLES + 1, batch.examples)
    labels = labels.astype(batch.labels.dtype)
    return batch._replace(inputs=inputs, labels=labels, examples=examples)


def permuted(batch, order):
    return batch._replace(
        inputs=batch.inputs[order],
        labels=batch.labels[order],
        weights=batch.weights[order],
        examples=batch.examples[order],
    )


def outcome(result):
    """Return what does not tell of each example: loss, metrics, gradient, new state."""
    loss, aux, grads, state = result
    return loss, aux["metrics"], grads, state


def check(program, batches):
    """Run a chain on one batch after the other, and each batch in several guises."""
    setting, lines, scheduled = program
    run, first = compiled(setting, lines, scheduled)
    state = first(batches[0])
    for batch in batches:
        result, seen, expected = run(1.0, state, batch)
        new = result[3]
        large = too_large(lines, seen, new.perturbations, batch, expected)
        well = finite(expected) and not large
        if well:
            chex.assert_tree_all_finite(storable(outcome(result)))
            step = int(state.step)
            for line, timed, by_site in zip(lines, scheduled, seen, strict=True):
                now = dataclasses.replace(line, amount=line.amount / (1 + step if timed else 1))
                for site, one in by_site.items():
                    if line.ball is not None:
                        check_bounds(setting, now, site, one, batch.weights)
                    if site in ("logits", "logit_grads") and line.ball not in (None, "attack"):
                        check_directions(setting, now, one, batch.weights)
                    if line.factory is clipping:
                        check_clipping(now, one)
            # As an array, like elsewhere: of a number some factories refuse the ends of the range.
            if any(made(line, jnp.float32(line.amount), 1.0).class_level for line in lines):
                check_statistics(state, new, batch)
            else:
                chex.assert_trees_all_equal(new.class_stats, state.class_stats)
            (zero_loss, _, zero_grads, _), _, _ = run(0.0, state, batch)
            digits = 1e-4 if setting.dtype == jnp.float32 else 0.1
            check_close((zero_loss, zero_grads), expected, digits, rounding(batch))
        if well and (batch.weights == 0).any():
            again, _, _ = run(1.0, state, padded_otherwise(setting, batch))
            check_close(outcome(again), outcome(result), 1e-6)
        if well and batch.tame and tamed(setting, lines):
            order = np.random.default_rng(0).permutation(setting.batch)
            again, seen_again, _ = run(1.0, state, permuted(batch, order))
            check_close(outcome(again), outcome(result), 1e-3, rounding(batch))
            for one, other in zip(seen, seen_again, strict=True):
                for site in set(one) - {"param_grads"}:
                    check_close(other[site].after, one[site].after[order], 1e-3, rounding(batch))
        if finite(new):
            state = new


data = st.data()


def draw_and_check(program, data, batches):
    check(program, [data.draw(any_batch(program[0])) for _ in range(batches)])


@pytest.mark.guarantee("random-chains", "batch-order")
@draws(max_examples=13)
@given(any_program(), data)
def test_any_chain_on_any_batch(program, data):
    draw_and_check(program, data, batches=8)


@pytest.mark.guarantee("random-chains", "batch-order")
@pytest.mark.slow
def test_many_chains_on_many_batches(capsys):
    chains, batches, factories = 0, 16, set()
    # By itself hypothesis would draw some kinds often and others never.
    for kind in (None, *range(KINDS + len(OF_ROWS))):

        @seed(0 if kind is None else 1 + kind)
        @draws(max_examples=50 if kind is None else 5)
        @given(any_program(kind), data)
        def many(program, data):
            nonlocal chains
            draw_and_check(program, data, batches)
            chains += 1
            factories.update(line.factory for line in program[1])

        many()
    with capsys.disabled():
        print(f"\n{chains} chains on {batches} batches each")
    assert chains >= 180
    known = {row.factory for name, row in METHODS.items() if name not in LEFT_OUT}
    known -= {lpa_jax.gradient_clipping, lpa_jax.mixup_cutmix}
    assert known | {clipping, mixup_cutmix} <= factories
