"""The trainer, in this process: what a run saves, and what it refuses."""

import contextlib
import functools
import gc
import io
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import optax
import probes
import pytest
from rich.console import Console

from configs import digits
import lpa_jax
from lpa_jax import data, losses, models
from lpa_jax.core import class_stats
from lpa_jax.core import step as step_module
from lpa_jax.methods import METHODS
from lpa_jax.tasks import classification
from lpa_jax.training import (
    build,
    checkpoints,
    feed,
    files,
    fit,
    loop,
    mesh,
    method_config,
    metric_log,
    schedules,
    writers,
)  # fmt: skip
from lpa_jax.training import config as configuration
from lpa_jax.training.network import Network
from lpa_jax.training.step import make_steps

# tensorboardX and orbax are third parties to these.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")

# Orbax leaves coroutines behind where it cannot read, which are collected at the test's end.
unread = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def smoke(method="lpa", **changes):
    config = digits.get_config(f"method={method},smoke")
    config.update_from_flattened_dict(changes)
    return config


def run(config, workdir):
    console = Console(file=io.StringIO(), width=120)
    return loop.train_and_evaluate(config, workdir, console), console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    traces = []
    original = step_module.Step.__call__

    def counting(self, *args, **kwargs):
        traces.append(self)
        return original(self, *args, **kwargs)

    step_module.Step.__call__ = counting
    try:
        summary, text = run(smoke("lpa+lpl+lpg", num_seeds=2, seed=3), workdir)
    finally:
        step_module.Step.__call__ = original
    return workdir, summary, text, traces


def test_a_run_saves_its_results_and_shows_them(finished):
    workdir, summary, text, _ = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    for name in ("curves.png", "perturbation.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    assert [seed["seed"] for seed in summary["seeds"]] == [3, 4]
    for seed in (3, 4):
        rows = metric_log.read_rows(workdir / f"seed{seed}" / "metrics.jsonl")
        assert [row["epoch"] for row in rows] == [1, 2]
        assert {"loss", "accuracy"} <= set(rows[0]["metrics"]["train"])
        assert "nll" in rows[0]["metrics"]["validation"]
        assert ("norm" in rows[0]["sites"]["group3"], "sign" in rows[0]["sites"]["logits"]) == (
            True,
            True,
        )
        assert list((workdir / f"seed{seed}" / "tensorboard").iterdir())
    assert "test accuracy %" in text
    assert "mean ± std" in text


def test_a_plain_run_reports_no_labels_and_no_groups(finished):
    workdir, summary, text, _ = finished
    assert not (workdir / "labels.npz").exists()
    assert not {"groups", "noise_rate", "labels_sha256"} & set(summary)
    assert "group of classes" not in text


def test_mean_and_standard_deviation_are_those_of_the_seeds(finished):
    _, summary, _, _ = finished
    values = [seed["metrics"]["test"]["accuracy"] for seed in summary["seeds"]]
    assert summary["metrics"]["test"]["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert summary["metrics"]["test"]["accuracy"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert values[0] != values[1]


def test_the_step_is_traced_once_for_all_seeds(finished):
    assert len(finished[3]) == 1


def test_a_finished_run_is_shown_again_and_not_trained_again(finished):
    workdir, summary, _, traces = finished
    before = len(traces)
    again, text = run(smoke("lpa+lpl+lpg", num_seeds=2, seed=3), workdir)
    assert again["seeds"] == summary["seeds"]
    assert len(traces) == before
    assert "test accuracy %" in text


@pytest.mark.guarantee("changed-configuration")
def test_another_configuration_is_refused_with_the_differing_keys(finished):
    with pytest.raises(
        configuration.ConfigError, match=r"differs in batch_size, perturbation\.lpa"
    ):
        run(
            smoke(
                "lpa+lpl+lpg",
                num_seeds=2,
                seed=3,
                batch_size=32,
                **{"perturbation.lpa.epsilon": 0.3},
            ),
            finished[0],
        )


@pytest.mark.guarantee("changed-configuration")
@unread
def test_another_configuration_resumes_where_that_is_allowed(finished, tmp_path, caplog):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    for name in ("seed3/result.json", "seed4/result.json"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "seed4")
    changes = {"num_seeds": 1, "seed": 3, "epochs": 3, "schedule.learning_rate": 0.05}
    change = {"epochs": [2, 3], "schedule.learning_rate": [0.1, 0.05]}

    def go_on(**more):
        config = smoke("lpa+lpl+lpg", **{**changes, **more})
        return loop.train_and_evaluate(
            config, workdir, Console(file=io.StringIO()), allow_config_change=True
        )

    summary = go_on()
    assert "another configuration: epochs from 2 to 3, schedule.learning_rate" in caplog.text
    assert summary["config_changes"] == [change]
    assert files.read_json(workdir / "config_changes.json") == {"changes": [change]}
    rows = metric_log.read_rows(workdir / "seed3" / "metrics.jsonl")
    assert rows[:2] == metric_log.read_rows(finished[0] / "seed3" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    # The change is remembered, and the new configuration is now its own.
    again, _ = run(smoke("lpa+lpl+lpg", **changes), workdir)
    assert again["config_changes"] == [change]
    # A change that does not fit the state is refused, and the state is kept.
    (workdir / "seed3" / "result.json").unlink()
    with pytest.raises(configuration.ConfigError, match="60 steps, but this configuration has 20"):
        go_on(epochs=1)
    kept = sorted((workdir / "seed3" / "checkpoints").iterdir())
    with pytest.raises(checkpoints.CheckpointError, match="resume with the configuration"):
        go_on(**{"model.options.width": 8})
    assert sorted((workdir / "seed3" / "checkpoints").iterdir()) == kept
    assert finished[1]["config_changes"] == []
    gc.collect()


def diverging(**changes):
    # From the second epoch on, the rate is out of all reason.
    changes = {"schedule.name": "piecewise", "schedule.factor": 1e30, **changes}
    config = smoke("erm", **changes)
    config.optimizer.options = config_dict.ConfigDict({})
    return config


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(
        fit.NonFiniteLossError,
        match=r"Step 21 was not finite, first 'group1/norm1': lower the learning",
    ):
        run(diverging(), tmp_path)
    assert not (tmp_path / "seed0" / "result.json").exists()
    kept = list((tmp_path / "seed0" / "checkpoints").iterdir())
    assert [path.name for path in kept] == [str(1295 // 64)]


def sometimes_infinite(site, share):
    """Make a site infinite in this share of the steps, drawn by their keys."""

    def update(value, *, key, **_):
        return value + jnp.where(jax.random.uniform(key) < share, jnp.inf, 0.0)

    return lpa_jax.stateless(site, update)


@pytest.mark.guarantee("non-finite-step")
@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("group2", "the perturbation at 'group2'"),
        pytest.param("logits", "the perturbation at 'logits'", marks=pytest.mark.slow),
        pytest.param("logit_grads", "the perturbation at 'logit_grads'", marks=pytest.mark.slow),
    ],
)
def test_the_first_site_that_is_not_finite_is_named(site, name, tmp_path, monkeypatch):
    broken = sometimes_infinite(site, 0.1)
    monkeypatch.setattr(method_config, "perturbation", lambda *_: (broken,))
    with pytest.raises(fit.NonFiniteLossError, match=f"Step \\d+ was not finite, first {name}"):
        run(smoke("erm"), tmp_path)


@pytest.mark.guarantee("non-finite-step")
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    broken = sometimes_infinite("logits", 0.3)
    monkeypatch.setattr(method_config, "perturbation", lambda *_: (broken,))
    config = smoke("erm", nonfinite="skip")
    summary, _ = run(config, tmp_path)
    skipped = [
        row["nonfinite_steps"] for row in metric_log.read_rows(tmp_path / "seed0/metrics.jsonl")
    ]
    assert 0 < skipped[0] < skipped[-1] < 1295 // 64 * config.epochs
    assert summary["seeds"][0]["metrics"]["test"]["accuracy"] > 0.2


def test_an_epoch_without_a_finite_step_stops_a_run_that_skips(tmp_path, monkeypatch):
    broken = sometimes_infinite("logits", 1.0)
    monkeypatch.setattr(method_config, "perturbation", lambda *_: (broken,))
    last = 1295 // 64 - 1
    with pytest.raises(fit.NonFiniteLossError, match=f"Step {last} was not finite, first the per"):
        run(smoke("erm", nonfinite="skip"), tmp_path)


def steps_on_digits(perturbation, nonfinite="stop"):
    """Return the steps of a small network, their first state, and an iterator of batches."""
    grid = mesh.make_mesh(64)
    source = feed.make_feed("device", data.load("digits").train, 64, 20, grid)
    model = models.create("small_cnn", num_classes=10, mean=(0.5,), std=(0.25,))
    steps = make_steps(
        Network(model),
        classification,
        lpa_jax.value_and_grad(model.apply, perturbation, num_classes=10),
        optax.adam(1e-3),
        grid,
        source.like,
        source.take,
        augment=data.augmentations("crop=1"),
        nonfinite=nonfinite,
    )
    return steps, steps.init(jnp.int32(0)), source.open(0, 0)


@pytest.mark.parametrize("site", ["inputs", pytest.param("group1", marks=pytest.mark.slow)])
def test_a_mixed_image_counts_by_its_share_of_the_class_predicted(site):
    mixup = lpa_jax.manifold_mixup((site,), 4.0)
    steps, state, batches = steps_on_digits(
        lpa_jax.chain(mixup, probes.watch("labels"), probes.watch("logits"))
    )
    total, unmixed = 0.0, 0.0
    for given in itertools.islice(batches, 15):
        state = steps.train(state, jnp.int32(0), jnp.int32(1), *given)
        *_, labels, logits = jax.tree.map(np.asarray, state.perturbation.perturbations)
        predicted = np.argmax(logits, axis=1)
        total += np.take_along_axis(labels, predicted[:, None], 1).sum()
        unmixed += np.sum(predicted == np.argmax(labels, axis=1))
    # Of predictions that are all of one class the sum would be the same.
    assert abs(total - unmixed) > 10
    np.testing.assert_allclose(state.running.correct, total, rtol=1e-5)


@pytest.mark.guarantee("non-finite-step")
@pytest.mark.parametrize(("nonfinite", "after"), [("stop", 0), ("skip", 2)])
def test_a_step_that_is_not_finite_changes_its_count_alone(nonfinite, after):
    perturbation = lpa_jax.chain(lpa_jax.lpa("group2", 0.1), sometimes_infinite("logits", 1.0))
    steps, state, batches = steps_on_digits(perturbation, nonfinite)
    before = jax.tree.map(np.array, state)
    for given in itertools.islice(batches, 2):
        state = steps.train(state, jnp.int32(0), jnp.int32(1), *given)
    assert int(state.step) == after
    # A run that stops counts the step at which it stops.
    assert int(state.nonfinite_steps) == max(after, 1)
    # The schedules of a run that continues advance too, or they would repeat the failure.
    assert int(state.perturbation.step) == after
    state = state._replace(
        step=before.step,
        nonfinite_steps=before.nonfinite_steps,
        perturbation=state.perturbation._replace(step=before.perturbation.step),
    )
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_bfloat16_computes_with_float32_parameters(tmp_path):
    summary, _ = run(smoke("lpa+lpg", **{"model.dtype": "bfloat16"}), tmp_path)
    assert np.isfinite(summary["metrics"]["test"]["nll"]["mean"])
    assert summary["metrics"]["test"]["accuracy"]["mean"] > 0.3


# ---------------------------------------------------------------- batches and dispatches


def batches_of(place, first, count=7, sampling="uniform"):
    """Return the batches of a few steps as a feed gives them to the step."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 2, 2, 1), dtype=np.uint8)
    labels = np.arange(40, dtype=np.int32)
    if sampling != "uniform":
        labels = np.sqrt(labels).astype(np.int32)
    fed = feed.make_feed(place, data.Examples(images, labels), 16, 10, mesh.make_mesh(16), sampling)
    take = jax.jit(fed.take)
    steps = enumerate(itertools.islice(fed.open(3, first), count), start=first)
    return [jax.device_get(take(jnp.int32(step), *given)) for step, given in steps]


def test_device_and_host_give_the_same_batches_in_the_same_order():
    both = [batches_of(place, 0) for place in ("device", "host")]
    jax.tree.map(np.testing.assert_array_equal, *both)
    expected = [b for epoch in range(4) for b in data.train_batches(3, epoch, np.arange(40), 16)]
    for (_, labels, extra), indices in zip(both[0], expected, strict=False):
        np.testing.assert_array_equal(labels, indices)
        np.testing.assert_array_equal(extra["examples"], indices)


@pytest.mark.parametrize("sampling", ["class_balanced", "class_aware"])
def test_device_and_host_draw_the_same_examples_by_class(sampling):
    both = [batches_of(place, 0, sampling=sampling) for place in ("device", "host")]
    jax.tree.map(np.testing.assert_array_equal, *both)
    labels = np.sqrt(np.arange(40)).astype(np.int32)
    expected = [b for e in range(4) for b in data.train_batches(3, e, labels, 16, sampling)]
    for (_, given, extra), indices in zip(both[0], expected, strict=False):
        np.testing.assert_array_equal(given, labels[indices])
        np.testing.assert_array_equal(extra["examples"], indices)


@pytest.mark.parametrize("sampling", ["uniform", "class_balanced", "class_aware"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_batches_resume_where_they_were_interrupted(place, sampling):
    late, all_ = batches_of(place, 3, 4, sampling), batches_of(place, 0, sampling=sampling)
    jax.tree.map(np.testing.assert_array_equal, late, all_[3:])


@pytest.mark.parametrize(("place", "fsdp"), [("device", 1), ("host", 8)])
def test_the_step_gets_the_numbers_of_its_examples(place, fsdp):
    """ELR remembers the predictions on those and on no others."""
    examples = data.load("digits").train
    grid = mesh.make_mesh(64, fsdp)
    source = feed.make_feed(place, examples, 64, 20, grid)
    model = models.create("small_cnn", num_classes=10, mean=(0.5,), std=(0.25,), width=4)
    # As many as eight devices can share.
    chain = lpa_jax.chain(lpa_jax.elr(1600, 3.0), lpa_jax.isda("features", 0.5, 10))
    steps = make_steps(
        Network(model),
        classification,
        lpa_jax.value_and_grad(model.apply, chain, num_classes=10),
        optax.sgd(0.1),
        grid,
        source.like,
        source.take,
        augment=data.augmentations("crop=1"),
    )
    state = steps.init(jnp.int32(0))
    with contextlib.closing(source.open(0, 0)) as batches:
        for given in itertools.islice(batches, 2):
            state = steps.train(state, jnp.int32(0), jnp.int32(1), *given)
    table, _ = state.perturbation.perturbations
    assert table.addressable_shards[0].data.shape == (1600 // fsdp, 10)
    remembered, covariances = jax.device_get(state.perturbation.perturbations)
    seen = data.train_batches(0, 0, examples.labels, 64)[:2].ravel()
    np.testing.assert_array_equal(np.flatnonzero(remembered.any(1)), np.sort(seen))
    np.testing.assert_allclose(remembered[seen].sum(1), 0.3, rtol=1e-5)
    counts = np.bincount(examples.labels[seen], minlength=10)
    np.testing.assert_array_equal(covariances.counts, counts)


def test_large_sets_stay_on_the_host(monkeypatch):
    examples = data.Examples(np.zeros((16, 2, 2, 1), np.uint8), np.zeros(16, np.int32))
    made = functools.partial(feed.make_feed, "auto", examples, 16, 1, mesh.make_mesh(16))
    assert made().resident
    monkeypatch.setattr(feed, "UNKNOWN_MEMORY", 100)
    assert not made().resident


@pytest.mark.parametrize(
    "changes",
    [
        {"input": "host"},
        pytest.param({"steps_per_dispatch": 7}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8, "batch_size": 64}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_place_of_the_computation_does_not_change_its_result(finished, tmp_path, changes):
    summary, _ = run(smoke("lpa+lpl+lpg", seed=3, **changes), tmp_path)
    expected = finished[1]["seeds"][0]
    assert summary["seeds"][0]["metrics"]["test"]["nll"] == pytest.approx(
        expected["metrics"]["test"]["nll"], rel=1e-4
    )
    rows = [metric_log.read_rows(d / "seed3" / "metrics.jsonl") for d in (tmp_path, finished[0])]
    for new, old in zip(*rows, strict=True):
        assert metric_log.scalars(new) == pytest.approx(metric_log.scalars(old), rel=1e-3, abs=1e-4)


def test_accumulated_gradients_are_those_of_the_larger_batch():
    params, rng = {"w": jnp.ones(3)}, np.random.default_rng(0)
    grads = [{"w": jnp.asarray(rng.normal(size=3), jnp.float32)} for _ in range(4)]
    rate = optax.constant_schedule(0.1)
    few = schedules.optimizer("sgd", rate, 0.5, {"momentum": 0.9})
    many = schedules.optimizer("sgd", rate, 0.5, {"momentum": 0.9}, accumulate=2)
    one, state = params, few.init(params)
    for pair in (grads[:2], grads[2:]):
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        updates, state = few.update(mean, state, one)
        one = optax.apply_updates(one, updates)
    other, state = params, many.init(params)
    for grad in grads:
        updates, state = many.update(grad, state, other)
        other = optax.apply_updates(other, updates)
    np.testing.assert_allclose(other["w"], one["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", optax.sgd(0.1, momentum=0.9, nesterov=True)),
        ("rmsprop", optax.rmsprop(0.1)),
        ("adamw", optax.adamw(0.1)),
        ("prodigy", optax.contrib.prodigy(0.1)),
    ],
)
def test_the_default_momentum_is_of_sgd_alone(name, expected):
    options = dict(configuration.default().optimizer.options)
    tx = schedules.optimizer(name, optax.constant_schedule(0.1), 0.0, options)
    params, grads = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, -0.1])}
    for _ in range(2):
        ours, theirs = (of.update(grads, of.init(params), params)[0] for of in (tx, expected))
        np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-6)
        params = optax.apply_updates(params, ours)
    # Nothing is added to what is asked for alone.
    plain = schedules.optimizer("sgd", optax.constant_schedule(0.1), 0.0, {})
    updates, _ = plain.update(grads, plain.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * grads["w"], rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_transform_can_be_configured(name):
    config = digits.get_config(f"method={name}")
    (perturbation,) = method_config.perturbation(config, [10] * 10, (0.5,), 20, 100, 3)
    assert perturbation.sites


def test_a_method_of_domains_needs_domains():
    config = digits.get_config("method=mixstyle+coral+mmd")
    told = r"For coral and mmd in config\.method the domain of each .* take data that have it"
    with pytest.raises(configuration.ConfigError, match=told):
        method_config.perturbation(config, [10] * 10, (0.5,), 20, 100, None)


def test_the_split_of_a_configuration_is_scaled_and_inverted():
    counts = data.long_tail_counts([5000] * 10, 100).tolist()
    config = digits.get_config("method=lpl+lpg")
    config.perturbation.lpl.update(
        {"epsilon": 0.0, "delta_epsilon": 1.5, "step_size": 0.15, "solver": "rounded_steps"}
    )
    config.perturbation.lpl.split.update({"name": "tail", "num_head": 4, "head_scale": 0.6})
    config.perturbation.lpg.split.update({"name": "tail", "num_head": 4, "inverted": True})
    chain = method_config.perturbation(config, counts, (0.5,), 20, sum(counts))
    reports = [part.report(part.sites[0], class_stats.init(10), 0) for part in chain]
    assert reports[0]["steps"].tolist() == [6, 4, 2, 1, 1, 1, 2, 4, 6, 10]
    assert reports[0]["sign"].tolist() == [-1] * 4 + [1] * 6
    assert reports[1]["sign"].tolist() == [1] * 4 + [-1] * 6


def test_margins_come_with_a_normalized_head_and_their_scale():
    assert digits.get_config("method=lpa").model.head == "linear"
    margins = {"ldam": ("max_margin", 0.5), "additive_margin": ("margin", 0.35)}
    for name, (key, margin) in margins.items():
        config = digits.get_config(f"method=dropout+{name}")
        assert config.model.head == "normalized"
        assert (config.perturbation[name][key], config.perturbation[name].scale) == (margin, 30.0)
        assert build.build(config).network.module.head == "normalized"
        chosen = method_config.arguments_of(name, "digits")
        assert chosen == config.perturbation[name].to_dict()


@pytest.mark.parametrize("method", ["ldam+isda", "isda+additive_margin"])
def test_isda_on_a_normalized_head_is_refused(method):
    config = digits.get_config(f"method={method}")
    with pytest.raises(
        configuration.ConfigError, match=r"isda needs a linear head.*model\.head is"
    ):
        build.build(config)
    config.model.head = "linear"
    assert build.build(config).network.module.head == "linear"


def test_deferred_weights_begin_late_and_isda_reaches_its_strength_at_the_end():
    counts, num_steps = [90, 10, *[20] * 8], 600
    config = digits.get_config("method=drw+isda")
    drw, isda = method_config.perturbation(config, counts, (0.5,), num_steps, sum(counts))
    labels, weights, ones = jnp.array([0, 1]), jnp.ones(2), jnp.ones((2, 10))
    given = {"labels": labels, "weights": weights}
    before, after = (
        drw.update(ones, drw.init(ones), step=jnp.int32(480 + late), **given)[0][:, 0]
        for late in (-1, 0)
    )
    np.testing.assert_array_equal(before, [1.0, 1.0])
    assert after[1] / after[0] == pytest.approx(9.0, rel=0.01)

    state = isda.init(jnp.zeros((2, 3)))
    state = state._replace(covariances=jnp.ones_like(state.covariances))
    head = {"head": {"kernel": jnp.eye(3, 10) + jnp.eye(3, 10, 3)}}
    given |= {"site": "logits"}
    half, whole = (
        isda.update(0 * ones, state, head, step=jnp.int32(step), **given)[0]
        for step in (num_steps // 2, num_steps)
    )
    # 0.25 of (1 - 0)^2, and of (1 - 1)^2, sums of the columns' entries.
    np.testing.assert_allclose(whole[0], [0.0] * 6 + [0.25] * 4, atol=1e-6)
    np.testing.assert_allclose(half, whole / 2, atol=1e-6)

    config.perturbation.drw.start = 160.0
    with pytest.raises(configuration.ConfigError, match=r"drw.start must be a share of the run"):
        method_config.perturbation(config, counts, (0.5,), num_steps, sum(counts))


def test_a_checkpoint_restores_what_was_saved(tmp_path):
    state = {"a": jnp.arange(3.0), "b": (jnp.int32(7), jnp.ones((2, 2), jnp.bfloat16))}
    sharding = jax.tree.map(lambda _: mesh.replicated(mesh.make_mesh(8)), state)
    saved = checkpoints.Checkpoints(tmp_path / "c")
    assert saved.restore({"x": jax.eval_shape(lambda: state)}, {"x": sharding}) is None
    for step in (1, 2, 3):
        saved.save(step, {"x": jax.tree.map(lambda leaf, step=step: leaf * step, state)})
    saved.close()
    again = checkpoints.Checkpoints(tmp_path / "c")
    restored = again.restore({"x": jax.eval_shape(lambda: state)}, {"x": sharding})
    again.close()
    jax.tree.map(np.testing.assert_array_equal, restored["x"], jax.tree.map(lambda x: 3 * x, state))


def spoilt(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])


@pytest.mark.guarantee("damaged-checkpoint")
@unread
@pytest.mark.parametrize("how", ["gone", "cut", "one bit turned"])
def test_damage_to_a_checkpoint_is_detected(how, tmp_path, caplog):
    state = {
        "a": jnp.arange(1.0, 5000.0),
        "b": jnp.full((8, 8), 3, jnp.bfloat16),
        "c": jnp.int32(1),
    }
    like, sharding = jax.eval_shape(lambda: state), jax.tree.map(lambda x: x.sharding, state)
    saved = checkpoints.Checkpoints(tmp_path / "whole")
    for step in (1, 2):
        saved.save(step, {"x": jax.tree.map(lambda leaf, step=step: leaf * step, state)})
    saved.close()
    newest = tmp_path / "whole" / "2"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.stat().st_size > 1)
    fallen_back = 0
    for number, file in enumerate(path for path in files if (newest / path).is_file()):
        copy = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        spoilt(copy / "2" / file, how)
        again = checkpoints.Checkpoints(copy)
        caplog.clear()
        restored = again.restore({"x": like}, {"x": sharding})["x"]
        again.close()
        step = int(restored["c"])
        fallen_back += step == 1
        warned = "The checkpoint of step 2 in" in caplog.text and "taking the one" in caplog.text
        assert warned == (step == 1)
        jax.tree.map(
            np.testing.assert_array_equal, restored, jax.tree.map(lambda x, s=step: x * s, state)
        )
    assert fallen_back >= 3
    gc.collect()


@pytest.mark.guarantee("no-readable-checkpoint")
@unread
def test_without_a_readable_checkpoint_nothing_is_deleted(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path)
    state = {"a": jnp.arange(3.0)}
    saved.save(1, {"x": state})
    saved.close()
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file():
            spoilt(path, "cut")

    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    assert before
    again = checkpoints.Checkpoints(tmp_path)
    with pytest.raises(
        checkpoints.CheckpointError, match=r"No checkpoint in.*remove that directory"
    ):
        again.restore({"x": jax.eval_shape(lambda: state)}, {"x": {"a": state["a"].sharding}})
    again.close()
    assert contents() == before
    gc.collect()


@pytest.mark.guarantee("damaged-records")
@pytest.mark.parametrize("content", [b"", b"[]", b'{"seed": 0', b"{}", b"\xff\xfe"], ids=repr)
def test_a_damaged_result_is_named(finished, tmp_path, content):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    (workdir / "seed3" / "result.json").write_bytes(content)
    with pytest.raises(configuration.ConfigError, match=r"seed3/result.json is damaged.*remove it"):
        run(smoke("lpa+lpl+lpg", num_seeds=2, seed=3), workdir)
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(configuration.ConfigError, match=r"config.json is damaged|another config"):
        run(smoke("lpa+lpl+lpg", num_seeds=2, seed=3), workdir)


@pytest.mark.guarantee("damaged-records")
@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"[]\n", b"3\n", b'{"loss": 1}\n', b"{"])
def test_damaged_metrics_are_read_up_to_the_damage(content, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + content + b'{"step": 2}\n')
    assert metric_log.read_rows(path) == [{"step": 1}]


def test_records_drop_the_rows_that_a_resumed_run_records_again(tmp_path):
    log = metric_log.MetricLog(tmp_path, 0, [writers.TensorBoard])
    for step in (10, 20, 30):
        log.write({"step": step, "loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    again = metric_log.MetricLog(tmp_path, 20)
    again.write({"step": 30, "loss": 0.5})
    again.close()
    rows = metric_log.read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 0.1), (20, 0.05), (30, 0.5)]


@pytest.mark.parametrize("name", ["piecewise", "cosine", "constant"])
def test_schedules_warm_up_and_keep_their_boundaries(name):
    rate = schedules.learning_rate(
        name, 0.4, epochs=10, steps_per_epoch=5, warmup_epochs=2.0, boundaries=(4, 8), factor=0.1
    )
    expected = {
        "piecewise": {0: 0.0, 5: 0.2, 10: 0.4, 19: 0.4, 21: 0.04, 41: 0.004},
        "cosine": {0: 0.0, 5: 0.2, 10: 0.4, 30: 0.2, 50: 0.0},
        "constant": {0: 0.0, 5: 0.2, 10: 0.4, 49: 0.4},
    }[name]
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-7)


def test_weight_decay_enters_the_gradient_once():
    tx = schedules.optimizer("sgd", optax.constant_schedule(0.1), 0.5, {})
    params = {"w": jnp.array([2.0])}
    updates, _ = tx.update({"w": jnp.array([1.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 * (1.0 + 0.5 * 2.0)])


def test_binary_cross_entropy_agrees_with_float64_and_stays_finite():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4)) * 4
    targets = rng.dirichlet(np.ones(4), size=6)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p), axis=1)
    ours = losses.softmax_binary_cross_entropy(jnp.float32(logits), jnp.float32(targets))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def total(logits):
        return losses.softmax_binary_cross_entropy(logits, jnp.float32(targets)).sum()

    for scale in (0.0, 1e2, 1e4):
        assert np.isfinite(jax.grad(total)(jnp.float32(logits) * scale)).all()
    # Two that are equal, and so large that their sum has few digits behind the point.
    even = losses.softmax_binary_cross_entropy(jnp.array([[1e4, 0.0, 1e4]]), jnp.eye(3)[2:])
    np.testing.assert_allclose(even, 2 * np.log(2) / 3, rtol=1e-6)
