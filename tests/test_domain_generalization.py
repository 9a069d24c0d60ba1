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
from rich.console import Console

from configs import digits
import lpa_jax
from lpa_jax import data
from lpa_jax.training import build
from lpa_jax.training.config import ConfigError

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


def gradient_of(function, at=PARAMS):
    """Return central differences of a function of the parameters, and its value."""
    params = jax.tree.map(np.float64, at)

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


# ---------------------------------------------------------------- CORAL, MMD and DANN


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


def dann(site, strength, num_domains, **options):
    return lpa_jax.dann(site, strength, num_domains, width=3, grad_penalty=0.5, **options)


# Of three layers, as it begins.
DISCRIMINATOR = dann("features", 0.7, DOMAINS).init(jnp.zeros((BATCH, WIDTH))).discriminator


def discriminator_loss(layers, values):
    """Return the mean of the cross-entropy and half of its squared slope at the features."""
    found = []
    for x, domain in zip(values.features, values.domains, strict=True):
        sums = []
        for kernel, bias in layers:
            sums.append(x @ kernel + bias)
            x = np.maximum(sums[-1], 0)
        q = np.exp(sums[-1]) / np.exp(sums[-1]).sum()
        back = q - np.eye(DOMAINS)[domain]
        for (kernel, _), inner in zip(layers[:0:-1], sums[-2::-1], strict=True):
            back = (kernel @ back) * (inner > 0)
        slope = layers[0][0] @ back
        found.append(-np.log(q[domain]) + 0.5 * slope @ slope)
    return values.mean(found)


def dann_of(values):
    return -discriminator_loss(jax.tree.map(np.float64, DISCRIMINATOR), values)


PENALTIES = {
    "coral": (lpa_jax.coral, coral_of),
    "mmd": (lpa_jax.mmd, mmd_of),
    "dann": (dann, dann_of),
}
BATCHES = {
    "whole": (BALANCED, [1] * BATCH),
    "padding": (BALANCED, PADDING),
    "sparse": (SPARSE, FRACTIONS),
    "one domain": ([2] * BATCH, PADDING),
}
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in BATCHES if name != "sparse"]
each_batch = pytest.mark.parametrize("batch", ["sparse", *OTHERS])


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


@pytest.mark.parametrize("name", ["coral", pytest.param("mmd", marks=pytest.mark.slow), "dann"])
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


def adam(layers, values, num_steps, rate, decay, beta1):
    """Return a discriminator after some steps of Adam."""
    mean, square = (jax.tree.map(np.zeros_like, layers) for _ in range(2))
    for t in range(1, num_steps + 1):
        _, grads = gradient_of(lambda layers: discriminator_loss(layers, values), layers)
        grads = jax.tree.map(lambda g, p: g + decay * p, grads, layers)
        mean = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, mean, grads)
        square = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, square, grads)

        def moved(p, m, v, t=t):
            return p - rate * m / (1 - beta1**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)

        layers = jax.tree.map(moved, layers, mean, square)
    return layers


@each_batch
@pytest.mark.parametrize(("num_steps", "of_one"), [(2, 1), (1, 2)])
def test_the_discriminator_of_dann_learns_by_itself(batch, num_steps, of_one):
    domains, weights = BATCHES[batch]
    values = Values(jax.tree.map(np.float64, PARAMS), domains, weights)
    begun = jax.tree.map(np.float64, DISCRIMINATOR)
    options = {"rate": 0.05, "decay": 0.3, "beta1": 0.4}
    # The network's gradient is that of the discriminator before the step.
    judge = adam(begun, values, num_steps - 1, **options)

    def objective(params):
        values = Values(params, domains, weights)
        return values.mean(values.losses) - 0.7 * discriminator_loss(judge, values)

    chain = dann(
        "features",
        0.7,
        DOMAINS,
        learning_rate=0.05,
        weight_decay=0.3,
        beta1=0.4,
        discriminator_steps=of_one,
    )
    loss, grads, state = one_step(chain, domains, weights, num_steps=num_steps)
    compare(grads, gradient_of(objective)[1])
    assert loss == pytest.approx(values.mean(values.losses), rel=1e-5)
    learned = adam(begun, values, 2, **options)
    compare(state.perturbations[0].discriminator, learned)
    assert np.abs(learned[0][0] - begun[0][0]).max() > 0.05


def test_the_discriminator_of_dann_stays_as_it_is_without_examples():
    chain = dann("features", 0.7, DOMAINS, learning_rate=0.1, weight_decay=0.3)
    given = {"key": KEY, "domains": jnp.array(BALANCED)}
    update = quick_jit(chain.update)
    _, state = update(INPUTS, chain.init(INPUTS), weights=jnp.ones(BATCH), **given)
    nothing = jnp.full_like(INPUTS, jnp.nan)
    _, after = update(nothing, state, weights=jnp.zeros(BATCH), **given)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_the_hidden_units_of_danns_discriminator_are_dropped():
    chain = lpa_jax.dann("features", 1.0, DOMAINS, width=1, depth=2, dropout=0.75)
    kernel, bias = np.ones((DEPTH, 1)), np.ones(1)
    outwards = np.random.default_rng(0).normal(size=(1, DOMAINS))
    layers = [(kernel, bias), (outwards, np.zeros(DOMAINS))]
    layers = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers)
    state = chain.init(INPUTS)._replace(discriminator=layers)
    features = jnp.abs(INPUTS)
    # One unit is there, at four times its value, or it is not.
    hidden = 4 * (np.float64(features).sum(1) + 1)
    u = hidden[:, None] * outwards
    q = np.exp(u) / np.exp(u).sum(1, keepdims=True)
    slopes = 4 * ((q - np.eye(DOMAINS)[BALANCED]) @ outwards[0])

    def pull_of(key):
        given = {"key": key, "weights": jnp.ones(BATCH), "domains": jnp.array(BALANCED)}
        return jax.grad(lambda x: chain.update(x, state, **given)[0].sum())(features) - 1.0

    pulls = np.asarray(quick_jit(jax.vmap(pull_of))(jax.random.split(KEY, 400)))
    there = np.abs(pulls).max(2) > 0
    assert there.mean() == pytest.approx(0.25, abs=0.03)
    exact = np.where(there, -slopes / BATCH, 0.0)[:, :, None]
    np.testing.assert_allclose(pulls, np.broadcast_to(exact, pulls.shape), rtol=1e-4, atol=1e-6)


def test_the_discriminator_of_dann_begins_as_in_pytorch():
    value = jnp.zeros((BATCH, 64))
    first, again, other = (
        lpa_jax.dann("features", 1.0, 3, seed=seed).init(value).discriminator for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for (kernel, bias), (its_kernel, _) in zip(first, other, strict=True):
        bound = 1 / np.sqrt(len(kernel))
        for drawn in (kernel, bias):
            assert np.abs(drawn).max() <= bound
        assert np.std(kernel) == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert np.abs(bias).max() > 0.3 * bound
        assert np.mean(np.asarray(kernel) == its_kernel) < 0.01


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


@pytest.mark.parametrize("name", ["group_dro", pytest.param("vrex", marks=pytest.mark.slow)])
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


@each_batch
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


# ---------------------------------------------------------------- mixup of domains


@pytest.mark.parametrize("batch", BATCHES)
def test_each_domain_is_mixed_with_the_next_in_a_circle(batch):
    domains, weights = BATCHES[batch]
    perturbation = lpa_jax.domain_mixup(1.0, DOMAINS)
    targets = jnp.eye(BATCH)
    places = {
        m: [i for i in range(BATCH) if weights[i] > 0 and domains[i] == m] for m in range(DOMAINS)
    }
    places = {m: found for m, found in places.items() if found}
    given = {"weights": jnp.asarray(weights, jnp.float32), "domains": jnp.array(domains)}
    circles = set()
    for seed in range(8):
        key = jax.random.key(seed)
        # With a class of its own for each example the targets tell the shares.
        mixed, inputs = (
            np.asarray(perturbation.update(value, (), site=site, key=key, **given)[0])
            for site, value in (("labels", targets), ("inputs", INPUTS))
        )
        np.testing.assert_allclose(inputs, mixed @ np.asarray(INPUTS), atol=1e-6)
        following, lam = {}, {}
        for m, found in places.items():
            for turn, i in enumerate(found):
                (j,) = set(np.flatnonzero(mixed[i])) - {i} or {i}
                share = mixed[i, i] if j != i else 1.0
                assert following.setdefault(m, domains[j]) == domains[j]
                assert lam.setdefault(m, share) == pytest.approx(share, abs=1e-6)
                others = places[following[m]]
                assert j == others[turn % len(others)]
        for i in range(BATCH):
            if weights[i] == 0:
                np.testing.assert_array_equal(mixed[i], targets[i])
        if len(places) > 1:
            # All of them in one circle, and each with a share of its own.
            walk = [min(places)]
            while len(walk) < len(places):
                walk.append(following[walk[-1]])
            assert sorted(walk) == sorted(places)
            assert following[walk[-1]] == walk[0]
            assert len({round(float(share), 4) for share in lam.values()}) == len(places)
            circles.add(tuple(walk))
    assert len(circles) == (2 if len(places) > 2 else 0)


# ---------------------------------------------------------------- all of them


ALL = {
    "coral": lpa_jax.coral("features", 0.7, DOMAINS),
    "mmd": lpa_jax.mmd("features", 0.7, DOMAINS),
    "dann": dann("features", 0.7, DOMAINS, learning_rate=0.05),
    "group_dro": lpa_jax.group_dro(0.4, DOMAINS),
    "vrex": lpa_jax.vrex(5.0, DOMAINS),
    "irm": lpa_jax.irm(3.0, DOMAINS),
}
each_method = pytest.mark.parametrize("method", ALL)
each_method_in_time = pytest.mark.parametrize(
    "method",
    [
        name if name in ("coral", "dann", "irm") else pytest.param(name, marks=pytest.mark.slow)
        for name in ALL
    ],
)


@each_method
def test_a_batch_of_padding_has_no_gradient(method):
    inputs = jnp.full_like(INPUTS, jnp.nan)
    loss, grads, state = one_step(ALL[method], BALANCED, [0] * BATCH, inputs)
    assert loss == 0
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.perturbations))


def test_a_domain_that_there_is_not_makes_the_loss_of_mixed_domains_nan():
    mixup = lpa_jax.domain_mixup(1.0, DOMAINS)
    given = {"key": KEY, "weights": jnp.ones(BATCH)}
    for wrong in (-1, DOMAINS):
        mixed, _ = mixup.update(INPUTS, (), domains=jnp.array([wrong, *BALANCED[1:]]), **given)
        assert np.isnan(mixed).all()
    with pytest.raises(ValueError, match="domain_mixup needs the domain of each example"):
        mixup.update(INPUTS, (), **given)


@each_method_in_time
def test_a_domain_that_there_is_not_makes_the_gradient_nan(method):
    for wrong in (-1, DOMAINS):
        _, grads, _ = one_step(ALL[method], [wrong, *BALANCED[1:]], [1] * BATCH)
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(grads["dense"]))
        # Of padding it does not count.
        _, grads, _ = one_step(ALL[method], [wrong, *BALANCED[1:]], [0, *PADDING[1:]])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@each_method_in_time
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
        penalty.update(value, penalty.init(value), weights=jnp.ones(2), domains=jnp.arange(2))


# ---------------------------------------------------------------- the trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")
def test_the_trainer_counts_the_domains(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (90, 8, 8, 1)).astype(np.uint8)
    labels = np.arange(90, dtype=np.int32) % 3
    domains = {"domains": np.arange(90, dtype=np.int32) // 30}
    examples = data.Examples(images, labels, ("a", "b", "c"), domains)
    config = digits.get_config("method=coral+group_dro,smoke")
    config.update_from_flattened_dict(
        {"batch_size": 32, "epochs": 1, "schedule.boundaries": (), "limit": None}
    )
    splits = {"train": examples, "test": examples}
    lpa_jax.train_and_evaluate(config, tmp_path, Console(quiet=True), dataset=splits)
    state = lpa_jax.load_run(tmp_path, dataset=splits)
    assert state.step == 2
    parts = build.build(config, dataset=splits)
    assert parts.perturbed.chain[1].init(jnp.zeros((2, 3))).shape == (3,)
    del domains["domains"]
    with pytest.raises(ConfigError, match=r"For coral and group_dro in .* the domain of each"):
        lpa_jax.train_and_evaluate(config, tmp_path / "x", Console(quiet=True), dataset=splits)
    assert not (tmp_path / "x").exists()
