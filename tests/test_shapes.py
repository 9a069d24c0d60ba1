"""What networks take in and return: trees, several inputs, positions, one logit, other layouts."""

import functools
import pickle

import chex
from flax import linen as nn
from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import networks
from networks import shift
import numpy as np
import optax
from probes import absolute, quick_jit
import pytest

import lpa_jax

KEY = jax.random.key(3)
X = jax.random.normal(jax.random.key(1), (6, 5))
Y = jnp.array([0, 1, 2, 0, 1, 1])
SPLIT = lpa_jax.splits.all_positive()
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-6)


def lpa(site, epsilon=0.3, **kwargs):
    return absolute(site, epsilon=epsilon, split=SPLIT, **kwargs)


def run(model, variables, perturbation, inputs=X, labels=Y, classes=3, given=None, **kwargs):
    """Return the result of the first step; `given` says how the step is made."""
    step = lpa_jax.value_and_grad(model, perturbation, num_classes=classes, **(given or {}))
    per_step = {name: kwargs.pop(name) for name in ("weights", "extra") if name in kwargs}
    state = step.init(variables, inputs, labels, **kwargs)
    go = quick_jit(lambda v, s, x, y: step(v, s, x, y, KEY, **per_step, **kwargs))
    return go(variables, state, inputs, labels)


def plain(function, variables, labels=Y):
    """Return the mean cross-entropy of a network, and its gradient."""

    def loss(params):
        logits = function({**variables, "params": params})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return quick_jit(jax.value_and_grad(loss))(variables["params"])


class Mlp(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(7, name="first")(x))
        x = jnp.tanh(nn.Dense(6, name="second")(x))
        return nn.Dense(self.classes, name="head")(x)


MLP = Mlp()
VARIABLES = networks.fill(MLP, X)


# ---------------------------------------------------------------- what comes out


class Outputs(nn.Module):
    """Logits among other things, in the form that is named."""

    form: str = "tuple"

    @nn.compact
    def __call__(self, x):
        features = jnp.tanh(nn.Dense(7, name="first")(x))
        logits = nn.Dense(3, name="head")(features)
        return {
            "tuple": (logits, {"features": features}),
            "dict": {"logits": logits, "features": features},
            "dict of one": {"logits": logits},
            "object": Output(logits=logits, features=features),
        }[self.form]


@chex.dataclass(frozen=True)
class Output:
    logits: jax.Array
    features: jax.Array


PICKS = {
    "tuple": lambda output: output[0],
    "dict": lambda output: output["logits"],
    "dict of one": lambda output: output["logits"],
    "object": lambda output: output.logits,
}


@pytest.mark.parametrize("form", PICKS)
@pytest.mark.parametrize("how", ["logits=", "a wrapper"])
def test_the_logits_are_picked_from_any_output(form, how):
    model, pick = Outputs(form), PICKS[form]
    variables = networks.fill(model, X)
    apply, given = model.apply, {"logits": pick}
    if how == "a wrapper":
        apply, given = (lambda v, x, **kwargs: pick(model.apply(v, x, **kwargs))), {}
    found = lpa_jax.list_sites(apply, variables, X, **given)
    assert list(found) == ["inputs", "labels", "first", "head", "logits", "logit_grads"]
    (loss, aux), grads, _ = run(apply, variables, lpa_jax.chain(), given=given)
    close((loss, grads), plain(lambda v: pick(model.apply(v, X)), variables))
    assert aux["updates"] == {}
    (moved, _), _, _ = run(apply, variables, lpa("first"), given=given)
    assert moved > loss + 1e-3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("form", PICKS)
def test_an_output_without_an_array_of_logits_is_refused(form):
    model = Outputs(form)
    with pytest.raises(ValueError, match=r"logits=lambda output: output\[0\]"):
        lpa_jax.list_sites(model.apply, networks.fill(model, X), X)


def test_mutable_collections_of_a_wrapper_are_not_taken_for_logits():
    model = networks.BatchNorms()
    variables = networks.fill(model, X)

    def wrapped(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    with pytest.raises(ValueError, match="give mutable= to the step"):
        lpa_jax.list_sites(wrapped, variables, X)


def test_training_continues_where_everything_is_mutable():
    step = lpa_jax.value_and_grad(MLP.apply, lpa_jax.chain(), num_classes=3)
    variables, losses = VARIABLES, []
    state = step.init(variables, X, Y, mutable=True)
    go = quick_jit(functools.partial(step, mutable=True))
    for _ in range(3):
        (loss, aux), grads, state = go(variables, state, X, Y, KEY)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, variables["params"], grads)
        # In the order in which a user may write it.
        variables = {**variables, "params": params, **aux["updates"]}
        losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]


# ---------------------------------------------------------------- one logit for two classes


class OneLogit(nn.Module):
    axes: int = 2

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(7, name="first")(x))
        x = nn.Dense(1, name="head")(x)
        return x if self.axes == 2 else x[..., 0]


def two_logits(model):
    """Return the same network with a logit for each class."""

    def apply(variables, x, **kwargs):
        logit = model.apply(variables, x, **kwargs).reshape(-1, 1)
        return jnp.concatenate([jnp.zeros_like(logit), logit], axis=1)

    return apply


BINARY = jnp.array([0, 1, 1, 0, 1, 1])


@pytest.mark.parametrize("axes", [1, 2])
def test_one_logit_is_trained_by_binary_cross_entropy(axes):
    model = OneLogit(axes)
    variables = networks.fill(model, X)

    def loss(params):
        logits = model.apply({"params": params}, X).reshape(-1)
        return optax.sigmoid_binary_cross_entropy(logits, BINARY).mean()

    (got, aux), grads, _ = run(model.apply, variables, lpa_jax.chain(), labels=BINARY, classes=2)
    close((got, grads), jax.value_and_grad(loss)(variables["params"]))
    assert aux["logits"].shape == ((6,), (6, 1))[axes - 1]
    shapes = lpa_jax.list_sites(model.apply, variables, X)
    assert shapes["labels"].shape == shapes["logits"].shape == (6, 2)


@pytest.mark.parametrize(
    "perturbation",
    [lpa("first"), lpa_jax.lpl(0.3, split=SPLIT), lpa_jax.lpg(0.1), lpa_jax.label_smoothing(0.2)],
    ids=["lpa", "lpl", "lpg", "label smoothing"],
)
def test_one_logit_is_perturbed_as_the_second_of_two(perturbation):
    model = OneLogit()
    variables = networks.fill(model, X)
    one = run(model.apply, variables, perturbation, labels=BINARY, classes=2)
    two = run(two_logits(model), variables, perturbation, labels=BINARY, classes=2)
    close((one[0][0], one[1], one[2]), (two[0][0], two[1], two[2]))


@pytest.mark.usefixtures("unchecked")
def test_one_logit_of_three_classes_is_refused():
    model = OneLogit()
    with pytest.raises(ValueError, match=r"returns \(6, 1\), but num_classes is 3"):
        run(model.apply, networks.fill(model, X), lpa_jax.chain(), labels=BINARY)


# ---------------------------------------------------------------- labels at each position

TOKENS = jax.random.normal(jax.random.key(4), (3, 4, 5))
TAGS = jnp.array([[0, 1, 2, 0], [1, 1, 2, -1], [0, 0, 2, 1]])
COUNTS = [5, 3, 2]
BY_ROW = {
    "nothing": lpa_jax.chain(),
    "lpa": lpa("first"),
    "lpa, relative": lpa_jax.lpa("second", epsilon=0.2),
    "lpa at the inputs": lpa("inputs"),
    "lpl": lpa_jax.lpl(0.3),
    "lpg": lpa_jax.lpg(0.1),
    "smoothing": lpa_jax.label_smoothing(0.2),
    "logit adjustment": lpa_jax.logit_adjustment(COUNTS),
    "drw": lpa_jax.drw(COUNTS, start=0),
    "isda": lpa_jax.isda("second", 0.3, 3),
    "adversarial": lpa_jax.adversarial("first", 0.1, norm="l2"),
    "elr": lpa_jax.elr(20, 2.0),
    "several": lpa_jax.chain(lpa("first"), lpa_jax.lpl(0.3), lpa_jax.lpg(0.1)),
}


@pytest.mark.parametrize("name", BY_ROW)
def test_positions_are_perturbed_like_examples(name):
    weights = jnp.array([[1.0, 0.5, 0.0, 2.0], [1.0] * 4, [0.0, 1.0, 1.0, 1.0]])
    kwargs = {"extra": {"examples": jnp.arange(12).reshape(3, 4)}, "weights": weights}
    flat = jax.tree.map(lambda value: value.reshape(12), kwargs)
    positions = run(MLP.apply, VARIABLES, BY_ROW[name], TOKENS, TAGS, **kwargs)
    rows = run(MLP.apply, VARIABLES, BY_ROW[name], TOKENS.reshape(12, 5), TAGS.reshape(12), **flat)
    (loss, aux), grads, state = positions
    (expected, by_row), by_row_grads, by_row_state = rows
    close((loss, grads, state), (expected, by_row_grads, by_row_state))
    close(aux["metrics"], by_row["metrics"])
    assert aux["logits"].shape == (3, 4, 3)
    assert aux["labels"].shape == (3, 4)
    close(aux["labels"].reshape(12), by_row["labels"])
    # The inputs of an example are kept where one of its positions counts.
    real = by_row["labels"] >= 0
    close(aux["logits"].reshape(12, 3)[real], by_row["logits"][real])


def test_soft_labels_at_each_position():
    soft = jax.nn.softmax(jax.random.normal(KEY, (3, 4, 3)))
    (loss, aux), grads, _ = run(MLP.apply, VARIABLES, lpa("first"), TOKENS, soft)
    rows = run(MLP.apply, VARIABLES, lpa("first"), TOKENS.reshape(12, 5), soft.reshape(12, 3))
    close((loss, grads), (rows[0][0], rows[1]))
    assert aux["labels"].shape == (3, 4, 3)


def test_the_weight_of_an_example_is_that_of_its_positions():
    perturbation = lpa_jax.chain(lpa("first"), lpa_jax.lpl(0.3))
    given = jnp.array([1.0, 0.0, 0.5])
    tokens = TOKENS.at[1].set(jnp.nan)
    by_example = run(MLP.apply, VARIABLES, perturbation, tokens, TAGS, weights=given)
    every = jnp.broadcast_to(given[:, None], TAGS.shape)
    by_position = run(MLP.apply, VARIABLES, perturbation, TOKENS, TAGS, weights=every)
    close(by_example, by_position)


class Segmenter(nn.Module):
    """Classes of pixels, from values of pixels, of patches and of whole images."""

    @nn.compact
    def __call__(self, images):
        pixels = nn.Conv(4, (3, 3), name="pixels")(images)
        patches = nn.Conv(4, (2, 2), (2, 2), name="patches")(pixels)
        whole = nn.Dense(4, name="whole")(patches.mean((1, 2)))
        up = jnp.repeat(jnp.repeat(patches, 2, 1), 2, 2)
        return nn.Dense(3, name="head")(jnp.tanh(up + pixels + whole[:, None, None]))


def test_pixels_have_classes_and_sites_have_one_value_for_each_pixel():
    images = jax.random.normal(KEY, (3, 4, 4, 2))
    labels = jnp.arange(48).reshape(3, 4, 4) % 3
    model = Segmenter()
    variables = networks.fill(model, images)
    found = lpa_jax.list_sites(model.apply, variables, images)
    assert list(found) == ["inputs", "labels", "pixels", "head", "logits", "logit_grads"]
    assert found["labels"].shape == (3, 4, 4, 3)
    assert "(3, 2, 2, 4), are not one for each label, (3, 4, 4)" in found.refused["patches"]
    assert "(3, 4), are not one for each label" in found.refused["whole"]
    (loss, aux), _, _ = run(model.apply, variables, lpa_jax.chain(), images, labels)
    (moved, aux), _, _ = run(model.apply, variables, lpa("pixels"), images, labels)
    assert moved > loss
    assert aux["metrics"]["pixels"]["count"].tolist() == [16.0, 16.0, 16.0]
    with pytest.raises(lpa_jax.SiteError, match="'whole' is no site: its values"):
        run(model.apply, variables, lpa("whole"), images, labels)


@pytest.mark.parametrize("mixing", [lpa_jax.mixup(1.0), lpa_jax.manifold_mixup("first", 1.0)])
def test_mixing_is_refused_where_positions_have_labels(mixing):
    with pytest.raises(lpa_jax.SiteError, match="not defined for a label at each position"):
        run(MLP.apply, VARIABLES, mixing, TOKENS, TAGS)


# ---------------------------------------------------------------- what goes in


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        image = lpa_jax.tap("image", inputs["image"])
        first = nn.Dense(7, name="first")(jnp.concatenate([image, inputs["more"][0]], 1))
        return nn.Dense(3, name="head")(jnp.tanh(first))


def joined(variables, x):
    first = x @ variables["params"]["first"]["kernel"] + variables["params"]["first"]["bias"]
    return (
        jnp.tanh(first) @ variables["params"]["head"]["kernel"]
        + variables["params"]["head"]["bias"]
    )


TREE = {"image": X, "more": (2.0 * X[:, :2] + 1.0,)}
TWO = TwoInputs()
TWO_VARIABLES = networks.fill(TWO, TREE)


@pytest.mark.parametrize(
    "perturbation",
    [lpa_jax.chain(), lpa_jax.mixup(2.0), lpa_jax.at("inputs", optax.scale(0.5)), lpa("first")],
    ids=["nothing", "mixup", "scale", "lpa"],
)
def test_a_tree_of_inputs_is_one_value(perturbation):
    whole = jnp.concatenate([TREE["image"], TREE["more"][0]], 1)
    (loss, aux), grads, _ = run(TWO.apply, TWO_VARIABLES, perturbation, TREE)
    if "first" in str(perturbation):
        # The layer has no name in the function.
        class One(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(7, name="first")(x)
                return nn.Dense(3, name="head")(jnp.tanh(x))

        function = One().apply
    else:
        function = joined
    expected = run(function, TWO_VARIABLES, perturbation, whole)
    close((loss, grads), (expected[0][0], expected[1]))
    close(aux["metrics"], expected[0][1]["metrics"])


def test_a_tree_of_inputs_is_listed_by_its_paths():
    found = lpa_jax.list_sites(TWO.apply, TWO_VARIABLES, TREE)
    assert list(found)[:4] == ["inputs['image']", "inputs['more'][0]", "labels", "image"]


def test_a_perturbation_of_one_array_refuses_a_tree_with_advice():
    with pytest.raises(lpa_jax.SiteError, match=r"name the array in the network, by lpa_jax\.tap"):
        run(TWO.apply, TWO_VARIABLES, lpa("inputs"), TREE)
    (moved, _), _, _ = run(TWO.apply, TWO_VARIABLES, lpa("image"), TREE)
    (loss, _), _, _ = run(TWO.apply, TWO_VARIABLES, lpa_jax.chain(), TREE)
    assert moved > loss


def test_inputs_that_do_not_agree_on_the_batch_are_refused():
    uneven = {"image": X, "more": (X[:3, :2],)}
    with pytest.raises(ValueError, match="The first axis of all inputs must be that of the batch"):
        run(TWO.apply, TWO_VARIABLES, lpa_jax.chain(), uneven)


def test_padding_of_a_tree_may_hold_anything():
    weights = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    bad = jax.tree.map(lambda leaf: leaf.at[4].set(jnp.nan), TREE)
    good = jax.tree.map(lambda leaf: leaf.at[4].set(0.0), TREE)
    perturbation = lpa_jax.chain(lpa("first"), lpa_jax.lpl(0.2))
    got = run(TWO.apply, TWO_VARIABLES, perturbation, bad, weights=weights)
    close(got, run(TWO.apply, TWO_VARIABLES, perturbation, good, weights=weights))


class Masked(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(20, 8, name="embed")(tokens) * mask[..., None]
        x = x.sum(1) / jnp.maximum(mask.sum(1), 1.0)[:, None]
        return nn.Dense(3, name="head")(jnp.tanh(nn.Dense(8, name="inner")(x)))


MASKED = Masked()
IDS = jnp.arange(24).reshape(6, 4) % 20
MASK = jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]] * 3)
MASKED_VARIABLES = MASKED.init(KEY, IDS, MASK)
GIVEN = {"per_example": ("mask",)}


def test_a_keyword_input_of_each_example_is_cleaned_where_it_is_padding():
    weights = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    perturbation = lpa_jax.chain(lpa("inner"), lpa_jax.lpl(0.2))
    run_masked = functools.partial(run, MASKED.apply, MASKED_VARIABLES, perturbation, IDS)
    bad = run_masked(weights=weights, given=GIVEN, mask=MASK.at[4].set(jnp.nan))
    good = run_masked(weights=weights, given=GIVEN, mask=MASK.at[4].set(0.0))
    close(bad, good)
    assert np.isfinite(bad[0][0])


def test_a_keyword_input_of_each_example_is_refused_by_mixing():
    for perturbation in (
        lpa_jax.manifold_mixup("embed", 2.0),
        lpa_jax.manifold_mixup("inner", 2.0),
    ):
        with pytest.raises(lpa_jax.SiteError, match="'mask' would stay those of the first"):
            run(MASKED.apply, MASKED_VARIABLES, perturbation, IDS, given=GIVEN, mask=MASK)


def test_a_keyword_input_that_is_not_declared_is_refused_at_sites_alone():
    (loss, _), grads, _ = run(MASKED.apply, MASKED_VARIABLES, lpa_jax.chain(), IDS, mask=MASK)
    close((loss, grads), plain(lambda v: MASKED.apply(v, IDS, MASK), MASKED_VARIABLES))
    with pytest.raises(
        lpa_jax.SiteError, match="if mask hold a value for each example, name them in per_example"
    ):
        run(MASKED.apply, MASKED_VARIABLES, lpa("inner"), IDS, mask=MASK)
    found = lpa_jax.list_sites(MASKED.apply, MASKED_VARIABLES, IDS, mask=MASK)
    assert "inner" not in found
    assert "per_example" in found.refused["inner"]
    found = lpa_jax.list_sites(MASKED.apply, MASKED_VARIABLES, IDS, per_example=["mask"], mask=MASK)
    assert list(found)[2:-2] == ["embed", "inner", "head"]
    assert not found.refused


class Colliding(nn.Module):
    @nn.compact
    def __call__(self, x, *, labels, key, state, weights, inputs):
        first = nn.Dense(7, name="first")(x) * (labels + key + state + weights + inputs)
        return nn.Dense(3, name="head")(jnp.tanh(first))


def test_keywords_of_the_network_may_have_any_names():
    model = Colliding()
    names = ("labels", "key", "state", "weights", "inputs")
    kwargs = {name: 0.1 * place for place, name in enumerate(names)}
    variables = model.init(KEY, X, **kwargs)
    found = lpa_jax.list_sites(model.apply, variables, X, apply_kwargs=kwargs)
    assert list(found)[2:-2] == ["first", "head"]
    step = lpa_jax.value_and_grad(model.apply, lpa_jax.chain(), num_classes=3)
    state = step.init(variables, X, Y, apply_kwargs=kwargs)
    (loss, _), grads, state = step(variables, state, X, Y, KEY, apply_kwargs=kwargs)
    close((loss, grads), plain(lambda v: model.apply(v, X, **kwargs), variables))
    finite, _ = step.diagnose(variables, state, X, Y, KEY, apply_kwargs=kwargs)
    assert all(finite.values())
    assert "'first'" in finite


# ---------------------------------------------------------------- the axis of the batch


class Layout(nn.Module):
    """The same network, the batch first or second, or one with the positions."""

    layout: str = "batch first"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, name="stem")(x)
        batch, positions, _ = x.shape
        first = nn.Dense(6, name="first")
        if self.layout == "batch first":
            x = first(x)
        elif self.layout == "time first":
            x = jnp.swapaxes(first(jnp.swapaxes(x, 0, 1)), 0, 1)
        elif self.layout == "joined":
            x = first(x.reshape(batch * positions, -1)).reshape(batch, positions, -1)
        table = nn.Embed(16, 6, name="table")(jnp.arange(positions))
        return nn.Dense(3, name="head")(jnp.tanh(x + table).mean(1))


@pytest.mark.parametrize("positions", [4, 6])  # 6 is the size of the batch.
def test_a_time_major_value_is_perturbed_as_a_batch_major_one(positions):
    inputs = jax.random.normal(KEY, (6, positions, 5))
    variables = networks.fill(Layout(), inputs)
    for perturbation in (lpa("first"), lpa("first", sharing="full")):
        first, second = (
            run(Layout(layout).apply, variables, perturbation, inputs)
            for layout in ("batch first", "time first")
        )
        close(first[:2], second[:2])
    found = lpa_jax.list_sites(Layout("time first").apply, variables, inputs)
    assert found["first"].shape == (positions, 6, 6)
    assert list(found)[2:-2] == ["stem", "first", "head"]
    shape = (positions, 6)
    assert found.refused == {"table": f"no axis of its shape, {shape}, grows with the batch"}


def test_a_value_that_joins_examples_and_positions_is_not_a_site():
    inputs = jax.random.normal(KEY, (6, 4, 5))
    variables = networks.fill(Layout(), inputs)
    found = lpa_jax.list_sites(Layout("joined").apply, variables, inputs)
    assert "joins the 6 examples with other positions" in found.refused["first"]
    with pytest.raises(lpa_jax.SiteError, match="'first' is no site: its axis 0, of 24, joins"):
        run(Layout("joined").apply, variables, lpa("first"), inputs)


def test_a_network_for_one_size_of_batch_is_trained_and_has_no_sites_within():
    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="first")(x).reshape(6, 2, 4)
            return nn.Dense(3, name="head")(x.mean(1))

    model = Fixed()
    variables = networks.fill(model, X)
    (loss, _), grads, _ = run(model.apply, variables, lpa_jax.lpl(0.0))
    close((loss, grads), plain(lambda v: model.apply(v, X), variables))
    found = lpa_jax.list_sites(model.apply, variables, X)
    assert "cannot be traced with 2 times as many" in found.refused["first"]


# ---------------------------------------------------------------- what is named, and what it costs


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="stem")(x)
        for i in range(3):
            x = x + DeepLayer(name=f"layer{i}")(x)
        return nn.Dense(3, name="head")(x)


class DeepLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="mlp")(jnp.tanh(nn.Dense(6, name="attention")(x)))


DEEP = Deep()
DEEP_VARIABLES = networks.fill(DEEP, X)


def test_a_pattern_names_all_sites_that_it_matches():
    by_pattern = run(DEEP.apply, DEEP_VARIABLES, shift("layer*/mlp", 0.3))
    by_name = run(
        DEEP.apply, DEEP_VARIABLES, lpa_jax.chain(*(shift(f"layer{i}/mlp", 0.3) for i in range(3)))
    )
    close(by_pattern[:2], by_name[:2])
    assert set(by_pattern[0][1]["metrics"]) == {f"layer{i}/mlp" for i in range(3)}


def test_lpa_takes_a_pattern_and_draws_separately_at_each_site():
    by_pattern = run(DEEP.apply, DEEP_VARIABLES, lpa("layer*"))
    by_name = run(DEEP.apply, DEEP_VARIABLES, lpa_jax.chain(*(lpa(f"layer{i}") for i in range(3))))
    close(by_pattern[:2], by_name[:2])
    noise = lpa_jax.gaussian_noise("layer*", 0.1)
    seen = []

    def update(value, **extra):
        new = noise.update(value, noise.init(value), **extra)[0]
        jax.debug.callback(lambda moved: seen.append(np.asarray(moved)), new - value)
        return new

    step = lpa_jax.value_and_grad(DEEP.apply, lpa_jax.stateless("layer*", update), num_classes=3)
    step(DEEP_VARIABLES, step.init(DEEP_VARIABLES, X, Y), X, Y, KEY)
    jax.effects_barrier()
    assert len(seen) == 3
    assert np.abs(seen[0] - seen[1]).max() > 0.01
    assert np.abs(seen[1] - seen[2]).max() > 0.01


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer*", ["layer0", "layer1", "layer2"]),
        ("layer1/*", ["layer1/attention", "layer1/mlp"]),
        ("**mlp", ["layer0/mlp", "layer1/mlp", "layer2/mlp"]),
    ],
)
def test_matches_of_a_pattern(pattern, expected):
    (_, aux), _, _ = run(DEEP.apply, DEEP_VARIABLES, shift(pattern, 0.1))
    assert sorted(aux["metrics"]) == expected


@pytest.mark.parametrize("pattern", ["block*", "*/mlp/*", "layer*/mlps"])
def test_a_pattern_that_matches_nothing_is_refused(pattern):
    with pytest.raises(lpa_jax.SiteError, match="There is no site"):
        run(DEEP.apply, DEEP_VARIABLES, shift(pattern))


def test_mixing_at_several_sites_of_a_pattern_is_refused():
    with pytest.raises(lpa_jax.SiteError, match="mixing more than once"):
        run(DEEP.apply, DEEP_VARIABLES, lpa_jax.manifold_mixup("layer*", 1.0))


def test_names_that_a_model_has_already_are_sites():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = checkpoint_name(jnp.tanh(nn.Dense(7, name="first")(x)), "hidden")
            return nn.Dense(3, name="head")(x)

    model = Named()
    variables = networks.fill(model, X)
    assert list(lpa_jax.list_sites(model.apply, variables, X))[2:-2] == ["first", "hidden", "head"]
    (moved, _), _, _ = run(model.apply, variables, shift("hidden", 0.2))
    (loss, _), _, _ = run(model.apply, variables, lpa_jax.chain())
    assert abs(moved - loss) > 1e-3


class Hidden(nn.Module):
    """Layers in places where no value can be replaced, and one that is not called."""

    def setup(self):
        self.first, self.never = nn.Dense(5), nn.Dense(5)
        self.branches = [nn.Dense(5), nn.Dense(5)]
        self.coder = Coder()
        self.head = nn.Dense(3)

    def __call__(self, x):
        x = self.first(x)
        if self.is_initializing():
            self.never(x)
        x = nn.switch(jnp.int32(x.sum() > 0), [_branch(0), _branch(1)], self, x)
        return self.head(self.coder.encode(x))


def _branch(i):
    return lambda module, x: module.branches[i](x)


class Coder(nn.Module):
    def setup(self):
        self.dense = nn.Dense(5)

    def encode(self, x):
        return jnp.tanh(self.dense(x))


def test_values_that_are_not_sites_are_listed_with_the_reason():
    model = Hidden()

    def init(module, x):
        for branch in module.branches:
            branch(x)
        module.coder.encode(x)
        module.never(x)
        return module.head(module.first(x))

    variables = model.init(KEY, X, method=init)
    found = lpa_jax.list_sites(model.apply, variables, X)
    assert list(found)[2:-2] == ["first", "coder/dense", "head"]
    assert set(found.refused) == {"branches_0", "branches_1", "never", "coder"}
    assert "branch that may not be taken" in found.refused["branches_0"]
    assert "no call of it was seen" in found.refused["never"]
    assert "no site: no call" in str(found)
    named = lpa_jax.list_sites(model.apply, variables, X, methods=["encode"])
    assert "coder.encode" in named
    step = {"methods": ["encode"]}
    (_, aux), _, _ = run(model.apply, variables, shift("coder.encode"), given=step)
    assert "coder.encode" in aux["metrics"]
    with pytest.raises(lpa_jax.SiteError, match="'never' is no site: no call of it was seen"):
        run(model.apply, variables, shift("never"))


def test_costs_are_those_of_the_rest_of_the_network():
    found = lpa_jax.list_sites(DEEP.apply, DEEP_VARIABLES, X)
    assert list(found.costs) == list(found)[2:-2]
    costs = [found.costs[f"layer{i}"] for i in range(3)]
    assert 1.0 > costs[0] > costs[1] > costs[2] > 0.0
    # Three layers of two products 6 x 6, a stem 5 x 6, a head 6 x 3; the rest is small.
    assert costs[1] == pytest.approx((72 + 18) / (3 * 72 + 30 + 18), abs=0.05)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lpa_jax.value_and_grad(3, lpa_jax.chain(), num_classes=3), TypeError, "not int"),
        (
            lambda: lpa_jax.value_and_grad(
                MLP.apply, lpa_jax.chain(), num_classes=3, per_example="mask"
            ),
            TypeError,
            "takes several names",
        ),
        (
            lambda: run(MLP.apply, VARIABLES, lpa_jax.chain(), TOKENS, TAGS, weights=jnp.ones(4)),
            ValueError,
            r"weights must have shape \(3, 4\), not \(4,\)",
        ),
        (
            lambda: run(MLP.apply, VARIABLES, lpa_jax.chain(), TOKENS, TAGS[:, :3]),
            ValueError,
            r"integer labels must have shape \(3, 4\), not \(3, 3\)",
        ),
    ],
    ids=["a model", "a name", "weights", "labels"],
)
def test_calls_that_do_not_fit_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------- what is refused


def test_a_layer_with_the_name_of_another_site_is_not_matched_by_a_pattern():
    class Taken(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="logits")(jnp.tanh(nn.Dense(7, name="inputs")(x)))

    model = Taken()
    variables = networks.fill(model, X)
    found = lpa_jax.list_sites(model.apply, variables, X)
    assert set(found.refused) == {"inputs", "logits"}
    with pytest.raises(lpa_jax.SiteError, match="pattern matches none of the layers"):
        run(model.apply, variables, lpa_jax.chain(shift("logits"), shift("*")))


def test_an_unused_value_is_not_a_site():
    def network(params, x):
        lpa_jax.tap("unused", x @ params["a"])
        turns = jax.lax.scan(turn, (x, x), jnp.arange(2.0))[0]
        return lpa_jax.tap("hidden", turns[0] @ params["a"]) @ params["b"]

    def turn(carry, _):
        kept, dropped = carry
        return (lpa_jax.tap("kept", jnp.tanh(kept)), lpa_jax.tap("dropped", dropped + kept)), None

    params = {"a": jnp.eye(5), "b": jnp.ones((5, 3))}
    found = lpa_jax.list_sites(network, params, X)
    assert list(found)[2:-2] == ["kept", "kept[0]", "kept[1]", "hidden"]
    reason = "the network's output does not depend on it"
    assert found.refused == {"unused": reason, "dropped": reason}
    with pytest.raises(lpa_jax.SiteError, match="'unused' is no site: the network's output"):
        run(network, params, lpa("unused"))


def test_values_in_a_loop_over_the_examples_do_not_hide_those_outside():
    def network(params, x):
        inner = jax.lax.map(lambda row: lpa_jax.tap("a", jnp.tanh(row @ params["a"])), x)
        return lpa_jax.tap("a", jnp.tanh(inner @ params["a"])) @ params["b"]

    params = {"a": jnp.eye(5), "b": jnp.ones((5, 3))}
    found = lpa_jax.list_sites(network, params, X)
    assert list(found)[2:-2] == ["a", "a[6]"]
    assert found.refused["a[0]"] == "no axis of its shape, (5,), grows with the batch"


def test_a_mask_that_is_not_declared_is_refused_by_mixing():
    step = lpa_jax.value_and_grad(MASKED.apply, lpa_jax.manifold_mixup("embed", 1.0), num_classes=3)
    with pytest.raises(lpa_jax.SiteError, match=r"Examples cannot be mixed.*name them"):
        step.init(MASKED_VARIABLES, IDS, Y, mask=MASK)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "kwargs", "message"),
    [
        ({"per_example": ("maks",)}, {"mask": MASK}, "names {'maks'}, which are not among"),
        (GIVEN, {"mask": MASK[:1]}, "a value for each of the 6 examples along its first axis"),
        (GIVEN, {"mask": 1.0}, "a value for each of the 6 examples"),
        (GIVEN, {"mask": MASK, "apply_kwargs": {"mask": MASK}}, "given twice"),
        ({}, {"mask": MASK, "mutable": True, "wrapped": True}, "must return what model.apply does"),
    ],
)
def test_keyword_arguments_that_do_not_fit_are_refused(given, kwargs, message):
    kwargs = dict(kwargs)
    wrapped = kwargs.pop("wrapped", False)
    apply = (lambda *args, **kw: MASKED.apply(*args, **kw)[0]) if wrapped else MASKED.apply
    step = lpa_jax.value_and_grad(apply, lpa_jax.chain(), num_classes=3, **given)
    with pytest.raises(ValueError, match=message):
        step.init(MASKED_VARIABLES, IDS, Y, **kwargs)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("model", "variables", "message"),
    [
        (MLP, VARIABLES, "Give value_and_grad model.apply"),
        (MLP.apply, VARIABLES["params"], "give {'params': params}"),
        (MLP.apply, nnx.Linear(5, 3, rngs=nnx.Rngs(0)), "Give value_and_grad the NNX model itself"),
        (nnx.Linear(5, 3, rngs=nnx.Rngs(0)), VARIABLES, "are the model itself, not dict"),
        (
            lambda p, x: x @ p["w"],
            {"w": X.T @ X, "act": "relu"},
            "there is a str: take the arrays",
        ),
    ],
)
def test_variables_of_another_kind_than_the_model_are_refused(model, variables, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lpa_jax.list_sites(model, variables, X)


@pytest.mark.usefixtures("unchecked")
def test_the_state_of_another_step_is_refused():
    step = lpa_jax.value_and_grad(MLP.apply, lpa("first"), num_classes=3)
    other = lpa_jax.value_and_grad(MLP.apply, lpa_jax.chain(), num_classes=3)
    for state in (other.init(VARIABLES, X, Y), None):
        with pytest.raises(ValueError, match=r"must be what step\.init returned, of 1 pert"):
            step(VARIABLES, state, X, Y, KEY)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("call", [lambda: lpa_jax.tap("", X), lambda: lpa_jax.tap(X, "hidden")])
def test_a_tap_needs_a_name(call):
    with pytest.raises(TypeError, match="tap takes a name and a value"):
        call()


def test_a_mask_of_zeros_is_never_made_for_padding():
    """Its mean over no position would be 0 / 0."""

    def network(params, x, mask):
        pooled = (x @ params["w"] * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return jnp.tanh(pooled) @ params["v"]

    params = {"w": jnp.ones((5, 4)), "v": jnp.ones((4, 3))}
    weights = jnp.array([1.0, 0.0, 1.0])
    mask = jnp.array([[1.0, 1.0, 0.0, 0.0]] * 3).at[1].set(jnp.nan)
    kwargs = {"given": GIVEN, "weights": weights, "mask": mask}
    (loss, _), grads, _ = run(network, params, lpa_jax.lpl(0.1), TOKENS, Y[:3], **kwargs)
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_state_of_the_size_of_the_batch_grows_with_it():
    class Carried(nn.Module):
        @nn.compact
        def __call__(self, x):
            carry = self.variable("carry", "h", jnp.zeros, (6, 7))
            x = nn.Dense(7, name="first")(x) + carry.value
            carry.value = x
            return nn.Dense(3, name="head")(jnp.tanh(x))

    model = Carried()
    variables = model.init(KEY, X)
    for perturbation in (lpa("first"), lpa_jax.mixup(1.0)):
        (_, aux), _, _ = run(model.apply, variables, perturbation, mutable=["carry"])
        assert aux["updates"]["carry"]["h"].shape == (6, 7)


def test_the_network_after_a_site_may_depend_on_the_batch_size():
    def network(params, x):
        hidden = lpa_jax.tap("hidden", jnp.tanh(x @ params["a"]))
        chunks = [hidden[i : i + 3] @ params["b"] for i in range(0, x.shape[0], 3)]
        return jnp.concatenate(chunks)

    params = {"a": jnp.eye(5), "b": jnp.ones((5, 3))}
    assert "hidden" in lpa_jax.list_sites(network, params, X)


def test_a_value_written_to_a_reference_is_used():
    def network(params, x):
        place = jax.new_ref(jnp.zeros(x.shape))
        place[...] = lpa_jax.tap("hidden", jnp.tanh(x @ params["a"]))
        return place[...] @ params["b"]

    params = {"a": jnp.eye(5), "b": jnp.ones((5, 3))}
    assert "hidden" in lpa_jax.list_sites(network, params, X)


@pytest.mark.usefixtures("unchecked")
def test_one_hot_labels_of_integers_are_refused():
    model = Mlp(classes=2)
    variables = networks.fill(model, X)
    with pytest.raises(ValueError, match="one-hot labels must be floats"):
        run(
            model.apply, variables, lpa_jax.chain(), labels=jnp.eye(2, dtype=int)[BINARY], classes=2
        )


def test_the_list_of_sites_is_copied_with_all_its_attributes():
    found = lpa_jax.list_sites(DEEP.apply, DEEP_VARIABLES, X)
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert (again.refused, again.costs) == (found.refused, found.costs)
