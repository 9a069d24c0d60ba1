"""SWAD's average of the weights: against a list-based reference, in the trainer, and resumed."""

import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lpa_jax
from lpa_jax.training import config as configuration
from lpa_jax.training import fit, method_config, swad
from lpa_jax.training.config import ConfigError

QUIET = Console(quiet=True)


def reference(losses, converge, tolerance, ratio):
    """Return the numbers of the segments in the average, as the paper describes it."""
    for first in range(len(losses) - converge + 1):
        window = losses[first : first + converge]
        if window[0] == min(window):
            break
    else:
        return [len(losses) - 1], None
    threshold = float(np.mean(window)) * (1 + ratio)
    taken = []
    for number in range(first, len(losses)):
        if min(losses[number : number + tolerance]) > threshold:
            break
        taken.append(number)
    return taken, threshold


SEQUENCES = {
    "a valley": [3, 2, 1.5, 1, 1.1, 1.2, 1.05, 1.1, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1],
    "one that goes on to the end": [3, 1, 1.1, 1.2, 1.1, 1.3, 1.0],
    "one that the end cuts short": [3, 1, 1.1, 1.2, 1.1, 5, 5, 5],
    "falling losses": [5, 4, 3, 2, 1],
    "equal losses": [1, 1, 1, 1],
    "few": [1, 2],
    "one": [1],
}


@pytest.mark.parametrize(("converge", "tolerance"), [(3, 6), (3, 3), (1, 2), (2, 5)])
@pytest.mark.parametrize("name", [*SEQUENCES, *range(20)])
def test_the_segments_are_those_of_the_paper(name, converge, tolerance):
    if isinstance(name, str):
        losses = SEQUENCES[name]
    else:
        rng = np.random.default_rng(name)
        number = int(rng.integers(1, 25))
        # Quarters, so that there are equals.
        losses = np.round(4 * rng.uniform(1, 2, number) * np.linspace(2, 1, number)) / 4
    losses = [float(loss) for loss in losses]
    settings = swad.Settings(0.3, converge, tolerance, ())
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(len(losses), 4, 3)).astype(np.float32)
    state = swad.init({"w": jnp.zeros(3)}, settings)
    close = jax.jit(swad.close, static_argnames="settings")
    for segment, loss in zip(steps, losses, strict=True):
        for params in segment:
            state = swad.after_step(state, {"w": params})
        state = close(state, loss, settings=settings)
    variables, state = swad.finished(state, {"params": {"w": jnp.zeros(3)}}, settings)
    taken, threshold = reference(losses, converge, tolerance, 0.3)
    np.testing.assert_allclose(
        variables["params"]["w"], steps[taken].mean(axis=(0, 1)), rtol=1e-5, atol=1e-6
    )
    assert swad.about(state) == {
        "converged": threshold is not None,
        "first": taken[0],
        "last": taken[-1],
        "closed": len(losses),
        "threshold": None if threshold is None else pytest.approx(threshold),
    }


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def small(**changes):
    config = method_config.choose(configuration.default(), "method=gaussian_noise", {}, "digits")
    changes = {
        "dataset": "rotated:digits", "test_domains": ("30",), "sampling": "domains",
        "augment": "none", "batch_size": 40, "epochs": 6, "steps_per_epoch": 4,
        "model.name": "small_cnn", "model.options": {"width": 4}, "writers": (),
        "schedule.name": "constant", "optimizer.swad.ratio": 0.3, "optimizer.swad.converge": 1,
        "optimizer.swad.tolerance": 2, "evaluate_every": 2,
    } | changes  # fmt: skip
    for key, value in changes.items():
        config.update_from_flattened_dict({key: value})
    return config


def test_a_run_averages_its_steps_and_judges_the_average(tmp_path, monkeypatch):
    each = {}

    def save(self, state, step):
        each[step] = jax.device_get(state.variables["params"])
        kept(self, state, step)

    kept = fit.Fit._save
    monkeypatch.setattr(fit.Fit, "_save", save)
    summary = lpa_jax.train_and_evaluate(small(checkpoint_every=0.25), tmp_path / "run", QUIET)
    (result,) = summary["seeds"]
    lines = (tmp_path / "run/seed0/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    trained = ["0", "15", "45", "60", "75"]
    losses = [
        np.mean([row["metrics"][f"{domain}/out"]["nll"] for domain in trained])
        for row in rows
        if "30/out" in row["metrics"]
    ]
    assert len(losses) == 3
    taken, threshold = reference(losses, 1, 2, 0.3)
    assert result["segments"] == {
        "converged": True, "first": taken[0], "last": taken[-1], "closed": 3,
        "threshold": pytest.approx(threshold, rel=1e-5),
    }  # fmt: skip
    found = [each[step] for segment in taken for step in range(8 * segment + 1, 8 * segment + 9)]
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *found)
    run = lpa_jax.load_run(tmp_path / "run")
    chex.assert_trees_all_close(run.average["params"], mean, atol=1e-6)
    chex.assert_trees_all_equal(run.average["batch_stats"], run.variables["batch_stats"])
    examples = run.dataset.splits["30/in"]
    logits = run._replace(variables=run.average).logits(examples.images)
    accuracy = np.mean(np.argmax(np.asarray(logits), axis=1) == examples.labels)
    assert result["average"]["30/in"]["accuracy"] == pytest.approx(accuracy)
    # The training is that without an average.
    monkeypatch.setattr(fit.Fit, "_save", kept)
    plain = small(**{"optimizer.swad.ratio": None})
    alone = lpa_jax.train_and_evaluate(plain, tmp_path / "plain", QUIET)
    assert alone["metrics"] == summary["metrics"]
    assert "average" not in alone


@pytest.mark.parametrize("last", [13, pytest.param(8, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_average(tmp_path, monkeypatch, last):
    def save(self, state, step):
        kept(self, state, step)
        if step == last:
            raise KeyboardInterrupt

    kept = fit.Fit._save
    config = small(checkpoint_every=0.25)
    whole = lpa_jax.train_and_evaluate(config, tmp_path / "a", QUIET)["seeds"][0]
    monkeypatch.setattr(fit.Fit, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        lpa_jax.train_and_evaluate(config, tmp_path / "b", QUIET)
    monkeypatch.setattr(fit.Fit, "_save", kept)
    again = lpa_jax.train_and_evaluate(config, tmp_path / "b", QUIET)["seeds"][0]
    assert again["average"] == whole["average"]
    assert again["segments"] == whole["segments"]


@pytest.mark.slow
def test_seeds_together_average_as_alone(tmp_path):
    config = small(num_seeds=2)
    alone = lpa_jax.train_and_evaluate(config, tmp_path / "a", QUIET)["seeds"]
    config.seeds_together = 2
    together = lpa_jax.train_and_evaluate(config, tmp_path / "b", QUIET)["seeds"]
    for one, other in zip(alone, together, strict=True):
        chex.assert_trees_all_close(
            one["average"]["30/out"]["nll"], other["average"]["30/out"]["nll"], rtol=1e-3
        )
        assert one["segments"]["first"] == other["segments"]["first"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer.ema_decay": 0.9}, "each ask for an average"),
        ({"optimizer.swad.converge": 3}, "give at least as much"),
        (
            {"dataset": "digits", "test_domains": (), "sampling": "uniform",
             "steps_per_epoch": None, "validation_fraction": 0.0},
            "needs a validation set",
        ),
        ({"optimizer.swad.ratio": 0.0}, "must be above 0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_told(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        lpa_jax.train_and_evaluate(small(**changes), tmp_path, QUIET)
    assert not [*itertools.islice(tmp_path.iterdir(), 1)]
