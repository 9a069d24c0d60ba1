"""A frozen prefix is run once: its activations take the place of the images."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import numpy as np
from rich.console import Console

from lpa_jax import data
from lpa_jax.api import backend_of
from lpa_jax.core.jaxprs import needed_by
from lpa_jax.training import progress
from lpa_jax.training.build import as_config_error, Parts
from lpa_jax.training.config import ConfigError
from lpa_jax.training.network import Begin, Network, visiting


def without_prefix(parts: Parts, variables: PyTree, console: Console) -> Parts:
    """Return parts whose network begins with the output of the module `config.model.cached`.

    Args:
      parts: Parts with `parts.plan.cached`.
      variables: First variables, of which those that are frozen are the same for all seeds.
      console: Where progress is shown.

    Raises:
      ConfigError: If images are augmented, or something in the prefix learns.
    """
    network, plan, dataset = parts.network, parts.plan, parts.dataset
    site = str(plan.cached)
    if plan.augment:
        raise ConfigError(
            "config.model.cached needs images that are the same in each epoch: set config.augment "
            "to 'none'."
        )
    if "batch_stats" in variables and not getattr(network.module, "freeze_norm", False):
        raise ConfigError(
            "config.model.cached needs running statistics that stay: set "
            "config.model.options.freeze_norm to True, or leave config.model.cached out."
        )
    image = data.to_float(jnp.asarray(dataset.train.images[:1]))[0]
    tail = network._replace(begins=Begin(site, image.shape, image.dtype))
    with as_config_error():
        run = activations(network, site)
        value = jax.eval_shape(run, variables, image[None])
        learning = learning_before(tail, variables, value)
    if learning:
        raise ConfigError(
            f"config.model.cached is {site!r}, but {learning[0]} before it learns: freeze all that "
            "leads to it by config.optimizer.rates, such as 'stem=0'."
        )
    count = sum(map(len, dataset.splits.values()))
    with progress.bar(console, "prefix", count, unit="image") as shown:
        splits = {
            split: cached(examples, run, variables, plan.eval_batch_size, shown.finished)
            for split, examples in dataset.splits.items()
        }
    return parts._replace(
        network=tail,
        dataset=dataset.replace(splits=splits),
        perturbed=dataclasses.replace(parts.perturbed, backend=backend_of(tail.apply)),
    )


def activations(network: Network, site: str) -> Callable[[PyTree, Any], Array]:
    """Return the function `(variables, images) -> output of a module`, as evaluation computes it.

    Raises:
      ValueError: By what it returns, if the module is not called, or several times.
    """

    @jax.jit
    def call(variables, images):
        found = []

        def keep(value):
            found.append(value)
            return value

        with visiting(site, keep):
            network.logits(variables, data.to_float(images))
        if len(found) != 1 or not isinstance(found[0], jax.Array):
            raise ValueError(
                f"config.model.cached is {site!r}, which is no module that is called once and "
                "returns one array: give the path of one, such as group5."
            )
        return found[0]

    return call


def cached(
    examples: data.Examples,
    run: Callable[[PyTree, Any], Array],
    variables: PyTree,
    batch_size: int,
    finished: Callable[[int], None],
) -> data.Examples:
    """Return examples whose images are the activations of a frozen prefix.

    Args:
      examples: Images, in memory or in files.
      run: From `activations`.
      variables: Of the network.
      batch_size: Images of a forward pass.
      finished: Called with the number of images that are done.
    """
    kept: Any = None
    for rows, weights in data.eval_batches(len(examples), batch_size):
        found = np.asarray(run(variables, examples.images[rows]))[weights > 0]
        if kept is None:
            kept = np.empty((len(examples), *found.shape[1:]), found.dtype)
        kept[rows[weights > 0]] = found
        finished(len(found))
    return dataclasses.replace(examples, images=kept)


def learning_before(tail: Network, like: PyTree, inputs: Any) -> list[str]:
    """Return the paths of parameters that learn, but that the tail's output does not depend on."""
    rest = {name: tree for name, tree in like.items() if name != "params"}

    def logits(params, rest, inputs):
        return tail.logits({**rest, "params": params}, inputs)

    jaxpr = jax.make_jaxpr(logits)(like["params"], rest, inputs).jaxpr
    alive = needed_by(jaxpr, [True] * len(jaxpr.outvars))
    # Flattened in the order of the arguments, each in that of its tree.
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(like["params"])
    ]
    return [path for path, var in zip(paths, jaxpr.invars, strict=False) if var not in alive]
