"""What a perturbation declares and keeps, and what its update is given besides the value."""

import copy
import inspect
import pickle
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
from probes import quick_jit
import pytest

import lpa_jax
from lpa_jax.core.perturbation import GIVEN, StatelessUpdate, Update

BATCH, CLASSES = 8, networks.NUM_CLASSES
INPUTS = jax.random.normal(jax.random.key(1), (BATCH, 3, 5))
LABELS = jnp.array([0, 1, 2, 0, 1, 1, 0, 0])
MODEL = networks.Nested()
VARIABLES = networks.fill(MODEL, INPUTS)
KEY = jax.random.key(2)
TRAITS = ("mixes", "class_level", "needs_gradient")


def same(value, state, params=None, **_):
    return value, state


def begin(value):
    return ()


def begin_otherwise(value):
    return ()


def show(site, class_stats, step):
    return {}


PARTS = {
    "sites": ("first", "labels"),
    "init": begin,
    "update": same,
    "report": show,
    "mixes": False,
    "class_level": False,
    "needs_gradient": None,
}
CHANGES = {
    "sites": ("second", "labels"),
    "init": begin_otherwise,
    "update": lambda value, state, params=None, **_: (value, state),
    "report": None,
    "mixes": True,
    "class_level": True,
    "needs_gradient": False,
}


def made(**changes):
    return lpa_jax.Perturbation(**{**PARTS, **changes})


def parts_of(perturbation):
    return {name: getattr(perturbation, name) for name in PARTS}


# ---------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda p: p._replace(),
        *(lambda p, n=n: pickle.loads(pickle.dumps(p, n)) for n in range(pickle.HIGHEST_PROTOCOL)),
    ],
)
def test_a_copy_is_equal_and_has_every_attribute(copied):
    for changes in ({}, {"mixes": True, "needs_gradient": True}, {"class_level": True}):
        perturbation = made(**changes)
        again = copied(perturbation)
        assert type(again) is lpa_jax.Perturbation
        assert parts_of(again) == {**PARTS, **changes}
        assert again == perturbation
        assert (again != perturbation) is False
        assert hash(again) == hash(perturbation)


@pytest.mark.parametrize("name", PARTS)
def test_perturbations_that_differ_in_one_part_are_not_equal(name):
    one, other = made(), made()._replace(**{name: CHANGES[name]})
    assert parts_of(other) == {**PARTS, name: CHANGES[name]}
    assert one != other
    assert (one == other) is False
    assert len({one, other, made()}) == 2


def test_a_perturbation_does_not_equal_a_bare_transform():
    bare = optax.GradientTransformationExtraArgs(begin, same)
    assert made() != bare
    assert bare != made()


# ---------------------------------------------------------------- what is declared


def test_defaults_of_declarations():
    def traits(perturbation):
        return [getattr(perturbation, name) for name in TRAITS]

    def update(value, **_):
        return value

    assert traits(lpa_jax.stateless("first", update)) == [False, False, None]
    # The targets go with the examples.
    assert traits(lpa_jax.stateless(("first", "labels"), update)) == [True, False, None]
    # A report is given the class statistics.
    assert traits(lpa_jax.stateless("first", update, show)) == [False, True, None]
    # Of a wrapped one nothing is known, and of a plain one everything.
    wrapped = optax.chain(lpa_jax.dropout("first", 0.1))
    assert traits(lpa_jax.at("first", wrapped)) == [False, True, None]
    assert traits(lpa_jax.at("first", optax.clip(1.0))) == [False, False, False]


@pytest.mark.parametrize("name", TRAITS)
@pytest.mark.parametrize("value", [True, False])
def test_declarations_are_kept(name, value):
    sites = ("first", "labels") if name == "mixes" else "first"

    def update(value, **_):
        return value

    found = [
        lpa_jax.stateless(sites, update, **{name: value}),
        lpa_jax.at(sites, optax.chain(lpa_jax.dropout("first", 0.1)), **{name: value}),
        lpa_jax.at(sites, optax.clip(1.0), **{name: value}),
        lpa_jax.at(sites, lpa_jax.stateless(sites, update), **{name: value}),
    ]
    assert [getattr(perturbation, name) for perturbation in found] == [value] * 4


@pytest.mark.parametrize("site", ["labels", "logit_grads"])
def test_needs_gradient_is_refused_at_sites_without_a_gradient(site):
    message = f"needs the gradient of the loss at its site, which '{site}' does not have"
    with pytest.raises(lpa_jax.SiteError, match=message):
        lpa_jax.stateless(site, lambda value, **_: value, needs_gradient=True)

    def run(perturbation):
        step = lpa_jax.value_and_grad(MODEL.apply, perturbation, num_classes=CLASSES)
        step(VARIABLES, step.init(VARIABLES, INPUTS, LABELS), INPUTS, LABELS, KEY)

    # Not declared, it is noticed when it is asked for.
    asks = lpa_jax.stateless(site, lambda value, *, gradient_fn, **_: gradient_fn(value)[1])
    wrapped = lpa_jax.at(site, optax.chain(lpa_jax.adversarial("group1", 0.1)))
    for perturbation in (asks, wrapped):
        with pytest.raises(lpa_jax.SiteError, match=message):
            jax.eval_shape(lambda perturbation=perturbation: run(perturbation))


def test_mixing_needs_the_labels_and_another_site():
    for site in ("labels", "first", ("first", "second")):
        with pytest.raises(lpa_jax.SiteError, match="acts at 'labels' and at another site"):
            lpa_jax.stateless(site, lambda value, **_: value, mixes=True)


@pytest.mark.parametrize(
    ("update", "given"),
    [
        (lambda value, *, class_stats, **_: value * class_stats.frequency.sum(), "class_stats"),
        (lambda value, *, gradient_fn, **_: gradient_fn(value)[1], "gradient_fn"),
    ],
    ids=["class_stats", "gradient_fn"],
)
def test_using_what_is_declared_unused_is_refused(update, given):
    trait = {"class_stats": "class_level", "gradient_fn": "needs_gradient"}[given]

    def run(value):
        perturbation = lpa_jax.stateless("group1", update, **{trait: value})
        step = lpa_jax.value_and_grad(MODEL.apply, perturbation, num_classes=CLASSES)
        step(VARIABLES, step.init(VARIABLES, INPUTS, LABELS), INPUTS, LABELS, KEY)

    jax.eval_shape(lambda: run(True))
    with pytest.raises(lpa_jax.SiteError, match=f"uses {given}, .* not declare: give {trait}=True"):
        jax.eval_shape(lambda: run(False))


def test_targets_are_perturbed_apart_from_the_examples_where_nothing_is_mixed():
    def update(value, *, site, **_):
        return 2.0 * value if site == "inputs" else 0.5 * value

    perturbation = lpa_jax.stateless(("inputs", "labels"), update, mixes=False)
    step = lpa_jax.value_and_grad(MODEL.apply, perturbation, num_classes=CLASSES)
    state = step.init(VARIABLES, INPUTS, LABELS)
    (loss, aux), _, _ = quick_jit(step)(VARIABLES, state, INPUTS, LABELS, KEY)
    logits = MODEL.apply(VARIABLES, 2.0 * INPUTS)
    targets = 0.5 * jax.nn.one_hot(LABELS, CLASSES)
    expected = optax.softmax_cross_entropy(logits, targets).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # The examples are of the classes that they were of.
    np.testing.assert_array_equal(aux["labels"], LABELS)


# ---------------------------------------------------------------- what an update is given


def test_an_update_gets_the_arguments_of_the_protocol():
    seen = {}

    def update(value, state, params=None, **given):
        seen.update(given)
        return value, state

    chain = lpa_jax.Perturbation("group1", begin, update, class_level=True)
    extra = {"examples": jnp.arange(BATCH)}
    step = lpa_jax.value_and_grad(MODEL.apply, chain, num_classes=CLASSES)
    state = step.init(VARIABLES, INPUTS, LABELS, extra=extra)
    jax.eval_shape(lambda: step(VARIABLES, state, INPUTS, LABELS, KEY, extra=extra))
    kinds = inspect.Parameter
    for protocol, others in ((Update, set()), (StatelessUpdate, {"params"})):
        parameters = inspect.signature(protocol.__call__).parameters.values()
        named = {p.name for p in parameters if p.kind is kinds.KEYWORD_ONLY}
        assert named == {*seen, *others} - {"examples"}
    # Python 3.13 strips the indentation of docstrings.
    documented = set(re.findall(r"^ *(\w+): ", Update.__doc__, re.MULTILINE))
    assert {*seen} - {"examples"} <= documented
    assert {*seen} - {"examples"} < {*GIVEN}


def keep(name):
    """Keep what the transform is given by a name."""

    def update(value, state, params=None, **given):
        return value, given[name]

    return update


@pytest.mark.parametrize(
    ("shape", "labels"), [((), 1), ((2,), 1), ((), 2), ((2,), 2), ((3,), 2), ((3, 2), 2)], ids=repr
)
def test_extra_values_are_given_by_name_to_every_transform(shape, labels):
    """Of labels `[B, T]`, one for each position, or one for each example that they share."""
    rows = (BATCH, 3) if labels == 2 else (BATCH,)
    array = jnp.arange(BATCH * int(np.prod(shape, dtype=int))).reshape(BATCH, *shape)
    spread = array if shape[:1] == (3,) or labels == 1 else jnp.repeat(array[:, None], 3, axis=1)
    expected = spread.reshape(int(np.prod(rows)), *spread.shape[len(rows) :])

    def network(params, x):
        x = lpa_jax.tap("first", x @ params["kernel"])
        return x if labels == 2 else x.mean(1)

    params = {"kernel": jnp.ones((5, CLASSES))}
    places = ("first", "logits", "logit_grads", "param_grads", "labels", "inputs")
    chain = lpa_jax.chain(
        *(lpa_jax.Perturbation(s, lambda _: expected, keep("domains")) for s in places)
    )
    step = lpa_jax.value_and_grad(network, chain, num_classes=CLASSES)
    of_rows = LABELS if labels == 1 else jnp.repeat(LABELS[:, None], 3, axis=1)
    state = step.init(params, INPUTS, of_rows)
    cleared = state._replace(perturbations=tuple(0 * kept for kept in state.perturbations))
    result = quick_jit(step)(params, cleared, INPUTS, of_rows, KEY, extra={"domains": array})
    for kept in result[2].perturbations:
        np.testing.assert_array_equal(kept, expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([jnp.ones(BATCH)], r"extra must be a mapping from names to arrays \[batch, ...\]"),
        ({3: jnp.ones(BATCH)}, "extra must be a mapping from names"),
        ({"domains": jnp.ones(BATCH - 1)}, r"extra\['domains'\] must be .*\(8, ...\), not shape"),
        ({"domains": jnp.float32(1.0)}, r"extra\['domains'\] must be an array with an entry"),
        ({"domains": [0] * BATCH}, r"extra\['domains'\] must be an array with an entry"),
        *(
            ({name: jnp.ones(BATCH)}, f"extra names {name}, which .* choose another name")
            for name in GIVEN
        ),
    ],
    ids=lambda value: str([*value])[:30] if not isinstance(value, str) else "",
)
def test_extra_values_that_do_not_fit_are_refused(extra, message):
    step = lpa_jax.value_and_grad(MODEL.apply, lpa_jax.chain(), num_classes=CLASSES)
    state = step.init(VARIABLES, INPUTS, LABELS)
    for take in (step, step.diagnose):
        with pytest.raises(ValueError, match=message):
            take(VARIABLES, state, INPUTS, LABELS, KEY, extra=extra)
