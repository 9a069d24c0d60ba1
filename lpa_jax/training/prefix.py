"""A frozen prefix is run once: its activations take the place of the images."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

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
from lpa_jax.training.feed import divided
from lpa_jax.training.network import Begin, Network, visiting


def without_prefix(parts: Parts, variables: PyTree, console: Console) -> Parts:
    """Return parts whose network begins with the output of the module `config.model.cached`.

    Args:
      parts: Parts with `parts.plan.cached`.
      variables: First variables, of which those that are frozen are the same for all seeds.
      console: Where progress is shown.

    Raises:
      ConfigError: If images are augmented anew in each epoch, something in the prefix learns, or
        activations cannot be kept in the directory that was given.
    """
    network, plan, dataset = parts.network, parts.plan, parts.dataset
    site, augment = str(plan.cached), plan.augment
    if augment and not plan.views:
        raise ConfigError(
            "config.model.cached needs images that stay: set config.augment to 'none', or "
            "config.model.views to the number of augmented views that are kept of each image."
        )
    if plan.views and not augment:
        raise ConfigError(
            f"config.model.views is {plan.views}, but images are not augmented: give "
            "config.augment what the views are made by, or leave config.model.views out."
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
    wanted = [Wanted(dataset.train, View(plan.data_seed, i, augment)) for i in range(plan.views)]
    others = [name for name in dataset.splits if name != "train" or not wanted]
    wanted += [Wanted(dataset.splits[name]) for name in others]
    count = sum(len(one.examples) for one in wanted)
    with progress.bar(console, "prefix", count, unit="image") as shown:
        kept = [
            cached(one, run, variables, plan.eval_batch_size, shown.finished, plan.cache_dir)
            for one in wanted
        ]
    views = kept[: plan.views]
    images = dict(zip(others, kept[plan.views :], strict=True)) | (
        {"train": views[0]} if views else {}
    )
    splits = {
        name: dataclasses.replace(examples, images=images[name])
        for name, examples in dataset.splits.items()
    }
    return parts._replace(
        network=tail,
        dataset=dataset.replace(splits=splits),
        views=views,
        plan=plan._replace(augment=()),
        perturbed=dataclasses.replace(parts.perturbed, backend=backend_of(tail.apply)),
    )


Run = Callable[[PyTree, Any], Array]


def activations(network: Network, site: str) -> Run:
    """Return the function `(variables, inputs) -> output of a module`, as evaluation computes it.

    Raises:
      ValueError: By what it returns, if the module is not called, or several times.
    """

    def call(variables, inputs):
        found = []

        def keep(value):
            found.append(value)
            return value

        with visiting(site, keep):
            network.logits(variables, inputs)
        if len(found) != 1 or not isinstance(found[0], jax.Array):
            raise ValueError(
                f"config.model.cached is {site!r}, which is no module that is called once and "
                "returns one array: give the path of one, such as group5."
            )
        return found[0]

    return call


class View(NamedTuple):
    """A version of images that is drawn once, for each by its number.

    Attributes:
      seed: Of the draws.
      number: Of the view.
      augment: What images go through.
    """

    seed: int
    number: int
    augment: Sequence[data.Applied]


class Wanted(NamedTuple):
    """Images whose activations are wanted; without a view, as they are."""

    examples: data.Examples
    view: View | None = None

    def function(self, run: Run) -> Callable[[PyTree, Any, Any], Array]:
        """Return `(variables, images, their numbers) -> activations`."""
        _, augment = self._divided

        def call(variables, images, numbers):
            if self.view is not None:
                key = jax.random.fold_in(jax.random.key(self.view.seed), self.view.number)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
                # One by one, so that an image's draws do not depend on the batch it is in.
                images = jax.vmap(lambda k, image: data.augment(k, image[None], augment)[0])(
                    keys, images
                )
            return run(variables, data.to_float(images))

        return call

    def read(self, rows: np.ndarray) -> Any:
        """Return images, each with its random part if that is drawn where files are decoded."""
        images, (part, _) = self.examples.images, self._divided
        if self.view is None or part is None or not isinstance(images, data.Streamed):
            return images[rows]
        return images.read(rows, data.random_parts(self.view.seed, self.view.number, *part))

    @property
    def _divided(self) -> tuple[tuple[float, ...] | None, tuple[data.Applied, ...]]:
        return divided(self.examples.images, () if self.view is None else self.view.augment)

    def about(self) -> str:
        """Return what images are read, for the name of a file of their activations."""
        part, _ = self._divided
        return f"{self.examples.fingerprint()} {part if part is None else (part, self.view)}"


def cached(
    wanted: Wanted,
    run: Run,
    variables: PyTree,
    batch_size: int,
    finished: Callable[[int], None],
    directory: str | None = None,
) -> np.ndarray:
    """Return the activations of images behind a frozen prefix.

    Args:
      wanted: The images.
      run: From `activations`.
      variables: Of the network.
      batch_size: Images of a forward pass.
      finished: Called with the number of images that are done.
      directory: Where they are kept, under the digest of all that they follow from; those that are
        there are used, by whichever run they were written. None to keep them in memory.

    Returns:
      An array; with a directory, one that is read from its file where it is used.

    Raises:
      ConfigError: If the directory cannot be written, or what is in it is damaged.
    """
    function = wanted.function(run)
    if directory is None:
        return _computed(wanted, jax.jit(function), variables, batch_size, finished, np.empty)
    path = pathlib.Path(directory).expanduser() / f"{_digest(wanted, function, variables)}.npy"
    try:
        if path.exists():
            finished(len(wanted.examples))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own, since other runs may write the same.
            number, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
            os.close(number)
            make = functools.partial(np.lib.format.open_memmap, partial, "w+")
            try:
                _computed(wanted, jax.jit(function), variables, batch_size, finished, make)
                os.replace(partial, path)
            finally:
                pathlib.Path(partial).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"config.model.cache_dir is {directory!r}, which cannot keep activations "
            f"({error.strerror}): give another directory, or leave it out to keep them in memory."
        ) from error
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it, and rerun.") from error


def _computed(
    wanted: Wanted,
    function: Callable[[PyTree, Any, Any], Array],
    variables: PyTree,
    batch_size: int,
    finished: Callable[[int], None],
    make: Callable[..., np.ndarray],
) -> np.ndarray:
    number, kept = len(wanted.examples), None
    for rows, weights in data.eval_batches(number, batch_size):
        found = np.asarray(function(variables, wanted.read(rows), rows))[weights > 0]
        if kept is None:
            kept = make(shape=(number, *found.shape[1:]), dtype=found.dtype)
        kept[rows[weights > 0]] = found
        finished(len(found))
    assert kept is not None
    return kept


def _digest(wanted: Wanted, function: Callable[..., Any], variables: PyTree) -> str:
    """Return a digest of images, variables and computation: what activations follow from."""
    digest = hashlib.blake2b(wanted.about().encode(), digest_size=16)
    rows = np.zeros(1, np.int32)
    traced = jax.make_jaxpr(function)(variables, wanted.examples.images[:1], rows)
    # Addresses of functions differ from process to process.
    digest.update(re.sub("0x[0-9a-f]+", "", str(traced.jaxpr)).encode())
    for leaf in (*traced.consts, *jax.tree.leaves(variables)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


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
