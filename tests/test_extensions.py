"""What a user adds from outside of the package, by public names alone, and what runs take."""

import json
import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from rich.console import Console

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")
QUIET = Console(quiet=True)

# A module of a user's: one of each kind of thing, by the public API alone.
MINE = '''
import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import lpa_jax
from lpa_jax import data, tasks
from lpa_jax.methods import Method, METHODS, Range
from lpa_jax.tables.catalogue import Row, Table


def fade(site, strength):
    """Scale a value down: a perturbation."""
    return lpa_jax.stateless(site, lambda value, **_: value * (1 - strength))


METHODS.register(
    "fade",
    Method(
        fade, defaults={"site": "hidden", "strength": 0.1}, ranges={"strength": Range(0.05, 0.2)}
    ),
)


class Ramps:
    """A source that makes its examples on demand."""

    class_names = ("down", "flat", "up")

    def __init__(self, first, number):
        self.first, self.number = first, number

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        if i >= self.number:
            raise IndexError(i)
        label = (self.first + i) % 3
        noise = np.random.default_rng(self.first + i).normal(size=6)
        ramp = (label - 1) * np.linspace(-1, 1, 6) + 0.3 * noise
        return {"image": ramp.astype(np.float32), "label": label, "domain": i % 2}

    def fingerprint(self):
        return f"ramps from {self.first}, {self.number}"


def ramps():
    """Return sources by split."""
    return {"train": Ramps(0, 120), "test": Ramps(1000, 60)}


data.READERS.register("ramps", lambda rest, options: ramps())


class Net(nn.Module):
    """A network that takes neither train nor statistics."""

    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.width, name="hidden")(x))
        return nn.Dense(self.num_classes, name="head")(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Ordinal(tasks.Classification):
    """Classes in an order: the distance from the true one counts."""

    shown: dict = dataclasses.field(
        default_factory=lambda: {
            "distance": tasks.Metric("distance", digits=3),
            "accuracy": tasks.Metric("accuracy %", 100.0, maximize=True),
        }
    )
    selection: str = "distance"

    def metrics(self, outcomes, labels, num_classes, groups):
        apart = np.abs(outcomes.predicted - labels)
        return {"distance": float(apart.mean()), "accuracy": float((apart == 0).mean())}

    def details(self, outcomes, labels, num_classes):
        return {}


ordinal = Ordinal()


class Lines:
    """A writer."""

    def __init__(self, directory, step):
        directory.mkdir(parents=True, exist_ok=True)
        self.file = (directory / "lines.txt").open("a")

    def write(self, step, scalars):
        self.file.write(json.dumps({"step": step, **scalars}) + "\\n")

    def close(self):
        self.file.close()


TABLE = Table("CONFIG", {}, {"erm": Row("erm"), "fade": Row("fade", {"Mine": 12.5})})
'''
CONFIG = """
import mine
from lpa_jax.training import config as configuration
from lpa_jax.training import method_config


def get_config(argument=""):
    config = configuration.default()
    config.dataset = "ramps:"
    config.task = "mine:ordinal"
    config.model.name = "mine:Net"
    config.model.options = {"width": 6}
    config.writers = ("mine:Lines",)
    config.update({"epochs": 4, "batch_size": 12})
    config.schedule.update({"name": "constant", "learning_rate": 0.05})
    return method_config.choose(config, argument, {}, "mine")
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Return a folder with the user's module and configuration."""
    folder = tmp_path_factory.mktemp("outside")
    config = folder / "my_config.py"
    config.write_text(CONFIG)
    (folder / "mine.py").write_text(MINE.replace('"CONFIG"', repr(str(config))))
    return folder


def call(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "lpa_jax", *map(str, words)],
        cwd=folder, capture_output=True, text=True, check=False, timeout=600,
        env={"PATH": "", "HOME": str(folder), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_each_kind_of_thing_is_added_from_outside_and_used(outside):
    done = call(outside, "main", "--config=my_config.py:method=fade", "--workdir=run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((outside / "run" / "summary.json").read_text())
    assert summary["metrics"]["test"]["distance"]["mean"] < 0.3
    assert set(summary["metrics"]["test"]) == {"distance", "accuracy"}
    assert summary["num_examples"] == {"train": 108, "validation": 12, "test": 60}
    lines = (outside / "run/seed0/lines.txt").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [9, 18, 27, 36]
    assert rows[-1]["validation/distance"] == pytest.approx(
        summary["metrics"]["validation"]["distance"]["mean"]
    )
    assert "sites/hidden/relative" in rows[-1]
    assert rows[-1]["sites/hidden/relative"] == pytest.approx(0.1, rel=1e-3)
    # The best epoch has the smallest distance.
    distances = [row["validation/distance"] for row in rows]
    best = json.loads((outside / "run/seed0/result.json").read_text())["best"]
    assert best["metrics"]["validation"]["distance"] == min(distances)

    done = call(outside, "evaluate", "--workdir=run", "--split=validation")
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((outside / "run" / "evaluation_validation.json").read_text())
    assert evaluation["metrics"]["clean"] == summary["metrics"]["validation"]
    done = subprocess.run(
        [
            sys.executable, "-c",
            "import mine, lpa_jax\n"
            "from lpa_jax.evaluation.evaluate import evaluate_run\n"
            "evaluate_run('run')\n"
            "run = lpa_jax.load_run('run')\n"
            "print(run.logits(run.dataset.splits['test'].images[:2]).shape)",
        ],
        cwd=outside, capture_output=True, text=True, check=False, timeout=600,
        env={"PATH": "", "HOME": str(outside), "JAX_PLATFORMS": "cpu",
             "PYTHONPATH": f"{ROOT}:{outside}"},
    )  # fmt: skip
    assert "(2, 3)" in done.stdout, done.stderr

    done = call(
        outside, "table", "--table=mine:TABLE", "--config.num_seeds=2", "--config.epochs=2",
        "--trials=2", "--workdir=table",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = json.loads((outside / "table" / "table.json").read_text())
    assert table["metric"] == "test distance"
    assert [row["name"] for row in table["rows"]] == ["erm", "fade"]
    assert table["rows"][1]["published"] == {"Mine": 12.5}
    search = json.loads((outside / "table/tuning/fade/search.json").read_text())
    assert "perturbation.fade.strength" in search["ranges"]


def test_everything_that_has_a_name_is_listed(outside):
    done = call(outside, "main", "--list")
    for name in ("lpa", "mixstyle", "wrn_{depth}_{k}", "npz", "classification", "digits_lt",
                 "wandb", "cifar100"):  # fmt: skip
        assert name in done.stdout
    done = call(outside, "main", "--config=my_config.py:method=fade", "--print_config")
    assert "perturbation.fade.strength = 0.1" in done.stdout
    assert "epochs = 4  # length of the run; at least 1" in done.stdout
    # What a module registers is known after --import, in a configuration of the package too.
    done = call(outside, "main", "--config=digits:method=fade", "--print_config")
    assert "There is no method 'fade'" in done.stderr
    done = call(outside, "main", "--import=mine", "--config=digits:method=fade", "--print_config")
    assert "perturbation.fade.strength = 0.1" in done.stdout
    done = call(
        outside, "main", "--import", "mine", "--config=digits:method=fade", "--print_config"
    )
    assert done.returncode == 0, done.stderr
    done = call(outside, "main", "--import=nowhere", "--list")
    assert (done.returncode, "--import=nowhere cannot be imported" in done.stderr) == (2, True)
    done = call(outside, "table", "--table=digits", "--methods=lpa", "--print_config")
    assert "perturbation.lpa.steps = 3" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--config.model.name=mine:Nett"], "'mine:Nett' cannot be imported"),
        (["--config.model.name=nowhere:Net"], "'nowhere:Net' cannot be imported"),
        (["--config.task=mine:ordinall"], "'mine:ordinall' cannot be imported"),
        (["--config.dataset=mine:nothing"], "'mine:nothing' cannot be imported"),
        (["--config.dataset=mine:ordinal"], "must give sources by the names of its splits"),
        (["--config.writers=('wandbb',)"], "no writer 'wandbb'; did you mean wandb"),
        (["--config.model.head=normalized"], "mine:Net takes no head"),
        (["--config.model.options={'depth': 3}"], "depth"),
        (["--config.selection.metric=error"], "must be one of distance, accuracy"),
    ],
)
def test_missing_names_and_files_are_reported(words, sentence, outside, tmp_path):
    done = call(
        outside, "main", "--config=my_config.py:method=erm", *words, f"--workdir={tmp_path / 'x'}"
    )
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- objects given in Python


def small(method="erm", **changes):
    from configs import digits

    config = digits.get_config(f"method={method},smoke")
    config.update_from_flattened_dict({"limit": 200, "batch_size": 32, **changes})
    return config


def test_a_network_and_data_are_given_as_objects(tmp_path, unchecked):
    import flax.linen as nn

    import lpa_jax
    from lpa_jax.training.config import ConfigError

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            x = nn.Dropout(0.2, deterministic=not train)(nn.relu(nn.Dense(8, name="group3")(x)))
            return nn.Dense(2)(x)

    rng = np.random.default_rng(0)
    features = rng.normal(size=(96, 5)).astype(np.float32)
    labels = (features.sum(1) > 0).astype(int)
    arrays = {"train": (features[:64], labels[:64]), "test": (features[64:], labels[64:])}
    config = small("lpa", **{"schedule.learning_rate": 0.05, "limit": None, "epochs": 30})
    given = {"model": Net(), "dataset": arrays}
    summary = lpa_jax.train_and_evaluate(config, tmp_path, QUIET, **given)
    assert summary["metrics"]["test"]["accuracy"]["mean"] > 0.6
    assert summary["config"]["dataset"] == "given: given data"
    assert summary["config"]["model"]["name"].startswith("given: Net(")

    run = lpa_jax.load_run(tmp_path, **given)
    predicted = np.argmax(np.asarray(run.logits(features[64:])), axis=1)
    assert np.mean(predicted == labels[64:]) == summary["metrics"]["test"]["accuracy"]["mean"]
    # The same again is not trained again; what is missing, or another, is said.
    again = lpa_jax.train_and_evaluate(config, tmp_path, QUIET, **given)
    assert again["seeds"] == summary["seeds"]
    with pytest.raises(ConfigError, match="data that were given as an object"):
        lpa_jax.load_run(tmp_path, model=Net())
    with pytest.raises(ConfigError, match="network that was given as an object"):
        lpa_jax.load_run(tmp_path, dataset=arrays)
    others = {**arrays, "train": (features[:64] + 1, labels[:64])}
    with pytest.raises(ConfigError, match="was made with other data"):
        lpa_jax.train_and_evaluate(config, tmp_path, QUIET, model=Net(), dataset=others)
    with pytest.raises(ConfigError, match="takes a Flax Linen module"):
        lpa_jax.train_and_evaluate(config, tmp_path / "x", QUIET, model=lambda x: x)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": 0}, "sources by the names of its splits, 'train' and"),
        ({"train": 3, "test": 4}, "is no source of examples"),
        (([1], [0]), "sources by the names of its splits"),
    ],
)
def test_objects_that_are_not_data_are_refused(splits, message, tmp_path, unchecked):
    import lpa_jax

    with pytest.raises(lpa_jax.data.DataError, match=message):
        lpa_jax.train_and_evaluate(small(), tmp_path / "x", QUIET, dataset=splits)
    assert not (tmp_path / "x").exists()


def test_splits_of_any_name_are_evaluated(tmp_path):
    import lpa_jax

    digits = lpa_jax.data.load("digits")
    halves = digits.train.take(np.arange(0, 600)), digits.train.take(np.arange(600, 1200))
    splits = {"train": halves[0], "validation": halves[1], "test": digits.splits["test"],
              "again": digits.splits["test"]}  # fmt: skip
    summary = lpa_jax.train_and_evaluate(small(), tmp_path, QUIET, dataset=splits)
    assert summary["metrics"]["again"] == summary["metrics"]["test"]
    assert summary["num_examples"]["validation"] == 200


def test_a_registry_of_any_kind_takes_classes():
    from lpa_jax.registry import Registry

    kinds = Registry("kind", {})
    kinds.register("text", str)
    assert kinds.find("text") is str


def mlp(shape, classes=3):
    import flax.linen as nn

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=shape).astype(np.uint8)
    labels = np.arange(len(images)) % classes

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(classes)(x.reshape(len(x), -1))

    return Net(), (images, labels)


def test_a_split_whose_name_has_a_slash_is_evaluated_and_selects(tmp_path):
    import lpa_jax
    from lpa_jax.training.config import ConfigError

    network, given = mlp((64, 6))
    given = {"model": network, "dataset": {"train": given, "validation": given, "art/in": given}}
    config = small(**{"selection.split": "art/in"})
    summary = lpa_jax.train_and_evaluate(config, tmp_path / "a", QUIET, **given)
    assert "best" in summary
    found = lpa_jax.evaluate_run(tmp_path / "a", split="art/in", console=QUIET, **given)
    assert found["metrics"]["clean"]["nll"] == summary["metrics"]["art/in"]["nll"]
    assert (tmp_path / "a" / "evaluation_art_in.json").exists()
    with pytest.raises(ConfigError, match=r"uint8 \[N, H, W, C\]"):
        lpa_jax.evaluate_run(tmp_path / "a", split="art/in", corrupt=True, console=QUIET, **given)


@pytest.mark.parametrize("split", ["validaton", "test"])
def test_a_split_that_cannot_select_is_refused(split, tmp_path):
    import lpa_jax
    from lpa_jax.training.config import ConfigError

    with pytest.raises(ConfigError, match=rf"config.selection.split must be .*, not '{split}'"):
        lpa_jax.train_and_evaluate(small(**{"selection.split": split}), tmp_path / "x", QUIET)


def test_labels_that_the_task_does_not_take_are_refused(tmp_path):
    import lpa_jax
    from lpa_jax.training.config import ConfigError

    network, (images, labels) = mlp((64, 6))
    given = {"train": (images, np.eye(3)[labels]), "test": (images, np.eye(3)[labels])}
    with pytest.raises(ConfigError, match="takes one class an example"):
        lpa_jax.train_and_evaluate(small(), tmp_path / "x", QUIET, model=network, dataset=given)


class SeveralClasses:
    """A task of labels [N, C], none of whose metrics are those of classification."""

    def __init__(self):
        import jax

        from lpa_jax.tasks import Metric

        self.losses = {"bce": lambda u, t: (jax.nn.softplus(u) - u * t).mean(axis=1)}
        self.shown = {"wrong": Metric("wrong"), "share": Metric("share", maximize=True)}
        self.selection = "share"

    def class_statistic(self, logits):
        return 1 / (1 + np.e**-logits), (logits > 0).astype(np.float32)

    def correct(self, logits, labels):
        return ((logits > 0) == (labels > 0.5)).mean(axis=1)

    def outcomes(self, logits, labels):
        return (logits > 0) == (labels > 0.5)

    def metrics(self, outcomes, labels, num_classes, groups):
        return {"wrong": float((~outcomes.all(axis=1)).mean()), "share": float(outcomes.mean())}

    def details(self, outcomes, labels, num_classes):
        return {}

    def class_counts(self, labels, num_classes):
        return labels.sum(axis=0).astype(int).tolist()


def test_labels_of_several_classes_are_trained_on_and_select(tmp_path, monkeypatch):
    import io

    from rich.console import Console

    import lpa_jax
    from lpa_jax.training.config import ConfigError

    monkeypatch.setitem(lpa_jax.tasks.TASKS._entries, "several", SeveralClasses())
    network, (images, labels) = mlp((128, 6))
    several = np.eye(3)[labels] + np.eye(3)[(labels + 1) % 3]
    given = {"model": network, "dataset": dict.fromkeys(("train", "test"), (images, several))}
    config = small("lpl", **{"task": "several", "loss.name": "bce"})
    summary = lpa_jax.train_and_evaluate(config, tmp_path / "a", QUIET, **given)
    assert summary["num_examples"] == {"train": 115, "validation": 13, "test": 128}
    assert 0 <= summary["best"]["validation"]["share"]["mean"] <= 1
    shown = io.StringIO()
    console = Console(file=shown, width=120)
    found = lpa_jax.evaluate_run(tmp_path / "a", console=console, **given)
    assert found["metrics"]["clean"] == summary["metrics"]["test"]
    assert re.search(r"wrong .*share ", shown.getvalue())
    assert "plot" not in shown.getvalue()
    config.sampling = "class_balanced"
    with pytest.raises(ConfigError, match=r"by the one class of each example"):
        lpa_jax.train_and_evaluate(config, tmp_path / "b", QUIET, **given)


def test_a_method_that_there_is_not_is_named(tmp_path):
    import lpa_jax
    from lpa_jax.training.config import ConfigError

    config = small()
    config.method, config.perturbation = "lpaa", {"lpaa": {}}
    with pytest.raises(ConfigError, match="There is no method 'lpaa'; did you mean lpa"):
        lpa_jax.train_and_evaluate(config, tmp_path / "x", QUIET)


# ---------------------------------------------------------------- averages of the weights


def test_the_average_of_the_weights_is_kept_and_evaluated(tmp_path):
    import lpa_jax
    from lpa_jax.evaluation.evaluate import evaluate_run

    config = small(**{"optimizer.ema_decay": 0.9, "epochs": 3})
    summary = lpa_jax.train_and_evaluate(config, tmp_path / "a", QUIET)
    run = lpa_jax.load_run(tmp_path / "a")
    import jax

    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), run.average, run.variables)
    assert max(jax.tree.leaves(apart)) > 1e-3
    test = run.dataset.splits["test"]
    logits = run._replace(variables=run.average).logits(test.images)
    accuracy = np.mean(np.argmax(np.asarray(logits), axis=1) == test.labels)
    assert summary["average"]["test"]["accuracy"]["mean"] == accuracy
    found = evaluate_run(tmp_path / "a", console=QUIET)
    assert found["metrics"]["average"]["accuracy"]["mean"] == accuracy
    # What is trained is the same with an average as without.
    plain = lpa_jax.train_and_evaluate(small(epochs=3), tmp_path / "b", QUIET)
    assert plain["metrics"] == summary["metrics"]
    assert "average" not in plain


def test_the_average_is_that_of_the_steps():
    import jax.numpy as jnp

    from lpa_jax.training.step import _averaged

    average = {"w": jnp.zeros(2), "count": jnp.int32(0)}
    for step in (1, 2, 3):
        average = _averaged(average, {"w": jnp.full(2, float(step)), "count": jnp.int32(step)}, 0.5)
    np.testing.assert_allclose(average["w"], 0.5**3 * 1 + 0.5**2 * 2 + 0.5 * 3)
    assert int(average["count"]) == 3


# ---------------------------------------------------------------- writers


def stub(monkeypatch, name, **functions):
    import types

    module = types.ModuleType(name)
    for key, function in functions.items():
        setattr(module, key, function)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_wandb_is_called_as_its_interface_says(tmp_path, monkeypatch):
    from lpa_jax.training.metric_log import MetricLog
    from lpa_jax.training.writers import WRITERS

    calls = []

    class Run:
        id = "abc"

        def log(self, data, step=None):
            calls.append((data, step))

        def finish(self):
            calls.append("finish")

    def init(*, id, name, resume):
        calls.append((id, name, resume))
        return Run()

    stub(monkeypatch, "wandb", init=init)
    directory = tmp_path / "run" / "seed0"
    for step in (0, 5):
        log = MetricLog(directory, step, [WRITERS["wandb"]])
        log.write({"step": step + 5, "metrics": {"train": {"loss": 0.5}}})
        log.close()
    assert calls == [
        (None, "run-seed0", None), ({"train/loss": 0.5}, 5), "finish",
        ("abc", "run-seed0", "allow"), ({"train/loss": 0.5}, 10), "finish",
    ]  # fmt: skip


def test_mlflow_resumes_the_run_that_it_began(tmp_path, monkeypatch):
    import types

    from lpa_jax.training.metric_log import MetricLog
    from lpa_jax.training.writers import WRITERS

    calls = []

    def start_run(run_id=None, run_name=None):
        calls.append((run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    stub(
        monkeypatch,
        "mlflow",
        start_run=start_run,
        log_metrics=lambda metrics, step: calls.append((metrics, step)),
        end_run=lambda: calls.append("end"),
    )
    directory = tmp_path / "run" / "seed0"
    for step in (0, 5):
        log = MetricLog(directory, step, [WRITERS["mlflow"]])
        log.write({"step": step + 5, "sites": {"a": {"norm": 1.0}}})
        log.close()
    assert calls == [
        (None, "run-seed0"), ({"sites/a/norm": 1.0}, 5), "end",
        ("abc", "run-seed0"), ({"sites/a/norm": 1.0}, 10), "end",
    ]  # fmt: skip


def test_a_writer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    import lpa_jax
    from lpa_jax.training.config import ConfigError

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb.*pip install wandb"):
        lpa_jax.train_and_evaluate(small(writers=("wandb",)), tmp_path / "x", QUIET)


# ---------------------------------------------------------------- export


def test_an_exported_network_needs_no_code_of_ours(tmp_path):
    import lpa_jax

    lpa_jax.train_and_evaluate(small("lpl"), tmp_path / "run", QUIET)
    done = call(tmp_path, "export", "--workdir=run", "--output=out")
    assert done.returncode == 0, done.stderr
    run = lpa_jax.load_run(tmp_path / "run")
    images = run.dataset.splits["test"].images[:7]
    np.save(tmp_path / "images.npy", images)
    program = """
        import sys, json, numpy as np
        from jax import export
        function = export.deserialize(bytearray(open("out/network.jaxexport", "rb").read()))
        np.save("logits.npy", function.call(np.load("images.npy")))
        assert not any(name.startswith("lpa_jax") for name in sys.modules)
        print(json.load(open("out/network.json"))["inputs"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": "", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "{'shape': ['batch', 8, 8, 1], 'dtype': 'uint8'," in done.stdout
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), run.logits(images), rtol=1e-5, atol=1e-6
    )


# ---------------------------------------------------------------- what cannot be used is refused


class Drawn:
    """A source whose examples a function gives."""

    class_names = ("no", "yes")

    def __init__(self, give, number=40):
        self.give, self.number = give, number

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        return self.give(i)

    def fingerprint(self):
        return "drawn"


def image(i, **more):
    return {"image": np.full(5, i, np.float32), "label": i % 2, **more}


IMAGES = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
CLASSES = np.arange(40) % 2
SPLITS = {
    "no array": (([[1], [2, 3]], [0, 1]), "they are no arrays"),
    "no axis": ((np.float32(3), CLASSES), r"shape \(\): give at least one"),
    "one axis": ((IMAGES[:, 0], CLASSES), r"shape \(40,\): give at least one"),
    "nothing": ((IMAGES[:0], CLASSES[:0]), "give at least one"),
    "objects": ((IMAGES.astype(object), CLASSES), "images has dtype object: give numbers"),
    "NaN": ((np.where(IMAGES > 2, np.nan, IMAGES), CLASSES), r"images of example \d+ is not"),
    "other pixels": ((IMAGES.astype(np.uint8), CLASSES), r"differ in their type of images \(uint8"),
    "words": ((IMAGES, CLASSES.astype(str)), "np.unique"),
    "truths": ((IMAGES, CLASSES > 0), "y.astype"),
    "floats": ((IMAGES, CLASSES / 2), "save integers"),
    "whole one-hot": ((IMAGES, np.eye(2, dtype=int)[CLASSES]), "y.argmax"),
    "soft in one split": ((IMAGES, np.eye(2)[CLASSES]), "differ in their labels of shape"),
    "too few soft": ((IMAGES, np.eye(2)[CLASSES[1:]]), r"must have the shape \(40, 2\)"),
    "a number far off": ((IMAGES, CLASSES * 10**9), "label 1000000000: number the classes"),
    "an error": (Drawn(lambda i: [][i]), "'train': example 0 cannot be read .IndexError"),
    "two shapes": (Drawn(lambda i: {"image": np.zeros(1 + i), "label": 0}), "be stacked"),
    "pairs": (Drawn(lambda i: (IMAGES[i], 0)), "cannot be stacked"),
    "paths": (Drawn(lambda i: image(i, path="a")), "path has dtype <U1: give numbers"),
    "none": (Drawn(image, 0), "it is empty"),
}  # fmt: skip


@pytest.mark.guarantee("bad-input")
@pytest.mark.parametrize("case", SPLITS)
def test_examples_that_no_network_can_learn_from_are_refused(case, tmp_path, unchecked):
    import lpa_jax

    train, message = SPLITS[case]
    splits = {"train": train, "test": (IMAGES, CLASSES)}
    with pytest.raises(lpa_jax.data.DataError, match=message):
        lpa_jax.train_and_evaluate(small(), tmp_path / "x", QUIET, dataset=splits)
    assert not (tmp_path / "x").exists()


def test_soft_labels_need_a_task_and_splits_a_plain_name(tmp_path, unchecked):
    import lpa_jax
    from lpa_jax.training.config import ConfigError

    soft = IMAGES, np.eye(2)[CLASSES]
    given = {"train": soft, "test": soft}
    with pytest.raises(ConfigError, match="takes one class an example"):
        lpa_jax.train_and_evaluate(small(), tmp_path / "x", QUIET, dataset=given)
    config = small(**{"imbalance.kind": "step", "imbalance.ratio": 2.0})
    with pytest.raises(lpa_jax.data.DataError, match="neither a long tail nor label"):
        lpa_jax.train_and_evaluate(config, tmp_path / "x", QUIET, dataset=given)
    with pytest.raises(lpa_jax.data.DataError, match=r"has the split '../x'"):
        lpa_jax.data.make_dataset("mine", {"train": (IMAGES, CLASSES), "../x": (IMAGES, CLASSES)})
    config = small(**{"selection.split": "tests"})
    with pytest.raises(ConfigError, match="must be one of validation, not 'tests'"):
        lpa_jax.train_and_evaluate(config, tmp_path / "x", QUIET)
    assert not (tmp_path / "x").exists()


BROKEN = """
import dataclasses

import flax.linen as nn
import numpy as np

from lpa_jax import tasks
from lpa_jax.methods import Range
from lpa_jax.tables.catalogue import Row, Table


class Breaks(nn.Module):
    @nn.compact
    def __call__(self, x):
        raise RuntimeError("my mistake")


class One(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x.reshape(len(x), -1))


@dataclasses.dataclass(frozen=True, eq=False)
class Told(tasks.Classification):
    more: dict = dataclasses.field(default_factory=dict)

    def metrics(self, *args, **kwargs):
        return {**super().metrics(*args, **kwargs), **self.more}


class Raises(tasks.Classification):
    def metrics(self, *args, **kwargs):
        raise RuntimeError("my mistake")


class Deaf:
    def __init__(self, directory, step):
        pass

    def write(self, step, scalars):
        raise RuntimeError("my mistake")

    def close(self):
        pass


words, arrays = Told(more={"accuracy": "high"}), Told(more={"accuracy": np.float32(0.5)})
selects, raises = Told(selection="nothing"), Raises()
number = 3


def fails():
    raise RuntimeError("my mistake")


no_rows, no_range = (
    Table("digits", {}, {}),
    Table("digits", {}, {"erm": Row("erm")}, {"schedule.learning_rate": Range(3.0, 1.0)}),
)
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Put a user's modules with mistakes on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "breaks.py").write_text('raise RuntimeError("my mistake")\n')
    yield
    sys.modules.pop("broken", None)


MISTAKE = r"RuntimeError: my mistake, .*broken.py:\d+"
NAMES = {
    "a module that raises": ("model.name", "breaks:Net", "my mistake, .*breaks.py:1"),
    "a network that raises": ("model.name", "broken:Breaks", MISTAKE),
    "a network of one logit": ("model.name", "broken:One", "its output must be logits"),
    "a network that is a number": ("model.name", "broken:number", "must be a Flax Linen module"),
    "a network that needs more": ("model.name", "flax.linen:Dense", "give config.model.options"),
    "data that raise": ("dataset", "broken:fails", MISTAKE),
    "a task that is a number": ("task", "broken:number", "is no task, but 3: give a Task object"),
    "the class of a task": ("task", "broken:Told", "is no task"),
    "a task that raises": ("task", "broken:raises", MISTAKE),
    "a metric that is a word": ("task", "broken:words", "'accuracy': let its metrics"),
    "a choice by nothing": ("task", "broken:selects", "selects by 'nothing'"),
    "a writer that is a number": ("writers", ("broken:number",), "is no writer, but 3"),
    "a writer without a name": ("writers", (3,), "must be names of writers"),
}


@pytest.mark.guarantee("bad-input")
@pytest.mark.parametrize("case", NAMES)
def test_mistakes_in_the_code_of_a_user_are_told_and_nothing_is_written(
    case, broken, tmp_path, unchecked
):
    import lpa_jax

    key, value, message = NAMES[case]
    config = small(**{key: value})
    if key == "model.name":
        config.model.options = {}
    with pytest.raises(ValueError, match=message) as caught:
        lpa_jax.train_and_evaluate(config, tmp_path / "x", QUIET)
    assert isinstance(caught.value, (lpa_jax.data.DataError, lpa_jax.training.config.ConfigError))
    assert not (tmp_path / "x").exists()


def test_a_network_of_one_logit_is_told_of_two_classes(broken, tmp_path, unchecked):
    import broken as user

    import lpa_jax
    from lpa_jax.training.config import ConfigError

    given = {"train": (IMAGES, CLASSES), "test": (IMAGES, CLASSES)}
    with pytest.raises(ConfigError, match=r"returns \(2, 1\) for 2 examples of 2 classes"):
        lpa_jax.train_and_evaluate(small(), tmp_path / "x", QUIET, model=user.One(), dataset=given)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_metrics_may_be_numbers_of_numpy(broken, tmp_path):
    import lpa_jax

    summary = lpa_jax.train_and_evaluate(small(task="broken:arrays"), tmp_path / "x", QUIET)
    assert summary["metrics"]["test"]["accuracy"]["mean"] == 0.5


def test_a_writer_that_fails_stops_a_run_that_can_be_resumed(broken, tmp_path, unchecked):
    import lpa_jax
    from lpa_jax.training.files import WriteError

    with pytest.raises(WriteError, match=r"What Deaf records cannot be written \(my mistake\)"):
        lpa_jax.train_and_evaluate(small(writers=("broken:Deaf",)), tmp_path / "x", QUIET)
    lpa_jax.train_and_evaluate(small(), tmp_path / "x", QUIET)
    from lpa_jax.training.config import ConfigError

    with pytest.raises(ConfigError, match="writers must be what makes writers"):
        lpa_jax.train_and_evaluate(small(), tmp_path / "x", QUIET, writers=["tensorboard"])


def test_entries_and_tables_of_the_wrong_kind_are_refused(broken, tmp_path):
    import lpa_jax
    from lpa_jax.tables import catalogue, runs, tuning
    from lpa_jax.training.config import ConfigError

    with pytest.raises(TypeError, match=r"is no method, but .*: give a Method object"):
        lpa_jax.methods.METHODS.register("mine", lpa_jax.lpa)
    with pytest.raises(TypeError, match="give a function or a class"):
        lpa_jax.data.READERS.register("mine", 3)
    with pytest.raises(ConfigError, match="'broken:fails' is no table"):
        catalogue.chosen("broken:fails", None)
    with pytest.raises(ConfigError, match="needs rows"):
        catalogue.chosen("broken:no_rows", None)
    table = catalogue.chosen("broken:no_range", None)
    with pytest.raises(ConfigError, match="cannot be searched in Range"):
        tuning.tuned(table, runs.Protocol(1), 1, tmp_path / "x", QUIET)
    with pytest.raises(ConfigError, match="cannot be 'x': give it the type int"):
        runs.configure(table, table.rows["erm"], runs.Protocol(1, "x"))
    config = small()
    config.method, config.perturbation = "mine", {"mine": {}}
    with pytest.raises(ConfigError, match=r"There is no method 'mine'.*--import=MODULE"):
        lpa_jax.train_and_evaluate(config, tmp_path / "x", QUIET)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_damaged_journal_of_a_search_is_told_and_a_line_cut_short_is_left_out(tmp_path):
    from lpa_jax.tables import catalogue, runs, tuning
    from lpa_jax.training.config import ConfigError

    changes = {"limit": 64, "batch_size": 16, "epochs": 1, "writers": (), "model.options.width": 4}
    table = catalogue.Table("digits", changes, {"erm": catalogue.Row("erm")})

    def search():
        return tuning.tuned(table, runs.Protocol(1), 2, tmp_path, QUIET).rows["erm"].changes

    chosen, journal = search(), tmp_path / "optuna.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-5])
    assert search() == chosen
    assert [json.loads(line) for line in journal.read_bytes().splitlines()]
    journal.write_bytes(b"[1]\n" + whole)
    with pytest.raises(ConfigError, match=r"optuna.log is damaged .*: restore it, or remove it"):
        search()
    journal.unlink()
    assert search() == chosen
