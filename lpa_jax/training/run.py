"""A run that was trained, loaded: its networks with their variables, and what made them."""

from collections.abc import Mapping, Sequence
import contextlib
import pathlib
import types
from typing import Any, NamedTuple

from flax import linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float32, PyTree
import numpy as np

from lpa_jax import data
from lpa_jax.models.pretrained import Arrays
from lpa_jax.tasks import Task
from lpa_jax.training import checkpoints, identity, mesh, swad
from lpa_jax.training.build import build, Data, Parts, Plan
from lpa_jax.training.config import ConfigError


class Run(NamedTuple):
    """A trained network and what made it.

    Attributes:
      model: The Flax module.
      variables: `"params"` and the module's other collections, of the last readable checkpoint.
      average: The average of the weights that the run kept, with its other variables, or None.
      config: The configuration, as nested dictionaries.
      dataset: The examples, as they were in training.
      task: What labels mean.
      seed: Of the network.
      step: Number of steps it has taken.
      parts: All that the run was made of, see `build.Parts`.
    """

    model: nn.Module
    variables: PyTree
    average: PyTree | None
    config: dict[str, Any]
    dataset: data.Dataset
    task: Task
    seed: int
    step: int
    parts: Parts

    def __repr__(self) -> str:
        """Return a line that tells which network it is."""
        return f"Run({self.parts.title!r}, seed={self.seed}, step={self.step})"

    def logits(self, inputs: Any) -> Float32[Array, "batch classes"]:
        """Return the logits of the trained network, as evaluation has them.

        Args:
          inputs: `[B, ...]` like those of the data set: uint8 images, or floats in [0, 1].
        """
        return _logits(self.parts.network.logits, self.variables, jnp.asarray(inputs))

    def arrays(self, *, average: bool = False) -> Arrays:
        """Return the variables by their paths, such as `"params/head/bias"`.

        Args:
          average: Whether of the average of the weights.

        Raises:
          ConfigError: If the run kept none.
        """
        if average and self.average is None:
            raise ConfigError(
                "The run kept no average of its weights: take the last ones, or train with "
                "config.optimizer.ema_decay or config.optimizer.swad.ratio."
            )
        variables = jax.device_get(self.average if average else self.variables)
        return {path: np.asarray(leaf) for path, leaf in flatten_dict(variables, sep="/").items()}


# Compiled once for a network, whichever its variables are.
_logits = jax.jit(
    lambda function, variables, inputs: function(variables, data.to_float(inputs)).astype(
        jnp.float32
    ),
    static_argnums=0,
)


def load_run(
    workdir: str | pathlib.Path,
    seed: int | None = None,
    *,
    model: nn.Module | None = None,
    dataset: Data | None = None,
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> Run:
    """Load a network that `train_and_evaluate` trained, finished or not.

    What its configuration names as `package.module:NAME` is imported and called: load no run that
    you do not trust.

    Args:
      workdir: Directory of the run.
      seed: Which of its networks; None for the first.
      model: The network of a run that was given one as an object.
      dataset: The data of a run that was given them as an object.
      changes: Keys of the configuration to set anew, of those that are free to differ, such as
        `{"data_dir": ...}`.

    Returns:
      The run, with the variables of the last readable checkpoint, whatever number of devices and
      processes wrote it.

    Raises:
      ConfigError: If there is no such run or seed, or the data are no longer those of the run.
      CheckpointError: If the seed has checkpoints, but none that can be read.
      DataError: If the data cannot be read.
    """
    workdir = pathlib.Path(workdir)
    parts = load_parts(workdir, model=model, dataset=dataset, changes=changes)
    devices = mesh.make_mesh(jax.device_count())
    if seed is None:
        networks = load_networks(parts, workdir, None, devices, most=1)
    else:
        networks = load_networks(parts, workdir, [seed], devices)
    ((number, found),) = networks.items()
    whole = parts.network.whole
    return Run(
        parts.network.module,
        whole(found.variables),
        None if found.average is None else whole(found.average),
        parts.config,
        parts.dataset,
        parts.task,
        number,
        found.step,
        parts,
    )


class Loaded(NamedTuple):
    """What a checkpoint has of a network."""

    step: int
    variables: PyTree
    average: PyTree | None


def load_parts(
    workdir: pathlib.Path,
    *,
    model: nn.Module | None = None,
    dataset: Data | None = None,
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> Parts:
    """Build what a run was made of, and find that its labels are still the same."""
    parts = build(identity.read_config(workdir, changes), model=model, dataset=dataset)
    kept = workdir / "labels.npz"
    if kept.exists():
        identity.save_labels(kept, data.training_labels(parts.dataset), write=False)
    return parts


def load_networks(
    parts: Parts,
    workdir: pathlib.Path,
    seeds: Sequence[int] | None,
    devices: Mesh,
    *,
    most: int | None = None,
) -> dict[int, Loaded]:
    """Return the network of each seed that has a checkpoint, or of those asked for.

    Args:
      parts: What the run was made of.
      workdir: Directory of the run.
      seeds: Which seeds; None for all that have a checkpoint.
      devices: Where to put the variables.
      most: Number of networks after which no more are read; None for all.

    Raises:
      ConfigError: If one that is asked for has none, or none has, or they were made with other
        data than there are now, or of different code.
    """
    train = parts.dataset.train
    inputs = data.to_float(jnp.asarray(train.images[:1]))
    like = jax.eval_shape(parts.network.init, jax.random.key(0), inputs)
    present = {
        int(path.parent.name.removeprefix("seed")): path
        for path in workdir.glob("seed*/checkpoints")
        if path.parent.name.removeprefix("seed").isdecimal()
    }
    networks: dict[int, Loaded] = {}
    for seed in sorted(present) if seeds is None else dict.fromkeys(seeds):
        if len(networks) == most:
            break
        found = None
        if seed in present:
            found = _newest(present[seed], like, devices, parts.plan)
        if found is not None:
            networks[seed] = found
        elif seeds is not None:
            raise ConfigError(
                f"{workdir} has no checkpoint of seed {seed}: it has those of "
                f"{', '.join(map(str, sorted(present))) or 'none'}."
            )
    if not networks:
        raise ConfigError(f"{workdir} has no checkpoint yet: wait for the first one.")
    identity.check_evaluable([present[seed].parent for seed in networks], parts.dataset)
    return networks


def _newest(directory: pathlib.Path, like: PyTree, devices: Mesh, plan: Plan) -> Loaded | None:
    items: dict[str, Any] = {"variables": like}
    if plan.ema_decay is not None:
        items["ema"] = like
    if (settings := plan.swad) is not None:
        items["swad"] = jax.eval_shape(lambda: swad.init(like["params"], settings))
    # The step is in another item, of which no more is wanted.
    items["progress"] = {"step": jax.ShapeDtypeStruct((), np.int32)}
    places = jax.tree.map(lambda _: mesh.replicated(devices), items)
    while True:
        before = {path.name for path in directory.iterdir()}
        with contextlib.closing(checkpoints.Checkpoints(directory, read_only=True)) as saved:
            try:
                found = saved.restore(items, places)
            except checkpoints.CheckpointError:
                # A run in progress deletes old ones when it has saved newer ones.
                if {path.name for path in directory.iterdir()} == before:
                    raise
                continue
        if found is None:
            return None
        average = found.get("ema")
        if plan.swad is not None:
            average, _ = swad.finished(found["swad"], found["variables"], plan.swad)
        return Loaded(int(found["progress"]["step"]), found["variables"], average)
