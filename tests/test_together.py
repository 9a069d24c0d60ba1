"""Seeds that are trained together in one program end as if each had been trained alone."""

import contextlib
import io
import itertools
import shutil

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from stored import leaves

from configs import digits
import lpa_jax
from lpa_jax import data
from lpa_jax.tasks import classification
from lpa_jax.training import build, feed, fit, loop, mesh, method_config, metric_log
from lpa_jax.training.config import ConfigError
from lpa_jax.training.network import Network
from lpa_jax.training.step import make_steps, make_together

# tensorboardX is a third party to these.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")

SEEDS = (0, 1, 2)
STEPS = 3
"""Of an epoch: 96 examples in batches of 32."""


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Let the trainer see one of the eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


def small(method="lpa+dropout", **changes):
    config = digits.get_config(f"method={method},smoke")
    changes = {"limit": 96, "batch_size": 32, "schedule.boundaries": (), "num_seeds": 3} | changes
    config.update_from_flattened_dict(changes)
    return config


def run(config, workdir, **given):
    console = Console(file=io.StringIO(), width=200)
    return lpa_jax.train_and_evaluate(config, workdir, console, **given), console.file.getvalue()


class Mlp(nn.Module):
    """A network that is compiled in a moment."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(16, name="hidden")(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(10, name="head")(x)


def saved(workdir, seed):
    """Return the steps of the checkpoints that are kept of a seed."""
    found = (workdir / f"seed{seed}" / "checkpoints").iterdir()
    return sorted(int(path.name) for path in found)


def last(workdir, seed):
    """Return what the last checkpoint of a seed holds."""
    newest = f"[{saved(workdir, seed)[-1]}]"
    found = leaves(workdir / f"seed{seed}" / "checkpoints").items()
    return {k: leaf for k, leaf in found if k.startswith(newest) and "checksums" not in k}


def assert_alike(workdir, expected, seeds=SEEDS, atol=1e-5):
    """Compare what two runs recorded of their seeds, and what they saved last."""
    for seed in seeds:
        ours, theirs = (place / f"seed{seed}" for place in (workdir, expected))
        names = [sorted(path.name for path in place.iterdir()) for place in (ours, theirs)]
        assert names[0] == names[1]
        rows = [metric_log.read_rows(place / "metrics.jsonl") for place in (ours, theirs)]
        for row, other in zip(*rows, strict=True):
            assert list(row) == list(other)
            close(metric_log.scalars(row), metric_log.scalars(other), atol)
        close(last(workdir, seed), last(expected, seed), atol)


def close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.shape(found[name]) == np.shape(value)
        np.testing.assert_allclose(
            found[name], value, rtol=100 * atol, atol=atol, err_msg=str(name)
        )


@pytest.fixture(scope="module")
def alone(one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, run(small(), workdir)[0]


def test_seeds_together_end_as_one_at_a_time(alone, tmp_path):
    summary, text = run(small(seeds_together=2), tmp_path)
    assert "seeds 0, 1 (1, 2 of 3): seed 1, epoch 2 of 2, loss" in text
    assert_alike(tmp_path, alone[0])
    # The third was left over: a single seed has the same program, and the same bits.
    assert_alike(tmp_path, alone[0], [2], atol=0.0)
    for ours, theirs in zip(summary["seeds"], alone[1]["seeds"], strict=True):
        assert list(ours) == list(theirs)
        assert (ours["seed"], ours["sessions"]) == (theirs["seed"], theirs["sessions"])
        close(metric_log.scalars(ours), metric_log.scalars(theirs))
        assert saved(tmp_path, ours["seed"]) == saved(alone[0], ours["seed"])
    # They are as any others: none is trained again.
    again, text = run(small(), tmp_path)
    assert again["seeds"] == summary["seeds"]
    assert "epoch 2" not in text


def interrupted(config, workdir, monkeypatch, step):
    """Run up to a step, at which SIGTERM comes."""
    calls = itertools.count()
    # It is asked for once before the steps.
    asked = contextlib.nullcontext(lambda: next(calls) == step)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "preemption", lambda: asked)
        with pytest.raises(fit.PreemptedError) as raised:
            run(config, workdir)
    return str(raised.value)


@pytest.mark.slow
def test_interrupted_seeds_resume_together_where_their_steps_agree(alone, tmp_path, monkeypatch):
    step = STEPS + 1
    told = interrupted(small(seeds_together=2), tmp_path, monkeypatch, step)
    places = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    assert told == f"SIGTERM came; step {step} is saved in {places[0]}, {places[1]}."
    assert [saved(tmp_path, seed) for seed in (0, 1)] == 2 * [[STEPS, step]]
    assert not (tmp_path / "seed2").exists()
    _, text = run(small(seeds_together=3), tmp_path)
    for words in ("seeds 0, 1 (1, 2 of 3): seed 0, epoch 2 of 2", "seed 2 (3 of 3): epoch 1 of 2"):
        assert words in text
    assert "epoch 1 of 2" not in text.partition("seed 2 (3 of 3)")[0]
    assert_alike(tmp_path, alone[0])


@pytest.mark.slow
def test_seeds_that_were_killed_while_they_saved_resume_apart(alone, tmp_path, monkeypatch):
    interrupted(small(seeds_together=3), tmp_path, monkeypatch, STEPS + 1)
    # This was not saved any more.
    shutil.rmtree(tmp_path / "seed1" / "checkpoints" / str(STEPS + 1))
    _, text = run(small(seeds_together=3), tmp_path)
    for words in ("seeds 0, 2 (1, 3 of 3): seed 2, epoch 2", "seed 1 (2 of 3): epoch 2"):
        assert words in text
    assert_alike(tmp_path, alone[0])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_interrupted_seeds_resume_with_another_number_together(
    before, after, alone, tmp_path, monkeypatch
):
    # One at a time, this is in the second seed: the first is finished, and the third not begun.
    step = STEPS + 1 if before > 1 else 2 * STEPS + 1 + STEPS + 1
    interrupted(small(seeds_together=before), tmp_path, monkeypatch, step)
    run(small(seeds_together=after), tmp_path)
    assert_alike(tmp_path, alone[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lpa+lpl+lpg", {"steps_per_dispatch": 2, "optimizer.ema_decay": 0.9}),
        ("lpa+lpl+lpg", {"input": "host", "nonfinite": "skip"}),
        ("manifold_mixup+sam", {"optimizer.accumulate": 2, "epochs": 3}),
        ("isda+elr", {"input": "host"}),
        ("ldam+drw", {"checkpoint_every": 0.4}),
    ],
)
def test_what_a_run_can_do_it_can_do_together(method, changes, tmp_path):
    for together in (1, 2):
        config = small(method, num_seeds=2, seeds_together=together, **changes)
        run(config, tmp_path / str(together))
    assert_alike(tmp_path / "2", tmp_path / "1", [0, 1], atol=1e-4)


# ---------------------------------------------------------------- a seed that diverges


def infinite_at(example):
    """Make the logits infinite in the step whose first example this is."""

    def update(value, *, examples, **_):
        return value + jnp.where(examples[0] == example, jnp.inf, 0.0)

    return lpa_jax.stateless("logits", update)


def example_of(seed, step, labels, seeds=SEEDS):
    """Return the first example of a step of a seed, which is the first of no other step."""
    firsts = {
        (other, STEPS * epoch + at): int(batch[0])
        for other in seeds
        for epoch in range(2)
        for at, batch in enumerate(data.train_batches(other, epoch, labels, 32))
    }
    found = firsts.pop((seed, step))
    assert found not in firsts.values()
    return found


@pytest.mark.guarantee("non-finite-step")
@pytest.mark.parametrize("nonfinite", ["stop", pytest.param("skip", marks=pytest.mark.slow)])
def test_a_seed_that_diverges_is_named_and_changes_no_other(nonfinite, tmp_path, monkeypatch):
    labels = build.build(small("erm")).dataset.train.labels
    broken = infinite_at(example_of(1, STEPS, labels))
    monkeypatch.setattr(method_config, "perturbation", lambda *_: (broken,))
    config = small("erm", seeds_together=3, nonfinite=nonfinite)
    if nonfinite == "stop":
        message = f"Step {STEPS} of seed 1 was not finite, first the perturbation at 'logits'"
        with pytest.raises(fit.NonFiniteLossError, match=message):
            run(config, tmp_path, model=Mlp())
        assert [saved(tmp_path, seed) for seed in SEEDS] == 3 * [[STEPS]]
        assert not list(tmp_path.glob("seed*/result.json"))
        return
    run(config, tmp_path / "together", model=Mlp())
    config.seeds_together = 1
    run(config, tmp_path / "alone", model=Mlp())
    assert_alike(tmp_path / "together", tmp_path / "alone")
    rows = [metric_log.read_rows(tmp_path / f"together/seed{s}/metrics.jsonl") for s in SEEDS]
    assert [seed[-1]["nonfinite_steps"] for seed in rows] == [0, 1, 0]


@pytest.mark.parametrize(
    ("place", "looped", "nonfinite"), [("device", True, "skip"), ("host", False, "stop")]
)
def test_a_step_together_is_that_of_each_seed(place, looped, nonfinite):
    grid, examples = mesh.make_mesh(32), build.build(small("erm")).dataset.train
    fed = feed.make_feed(place, examples, 32, 2 * STEPS, grid)
    model, broken = Mlp(), infinite_at(example_of(1, 1, examples.labels))
    chain = lpa_jax.chain(lpa_jax.dropout("hidden", 0.5), broken)
    steps = make_steps(
        Network(model),
        classification,
        lpa_jax.value_and_grad(model.apply, chain, num_classes=10),
        optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2).gradient_transformation(),
        grid,
        fed.like,
        fed.take,
        augment=data.augmentations("crop=1"),
        looped=looped,
        nonfinite=nonfinite,
        ema_decay=0.9,
    )
    together, count = make_together(steps, fed.axes, len(SEEDS)), jnp.int32(1)
    found = together.stack([steps.init(jnp.int32(seed)) for seed in SEEDS])
    for given in itertools.islice(fed.open(SEEDS, 0), STEPS):
        found = together.train(found, jnp.array(SEEDS), count, *given)
    found = together.end_epoch(found)
    for i, seed in enumerate(SEEDS):
        expected = steps.init(jnp.int32(seed))
        for given in itertools.islice(fed.open(seed, 0), STEPS):
            expected = steps.train(expected, jnp.int32(seed), count, *given)
        expected, own = steps.end_epoch(expected), together.of(found, i)
        assert (int(own.nonfinite_steps), int(own.step)) == {
            "skip": (i == 1, STEPS), "stop": (i == 1, 1 if i == 1 else STEPS)
        }[nonfinite]  # fmt: skip
        assert jax.tree.map(lambda leaf: leaf.sharding, own) == steps.shardings
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), own, expected)


# ---------------------------------------------------------------- one at a time, and refusals


def test_a_single_seed_has_the_functions_of_one(tmp_path):
    parts = build.build(small("erm"))
    assert parts.plan.seeds_together == 1
    compiled = fit.compile_parts(parts, fit.make_devices(parts))
    single, state = compiled.together(1), object()
    assert single.train is compiled.steps.train
    assert single.end_epoch is compiled.steps.end_epoch
    assert single.stack([state]) is single.of(state, 0) is state


def test_seeds_together_need_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    message = r"config.seeds_together above 1 needs one device: set it to 1, or show .* of the 8"
    with pytest.raises(ConfigError, match=message):
        run(small(seeds_together=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "told"), [("wandb", "WandB"), ("mlflow", "MLflow")])
def test_writers_that_cannot_be_open_twice_are_refused(name, told, tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: True)
    with pytest.raises(ConfigError, match=rf"at once, and {told} cannot: set it to 1, or leave"):
        run(small(seeds_together=2, writers=("tensorboard", name)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
