"""Pretrained weights, frozen modules and factors of the learning rate."""

import json
import re

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import digits
import lpa_jax
from lpa_jax import data
from lpa_jax.data import streams
from lpa_jax.models import weight_files
from lpa_jax.models.pretrained import Inputs
from lpa_jax.training import build, fit, loop, model_card, prefix, rates
from lpa_jax.training.config import ConfigError
from lpa_jax.training.run import Run


def config_of(method="lpa", **changes):
    config = digits.get_config(f"method={method},smoke")
    config.writers = ()
    config.update_from_flattened_dict(changes)
    return config


def trained(workdir, method="lpa", **changes):
    loop.train_and_evaluate(config_of(method, **changes), workdir, Console(quiet=True))
    return lpa_jax.load_run(workdir)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first")
    return workdir, trained(workdir, "erm")


FREEZING = "group1=0+group2=0.5"


@pytest.fixture(scope="module")
def second(first, tmp_path_factory):
    workdir, _ = first
    settings = {"model.pretrained": f"run:{workdir}", "optimizer.rates": FREEZING}
    return trained(tmp_path_factory.mktemp("second"), **settings)


def test_a_run_begins_with_the_weights_of_another_and_leaves_what_is_frozen(first, second):
    before, after = first[1].variables["params"], second.variables["params"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, before["group1"], after["group1"])
    for name in ("group2", "head"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before[name], after[name])
        assert 0 < max(jax.tree.leaves(moved)) < 0.5


def test_a_loaded_run_is_whole(second):
    logits = second.logits(second.dataset.splits["test"].images[:4])
    images = jnp.float32(second.dataset.splits["test"].images[:4]) / 255
    module = second.model.apply(second.variables, images)
    np.testing.assert_allclose(logits, module, rtol=1e-5, atol=1e-5)


def parts_of(**changes):
    parts = build.build(config_of(**changes))
    return parts, fit.compile_parts(parts, fit.make_devices(parts))


def test_what_is_frozen_has_no_gradient_and_no_state():
    _, whole = parts_of()
    _, part = parts_of(**{"optimizer.rates": "group1=0+group2=0"})
    kept, frozen = (compiled.steps.like for compiled in (whole, part))
    assert "group1" in kept.variables["params"]
    assert sorted(frozen.variables["params"]) == ["group3", "head"]
    assert sorted(frozen.variables["frozen"]) == ["group1", "group2"]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(one.opt_state)) for one in (kept, frozen)]
    shown = sum(leaf.size for leaf in jax.tree.leaves(frozen.variables["params"]))
    assert sizes[1] < shown + 10 < sizes[0]


def cost(compiled, parts):
    batch = next(compiled.feed.open(0, 0))
    arguments = (compiled.steps.like, jnp.int32(0), jnp.int32(1), *batch)
    found = compiled.steps.train.lower(*arguments).compile().cost_analysis()
    return found["flops"]


def test_a_step_does_not_go_back_into_what_is_frozen():
    flops = {}
    for factors in ("", "group1=0", "group1=0+group2=0"):
        parts, compiled = parts_of(method="erm", **{"optimizer.rates": factors})
        flops[factors] = cost(compiled, parts)
    assert flops[""] > flops["group1=0"] > flops["group1=0+group2=0"]
    # Forward alone is a third of a step.
    assert flops["group1=0+group2=0"] < 0.62 * flops[""]


def test_a_perturbation_may_be_at_or_below_a_frozen_module():
    factors = {"optimizer.rates": "group1=0+group2=0"}
    site = {"perturbation.lpa.site": "group1"}
    _, whole = parts_of(**site)
    _, part = parts_of(**site, **factors)
    losses = []
    for compiled in (whole, part):
        state = compiled.steps.init(jnp.int32(0))
        batches = compiled.feed.open(0, 0)
        state = compiled.steps.train(state, jnp.int32(0), jnp.int32(1), *next(batches))
        losses.append(float(state.running.loss))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_factors_multiply_the_update():
    def step(factors):
        _, compiled = parts_of(method="erm", **{"optimizer.rates": factors})
        state = compiled.steps.init(jnp.int32(0))
        before = jax.device_get(state.variables["params"])
        state = compiled.steps.train(
            state, jnp.int32(0), jnp.int32(1), *next(compiled.feed.open(0, 0))
        )
        return jax.tree.map(lambda a, b: np.asarray(a) - b, state.variables["params"], before)

    plain, scaled = step(""), step("*=0.5+head=3")
    for name, factor in (("head", 3), ("group1", 0.5)):
        expected = jax.tree.map(lambda update, factor=factor: factor * update, plain[name])
        chex.assert_trees_all_close(scaled[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.rates": "head"}, "'head' is no PATTERN=FACTOR"),
        ({"optimizer.rates": "head=fast"}, "'head=fast' is no PATTERN=FACTOR"),
        ({"optimizer.rates": "head=-1"}, "'head=-1' is no PATTERN=FACTOR"),
        ({"optimizer.rates": "=1"}, "'=1' is no PATTERN=FACTOR"),
        ({"optimizer.rates": "hed=0"}, "has 'hed', which is no module .* group1, group2"),
        ({"optimizer.rates": "*=0"}, "freezes the whole network"),
        ({"model.pretrained": "nothing"}, "There are no weights 'nothing': give safetensors:"),
        ({"model.pretrained": "safetensors:/no/such"}, "There is no file '/no/such' of weights"),
        ({"model.pretrained": "run:/no/such"}, "/no/such"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_last_pattern_that_fits_holds():
    found = rates.parse("*=0.1+group?/block0=2+group1/block0/conv1/kernel=0")
    paths = ["stem/kernel", "group1/block0/conv1/kernel", "group1/block0/conv1/bias", "group12/x"]
    assert [rates.factor(found, path) for path in paths] == [0.1, 0.0, 2.0, 0.1]


# ---------------------------------------------------------------- a prefix that is run once


def from_first(workdir, **changes):
    return {
        "model.pretrained": f"run:{workdir}",
        "optimizer.rates": "group1=0+group2=0",
        "augment": "none",
        "model.options.freeze_norm": True,
        **changes,
    }


def test_a_prefix_that_is_run_once_trains_the_same_network(first, tmp_path):
    settings = from_first(first[0])
    whole = trained(tmp_path / "whole", **settings)
    kept = {"model.cached": "group2", "model.cache_dir": str(tmp_path / "kept")}
    tail = trained(tmp_path / "tail", **settings, **kept)
    chex.assert_trees_all_close(tail.variables, whole.variables, rtol=1e-4, atol=1e-5)
    logits = [run.logits(run.dataset.splits["test"].images) for run in (whole, tail)]
    np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-3)
    results = [
        json.loads((tmp_path / name / "seed0/result.json").read_text())["metrics"]["test"]
        for name in ("whole", "tail")
    ]
    assert results[0]["nll"] == pytest.approx(results[1]["nll"], rel=1e-3)


def test_its_steps_cost_what_comes_after_it(first):
    parts = build.build(config_of("lpa", **from_first(first[0], **{"model.cached": "group2"})))
    variables = fit.pretrained_variables(parts, fit.read_weights(parts))
    tail = prefix.without_prefix(parts, variables, Console(quiet=True))
    assert tail.dataset.train.images.dtype == np.float32
    flops = [cost(fit.compile_parts(one, fit.make_devices(one)), one) for one in (parts, tail)]
    # What is left is the tail three times, and LPA of it.
    assert flops[1] < 0.7 * flops[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.options.freeze_norm": False}, "needs running statistics that stay"),
        ({"augment": "crop=1"}, "set config.augment to 'none', or config.model.views"),
        ({"model.views": 2}, "views is 2, but images are not augmented"),
        ({"model.cached": None, "model.views": 2}, "name it by config.model.cached"),
        ({"model.cached": None, "model.cache_dir": "kept"}, "name it by config.model.cached"),
        ({"model.cache_dir": "/dev/null/x"}, "'/dev/null/x', which cannot keep outputs"),
        ({"model.cache_dir": "a\0"}, "which cannot keep outputs"),
        ({"model.cached": "group9"}, "'group9', which is no module that is called once"),
        ({"optimizer.rates": "group1=0"}, "is 'group2', but group2/.* before it learns"),
        ({"optimizer.rates": ""}, "is 'group2', but group1/.* before it learns"),
        ({"model.pretrained": None}, "needs config.model.pretrained"),
        ({"perturbation.lpa.site": "group1"}, "group1"),
    ],
)
def test_a_prefix_that_cannot_be_kept_is_refused(first, changes, message, tmp_path):
    settings = from_first(first[0], **{"model.cached": "group2"}) | changes
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def without(first, **changes):
    settings = from_first(first[0], **{"model.cached": "group2"}) | changes
    parts = build.build(config_of("lpa", **settings))
    variables = fit.pretrained_variables(parts, fit.read_weights(parts))
    return parts, variables, prefix.without_prefix(parts, variables, Console(quiet=True))


AUGMENTED = {"augment": "crop=1+flip", "model.views": 2}


@pytest.mark.parametrize("place", ["device", "host"])
def test_epochs_take_augmented_views_by_turns(first, place):
    parts, variables, tail = without(first, **AUGMENTED, input=place, epochs=3)
    assert (len(tail.views), tail.plan.augment) == (2, ())
    # Drawn by the number of the example alone, whatever the batch.
    rows = np.array([7, 3])
    key = jax.random.key(int(streams.stream("view", 0, 1).integers(2**31)))
    pixels = jnp.asarray(parts.dataset.train.images[rows])
    images = [
        data.augment(jax.random.fold_in(key, row), image[None], parts.plan.augment)
        for row, image in zip(rows, pixels, strict=True)
    ]
    run = prefix.activations(parts.network, "group2")
    expected = run(variables, data.to_float(jnp.concatenate(images)))
    np.testing.assert_allclose(tail.views[1][rows], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(tail.views[0] - tail.views[1]).max() > 0.01
    # The validation split is not augmented.
    plain = without(first)[2].dataset.splits["validation"].images
    np.testing.assert_array_equal(tail.dataset.splits["validation"].images, plain)

    compiled = fit.compile_parts(tail, fit.make_devices(tail))
    batches = compiled.feed.open(0, 0)
    for step in range(2 * tail.plan.steps_per_epoch + 1):
        found, _, extra = compiled.feed.take(step, *next(batches))
        view = tail.views[step // tail.plan.steps_per_epoch % 2]
        np.testing.assert_array_equal(found, view[np.asarray(extra["examples"])])


def test_a_directory_keeps_activations_for_other_runs(first, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    settings = {**AUGMENTED, "model.cache_dir": str(kept)}
    in_memory = without(first, **AUGMENTED)[2]
    on_disk = without(first, **settings)[2]
    names = {path.name for path in kept.iterdir()}
    assert len(names) == 2 + len(on_disk.dataset.splits) - 1
    # What is there is not computed again.
    with monkeypatch.context() as patch:
        patch.setattr(prefix.Prefix, "_batches", None)
        again = without(first, **settings)[2]
    for one in (on_disk, again):
        for mine, theirs in zip(one.views, in_memory.views, strict=True):
            assert isinstance(mine, np.memmap)
            np.testing.assert_array_equal(mine, theirs)

    # What changes has files of its own; what stays, such as the test split, is shared.
    for changes, shared in (
        ({"limit": 100}, 0),
        ({"augment": "flip"}, 2),
        ({"data_seed": 1}, 1),
        ({"model.cached": "group1"}, 0),
    ):
        before = {path.name for path in kept.iterdir()}
        without(first, **settings | changes)
        added = {path.name for path in kept.iterdir()} - before
        assert len(added) == len(names) - shared

    (kept / sorted(names)[0]).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"cannot be read .*: remove it"):
        without(first, **settings)


def test_outputs_in_bfloat16_are_kept_as_such(first, tmp_path):
    narrow = {"model.dtype": "bfloat16"}
    in_memory = without(first, **narrow)[2].dataset.train.images
    kept = without(first, **narrow, **{"model.cache_dir": str(tmp_path)})[2].dataset.train.images
    assert in_memory.dtype == kept.dtype == jnp.bfloat16
    np.testing.assert_array_equal(in_memory, kept)


def test_nothing_is_kept_of_activations_that_are_not_finished(first, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prefix.Prefix, "_batches", stop)
    with pytest.raises(KeyboardInterrupt):
        without(first, **{"model.cache_dir": str(tmp_path)})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- weights that are given away


class Own(nn.Module):
    """A network of a user's, of which no names are known."""

    num_classes: int
    width: int = 3

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(self.width, name="first")(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(self.num_classes, name="last")(nn.relu(x))


def read_back(directory, **changes):
    """Return the variables that a run begins with, given those of a directory."""
    path = directory / "model.safetensors"
    parts = build.build(config_of("erm", **changes, **{"model.pretrained": f"safetensors:{path}"}))
    return fit.pretrained_variables(parts, fit.read_weights(parts))


def loaded_by_card(directory, monkeypatch):
    """Return the variables that the lines of the card load, and the card."""
    card = (directory / "README.md").read_text()
    monkeypatch.chdir(directory)
    names = {}
    exec(re.search("```python\n(.*?)```", card, re.DOTALL)[1], names)
    return names["variables"], card


def front_of(card):
    _, front, _ = card.split("---\n", 2)
    return {
        key: json.loads(value)
        for key, value in (line.split(": ", 1) for line in front.splitlines())
    }


def test_the_weights_of_a_run_are_written_and_read_back(first, tmp_path, monkeypatch):
    workdir, run = first
    out = tmp_path / "out"
    model_card.write_weights(run, workdir, out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "README.md", "model.safetensors", "out"
    ]  # fmt: skip
    chex.assert_trees_all_equal(read_back(out), run.variables)
    found, card = loaded_by_card(out, monkeypatch)
    chex.assert_trees_all_equal(found, run.variables)
    front = front_of(card)
    row = json.loads((workdir / "seed0/metrics.jsonl").read_text().splitlines()[-1])
    (result,) = front["model-index"][0]["results"]
    accuracy = row["metrics"]["test"]["accuracy"]
    assert result["metrics"] == [{"type": "accuracy", "value": accuracy}]
    assert front["tags"] == ["jax", "flax", "image-classification"]
    assert f"| test | {100 - 100 * accuracy:.2f} | {100 * accuracy:.2f} |" in card
    assert json.dumps([*run.dataset.class_names]) in card
    assert str(workdir) not in card
    with pytest.raises(ConfigError, match="is there already"):
        model_card.write_weights(run, workdir, out)
    with pytest.raises(ConfigError, match="kept no average of its weights"):
        model_card.write_weights(run, workdir, tmp_path / "average", average=True)


def test_nothing_is_left_of_weights_that_cannot_be_written(first, tmp_path, monkeypatch):
    workdir, run = first

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "write", full)
    with pytest.raises(RuntimeError, match=r"cannot be written \(No space left"):
        model_card.write_weights(run, workdir, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_the_average_of_a_network_of_a_users_own_is_read_back(first, tmp_path, monkeypatch):
    workdir, _ = first
    own = {"model.name": f"{__name__}:Own", "model.options": {"width": 5}}
    # A data set by a path, which the card does not tell whole.
    images = np.arange(40 * 64, dtype=np.int64).astype(np.uint8).reshape(40, 4, 4, 4)
    labels = np.arange(40) % 4
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "set.npz", **arrays)
    own |= {"dataset": f"npz:{tmp_path}/set.npz", "batch_size": 8, "optimizer.ema_decay": 0.9}
    parts = build.build(config_of("erm", **own))
    variables, ema = (
        parts.network.init(jax.random.key(seed), jnp.zeros((1, 4, 4, 4))) for seed in (0, 1)
    )
    run = Run(
        parts.network.module, variables, ema, parts.config, parts.dataset, parts.task, 0, 3, parts
    )
    # The records are another run's.
    model_card.write_weights(run, workdir, tmp_path / "out", average=True)
    chex.assert_trees_all_equal(read_back(tmp_path / "out", **own), ema)
    found, card = loaded_by_card(tmp_path / "out", monkeypatch)
    chex.assert_trees_all_equal(found, ema)
    assert "| data set | npz:set.npz |" in card
    assert str(tmp_path) not in card
    assert "| weights | average, decay 0.9 |" in card


def test_a_run_takes_its_inputs_as_the_file_tells_them_and_needs_it_once(tmp_path):
    settings = {"model.name": "vit_ti_4", "model.options": {"depth": 1}}
    path = tmp_path / "x.safetensors"
    settings["model.pretrained"] = f"safetensors:{path}"
    weight_files.write(path, {"a": np.ones(3)}, Inputs((0.125,), (0.5,), 8))
    parts = build.build(config_of("erm", **settings))
    assert (parts.network.module.mean, parts.network.module.std) == ((0.125,), (0.5,))
    path.unlink()
    with pytest.raises(ConfigError, match="There is no file"):
        build.build(config_of("erm", **settings))
    again = build.build(
        config_of("erm", **settings | {"model.options": parts.config["model"]["options"]})
    )
    assert again.network.module == parts.network.module
    assert again.config == parts.config
    # Others tell none, and the network does.
    weight_files.write(path, {"a": np.ones(3)}, None)
    assert build.build(config_of("erm", **settings)).network.module.mean == (0.5,) * 3
