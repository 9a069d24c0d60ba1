"""A run that is loaded has the network that was evaluated: for each kind, on any devices."""

import inspect
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import digits
import lpa_jax
from lpa_jax.methods import METHODS
from lpa_jax.tasks import classification
from lpa_jax.training import checkpoints, files
from lpa_jax.training.config import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")
QUIET = Console(quiet=True)


def trained(workdir, method="erm", **changes):
    config = digits.get_config(f"method={method},smoke")
    config.update_from_flattened_dict(
        {"limit": 96, "batch_size": 32, "epochs": 1, "schedule.boundaries": (), **changes}
    )
    return lpa_jax.train_and_evaluate(config, workdir, QUIET)


def check(workdir, summary, seed=0):
    """Compare the metrics of the loaded network's logits with those that the run recorded."""
    run = lpa_jax.load_run(workdir, seed)
    expected = summary["seeds"][seed]["metrics"]
    for split in ("validation", "test"):
        examples = run.dataset.splits[split]
        found = classification.outcomes(run.logits(examples.images), jnp.asarray(examples.labels))
        found = type(found)(*map(np.asarray, found))
        metrics = classification.metrics(found, examples.labels, run.dataset.num_classes)
        assert metrics["accuracy"] == expected[split]["accuracy"]
        assert metrics["nll"] == pytest.approx(expected[split]["nll"], rel=1e-5)
    return run


# One of each kind of site and state.
KINDS = ("erm", "lpa+lpl+lpg", "manifold_mixup", "isda+elr", "sam+dropout", "ldam+drw")


@pytest.mark.parametrize(
    "method",
    [KINDS[1], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != KINDS[1])],
)
def test_a_loaded_network_has_the_logits_that_were_evaluated(method, tmp_path):
    summary = trained(tmp_path, method)
    run = check(tmp_path, summary)
    assert (run.seed, run.step) == (0, 3)
    assert run.config["method"] == method
    assert set(run.variables) == {"params", "batch_stats"}
    assert set(run.variables["params"]) >= {"group1", "group2", "group3", "head"}


OF_DOMAINS = {
    name
    for name, row in METHODS.items()
    if "num_domains" in inspect.signature(row.factory).parameters
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", sorted(set(METHODS) - OF_DOMAINS - {"lpa", "lpl", "lpg", "isda", "elr"})
)
def test_a_network_of_each_method_is_loaded(method, tmp_path):
    check(tmp_path, trained(tmp_path, method))


@pytest.mark.slow
@pytest.mark.parametrize(
    "network", ["wrn_10_1", "resnet_8", "se_resnet_8", "preact_resnet_18", "mnist_cnn"]
)
def test_each_network_is_loaded(network, tmp_path):
    changes = {"model.name": network, "model.options": {}}
    check(tmp_path, trained(tmp_path, **changes))


def test_a_network_is_loaded_on_another_number_of_devices(tmp_path):
    summary = trained(tmp_path / "run", "lpl", num_seeds=2)
    check(tmp_path / "run", summary, seed=1)
    program = (
        "import jax, numpy as np, lpa_jax\n"
        "assert jax.device_count() == 1\n"
        f"run = lpa_jax.load_run({str(tmp_path / 'run')!r}, 1)\n"
        f"np.save({str(tmp_path / 'logits')!r}, run.logits(run.dataset.splits['test'].images))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here = lpa_jax.load_run(tmp_path / "run", 1)
    ours = here.logits(here.dataset.splits["test"].images)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), ours, rtol=1e-5, atol=1e-6)


def test_of_several_seeds_the_first_is_read_alone(tmp_path):
    trained(tmp_path, num_seeds=2)
    recorded = tmp_path / "seed1" / "sessions.json"
    files.write_json(recorded, {"sessions": []})
    assert lpa_jax.load_run(tmp_path).seed == 0
    with pytest.raises(ConfigError, match="does not record"):
        lpa_jax.load_run(tmp_path, 1)


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(ConfigError, match="holds no run: give"):
        lpa_jax.load_run(tmp_path / "nowhere")
    trained(tmp_path / "run")
    with pytest.raises(ConfigError, match="has no checkpoint of seed 7: it has those of 0"):
        lpa_jax.load_run(tmp_path / "run", 7)
    with pytest.raises(ConfigError, match=r"config\.epochs cannot be changed for a run that was"):
        lpa_jax.load_run(tmp_path / "run", changes={"epochs": 3})
    assert lpa_jax.load_run(tmp_path / "run", changes={"eval_batch_size": 7}).step == 3


def test_a_run_of_the_former_version_is_refused_with_a_sentence(tmp_path):
    trained(tmp_path / "run")
    config = files.read_json(tmp_path / "run" / "config.json")
    del config["selection"], config["writers"], config["task"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"has no .*task.*another version of lpa_jax"):
        lpa_jax.load_run(tmp_path / "run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_of_the_former_version_are_refused_with_a_sentence(tmp_path):
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    state = {"0": jnp.arange(3.0)}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
    saved = checkpoints.Checkpoints(tmp_path, read_only=True)
    like, places = {"a": jax.eval_shape(lambda: state)}, {"a": {"0": state["0"].sharding}}
    with pytest.raises(checkpoints.CheckpointError, match=r"written by lpa_jax 0\.1, in another"):
        saved.restore(like, places)
    saved.close()
