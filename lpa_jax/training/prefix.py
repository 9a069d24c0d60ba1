"""A frozen prefix is run once: its activations take the place of the images."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import hashlib
import os
import pathlib
import re
from typing import Any
import uuid

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import numpy as np
from rich.console import Console

from lpa_jax import data
from lpa_jax.api import backend_of
from lpa_jax.core.jaxprs import needed_by
from lpa_jax.data import streams
from lpa_jax.training import progress
from lpa_jax.training.build import as_config_error, Parts, Plan
from lpa_jax.training.config import ConfigError
from lpa_jax.training.feed import divided
from lpa_jax.training.files import writing
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
    site = str(plan.cached)
    if plan.augment and not plan.views:
        raise ConfigError(
            "config.model.cached needs images that stay: set config.augment to 'none', or "
            "config.model.views to the number of augmented views that are kept of each image."
        )
    if plan.views and not plan.augment:
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
    prefix = Prefix(run, variables, plan)
    # The training images are replaced by their views, if there are any.
    plain = {
        name: examples.images
        for name, examples in dataset.splits.items()
        if name != "train" or not plan.views
    }
    whole, places = each_once(plain)
    wanted = [(dataset.train.images, number) for number in range(plan.views)]
    wanted += [(images, None) for images in whole]
    count = sum(len(images) for images, _ in wanted)
    with progress.bar(console, "prefix", count, unit="image") as shown:
        kept = [prefix.outputs(images, number, shown.finished) for images, number in wanted]
    views, outputs = kept[: plan.views], kept[plan.views :]
    images = {
        name: outputs[i] if rows is None else np.asarray(outputs[i][rows])
        for name, (i, rows) in places.items()
    }
    images |= {"train": views[0]} if views else {}
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


def each_once(
    images: Mapping[str, Any],
) -> tuple[list[Any], dict[str, tuple[int, np.ndarray | None]]]:
    """Return images by split so that no file is among them twice.

    The splits of a set of domains share their files, and so do those of its other test domains and
    trials: what is computed of all of them once serves all of these.

    Args:
      images: Of each split.

    Returns:
      The images of which something is to be computed; and for each split, which of these has its
      own, and the rows there, None for all of them in order.
    """
    parts = [*images.values()]
    streamed = [part for part in parts if isinstance(part, data.Streamed)]
    if len(streamed) == len(parts):
        first, index = streamed[0], np.unique(np.concatenate([part.index for part in streamed]))
        alike = all(part.store is first.store and part.part is first.part for part in streamed)
        if alike and len(index) < sum(map(len, streamed)):
            whole = dataclasses.replace(first, index=index)
            rows = [np.searchsorted(index, part.index) for part in streamed]
            return [whole], dict(zip(images, ((0, row) for row in rows), strict=True))
    return parts, {name: (i, None) for i, name in enumerate(images)}


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


class Prefix:
    """The part of a network that does not change, and what it makes of images."""

    def __init__(self, run: Run, variables: PyTree, plan: Plan):
        """Take the function from `activations`, the variables, and how the run is carried out."""
        self.variables, self.plan = variables, plan
        # Compiled once for all splits, and once for all views.
        self._plain = jax.jit(lambda variables, images: run(variables, data.to_float(images)))

        def viewed(variables, images, key, numbers, augment):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
            # One by one, so that an image's draws do not depend on the batch it is in.
            images = jax.vmap(lambda key, image: data.augment(key, image[None], augment)[0])(
                keys, images
            )
            return run(variables, data.to_float(images))

        self._viewed = jax.jit(viewed, static_argnums=4)

    def outputs(self, images: Any, view: int | None, finished: Callable[[int], None]) -> np.ndarray:
        """Return the outputs for images.

        Args:
          images: In memory or in files.
          view: Number of the augmented version; None for the images as they are.
          finished: Called with the number of images that are done.

        Returns:
          An array; with `config.model.cache_dir` one that is read from its file where it is used,
          which any run may have written.

        Raises:
          ConfigError: If the directory cannot be made, or what is in it is damaged.
          WriteError: If its disk is full.
        """
        compute = self._function(images, view)
        one = jax.eval_shape(lambda: compute(np.zeros(1, np.int32)))
        shape, dtype = (len(images), *one.shape[1:]), one.dtype
        directory = self.plan.cache_dir
        if directory is None:
            kept = np.empty(shape, dtype)
            for rows, found in self._batches(compute, len(images)):
                kept[rows] = found
                finished(len(rows))
            return kept
        folder = pathlib.Path(os.path.expanduser(directory))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"config.model.cache_dir is {directory!r}, which cannot keep outputs ({error}): "
                "give another directory, or leave it out to keep them in memory."
            ) from error
        path = folder / f"{self._digest(compute, images, view)}.npy"
        if path.exists():
            finished(len(images))
        else:
            self._write(path, compute, shape, dtype, finished)
        try:
            # The format has no name for bfloat16.
            return np.load(path, mmap_mode="r", allow_pickle=False).view(dtype)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}): remove it, and rerun, if it is damaged."
            ) from error

    def _write(
        self,
        path: pathlib.Path,
        compute: Callable[[Any], Array],
        shape: tuple[int, ...],
        dtype: np.dtype,
        finished: Callable[[int], None],
    ) -> None:
        """Write outputs as they come, whole or not at all."""
        # A name of its own, since other runs may write the same.
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        about = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        try:
            with writing(str(path)):
                with partial.open("wb") as file:
                    np.lib.format.write_array_header_2_0(file, about)
                    for _, found in self._batches(compute, shape[0]):
                        file.write(np.ascontiguousarray(found).tobytes())
                        finished(len(found))
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _function(self, images: Any, view: int | None) -> Callable[[Any], Array]:
        """Return the function of numbers of images that returns their outputs."""
        if view is None:
            return lambda rows: self._plain(self.variables, images[rows])
        part, augment = divided(images, self.plan.augment)
        draws = streams.stream("view", self.plan.data_seed, view)
        key = jax.random.key(int(draws.integers(2**31)))

        def compute(rows):
            if part is None or not isinstance(images, data.Streamed):
                read = images[rows]
            else:
                # Drawn where files are decoded.
                read = images.read(rows, data.random_parts(self.plan.data_seed, view, *part))
            return self._viewed(self.variables, read, key, rows, augment)

        return compute

    def _batches(
        self, compute: Callable[[Any], Array], number: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows, weights in data.eval_batches(number, self.plan.eval_batch_size):
            yield rows[weights > 0], np.asarray(compute(rows))[weights > 0]

    def _digest(self, compute: Callable[[Any], Array], images: Any, view: int | None) -> str:
        """Return a digest of images, weights and computation: of what outputs follow from."""
        drawn = None if view is None else (self.plan.data_seed, view, self.plan.augment)
        digest = hashlib.blake2b(repr(drawn).encode(), digest_size=16)
        if isinstance(images, data.Streamed):
            digest.update(images.fingerprint().encode())
        else:
            digest.update(f"{images.dtype} {images.shape}".encode())
            digest.update(np.ascontiguousarray(images).reshape(-1).view(np.uint8))
        traced = jax.make_jaxpr(lambda: compute(np.zeros(1, np.int32)))()
        # Addresses of functions differ from process to process.
        digest.update(re.sub("0x[0-9a-f]+", "", str(traced.jaxpr)).encode())
        for leaf in jax.tree.leaves((traced.consts, self.variables)):
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
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
