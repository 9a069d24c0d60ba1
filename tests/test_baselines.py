"""Losses and other methods to compare with, against their formulas in float64.

The formulas are loops over examples and classes; gradients are central differences of them, so that
nothing is shared with the library, not even a derivative.
"""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
from probes import before_and_after, quick_jit, watched
import pytest

import lpa_jax
from lpa_jax import data, losses
from lpa_jax.models import layers

DEPTH, WIDTH, CLASSES, BATCH = 3, 4, 4, 7
COUNTS = [500, 20, 3, 90]
KEY = jax.random.key(0)
# A float32 has seven digits; what is summed of it has six.
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(WIDTH, name="dense")(x))


class Net(nn.Module):
    """`x [B, D] -> features = tanh(x V + a) -> features W + b`."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(Body(name="features")(x))


def draw_params(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "features": {"dense": {"kernel": draw(DEPTH, WIDTH), "bias": draw(WIDTH)}},
        "head": {"kernel": draw(WIDTH, CLASSES), "bias": draw(CLASSES)},
    }


PARAMS = draw_params()


def draw_batch(seed):
    """Return inputs, labels and weights, of which two are of padding."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)
    labels[:2] = 0
    weights = np.ones(BATCH, np.float32)
    weights[[2, 5]] = 0
    return rng.normal(size=(BATCH, DEPTH)).astype(np.float32), labels, weights


def soft(labels, seed=9):
    return np.random.default_rng(seed).dirichlet(np.ones(CLASSES), len(labels)).astype(np.float32)


# ---------------------------------------------------------------- formulas


def shares_of(labels):
    return np.eye(CLASSES)[labels] if labels.ndim == 1 else labels.astype(np.float64)


def features_of(params, x):
    dense = params["features"]["dense"]
    return [
        math.tanh(dense["bias"][k] + sum(x[d] * dense["kernel"][d][k] for d in range(DEPTH)))
        for k in range(WIDTH)
    ]


def logits_of(params, x):
    features, head = features_of(params, x), params["head"]
    return [
        head["bias"][c] + sum(features[k] * head["kernel"][k][c] for k in range(WIDTH))
        for c in range(CLASSES)
    ]


def softmax(u):
    exps = [math.exp(x) for x in u]
    return [e / sum(exps) for e in exps]


def cross_entropy(u, t):
    return -sum(t[c] * math.log(softmax(u)[c]) for c in range(CLASSES))


def focal(u, t, gamma):
    p = softmax(u)
    return -sum(t[c] * (1 - p[c]) ** gamma * math.log(p[c]) for c in range(CLASSES))


def gce(u, t, q):
    p = softmax(u)
    return sum(t[c] * (1 - p[c] ** q) / q for c in range(CLASSES))


def mean_over(batch, example_loss):
    """Return a function of the parameters: the mean of `example_loss(params, i, x, t)`."""
    inputs, labels, weights = batch
    inputs, shares = inputs.astype(np.float64), shares_of(labels)

    def mean(params):
        total = 0.0
        for i in range(BATCH):
            if weights[i]:
                total += weights[i] * example_loss(params, i, inputs[i], shares[i])
        return total / weights.sum()

    return mean


def plain_ce(params, i, x, t):
    del i
    return cross_entropy(logits_of(params, x), t)


def differences(function, params, step=1e-6):
    """Return the gradient of a function of the parameters by central differences."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(np.float64, params))
    grads = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, grad in zip(leaves, grads, strict=True):
        for place in np.ndindex(leaf.shape):
            at, values = leaf[place], []
            for sign in (1, -1):
                leaf[place] = at + sign * step
                values.append(function(treedef.unflatten(leaves)))
            leaf[place] = at
            grad[place] = (values[0] - values[1]) / (2 * step)
    return treedef.unflatten(grads)


def agree(result, objective, loss=None, params=PARAMS, **tolerance):
    """Check loss and gradient; the loss is of the objective unless another one is given."""
    (got, _), grads, _ = result
    exact = jax.tree.map(np.float64, params)
    close(float(got), (loss or objective)(exact), **tolerance)
    expected = differences(objective, params)
    jax.tree.map(functools.partial(close, **tolerance), grads, expected)


def stepper(perturbation, loss_fn=None):
    step = lpa_jax.value_and_grad(Net().apply, perturbation, num_classes=CLASSES, loss_fn=loss_fn)
    inputs, labels, _ = draw_batch(0)
    state = step.init({"params": PARAMS}, jnp.asarray(inputs), jnp.asarray(labels))

    @quick_jit
    def call(state, inputs, labels, weights, **more):
        return step({"params": PARAMS}, state, inputs, labels, KEY, weights=weights, **more)

    return lambda state, batch, **more: call(state, *map(jnp.asarray, batch), **more), state


def one_step(perturbation, batch, loss_fn=None, **more):
    call, state = stepper(perturbation, loss_fn)
    return call(state, batch, **more)


def both_kinds():
    inputs, labels, weights = draw_batch(1)
    return {"hard": (inputs, labels, weights), "soft": (inputs, soft(labels), weights)}


each_kind = pytest.mark.parametrize("kind", ["hard", "soft"])


# ---------------------------------------------------------------- losses

LOSSES = {
    "focal 2": (losses.softmax_focal_loss, functools.partial(focal, gamma=2.0)),
    "focal 0.5": (
        functools.partial(losses.softmax_focal_loss, gamma=0.5),
        functools.partial(focal, gamma=0.5),
    ),
    "focal 0": (functools.partial(losses.softmax_focal_loss, gamma=0.0), cross_entropy),
    "gce 0.7": (losses.generalized_cross_entropy, functools.partial(gce, q=0.7)),
    "gce 1": (
        functools.partial(losses.generalized_cross_entropy, q=1.0),
        lambda u, t: 1 - sum(t[c] * softmax(u)[c] for c in range(CLASSES)),
    ),
}


@each_kind
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas(name, kind):
    loss_fn, formula = LOSSES[name]
    batch = both_kinds()[kind]
    result = one_step(lpa_jax.chain(), batch, loss_fn)
    agree(result, mean_over(batch, lambda params, i, x, t: formula(logits_of(params, x), t)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [0, 1])
def test_losses_and_their_gradients_stay_finite_where_the_network_is_sure(name, label):
    loss_fn, _ = LOSSES[name]
    logits, targets = jnp.array([[200.0, -200.0, 0.0, 0.0]]), jnp.eye(CLASSES)[None, label]
    loss, grads = jax.value_and_grad(lambda u: loss_fn(u, targets)[0])(logits)
    chex.assert_tree_all_finite((loss, grads))
    assert (loss > 0.5) == (label == 1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "loss_fn",
    [
        losses.softmax_focal_loss,
        losses.generalized_cross_entropy,
        losses.softmax_binary_cross_entropy,
    ],
)
def test_labels_in_place_of_targets_are_refused(loss_fn):
    """There are as many as classes, and they would be broadcast."""
    with pytest.raises(ValueError, match=r"give jax.nn.one_hot\(labels, 4\)"):
        loss_fn(jnp.zeros((4, 4)), jnp.arange(4))


def test_gce_nears_cross_entropy():
    logits, targets = jnp.array([[1.0, -2.0, 0.5, 0.0]]), jnp.eye(CLASSES)[None, 1]
    near = losses.generalized_cross_entropy(logits, targets, q=1e-4)
    close(near, optax.softmax_cross_entropy(logits, targets), rtol=1e-3)


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        (losses.softmax_focal_loss, {"gamma": -0.1}),
        (losses.softmax_focal_loss, {"gamma": math.nan}),
        (losses.generalized_cross_entropy, {"q": 0.0}),
        (losses.generalized_cross_entropy, {"q": 1.1}),
        (losses.generalized_cross_entropy, {"q": math.nan}),
    ],
)
def test_options_of_losses_outside_their_range_are_refused(loss_fn, options):
    with pytest.raises(ValueError, match=r"must be"):
        loss_fn(jnp.zeros((1, 2)), jnp.eye(2)[:1], **options)


# ---------------------------------------------------------------- weights of classes


def effective_weights(beta):
    beta = float(np.float32(beta))
    numbers = [
        sum(beta**k for k in range(n)) for n in COUNTS
    ]  # (1 - beta^n) / (1 - beta), a geometric series.
    weights = [1 / number for number in numbers]
    return [w * CLASSES / sum(weights) for w in weights]


def weight_of(t, weights):
    return sum(t[c] * weights[c] for c in range(CLASSES))


@each_kind
@pytest.mark.parametrize("beta", [0.9999, 0.9, 1.0])
def test_reweight_scales_gradients_by_the_effective_number_of_samples(beta, kind):
    batch = both_kinds()[kind]
    weights = effective_weights(beta)

    def weighted(params, i, x, t):
        return weight_of(t, weights) * plain_ce(params, i, x, t)

    result = one_step(lpa_jax.reweight(COUNTS, beta), batch)
    agree(result, mean_over(batch, weighted), loss=mean_over(batch, plain_ce))


def test_class_balanced_focal_loss_is_focal_loss_with_weights():
    batch, weights = draw_batch(1), effective_weights(0.9999)

    def unweighted(params, i, x, t):
        return focal(logits_of(params, x), t, 2.0)

    def weighted(params, i, x, t):
        return weight_of(t, weights) * unweighted(params, i, x, t)

    result = one_step(lpa_jax.reweight(COUNTS), batch, losses.softmax_focal_loss)
    agree(result, mean_over(batch, weighted), loss=mean_over(batch, unweighted))


def weighted_mean(batch, example_loss, weights):
    """Return a function of the parameters: `sum w_y l / sum w_y` over the examples."""
    total = mean_over(
        batch, lambda params, i, x, t: weight_of(t, weights) * example_loss(params, i, x, t)
    )
    return lambda params: total(params) / mean_weight(batch, weights)


def mean_weight(batch, weights):
    shares, real = shares_of(batch[1]), batch[2]
    total = sum(r * weight_of(t, weights) for r, t in zip(real, shares, strict=True))
    return total / real.sum()


@each_kind
@pytest.mark.parametrize("beta", [0.9999, 1.0])
def test_normalized_weights_make_a_weighted_mean(beta, kind):
    inputs, labels, weights = both_kinds()[kind]
    # Weights of examples count as well, not whether they are padding alone.
    batch = inputs, labels, weights * np.linspace(0.5, 2.0, BATCH, dtype=np.float32)
    result = one_step(lpa_jax.reweight(COUNTS, beta, normalize=True), batch)
    objective = weighted_mean(batch, plain_ce, effective_weights(beta))
    agree(result, objective, loss=mean_over(batch, plain_ce))


@each_kind
def test_before_deferral_and_on_padding_alone_nothing_is_weighted(kind):
    inputs, labels, weights = both_kinds()[kind]
    value = jax.random.normal(KEY, (BATCH, CLASSES))
    given = {"labels": jnp.asarray(labels), "weights": jnp.asarray(weights)}
    drw = lpa_jax.drw(COUNTS, start=5)
    before, after = (drw.update(value, (), step=jnp.int32(s), **given)[0] for s in (4, 5))
    np.testing.assert_array_equal(before, value)
    assert not np.allclose(after, value, rtol=0.1)
    given["weights"] = jnp.zeros(BATCH)
    chex.assert_tree_all_finite(drw.update(value, (), step=jnp.int32(5), **given)[0])
    _, grads, _ = one_step(drw, (inputs, labels, 0 * weights))
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


class CosineNet(nn.Module):
    """`x [B, D] -> features = tanh(x V + a) -> 30 cos(features, w_c)`."""

    @nn.compact
    def __call__(self, x):
        return layers.NormalizedHead(CLASSES, name="head")(Body(name="features")(x))


COSINE_PARAMS = {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"]}}


def cosines_of(params, x):
    features, kernel = np.array(features_of(params, x)), params["head"]["kernel"]
    return [
        sum(features * kernel[:, c]) / math.sqrt(sum(features**2) * sum(kernel[:, c] ** 2))
        for c in range(CLASSES)
    ]


def cosine_stepper(perturbation, batch):
    step = lpa_jax.value_and_grad(CosineNet().apply, perturbation, num_classes=CLASSES)
    variables = {"params": COSINE_PARAMS}
    arrays = [jnp.asarray(array) for array in batch]

    @quick_jit
    def call(state):
        return step(variables, state, *arrays[:2], KEY, weights=arrays[2])

    return call, step.init(variables, *arrays[:2])


LDAM_MARGINS = [0.5 * (min(COUNTS) / n) ** 0.25 for n in COUNTS]


@each_kind
@pytest.mark.parametrize("order", [1, -1])
def test_ldam_drw_is_its_papers_loss_on_a_normalized_head(order, kind):
    """`sum w_y l / sum w_y` of `30 (cos - m_y e_y)`, with weights from the start on."""
    batch, weights = both_kinds()[kind], effective_weights(0.9999)
    assert sum(weights) == pytest.approx(CLASSES)

    def ldam(params, i, x, t):
        cosines = cosines_of(params, x)
        return cross_entropy(
            [30 * (cosines[c] - LDAM_MARGINS[c] * t[c]) for c in range(CLASSES)], t
        )

    pair = lpa_jax.ldam(COUNTS), lpa_jax.drw(COUNTS, start=2)
    call, state = cosine_stepper(lpa_jax.chain(*pair[::order]), batch)
    plain = mean_over(batch, ldam)
    for step in range(4):
        result = call(state)
        state = result[2]
        objective = weighted_mean(batch, ldam, weights) if step >= 2 else plain
        agree(result, objective, loss=plain, params=COSINE_PARAMS, atol=2e-5)


def test_the_additive_margin_is_of_cosines_on_a_normalized_head():
    batch = draw_batch(1)

    def formula(params, i, x, t):
        cosines = cosines_of(params, x)
        return cross_entropy([30 * (cosines[c] - 0.35 * t[c]) for c in range(CLASSES)], t)

    call, state = cosine_stepper(lpa_jax.additive_margin(0.35, scale=30.0), batch)
    agree(call(state), mean_over(batch, formula), params=COSINE_PARAMS, atol=2e-5)


def test_deferred_weights_leave_the_size_of_gradients_of_a_long_tail():
    """CIFAR-10-LT at ratio 100: without a weighted mean they would be six times smaller."""
    counts = data.long_tail_counts([5000] * 10, 100).tolist()
    # One example for each class stands for all of them.
    given = {"labels": jnp.arange(10), "weights": jnp.array(counts, jnp.float32)}
    sizes = {}
    for normalize in (True, False):
        drw = lpa_jax.drw(counts, start=1, normalize=normalize)
        factors = drw.update(jnp.ones((10, 10)), (), step=jnp.int32(1), **given)[0][:, 0]
        sizes[normalize] = np.average(factors, weights=counts)
    assert sizes[True] == pytest.approx(1.0, rel=1e-5)
    assert sizes[False] == pytest.approx(0.17, abs=0.01)


def test_counts_of_other_classes_are_refused():
    for perturbation in (lpa_jax.reweight(COUNTS[1:]), lpa_jax.drw(COUNTS[1:], start=0)):
        with pytest.raises(ValueError, match="names 3 classes, but there are 4 logits"):
            one_step(perturbation, draw_batch(0))


@each_kind
def test_the_additive_margin_is_taken_off_the_true_logit(kind):
    batch = both_kinds()[kind]

    def formula(params, i, x, t):
        u = logits_of(params, x)
        return cross_entropy([u[c] - 3.0 * 0.4 * t[c] for c in range(CLASSES)], t)

    agree(one_step(lpa_jax.additive_margin(0.4, scale=3.0), batch), mean_over(batch, formula))


# ---------------------------------------------------------------- ISDA


def covariances_of(seen, diagonal):
    """Return the covariance of the features of each class, over all examples seen."""
    found = []
    for c in range(CLASSES):
        members = [(share[c], a) for share, a in seen if share[c] > 0]
        total = sum(part for part, _ in members)
        covariance = np.zeros((WIDTH, WIDTH))
        if members:
            mean = sum(part * np.array(a) for part, a in members) / total
            for part, a in members:
                covariance += part / total * np.outer(np.array(a) - mean, np.array(a) - mean)
        found.append(np.diag(np.diag(covariance)) if diagonal else covariance)
    return found


def isda_logits(params, x, t, covariances, strength):
    u, kernel, shifted = logits_of(params, x), params["head"]["kernel"], []
    for j in range(CLASSES):
        shift = 0.0
        for c in range(CLASSES):
            apart = [kernel[k][j] - kernel[k][c] for k in range(WIDTH)]
            for k in range(WIDTH):
                for m in range(WIDTH):
                    shift += t[c] * strength / 2 * apart[k] * covariances[c][k][m] * apart[m]
        shifted.append(u[j] + shift)
    return shifted


@each_kind
@pytest.mark.parametrize("diagonal", [False, True])
def test_isda_adds_the_covariance_of_all_features_seen(diagonal, kind):
    perturbation = lpa_jax.isda("features", 1.5, CLASSES, num_steps=4, diagonal=diagonal)
    call, state = stepper(perturbation)
    exact, seen = jax.tree.map(np.float64, PARAMS), []
    for step in range(3):
        inputs, labels, weights = draw_batch(step)
        batch = (inputs, soft(labels, step) if kind == "soft" else labels, weights)
        for x, share, weight in zip(inputs, shares_of(batch[1]), weights, strict=True):
            seen += [(share, features_of(exact, x.astype(np.float64)))] if weight else []
        covariances = covariances_of(seen, diagonal)

        def formula(params, i, x, t, covariances=covariances, strength=1.5 * step / 4):
            return cross_entropy(isda_logits(params, x, t, covariances, strength), t)

        result = call(state, batch)
        state = result[2]
        agree(result, mean_over(batch, formula))
        kept = state.perturbations[0]
        expected = [np.diag(c) for c in covariances] if diagonal else covariances
        close(kept.covariances, expected)
        close(kept.counts, sum(share for share, _ in seen))


def test_isda_serves_more_classes_than_examples():
    """A row for each class present, and classes without examples keep what they had."""
    many, batch = 50, draw_batch(1)
    model = nn.Sequential([Body(), nn.Dense(many)])
    variables = model.init(KEY, batch[0])
    perturbation = lpa_jax.isda("layers_0", 2.0, many, head="layers_1")
    step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=many)
    inputs, labels, weights = map(jnp.asarray, batch)
    results = []
    for given in (labels, jax.nn.one_hot(labels, many)):
        state = step.init(variables, inputs, given)
        (loss, _), grads, state = quick_jit(step)(
            variables, state, inputs, given, KEY, weights=weights
        )
        results.append((loss, grads, state.perturbations))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "hed"}, r"no 'hed/kernel'.*'features', 'head'.*Name the module"),
        ({"head": "features"}, r"no 'features/kernel'.*'dense'"),
        ({"head": "features/dense"}, r"\[4, 4\], but that of 'features/dense' is \[3, 4\]"),
        ({"num_classes": 3}, r"\[4, 3\], but that of 'head' is \[4, 4\]"),
        ({"site": "fetures"}, "no site 'fetures'; near names: features"),
    ],
)
def test_isda_without_its_head_is_refused(arguments, message):
    arguments = {"site": "features", "strength": 0.5, "num_classes": CLASSES} | arguments
    with pytest.raises(lpa_jax.SiteError, match=message):
        one_step(lpa_jax.isda(**arguments), draw_batch(0))


def test_isda_needs_the_vector_that_the_head_takes_in():
    perturbation = lpa_jax.isda("features", 0.5, CLASSES)
    with pytest.raises(lpa_jax.SiteError, match=r"features \[B, D\].*holds \(2, 8, 8, 3\)"):
        perturbation.init(jnp.zeros((2, 8, 8, 3)))


@pytest.mark.usefixtures("unchecked")
def test_isda_that_observes_features_before_they_are_mixed_is_refused():
    isda, mixup = lpa_jax.isda("features", 0.5, CLASSES), lpa_jax.manifold_mixup(("features",), 1.0)
    with pytest.raises(lpa_jax.SiteError, match="mixed before the examples are"):
        one_step(lpa_jax.chain(isda, mixup), draw_batch(0))
    one_step(lpa_jax.chain(mixup, isda), draw_batch(0))


class Partitioned(nn.Module):
    """The same network, whose parameters say how they are divided among devices."""

    @nn.compact
    def __call__(self, x):
        def init(*names):
            return nn.with_partitioning(nn.initializers.normal(), names)

        options = {"kernel_init": init(None, "model"), "bias_init": init("model")}
        x = nn.Dense(WIDTH, name="features", **options)(x)
        return nn.Dense(CLASSES, name="head", **options)(nn.tanh(x))


@pytest.mark.parametrize(
    "perturbation",
    [
        lpa_jax.isda("features", 0.5, CLASSES),
        lpa_jax.sam(0.1),
        lpa_jax.asam(0.5),
        lpa_jax.gradient_clipping(0.01),
        lpa_jax.at("param_grads", optax.clip(0.01)),
    ],
    ids=["isda", "sam", "asam", "gradient_clipping", "clip"],
)
def test_parameters_within_boxes_are_perturbed_like_those_without(perturbation):
    inputs, labels, _ = map(jnp.asarray, draw_batch(0))
    model = Partitioned()
    boxed = model.init(KEY, inputs)
    plain = nn.meta.unbox(boxed)
    results = []
    for variables in (boxed, plain):
        step = lpa_jax.value_and_grad(model.apply, perturbation, num_classes=CLASSES)
        state = step.init(variables, inputs, labels)
        (loss, _), grads, _ = quick_jit(step)(variables, state, inputs, labels, KEY)
        results.append((loss, nn.meta.unbox(grads)))
    chex.assert_trees_all_close(*results, rtol=1e-6)


# ---------------------------------------------------------------- SAM with a mask

MASK = {"features": {"dense": {"kernel": True, "bias": False}}, "head": False}


@pytest.mark.parametrize("mask", [MASK, lambda params: MASK], ids=["tree", "function"])
@pytest.mark.parametrize("kind", ["sam", "asam"])
def test_sam_with_a_mask_moves_the_masked_parameters_alone(kind, mask):
    """The gradient is that of all parameters, where those of the mask are moved."""
    batch, rho, eta = draw_batch(1), 0.3, 0.01
    make = lpa_jax.sam if kind == "sam" else functools.partial(lpa_jax.asam, eta=eta)
    objective = mean_over(batch, plain_ce)
    grads = differences(objective, PARAMS)
    weight = np.float64(PARAMS["features"]["dense"]["kernel"])
    scale = np.ones_like(weight) if kind == "sam" else np.abs(weight) + eta
    scaled = scale * grads["features"]["dense"]["kernel"]
    moved = jax.tree.map(np.float64, PARAMS)
    moved["features"]["dense"]["kernel"] += rho * scale * scaled / np.linalg.norm(scaled)
    expected = differences(objective, moved)
    _, got, _ = one_step(make(rho, mask=mask), batch)
    jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-5), got, expected)
    # Moving all makes another gradient.
    _, whole, _ = one_step(make(rho), batch)
    assert np.abs(whole["head"]["kernel"] - expected["head"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sam: optax.masked(sam, MASK),
        lambda sam: optax.partition({True: sam, False: optax.identity()}, MASK),
        lambda sam: optax.chain(optax.masked(sam, MASK)),
    ],
    ids=["masked", "partition", "chain"],
)
@pytest.mark.parametrize("make", [lpa_jax.sam, lpa_jax.asam])
def test_sam_behind_a_wrapper_that_hides_parameters_is_refused(make, wrap):
    wrapped = lpa_jax.at("param_grads", wrap(make(0.1)))
    with pytest.raises(lpa_jax.SiteError, match=r"the mask instead, as in .*sam\(rho, mask="):
        one_step(wrapped, draw_batch(0))


# ---------------------------------------------------------------- ELR

# Of twelve; the fourth place of the second batch repeats its first, and the padding of the third,
# in its third and sixth places, names examples that are known.
EXAMPLES = [[0, 4, 9, 7, 2, 5, 11], [4, 7, 1, 4, 0, 3, 11], [11, 10, 2, 4, 7, 4, 0]]


def early_learning(params, x, t, average, strength):
    u = logits_of(params, x)
    inner = sum(softmax(u)[c] * average[c] for c in range(CLASSES))
    return cross_entropy(u, t) + strength * math.log(1 - inner)


def elr_averages(table, batch, examples, beta, logits):
    """Move the averages of a batch's examples."""
    found = {}
    for i in range(BATCH):
        if batch[2][i]:
            found.setdefault(examples[i], []).append(softmax(logits(i, batch[0][i])))
    for example, predictions in found.items():
        p = [sum(column) / len(predictions) for column in zip(*predictions, strict=True)]
        table[example] = [beta * a + (1 - beta) * b for a, b in zip(table[example], p, strict=True)]


def test_elr_holds_predictions_to_their_moving_average():
    call, state = stepper(lpa_jax.elr(12, strength=3.0, beta=0.7))
    exact, table = jax.tree.map(np.float64, PARAMS), [[0.0] * CLASSES for _ in range(12)]
    for step, examples in enumerate(EXAMPLES):
        batch = draw_batch(step)
        elr_averages(table, batch, examples, 0.7, lambda i, x: logits_of(exact, np.float64(x)))

        def formula(params, i, x, t, examples=examples):
            return early_learning(params, x, t, table[examples[i]], 3.0)

        result = call(state, batch, extra={"examples": jnp.array(examples)})
        state = result[2]
        close(state.perturbations[0], table)
        agree(result, mean_over(batch, formula), loss=mean_over(batch, plain_ce))


def test_elr_follows_the_logits_that_other_perturbations_made():
    batch, examples = draw_batch(1), EXAMPLES[1]
    exact, table = jax.tree.map(np.float64, PARAMS), [[0.0] * CLASSES for _ in range(12)]
    shares = shares_of(batch[1])

    def moved(params, i, x):
        return [u - 0.8 * s for u, s in zip(logits_of(params, x), shares[i], strict=True)]

    elr_averages(table, batch, examples, 0.5, lambda i, x: moved(exact, i, np.float64(x)))

    def formula(params, i, x, t):
        u = moved(params, i, x)
        inner = sum(softmax(u)[c] * table[examples[i]][c] for c in range(CLASSES))
        return cross_entropy(u, t) + 2.0 * math.log(1 - inner)

    chain = lpa_jax.chain(lpa_jax.elr(12, 2.0, beta=0.5), lpa_jax.additive_margin(0.8))
    result = one_step(chain, batch, extra={"examples": jnp.array(examples)})
    agree(
        result,
        mean_over(batch, formula),
        loss=mean_over(batch, lambda params, i, x, t: cross_entropy(moved(params, i, x), t)),
    )


def test_elr_without_the_numbers_of_the_examples_is_refused():
    with pytest.raises(ValueError, match="give the step extra="):
        one_step(lpa_jax.elr(12, 3.0), draw_batch(0))


@pytest.mark.parametrize(
    "mask",
    [
        "head",
        {"features": "frozen", "head": "moves"},
        {"features": 0.5, "head": 1},
        {"params": True},
        {"features": True},
        {"features": None, "head": True},
        [True],
    ],
    ids=repr,
)
def test_a_mask_that_is_none_of_sams_parameters_is_refused(mask):
    with pytest.raises(lpa_jax.SiteError, match="The mask of sam must hold True or False"):
        one_step(lpa_jax.sam(0.1, mask=mask), draw_batch(0))


@pytest.mark.parametrize("first", [6, -1])
def test_an_example_that_elr_does_not_know_is_not_finite(first):
    (_, _), grads, state = one_step(
        lpa_jax.elr(12, 3.0), draw_batch(0), extra={"examples": first + jnp.arange(BATCH)}
    )
    assert not any(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    chex.assert_tree_all_finite(state.perturbations)


@pytest.mark.parametrize("examples", [jnp.arange(BATCH - 1), jnp.ones(BATCH)])
def test_examples_that_do_not_fit_are_refused(examples):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=r"entry for each example|an integer for each label"):
            one_step(lpa_jax.elr(12, 3.0), draw_batch(0), extra={"examples": examples})
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# ---------------------------------------------------------------- several at one site


@pytest.mark.parametrize("order", ["elr+reweight", "reweight+elr"])
def test_weights_scale_what_was_added_before_them(order):
    batch, examples, weights = draw_batch(1), EXAMPLES[1], effective_weights(0.9)
    exact, table = jax.tree.map(np.float64, PARAMS), [[0.0] * CLASSES for _ in range(12)]
    elr_averages(table, batch, examples, 0.7, lambda i, x: logits_of(exact, np.float64(x)))

    def formula(params, i, x, t):
        whole = early_learning(params, x, t, table[examples[i]], 3.0)
        loss, weight = plain_ce(params, i, x, t), weight_of(t, weights)
        return weight * whole if order == "elr+reweight" else weight * loss + (whole - loss)

    made = {"elr": lpa_jax.elr(12, 3.0), "reweight": lpa_jax.reweight(COUNTS, 0.9)}
    chain = lpa_jax.chain(*(made[name] for name in order.split("+")))
    result = one_step(chain, batch, extra={"examples": jnp.array(examples)})
    agree(result, mean_over(batch, formula), loss=mean_over(batch, plain_ce))


@pytest.mark.parametrize("order", ["adjustment+lpl", "lpl+adjustment"])
def test_lpl_climbs_the_loss_of_the_adjusted_logits_in_either_order(order):
    batch = draw_batch(1)
    inputs, labels, weights = batch
    exact = jax.tree.map(np.float64, PARAMS)
    prior = [math.log(n / sum(COUNTS)) for n in COUNTS]

    def adjusted(params, x):
        return [u + a for u, a in zip(logits_of(params, x), prior, strict=True)]

    deltas = np.zeros((CLASSES, CLASSES))
    for c in range(CLASSES):
        members = [i for i in range(BATCH) if weights[i] and labels[i] == c]
        for i in members:
            p = np.array(softmax(adjusted(exact, inputs[i].astype(np.float64))))
            deltas[c] += 0.6 / len(members) * (p - np.eye(CLASSES)[c])

    def formula(params, i, x, t):
        return cross_entropy(np.array(adjusted(params, x)) + deltas[labels[i]], t)

    split = lpa_jax.splits.all_positive()
    made = {
        "adjustment": lpa_jax.logit_adjustment(COUNTS),
        "lpl": lpa_jax.lpl(0.6, step_size=0.6, split=split),
    }
    chain = lpa_jax.chain(*(made[name] for name in order.split("+")))
    agree(one_step(chain, batch), mean_over(batch, formula))


# ---------------------------------------------------------------- images


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(x.reshape(len(x), -1))


def images(size=(9, 12)):
    return jax.random.normal(jax.random.key(3), (BATCH, *size, 2))


def moved_images(perturbation, seed, labels, weights):
    """Return images before and after a perturbation, and the targets after it."""
    step = lpa_jax.value_and_grad(Flat().apply, watched(perturbation), num_classes=CLASSES)
    variables = {"params": {"head": {"kernel": jnp.zeros((216, CLASSES)), "bias": jnp.zeros(4)}}}
    state = step.init(variables, images(), labels)

    def run(key):
        _, _, state_ = step(variables, state, images(), labels, key, weights=weights)
        site = {"inputs": before_and_after(perturbation, state_, "inputs")}
        if "labels" in perturbation.sites:
            site["labels"] = before_and_after(perturbation, state_, "labels")
        return site

    return quick_jit(jax.vmap(run))(jax.random.split(jax.random.key(seed), 40))


def extent(mask):
    """Return height and width of the rectangle that a mask is, having checked that it is one."""
    rows, columns = mask.any(1), mask.any(0)
    assert (mask == rows[:, None] & columns).all()
    for line in (rows, columns):
        places = np.flatnonzero(line)
        assert len(places) == 0 or len(places) == places[-1] - places[0] + 1
    return rows.sum(), columns.sum()


def test_cutmix_pastes_a_box_of_the_example_before_and_mixes_by_its_area():
    labels = jnp.array([0, 1, 2, 3, 0, 1, 2])
    padding = 3
    weights = jnp.ones(BATCH).at[padding].set(0.0)
    found = moved_images(lpa_jax.cutmix(1.0, probability=0.75), 0, labels, weights)
    areas = []
    for before, after, _, targets in zip(*found["inputs"], *found["labels"], strict=True):
        changed = (np.asarray(before) != np.asarray(after)).all(-1)
        height, width = extent(changed[1])
        areas.append(height * width / 108)
        for i in range(BATCH):
            pasted = changed[1] & (i not in (padding, padding + 1))
            expected = np.where(pasted[..., None], before[i - 1], before[i])
            # Padding is taken as 0, and its label as well.
            np.testing.assert_array_equal(after[i], expected if i != padding else 0 * before[i])
            share = 1 - pasted.mean()
            own = labels[i] if i != padding else 0
            mixed = share * np.eye(4)[own] + (1 - share) * np.eye(4)[labels[i - 1]]
            close(targets[i], mixed)
    areas = np.array(areas)
    # A quarter is not mixed; what the borders cut off makes the mean less than one half.
    assert 0.1 < np.mean(areas == 0) < 0.5
    assert 0.15 < areas[areas > 0].mean() < 0.5
    assert len(np.unique(areas)) > 15


def drawn_areas(alpha, number=20_000):
    """Return the shares of boxes that the borders have cut, from draws of NumPy's own."""
    rng = np.random.default_rng(1)
    sides = np.sqrt(1 - rng.beta(alpha, alpha, (number, 1)))
    centers = rng.uniform(size=(number, 2))
    return (np.minimum(centers + sides / 2, 1) - np.maximum(centers - sides / 2, 0)).prod(1)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_the_box_of_cutmix_has_the_area_that_the_beta_distribution_draws(alpha):
    value, mix = (
        jnp.arange(2.0)[:, None, None, None] * jnp.ones((2, 60, 80, 1)),
        lpa_jax.cutmix(alpha),
    )

    def one(key):
        new, share = mix.update(value, mix.init(value), key=key, weights=jnp.ones(2))
        return new[1, :, :, 0] == 0, share

    masks, shares = jax.vmap(one)(jax.random.split(KEY, 400))
    height, width = np.array([extent(mask) for mask in np.asarray(masks)]).T
    close(shares, 1 - height * width / 4800)
    inside = (height > 0) & ~(masks[:, [0, -1]].any((1, 2)) | masks[:, :, [0, -1]].any((1, 2)))
    # Of the image's shape, but for the last pixel of each side.
    assert (np.abs(height / 60 - width / 80)[inside] <= 1 / 60 + 1 / 80).all()
    expected = drawn_areas(alpha)
    assert np.mean(1 - shares) == pytest.approx(expected.mean(), abs=0.04)
    assert np.std(shares) == pytest.approx(expected.std(), abs=0.03)


def test_cutout_covers_a_square_of_each_image_with_the_mean():
    labels, weights = jnp.zeros(BATCH, int), jnp.ones(BATCH)
    found = moved_images(lpa_jax.cutout(4, mean=(0.25, -2.0)), 0, labels, weights)
    sizes, places = [], set()
    for before, after in zip(*found["inputs"], strict=True):
        changed = (np.asarray(before) != np.asarray(after)).all(-1)
        for i in range(BATCH):
            np.testing.assert_array_equal(
                after[i], np.where(changed[i][..., None], np.array([0.25, -2.0]), before[i])
            )
            sizes.append(extent(changed[i]))
            places.add((changed[i].any(1).argmax(), changed[i].any(0).argmax()))
    heights, widths = np.array(sizes).T
    # The center lies in the image, so that at least half a side is left.
    for side in (heights, widths):
        assert set(side) == {2, 3, 4}
    # 9 - 3 of nine rows and 12 - 3 of twelve columns hold a whole side.
    assert np.mean(heights == 4) == pytest.approx(6 / 9, abs=0.1)
    assert np.mean(widths == 4) == pytest.approx(9 / 12, abs=0.1)
    assert len(places) > 50


@pytest.mark.parametrize("make", [lambda: lpa_jax.cutmix(1.0), lambda: lpa_jax.cutout(4)])
def test_cutmix_and_cutout_need_images(make):
    with pytest.raises(ValueError, match=r"needs inputs \[B, H, W, channels\], not \(7, 3\)"):
        one_step(make(), draw_batch(0))


def sent_through(perturbation):
    """Return a function of a key: images and targets that a batch becomes, with padding in it."""
    value, targets = images(), jax.nn.one_hot(jnp.arange(BATCH) % CLASSES, CLASSES)
    weights = jnp.ones(BATCH).at[3].set(0.0)

    def run(key, switch):
        given = {"key": key, "weights": weights}
        chosen = perturbation(switch)
        mixed, state = chosen.update(value, chosen.init(value), site="inputs", **given)
        # As between the sites of a step. Fused, the area may be rounded otherwise.
        state = jax.lax.optimization_barrier(state)
        return mixed, chosen.update(targets, state, site="labels", **given)[0]

    return quick_jit(run)


def test_each_batch_goes_through_mixup_or_cutmix_to_the_bit():
    either = sent_through(lambda switch: lpa_jax.mixup_cutmix(0.8, 1.0, switch))
    interpolated = sent_through(lambda _: lpa_jax.mixup(0.8))
    pasted = sent_through(lambda _: lpa_jax.cutmix(1.0))

    def same(found, expected):
        return all(map(np.array_equal, found, expected))

    drawn = []
    for key in jax.random.split(KEY, 40):
        first, second = interpolated(key, 0.0), pasted(key, 0.0)
        assert same(either(key, 0.0), first)
        assert same(either(key, 1.0), second)
        found = either(key, 0.3)
        drawn.append(same(found, second))
        assert drawn[-1] or same(found, first)
    assert 5 < sum(drawn) < 20


# ---------------------------------------------------------------- activations and gradients


def test_shake_scales_forwards_and_backwards_by_independent_factors():
    shake, value = lpa_jax.shake("features", 0.5), jnp.ones((5000, 3)) * jnp.array([1.0, -2.0, 4.0])
    after, pullback = jax.vjp(lambda v: shake.update(v, shake.init(v), key=KEY)[0], value)
    (back,) = pullback(jnp.ones_like(value))
    forward, backward = after / value, back
    for factors in (forward, backward):
        close(factors, np.broadcast_to(factors[:, :1], factors.shape))
        assert 0.5 <= factors.min() < 0.51
        assert 1.49 < factors.max() <= 1.5
        assert abs(factors.mean() - 1) < 0.02
    assert abs(np.corrcoef(forward[:, 0], backward[:, 0])[0, 1]) < 0.06


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_gradients_are_clipped_whose_squares_no_float32_holds(size):
    clip = lpa_jax.gradient_clipping(0.1 * size)
    clipped, _ = clip.update({"a": jnp.array([3 * size]), "b": jnp.array([4 * size])}, ())
    np.testing.assert_allclose(clipped["a"] / size, 0.06, rtol=1e-5)
    np.testing.assert_allclose(clipped["b"] / size, 0.08, rtol=1e-5)


def test_gradients_are_clipped_by_the_norm_of_all():
    batch = draw_batch(1)
    _, plain, _ = one_step(lpa_jax.chain(), batch)
    norm = math.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(plain)))
    for most in (0.3 * norm, 3.0 * norm):
        _, grads, _ = one_step(lpa_jax.gradient_clipping(most), batch)
        jax.tree.map(lambda g, p, m=most: close(g, p * min(1, m / norm)), grads, plain)


def test_noise_of_gradients_fades_with_the_steps():
    noise, zeros = (
        lpa_jax.gradient_noise(0.5, gamma=0.7),
        {"a": jnp.zeros((80, 90)), "b": jnp.zeros(9000)},
    )
    for step in (0, 30):
        grads, _ = noise.update(zeros, noise.init(zeros), key=KEY, step=jnp.int32(step))
        for leaf in grads.values():
            assert leaf.std() == pytest.approx(math.sqrt(0.5 / (1 + step) ** 0.7), rel=0.03)
            assert abs(leaf.mean()) < 0.03
        assert abs(np.corrcoef(grads["a"].ravel(), grads["b"][:7200])[0, 1]) < 0.05


# ---------------------------------------------------------------- drop path and MixStyle


def test_drop_path_drops_whole_examples_and_scales_the_others():
    value = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 2, 3)), jnp.float32)
    drop = lpa_jax.drop_path("branch", 0.3)
    after, pullback = jax.vjp(lambda v: drop.update(v, drop.init(v), key=KEY)[0], value)
    kept = np.asarray(after != 0).any(axis=(1, 2))
    assert abs(kept.mean() - 0.7) < 4 * math.sqrt(0.21 / 4000)
    exact = np.where(kept[:, None, None], np.float64(value) / 0.7, 0.0)
    close(after, exact)
    # What was dropped learns nothing.
    close(
        pullback(jnp.ones_like(value))[0], np.where(kept[:, None, None], 1 / 0.7, 0.0) + 0 * exact
    )


def style_of(image):
    """Return mean and standard deviation of each channel, by loops over the positions."""
    positions = [image[h][w] for h in range(len(image)) for w in range(len(image[0]))]
    styles = []
    for c in range(len(positions[0])):
        mean = sum(p[c] for p in positions) / len(positions)
        variance = sum((p[c] - mean) ** 2 for p in positions) / len(positions)
        styles.append((mean, math.sqrt(variance + 1e-6)))
    return styles


def partner_of(i, weights, domains):
    """Return the first example before `i`, around the end, that it may be mixed with, or None."""
    for back in range(1, len(weights)):
        j = (i - back) % len(weights)
        if domains is None:
            return j if weights[j] else None
        if weights[j] and domains[j] != domains[i]:
            return j
    return None


@pytest.mark.parametrize("domains", [None, [0, 0, 1, 2, 2, 2, 1, 0], [5] * 8], ids=repr)
def test_mixstyle_mixes_the_channel_statistics_of_pairs(domains):
    rng = np.random.default_rng(2)
    scales = rng.uniform(0.2, 3.0, (8, 1, 1, 2))
    images = (scales * rng.normal(size=(8, 4, 3, 2)) + rng.normal(size=(8, 1, 1, 2))).astype("f")
    weights = np.array([1, 1, 1, 1, 0, 1, 1, 1], np.float32)
    style = lpa_jax.mixstyle("layer", alpha=1.0, probability=1.0)
    extra = {} if domains is None else {"domains": jnp.array(domains)}

    def styled(value):
        given = {"key": KEY, "weights": jnp.asarray(weights), **extra}
        return style.update(value, style.init(value), **given)[0]

    after, pullback = jax.vjp(styled, jnp.asarray(images))
    (gradient,) = pullback(jnp.ones_like(after))
    drawn = []
    for i, image in enumerate(np.float64(images)):
        j = partner_of(i, weights, domains) if weights[i] else None
        if j is None:
            np.testing.assert_array_equal(after[i], images[i])
            np.testing.assert_array_equal(gradient[i], 1.0)
            continue
        own, other = style_of(image), style_of(np.float64(images[j]))
        # One lambda for all channels: the first tells it.
        (before, _), (its, _) = own[0], other[0]
        lam = (float(np.float64(after[i, ..., 0]).mean()) - its) / (before - its)
        drawn.append(lam)
        for c, ((mean, std), (its_mean, its_std)) in enumerate(zip(own, other, strict=True)):
            new_mean = lam * mean + (1 - lam) * its_mean
            new_std = lam * std + (1 - lam) * its_std
            exact = (image[..., c] - mean) / std * new_std + new_mean
            np.testing.assert_allclose(after[i, ..., c], exact, rtol=1e-4, atol=1e-4)
            # The statistics are constants: only the scale is left.
            np.testing.assert_allclose(gradient[i, ..., c], new_std / std, rtol=1e-4)
    assert all(0 <= lam <= 1 for lam in drawn)
    assert len({round(lam, 3) for lam in drawn}) == len(drawn)
    assert len(drawn) == {None: 6, 5: 0}.get(domains and domains[0], 7)


def test_mixstyle_draws_from_the_beta_distribution_in_a_share_of_the_batches():
    # Means 0 and 1 by turns, and the same spread: the new mean is lambda, or one less it.
    ends = jnp.arange(4000) % 2
    value = ends[:, None, None] + jnp.array([-1.0, 1.0])[None, :, None]
    style = lpa_jax.mixstyle("layer", alpha=0.4, probability=0.5)

    @quick_jit
    def styled(key):
        return style.update(value, style.init(value), key=key, weights=jnp.ones(4000))[0]

    results = [np.asarray(styled(jax.random.key(seed))) for seed in range(24)]
    mixed = [result for result in results if (result != value).any()]
    assert 6 <= len(mixed) <= 18
    lam = np.where(ends == 1, mixed[0].mean((1, 2)), 1 - mixed[0].mean((1, 2)))
    assert abs(lam.mean() - 0.5) < 0.03
    assert lam.var() == pytest.approx(1 / (4 * 1.8), rel=0.05)


@pytest.mark.parametrize(
    ("shape", "extra", "message"),
    [
        ((4, 3), {}, r"needs a value \[B, ..., channels\] with positions, not \(4, 3\)"),
        ((4, 2, 3), {"domains": jnp.ones(4)}, "needs an integer for each example"),
        ((4, 2, 3), {"domains": jnp.arange(3)}, "needs an integer for each example"),
    ],
)
def test_mixstyle_without_a_style_or_domains_is_refused(shape, extra, message):
    style = lpa_jax.mixstyle("layer", alpha=1.0)
    with pytest.raises(ValueError, match=message):
        style.update(jnp.ones(shape), style.init(None), key=KEY, weights=jnp.ones(4), **extra)
