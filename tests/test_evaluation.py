"""What is published of a run: metrics, calibration, attacks, corruptions, and their command."""

import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import eagerpy
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from rich.console import Console
from sklearn import calibration as sklearn_calibration
import sklearn.metrics

from configs import digits
from lpa_jax import plots
from lpa_jax.evaluation import attacks, corruptions, evaluate
from lpa_jax.models import SmallCNN
from lpa_jax.tasks import calibration, classification
from lpa_jax.tasks.classification import confusion, Outcomes
from lpa_jax.training import build, checkpoints, files, identity, loop, metric_log
from lpa_jax.training.config import ConfigError

with warnings.catch_warnings():
    # foolbox imports from where SciPy kept its filters once.
    message = "Please import `gaussian_filter` from the `scipy.ndimage` namespace"
    warnings.filterwarnings("ignore", message, DeprecationWarning)
    import foolbox

# tensorboardX is a third party to these.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")
ROOT = pathlib.Path(__file__).parent.parent


# --- Metrics. -------------------------------------------------------------------------------------


def outcomes(num_classes=5, n=400, scale=3.0):
    """Return random outcomes, their probabilities, and labels that leave out the last class."""
    rng = np.random.default_rng(num_classes)
    logits = scale * rng.normal(size=(n, num_classes)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    # Now over- and now underconfident: else the error would be the same with any bins.
    right = rng.uniform(size=n) < 0.5 + 0.5 * np.sin(25 * p.max(1))
    labels = np.where(right, p.argmax(1), rng.integers(0, num_classes - 1, n))
    labels = np.minimum(labels, num_classes - 2).astype(np.int32)
    outcomes = classification.outcomes(jnp.asarray(logits), jnp.asarray(labels))
    return Outcomes(*map(np.asarray, outcomes)), p, labels


def test_metrics_are_those_of_scikit_learn():
    found, p, labels = outcomes()
    result = classification.metrics(found, labels, 5, {"head": [0, 1], "absent": [4]})
    predicted = p.argmax(1)
    assert result["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    log_loss = sklearn.metrics.log_loss(labels, p, labels=range(5))
    assert result["nll"] == pytest.approx(log_loss, abs=1e-6)
    recalls = sklearn.metrics.recall_score(labels, predicted, labels=range(4), average=None)
    assert result["class_accuracy"] == [*map(pytest.approx, recalls), None]
    assert result["groups"]["head"] == pytest.approx(np.mean(recalls[:2]))
    assert "absent" not in result["groups"]
    theirs = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(5))
    np.testing.assert_array_equal(confusion(found.predicted, labels, 5), theirs)


def ece_by_loops(correct, confidence, bins):
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            mean = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / len(correct) * abs(accuracy - mean)
    return total


@pytest.mark.parametrize(("num_classes", "scale"), [(3, 1.0), (5, 3.0), (10, 40.0)])
def test_the_calibration_error_is_that_of_independent_loops(num_classes, scale):
    # At the largest scale most confidences are 1 exactly: the closed end of the last bin.
    found, p, labels = outcomes(num_classes, scale=scale)
    np.testing.assert_allclose(found.confidence, p.max(1), rtol=1e-5)
    correct = found.predicted == labels
    expected = ece_by_loops(correct, found.confidence, 15)
    assert classification.metrics(found, labels, num_classes)["ece"] == pytest.approx(
        expected, abs=1e-6
    )
    other = calibration.expected_calibration_error(correct, found.confidence, bins=7)
    assert other == pytest.approx(ece_by_loops(correct, found.confidence, 7), abs=1e-6)


def test_the_reliability_diagram_is_that_of_scikit_learn():
    found, _, labels = outcomes()
    correct = found.predicted == labels
    bins = calibration.reliability(correct, found.confidence)
    accuracy, confidence = sklearn_calibration.calibration_curve(
        correct, found.confidence, n_bins=15
    )
    filled = bins.examples > 0
    # Of five classes none is predicted with less than one fifth.
    assert not filled[:2].any()
    assert bins.examples.sum() == len(labels)
    np.testing.assert_allclose(bins.accuracy[filled], accuracy)
    np.testing.assert_allclose(bins.confidence[filled], confidence, rtol=1e-6)


# --- Attacks. -------------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(4)(x)


@functools.cache
def attacked():
    """Return a network, and pixels and labels of which it gets all but one right."""
    # Some pixels so near 0 and 1 that the attack is clipped.
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-0.1, 1.1, (32, 4, 3, 1)).clip(0, 1), jnp.float32)
    model = Net()
    variables = model.init(jax.random.key(1), images)
    logits_fn = functools.partial(model.apply, variables)
    labels = jnp.argmax(logits_fn(images), axis=1).astype(jnp.int32)
    return logits_fn, images, labels.at[0].set((labels[0] + 1) % 4)


def by_foolbox(attack, epsilon):
    logits_fn, images, labels = attacked()
    model = foolbox.models.JAXModel(logits_fn, bounds=(0.0, 1.0))
    criterion = foolbox.criteria.Misclassification(eagerpy.astensor(labels))
    _, moved, successful = attack(model, images, criterion, epsilons=epsilon)
    return moved, 1.0 - float(jnp.mean(successful))


def by_us(change):
    logits_fn, images, labels = attacked()

    def losses(images):
        return optax.softmax_cross_entropy_with_integer_labels(logits_fn(images), labels)

    moved = jax.jit(functools.partial(change, losses))(images, jnp.arange(len(labels)))
    return moved, float(
        jnp.mean(classification.outcomes(logits_fn(moved), labels).predicted == labels)
    )


def test_fgsm_is_that_of_foolbox():
    theirs = by_foolbox(foolbox.attacks.LinfFastGradientAttack(random_start=False), 8 / 255)
    ours = by_us(attacks.fgsm())
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
    assert ours[1] == pytest.approx(theirs[1])
    assert float(jnp.abs(ours[0] - attacked()[1]).max()) == pytest.approx(8 / 255, abs=1e-6)


@pytest.mark.parametrize("steps", [3, 20])
def test_pgd_from_a_random_start_is_that_of_foolbox(steps):
    # Three steps stay within the ball, twenty meet it.
    images = attacked()[1]
    start = images + attacks.random_start(images, jnp.arange(len(images)), 8 / 255, seed=5)

    class FromThere(foolbox.attacks.LinfPGD):
        def get_random_start(self, x0, epsilon):
            return eagerpy.astensor(start)

    attack = FromThere(abs_stepsize=2 / 255, steps=steps, random_start=True)
    theirs = by_foolbox(attack, 8 / 255)
    ours = by_us(attacks.pgd(steps=steps, seed=5))
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
    assert ours[1] == pytest.approx(theirs[1])


def test_the_random_start_is_the_examples_own_and_the_seeds():
    images = attacked()[1]
    start = attacks.random_start(images, jnp.arange(32), 0.1)
    backwards = attacks.random_start(images[::-1], jnp.arange(32)[::-1], 0.1)
    np.testing.assert_array_equal(start, backwards[::-1])
    assert not np.array_equal(start, attacks.random_start(images, jnp.arange(32), 0.1, seed=1))
    assert 0.09 < float(jnp.abs(start).max()) <= 0.1 + 1e-6
    assert float((images + start).min()) >= 0
    assert float((images + start).max()) <= 1 + 1e-6
    inside = (images > 0.1) & (images < 0.9)
    assert abs(float(start[inside].mean())) < 0.01


# --- Corruptions. ---------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 7, 9, 3)).astype(np.uint8)


def blurred(pixels, sigma):
    """Convolve by hand with a Gaussian cut at four deviations, border pixels going on outside."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(pixels, ((0, 0), (radius, radius), (radius, radius), (0, 0)), mode="edge")
    out = np.zeros_like(pixels)
    height, width = pixels.shape[1:3]
    for i, down in enumerate(taps):
        for j, across in enumerate(taps):
            out += down * across * padded[:, i : i + height, j : j + width]
    return out


def pixelated(pixels, block):
    out = np.empty_like(pixels)
    for i in range(0, pixels.shape[1], block):
        for j in range(0, pixels.shape[2], block):
            square = pixels[:, i : i + block, j : j + block]
            out[:, i : i + block, j : j + block] = square.mean(axis=(1, 2), keepdims=True)
    return out


BY_HAND = {
    "gaussian_blur": blurred,
    "pixelate": pixelated,
    "brightness": lambda pixels, added: pixels + added,
    "contrast": lambda pixels, share: (
        (1 - share) * pixels.mean(axis=(1, 2), keepdims=True) + share * pixels
    ),
}


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
@pytest.mark.parametrize("name", BY_HAND)
def test_corruptions_are_those_by_hand(name, severity):
    strength = corruptions.CORRUPTIONS[name][1][severity - 1]
    corrupted = corruptions.corrupt(IMAGES, name, severity)
    assert corrupted.dtype == np.uint8
    expected = 255 * np.clip(BY_HAND[name](IMAGES / 255.0, strength), 0, 1)
    # Rounded; a half may be rounded either way.
    np.testing.assert_allclose(corrupted, expected, rtol=0, atol=0.5 + 1e-3)


def test_noise_has_its_deviation_and_follows_the_seed():
    gray = np.full((50, 16, 16, 1), 128, np.uint8)
    for severity, stddev in zip(
        corruptions.SEVERITIES, corruptions.CORRUPTIONS["gaussian_noise"][1], strict=True
    ):
        noise = (corruptions.corrupt(gray, "gaussian_noise", severity) / 255.0) - 128 / 255
        assert noise.std() == pytest.approx(stddev, rel=0.05)
        assert abs(noise.mean()) < 0.01
    once, again = (corruptions.corrupt(gray, "gaussian_noise", 1) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, corruptions.corrupt(gray, "gaussian_noise", 1, seed=1))


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_severities_differ_and_chunks_do_not_matter(name, monkeypatch):
    whole = [corruptions.corrupt(IMAGES, name, severity) for severity in corruptions.SEVERITIES]
    harm = [np.mean((images.astype(float) - IMAGES) ** 2) for images in whole]
    assert 0 < harm[0] < harm[1] < harm[2]
    monkeypatch.setattr(corruptions, "CHUNK", 3)
    np.testing.assert_array_equal(whole[0], corruptions.corrupt(IMAGES, name, 1))


def test_an_unknown_corruption_is_refused():
    for name, severity in (("fog", 1), ("contrast", 4)):
        with pytest.raises(ValueError, match="give one of gaussian_noise"):
            corruptions.corrupt(IMAGES, name, severity)


# --- A run. ---------------------------------------------------------------------------------------


def smoke(**changes):
    config = digits.get_config("method=lpl,smoke")
    changes = {"batch_size": 32, "epochs": 4, **changes}
    config.update_from_flattened_dict(changes)
    return config


def evaluated(workdir, **options):
    console = Console(file=io.StringIO(), width=80)
    return evaluate.evaluate_run(workdir, console=console, **options), console.file.getvalue()


def contents(workdir):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workdir.rglob("*"))
        if path.is_file() and not path.name.startswith("evaluation")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a work directory of two seeds and a long tail, what is in it, and its evaluation."""
    workdir = tmp_path_factory.mktemp("finished")
    config = smoke(
        num_seeds=2, seed=3, **{"imbalance.kind": "exponential", "imbalance.ratio": 20.0}
    )
    config.optimizer.options = {"momentum": 0.8}
    loop.train_and_evaluate(config, workdir, Console(file=io.StringIO()))
    before = contents(workdir)
    return workdir, before, *evaluated(workdir, attack=True, corrupt=True, logit_adjustment=1.5)


def test_evaluation_does_not_change_the_run(finished):
    workdir, before, _, _ = finished
    assert contents(workdir) == before


def test_clean_images_are_evaluated_as_at_the_end_of_the_run(finished):
    workdir, _, evaluation, _ = finished
    for result in evaluation["seeds"]:
        ended = files.read_json(workdir / f"seed{result['seed']}" / "result.json")
        clean = result["metrics"]["clean"]
        assert clean == ended["metrics"]["test"]
        matrix = np.array(result["details"]["confusion"])
        assert matrix.sum() == evaluation["num_examples"] == 359
        np.testing.assert_allclose(np.diag(matrix) / matrix.sum(axis=1), clean["class_accuracy"])
        assert sum(result["details"]["reliability"]["examples"]) == 359
    # The trainer itself tells the calibration.
    summary = files.read_json(workdir / "summary.json")
    assert summary["metrics"]["test"] == evaluation["metrics"]["clean"]


def test_every_condition_is_evaluated_and_shown(finished):
    workdir, _, evaluation, text = finished
    corrupted = [f"{c}_{s}" for c in corruptions.CORRUPTIONS for s in corruptions.SEVERITIES]
    names = ["clean", "logit_adjusted", "fgsm", "pgd", *corrupted, "corruptions"]
    assert list(evaluation["metrics"]) == names
    assert json.loads((workdir / "evaluation.json").read_text()) == evaluation
    assert (workdir / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    for name in (*names, "error %", "mean ± sd of 2 seeds", "medium", "tail"):
        assert name in " ".join(text.split())
    assert max(map(len, text.splitlines()[:-2])) <= 80
    for name in names:
        errors = [result["metrics"][name]["error"] for result in evaluation["seeds"]]
        entry = evaluation["metrics"][name]["error"]
        assert entry == {
            "mean": pytest.approx(np.mean(errors)), "std": pytest.approx(np.std(errors, ddof=1)),
            "n": 2,
        }  # fmt: skip
    for result in evaluation["seeds"]:
        found = result["metrics"]
        errors = [found[name]["error"] for name in corrupted]
        assert found["corruptions"]["error"] == pytest.approx(np.mean(errors))
        # What an attack does not know is where the loss is largest; but it goes uphill.
        assert found["clean"]["nll"] < found["fgsm"]["nll"] < found["pgd"]["nll"] + 1e-3


def test_logit_adjustment_subtracts_the_log_of_the_prior(finished):
    workdir, _, evaluation, _ = finished
    config = identity.read_config(workdir)
    parts = build.build(config)
    counts = np.bincount(parts.dataset.train.labels, minlength=10)
    assert counts.max() >= 10 * counts.min()
    saved = checkpoints.Checkpoints(workdir / "seed3" / "checkpoints", read_only=True)
    held = saved._manager.restore(
        saved._manager.latest_step(),
        args=ocp.args.Composite(variables=ocp.args.StandardRestore()),
    )
    saved.close()
    test = parts.dataset.splits["test"]
    images = jnp.asarray(test.images, jnp.float32) / 255
    # By name, without any code of the trainer.
    variables = {name: held["variables"][name] for name in ("params", "batch_stats")}
    model = SmallCNN(10, width=4, mean=parts.dataset.mean, std=parts.dataset.std)
    logits = np.asarray(model.apply(variables, images, train=False))
    adjusted = logits - 1.5 * np.log(counts / counts.sum())
    found = evaluation["seeds"][0]["metrics"]
    result = found["logit_adjusted"]
    assert np.mean(adjusted.argmax(1) == test.labels) == pytest.approx(
        result["accuracy"], abs=0.003
    )
    p = np.exp(adjusted) / np.exp(adjusted).sum(1, keepdims=True)
    assert sklearn.metrics.log_loss(test.labels, p) == pytest.approx(result["nll"], abs=1e-4)
    assert result["nll"] != pytest.approx(found["clean"]["nll"], abs=1e-3)


def interrupted(finished, tmp_path):
    """Return a copy: its first seed interrupted at a damaged checkpoint, its second not begun."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "seed4" / "checkpoints")
    (workdir / "summary.json").unlink()
    (workdir / "seed3" / "result.json").unlink()
    steps = sorted((workdir / "seed3" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for path in steps[-1].rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    return workdir, [int(path.name) for path in steps]


def test_an_interrupted_run_is_evaluated_from_its_last_readable_checkpoint(finished, tmp_path):
    workdir, steps = interrupted(finished, tmp_path)
    before = contents(workdir)
    evaluation, text = evaluated(workdir, split="validation")
    assert contents(workdir) == before
    assert [(r["seed"], r["step"]) for r in evaluation["seeds"]] == [(3, steps[-2])]
    assert f"Seed 3 is at step {steps[-2]} of {steps[-1]}." in text
    assert list(evaluation["metrics"]) == ["clean"]
    rows = metric_log.read_rows(workdir / "seed3" / "metrics.jsonl")
    row = next(row for row in rows if row["step"] == steps[-2])
    clean = evaluation["metrics"]["clean"]
    assert clean["accuracy"] == {
        "mean": row["metrics"]["validation"]["accuracy"], "std": None, "n": 1,
    }  # fmt: skip
    assert clean["ece"]["mean"] == row["metrics"]["validation"]["ece"]
    assert (workdir / "evaluation_validation.json").exists()

    with pytest.raises(ConfigError, match="has no checkpoint of seed 4: it has those of 3"):
        evaluated(workdir, seeds=[3, 4])
    shutil.rmtree(workdir / "seed3" / "checkpoints" / str(steps[-2]))
    with pytest.raises(checkpoints.CheckpointError, match="can be read"):
        evaluated(workdir)


def test_a_checkpoint_deleted_while_it_is_read_is_skipped(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    directory = workdir / "seed3" / "checkpoints"
    aside = tmp_path / "aside"
    directory.rename(aside)
    newest = max(int(path.name) for path in aside.iterdir())
    shutil.copytree(aside / str(newest), directory / "1")
    restore = checkpoints.Checkpoints.restore

    def late(self, *args):
        # The run saves a newer one and deletes this.
        if (directory / "1").exists():
            shutil.rmtree(directory / "1")
            (aside / str(newest)).rename(directory / str(newest))
        return restore(self, *args)

    monkeypatch.setattr(checkpoints.Checkpoints, "restore", late)
    evaluation, _ = evaluated(workdir, seeds=[3])
    assert (
        evaluation["seeds"][0]["metrics"]["clean"] == (finished[2]["seeds"][0]["metrics"]["clean"])
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampling": "class_aware"}, "config.sampling=class_aware"),
        ({"sampling": "class_balanced"}, "config.sampling=class_balanced"),
        ({"method": "logit_adjustment"}, "logit_adjustment"),
        ({"method": "ldam+drw"}, "drw"),
    ],
)
def test_class_frequencies_are_not_corrected_again_post_hoc(changes, named, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    config = digits.get_config(f"method={changes.get('method', 'lpl')},smoke")
    config.sampling = changes.get("sampling", "uniform")
    config.update_from_flattened_dict(
        {"imbalance.kind": "exponential", "imbalance.ratio": 20.0, "batch_size": 32}
    )
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ConfigError, match=f"^{named}.* has corrected the run .*: take one of the"):
        evaluated(workdir, logit_adjustment=1.0)


@pytest.mark.guarantee("bad-input")
def test_what_cannot_be_evaluated_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match="holds no run: give --workdir"):
        evaluated(tmp_path)
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    with pytest.raises(ConfigError, match="tau must be at least 0"):
        evaluated(workdir, logit_adjustment=-1.0)
    assert not (tmp_path / "run" / "evaluation_validation.json").exists()

    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, "data_seed": 1}))
    with pytest.raises(ConfigError, match=r"labels.npz holds the labels this run began with"):
        evaluated(workdir)
    (workdir / "labels.npz").unlink()
    (workdir / "config.json").write_text(json.dumps({**config, "validation_fraction": 0.0}))
    with pytest.raises(ConfigError, match="has no split 'validation'"):
        evaluated(workdir, split="validation")
    for seed in (3, 4):
        shutil.rmtree(workdir / f"seed{seed}")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        evaluated(workdir)
    del config["schedule"]["factor"]
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"has no schedule\.factor: it was written by another"):
        evaluated(workdir)


def test_a_recorded_configuration_is_read_as_it_was(tmp_path):
    config = smoke(augment="none")
    config.optimizer.options = {}
    config.model.options = {"widths": (2, 3)}
    identity.claim(tmp_path, config.to_dict())
    assert identity.read_config(tmp_path).to_dict() == config.to_dict()


def test_the_plot_does_without_examples_of_a_class_and_with_one_seed(tmp_path):
    found, _, labels = outcomes()
    clean = classification.metrics(found, labels, 5)
    bins = calibration.reliability(found.predicted == labels, found.confidence)
    reliability = {name: value.tolist() for name, value in bins._asdict().items()}
    path = tmp_path / "plot.png"
    seed = {"metrics": {"clean": clean}, "details": {"reliability": reliability}}
    plots.save(plots.reliability("title", [seed]), path)
    assert path.read_bytes().startswith(b"\x89PNG")


# --- The command line. ----------------------------------------------------------------------------


def call(*arguments):
    # One CPU device: what a user has.
    return subprocess.run(
        [sys.executable, "-m", "lpa_jax.evaluate", *arguments],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.guarantee("bad-input")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir=runs/digits"),
        (["--workdir=W", "again"], "'again'"),
        (["--workdir=W", "--part=train"], "--part"),
        (["--workdir=W", "--attack"], "attacks"),
        (["--workdir=W", "--logit_adjustment=much"], "much"),
        (
            ["--workdir=W", "--logit_adjustment=-1"],
            "--logit_adjustment cannot be '-1': give a non-negative",
        ),
        (["--workdir=W", "--attacks"], "holds no run"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_exit_code_2(arguments, message, tmp_path):
    done = call(*(argument.replace("=W", f"={tmp_path / 'W'}") for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("lpa_jax: ")
    assert not (tmp_path / "W").exists()


def test_the_command_evaluates_the_seed_asked_for(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    done = call(f"--workdir={workdir}", "--seed=4", "--logit_adjustment=1.5")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "error %" in done.stdout
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    # On one device, where the run had eight.
    for name in ("clean", "logit_adjusted"):
        expected = finished[2]["seeds"][1]["metrics"][name]["nll"]
        assert evaluation["metrics"][name]["nll"]["mean"] == pytest.approx(expected, rel=1e-4)
    assert [result["seed"] for result in evaluation["seeds"]] == [4]
