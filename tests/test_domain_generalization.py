"""Methods of domain generalization, against their formulas in float64.

The formulas are loops over domains and examples; gradients are central differences of them.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from probes import quick_jit, watch
import pytest

import lpa_jax

DEPTH, WIDTH, CLASSES, DOMAINS = 3, 4, 3, 4
KEY = jax.random.key(0)
BALANCED = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
# The last of four domains has no example, and the third has one.
SPARSE = [0, 1, 1, 0, 0, 2, 1, 0, 1, 0]
PADDING = [1, 1, 1, 0, 1, 1, 1, 1, 0, 1]
FRACTIONS = [1, 0.5, 2, 0, 1, 0.25, 1, 1, 0, 3]
BATCH = len(BALANCED)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(WIDTH, name="dense")(x))
        x = lpa_jax.tap("features", x)
        return nn.Dense(CLASSES, name="head")(x)


def draw(seed=0):
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "dense": {"kernel": numbers(DEPTH, WIDTH), "bias": numbers(WIDTH)},
        "head": {"kernel": numbers(WIDTH, CLASSES), "bias": numbers(CLASSES)},
    }
    return params, numbers(BATCH, DEPTH), jnp.asarray(rng.integers(0, CLASSES, BATCH))


PARAMS, INPUTS, LABELS = draw()


def one_step(chain, domains, weights, inputs=INPUTS, num_steps=1):
    """Return the loss, the gradient and the state of the last of several steps."""
    step = lpa_jax.value_and_grad(Net().apply, chain, num_classes=CLASSES)
    state = step.init({"params": PARAMS}, inputs, LABELS)

    @quick_jit
    def run(state, inputs, domains, weights):
        given = {"params": PARAMS}, state, inputs, LABELS, KEY
        return step(*given, weights=weights, extra={"domains": domains})

    given = jnp.asarray(inputs), jnp.asarray(domains), jnp.asarray(weights, jnp.float32)
    for _ in range(num_steps):
        (loss, _), grads, state = run(state, *given)
    return float(loss), grads, state


class Values:
    """What a formula is of: each real example's features, logits, loss, domain and weight."""

    def __init__(self, params, domains, weights, moved=0.0):
        features = (
            np.tanh(np.float64(INPUTS) @ params["dense"]["kernel"] + params["dense"]["bias"])
            + moved
        )
        logits = features @ params["head"]["kernel"] + params["head"]["bias"]
        real = [i for i in range(BATCH) if weights[i] > 0]
        self.features = [features[i] for i in real]
        self.logits = [logits[i] for i in real]
        self.labels = [int(LABELS[i]) for i in real]
        self.domains = [domains[i] for i in real]
        self.weights = [weights[i] for i in real]
        self.losses = [
            np.log(np.exp(u).sum()) - u[y] for u, y in zip(self.logits, self.labels, strict=True)
        ]

    def of_domains(self):
        """Return the places of the examples of each domain that has some."""
        places = [
            [i for i, domain in enumerate(self.domains) if domain == m] for m in range(DOMAINS)
        ]
        return [found for found in places if found]

    def mean(self, numbers, places=None):
        places = range(len(numbers)) if places is None else places
        total = sum(self.weights[i] for i in places)
        return sum(self.weights[i] * numbers[i] for i in places) / total


def gradient_of(function):
    """Return central differences of a function of the parameters, and its value."""
    params = jax.tree.map(np.float64, PARAMS)

    def differences(leaf):
        found = np.zeros_like(leaf)
        for place in np.ndindex(leaf.shape):
            ends = []
            for sign in (1, -1):
                before = leaf[place]
                leaf[place] = before + sign * 1e-5
                ends.append(function(params))
                leaf[place] = before
            found[place] = (ends[0] - ends[1]) / 2e-5
        return found

    return function(params), jax.tree.map(differences, params)


def compare(grads, expected):
    jax.tree.map(
        lambda got, exact: np.testing.assert_allclose(got, exact, rtol=2e-4, atol=2e-5),
        grads,
        expected,
    )


# ---------------------------------------------------------------- CORAL and MMD


def coral_of(values):
    total, pairs = 0.0, 0
    for one, other in itertools.combinations(values.of_domains(), 2):
        stats = []
        for places in (one, other):
            x = np.stack([values.features[i] for i in places])
            centered = x - x.mean(0)
            covariance = centered.T @ centered / (len(x) - 1) if len(x) > 1 else None
            stats.append((x.mean(0), covariance))
        (mean, cov), (its_mean, its_cov) = stats
        total += ((mean - its_mean) ** 2).mean()
        if cov is not None and its_cov is not None:
            total += ((cov - its_cov) ** 2).mean()
        pairs += 1
    return total / pairs if pairs else 0.0


def mmd_of(values):
    def kernel(one, other):
        numbers = []
        for i, j in itertools.product(one, other):
            distance = ((values.features[i] - values.features[j]) ** 2).sum()
            numbers.append(sum(np.exp(-(10.0**s) * distance) for s in range(-3, 4)))
        return np.mean(numbers)

    found = [
        kernel(one, one) + kernel(other, other) - 2 * kernel(one, other)
        for one, other in itertools.combinations(values.of_domains(), 2)
    ]
    return np.mean(found) if found else 0.0


PENALTIES = {"coral": (lpa_jax.coral, coral_of), "mmd": (lpa_jax.mmd, mmd_of)}
BATCHES = {
    "whole": (BALANCED, [1] * BATCH),
    "padding": (BALANCED, PADDING),
    "sparse": (SPARSE, FRACTIONS),
    "one domain": ([2] * BATCH, PADDING),
}
each_batch = pytest.mark.parametrize("batch", BATCHES)


@pytest.mark.parametrize("name", PENALTIES)
@each_batch
def test_a_penalty_of_the_features(name, batch):
    factory, penalty = PENALTIES[name]
    domains, weights = BATCHES[batch]

    def objective(params):
        values = Values(params, domains, weights)
        return values.mean(values.losses) + 0.7 * penalty(values)

    _, exact = gradient_of(objective)
    loss, grads, _ = one_step(factory("features", 0.7, DOMAINS), domains, weights)
    compare(grads, exact)
    # The loss is the plain one.
    values = Values(jax.tree.map(np.float64, PARAMS), domains, weights)
    assert loss == pytest.approx(values.mean(values.losses), rel=1e-5)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_of_features_that_lpa_has_moved(name):
    factory, penalty = PENALTIES[name]
    lpa = lpa_jax.lpa("features", 0.5, split=lpa_jax.splits.all_positive())
    chain = lpa_jax.chain(
        watch("features"), lpa, watch("features"), factory("features", 0.7, DOMAINS)
    )
    _, grads, state = one_step(chain, BALANCED, PADDING)
    before, after = (np.float64(state.perturbations[i]) for i in (0, 2))
    assert np.abs(after - before).max() > 0.05

    def objective(params):
        values = Values(params, BALANCED, PADDING, after - before)
        return values.mean(values.losses) + 0.7 * penalty(values)

    compare(grads, gradient_of(objective)[1])


# ---------------------------------------------------------------- GroupDRO and V-REx


def mean_losses(values):
    return {
        values.domains[places[0]]: values.mean(values.losses, places)
        for places in values.of_domains()
    }


@each_batch
def test_the_weights_of_group_dro(batch):
    domains, weights = BATCHES[batch]
    eta, num_steps = 0.4, 3
    means = mean_losses(Values(jax.tree.map(np.float64, PARAMS), domains, weights))
    scores = {m: np.exp(num_steps * eta * mean) for m, mean in means.items()}
    shares = {m: score / sum(scores.values()) for m, score in scores.items()}

    def objective(params):
        means = mean_losses(Values(params, domains, weights))
        return sum(shares[m] * mean for m, mean in means.items())

    group_dro = lpa_jax.group_dro(eta, DOMAINS)
    loss, grads, state = one_step(group_dro, domains, weights, num_steps=num_steps)
    compare(grads, gradient_of(objective)[1])
    values = Values(jax.tree.map(np.float64, PARAMS), domains, weights)
    assert loss == pytest.approx(values.mean(values.losses), rel=1e-5)
    # The other domains keep the weight that they began with.
    q = np.exp(np.float64(state.perturbations[0]))
    exact = np.array([scores.get(m, 1.0) for m in range(DOMAINS)])
    np.testing.assert_allclose(q / q.sum(), exact / exact.sum(), rtol=1e-4)


def test_group_dro_holds_out_against_losses_without_end():
    group_dro = lpa_jax.group_dro(1.0, 3)
    state = group_dro.init(jnp.ones((3, 2)))
    given = {"weights": jnp.ones(3), "domains": jnp.arange(3)}
    for _ in range(3):
        value, state = group_dro.update(
            jnp.ones((3, 2)), state, losses=jnp.array([1e30, 1.0, 2e30]), **given
        )
    np.testing.assert_array_equal(value, [[0, 0], [0, 0], [3, 3]])
    assert np.isfinite(state).all()


@each_batch
@pytest.mark.parametrize("num_steps", [2, 3])
def test_the_variance_of_vrex(batch, num_steps):
    domains, weights = BATCHES[batch]
    # Steps 0 and 1 have weight 1, and step 2 has another.
    weight = 1.0 if num_steps == 2 else 5.0

    def objective(params):
        values = Values(params, domains, weights)
        return values.mean(values.losses) + weight * np.var(list(mean_losses(values).values()))

    vrex = lpa_jax.vrex(5.0, DOMAINS, anneal_steps=2)
    loss, grads, _ = one_step(vrex, domains, weights, num_steps=num_steps)
    compare(grads, gradient_of(objective)[1])
    values = Values(jax.tree.map(np.float64, PARAMS), domains, weights)
    assert loss == pytest.approx(values.mean(values.losses), rel=1e-5)


@pytest.mark.parametrize("name", ["group_dro", "vrex"])
def test_the_domains_are_weighed_of_features_that_lpa_has_moved(name):
    lpa = lpa_jax.lpa("features", 0.5, split=lpa_jax.splits.all_positive())
    chain = lpa_jax.chain(watch("features"), lpa, watch("features"), ALL[name])
    _, grads, state = one_step(chain, BALANCED, PADDING)
    before, after = (np.float64(state.perturbations[i]) for i in (0, 2))

    def means_of(params):
        values = Values(params, BALANCED, PADDING, after - before)
        return values.mean(values.losses), mean_losses(values)

    scores = np.exp(0.4 * np.array(list(means_of(jax.tree.map(np.float64, PARAMS))[1].values())))

    def objective(params):
        mean, means = means_of(params)
        if name == "vrex":
            return mean + 5.0 * np.var(list(means.values()))
        return sum(scores / scores.sum() * list(means.values()))

    compare(grads, gradient_of(objective)[1])


# ---------------------------------------------------------------- IRM and RSC


def irm_of(values):
    products = []
    for places in values.of_domains():
        slopes = []
        for half in (places[::2], places[1::2]):
            numbers = []
            for i, u in enumerate(values.logits):
                p = np.exp(u) / np.exp(u).sum()
                numbers.append(p @ u - u[values.labels[i]])
            slopes.append(values.mean(numbers, half) if half else 0.0)
        products.append(slopes[0] * slopes[1])
    return np.mean(products)


@each_batch
def test_the_penalty_of_irm(batch):
    domains, weights = BATCHES[batch]

    def objective(params):
        values = Values(params, domains, weights)
        return values.mean(values.losses) + 3.0 * irm_of(values)

    loss, grads, _ = one_step(ALL["irm"], domains, weights)
    compare(grads, gradient_of(objective)[1])
    values = Values(jax.tree.map(np.float64, PARAMS), domains, weights)
    assert loss == pytest.approx(values.mean(values.losses), rel=1e-5)


def test_the_weight_of_irm_is_1_in_its_first_steps():
    rng = np.random.default_rng(1)
    given = {
        "logits": jnp.asarray(rng.normal(size=(BATCH, CLASSES)), jnp.float32),
        "targets": jax.nn.one_hot(LABELS, CLASSES),
        "weights": jnp.asarray(PADDING, jnp.float32),
        "domains": jnp.array(BALANCED),
    }
    irm = lpa_jax.irm(9.0, DOMAINS, anneal_steps=2)
    zero = jnp.zeros((BATCH, CLASSES))
    pulls = [irm.update(zero, (), step=jnp.int32(step), **given)[0] for step in (1, 2)]
    assert jnp.abs(pulls[0]).max() > 0.01
    np.testing.assert_allclose(pulls[1], 9.0 * pulls[0], rtol=1e-5)


@pytest.mark.parametrize("batch", ["whole", "padding", "sparse"])
@pytest.mark.parametrize("shares", [(1 / 3, 1 / 3), (0.7, 0.5), (1.0, 1.0)])
def test_rsc_mutes_what_a_prediction_rests_on(batch, shares):
    _, weights = BATCHES[batch]
    of_features, of_batch = shares
    params = jax.tree.map(np.float64, PARAMS)
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    real = [i for i in range(BATCH) if weights[i] > 0]
    features = np.tanh(np.float64(INPUTS) @ params["dense"]["kernel"] + params["dense"]["bias"])

    def probability(a, y):
        u = a @ kernel + bias
        return np.exp(u[y]) / np.exp(u).sum()

    keep, falls = np.ones_like(features), {}
    for i in real:
        slopes = kernel[:, LABELS[i]]
        # As DomainBed takes the percentile.
        keep[i] = slopes < np.percentile(slopes, 100 * (1 - of_features)) - 1e-9
        falls[i] = probability(features[i], LABELS[i])
        falls[i] -= probability(features[i] * keep[i], LABELS[i])
    least = np.percentile(list(falls.values()), 100 * (1 - of_batch))
    for i in range(BATCH):
        if falls.get(i, -np.inf) < least - 1e-9:
            keep[i] = 1
    assert (keep[real] == 0).any()
    chain = lpa_jax.chain(lpa_jax.rsc("features", *shares), watch("features"))
    loss, _, state = one_step(chain, BALANCED, weights)
    muted = features * keep
    np.testing.assert_allclose(
        np.asarray(state.perturbations[1])[real], muted[real], rtol=1e-5, atol=1e-6
    )
    losses = np.array([-np.log(probability(muted[i], LABELS[i])) for i in range(BATCH)])
    assert loss == pytest.approx(np.average(losses, weights=weights), rel=1e-5)


def test_rsc_needs_the_kernel_of_the_head():
    with pytest.raises(lpa_jax.SiteError, match="rsc needs the kernel of the network's last"):
        one_step(lpa_jax.rsc("features", head="last"), BALANCED, PADDING)


# ---------------------------------------------------------------- all of them


ALL = {
    "coral": lpa_jax.coral("features", 0.7, DOMAINS),
    "mmd": lpa_jax.mmd("features", 0.7, DOMAINS),
    "group_dro": lpa_jax.group_dro(0.4, DOMAINS),
    "vrex": lpa_jax.vrex(5.0, DOMAINS),
    "irm": lpa_jax.irm(3.0, DOMAINS),
}
each_method = pytest.mark.parametrize("method", ALL)


@each_method
def test_a_batch_of_padding_has_no_gradient(method):
    inputs = jnp.full_like(INPUTS, jnp.nan)
    loss, grads, state = one_step(ALL[method], BALANCED, [0] * BATCH, inputs)
    assert loss == 0
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.perturbations))


@each_method
def test_a_domain_that_there_is_not_makes_the_gradient_nan(method):
    for wrong in (-1, DOMAINS):
        _, grads, _ = one_step(ALL[method], [wrong, *BALANCED[1:]], [1] * BATCH)
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(grads["dense"]))
        # Of padding it does not count.
        _, grads, _ = one_step(ALL[method], [wrong, *BALANCED[1:]], [0, *PADDING[1:]])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@each_method
def test_devices_have_the_statistics_of_the_whole_batch(method):
    domains, weights = jnp.array(SPARSE), jnp.array(FRACTIONS, jnp.float32)
    given = jnp.asarray(INPUTS), jnp.asarray(LABELS), domains, weights
    variables = {"params": PARAMS}
    options = {"num_classes": CLASSES, "axis_name": "data"}
    step = lpa_jax.value_and_grad(Net().apply, ALL[method], **options)
    state = step.init(variables, INPUTS, LABELS)

    def run(inputs, labels, domains, weights):
        extra = {"domains": domains}
        _, grads, new = step(variables, state, inputs, labels, KEY, weights=weights, extra=extra)
        return jax.lax.pmean(grads, "data"), new

    parts = [array.reshape(5, 2, *array.shape[1:]) for array in given]
    grads, new = quick_jit(jax.vmap(run, axis_name="data"))(*parts)
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((5,), ("data",), axis_types=axes, devices=jax.devices()[:5])
    split, whole = jax.P("data"), jax.P()
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(split,) * 4, out_specs=(whole, whole))
    shard_grads, shard_new = quick_jit(mapped)(*given)
    _, exact, exact_new = one_step(ALL[method], SPARSE, FRACTIONS)
    compare(jax.tree.map(lambda leaf: leaf[0], grads), exact)
    compare(shard_grads, exact)
    compare(jax.tree.map(lambda leaf: leaf[0], new.perturbations), exact_new.perturbations)
    compare(shard_new.perturbations, exact_new.perturbations)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, r"needs the domain of each example: give the step extra=\{'domains': domains\}"),
        ({"domains": jnp.ones(BATCH)}, "needs an integer for each example in extra"),
        ({"domains": jnp.ones((BATCH, 2), jnp.int32)}, "needs an integer for each example"),
    ],
)
@each_method
def test_a_step_without_domains_is_refused(method, extra, message):
    step = lpa_jax.value_and_grad(Net().apply, ALL[method], num_classes=CLASSES)
    state = step.init({"params": PARAMS}, INPUTS, LABELS)
    with pytest.raises(ValueError, match=f"{method} {message}"):
        step({"params": PARAMS}, state, INPUTS, LABELS, KEY, extra=extra)


@pytest.mark.parametrize("name", PENALTIES)
def test_what_is_no_vector_of_features_is_refused(name):
    factory, _ = PENALTIES[name]
    for site in ("inputs", "logits"):
        with pytest.raises(lpa_jax.SiteError, match="acts at a layer before the head"):
            factory(site, 1.0, 3)
    with pytest.raises(ValueError, match="num_domains must be a whole number of at least 2"):
        factory("features", 1.0, 1)
    penalty = factory("group3", 1.0, 3)
    value = jnp.ones((2, 4, 4, 3))
    with pytest.raises(lpa_jax.SiteError, match=r"needs features \[B, D\].*'group3' holds \(2, 4"):
        penalty.update(value, (), weights=jnp.ones(2), domains=jnp.arange(2))
