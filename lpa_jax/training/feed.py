"""How examples reach the training step: from the memory of the devices, or of the host."""

from collections.abc import Callable, Generator, Sequence
import dataclasses
import functools
import multiprocessing
import os
import threading
from typing import Any, NamedTuple

from absl import flags
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int, PyTree
import numpy as np

from lpa_jax import data
from lpa_jax.training import mesh as meshes

Batch = tuple[Any, Any, dict[str, Any]]
"""Images, labels, and by name what else is known of each example: `"examples"`, which of the
training set it is, and what the source adds."""
Batches = Callable[[int, int], Int[np.ndarray, "steps batch"]]
Seeds = int | Sequence[int]
"""One seed; or several that are trained together, whose batches are stacked along a first axis."""
SHARE = 0.25
"""Part of a device's memory that the training images may fill."""
UNKNOWN_MEMORY = 2**34
"""Taken for the memory of a device, in bytes, that does not tell (16 GiB)."""


class Feed(NamedTuple):
    """What hands the training step its batches, the same ones in the same order from either place.

    Attributes:
      open: `open(seeds, first)` returns the generator of what steps are given from step `first`
        on, a tuple of trees of arrays each: a resumed run begins at the step it resumes from.
      take: Picks the batch of a step out of what it is given, `take(step, *given)`; traced.
      axes: Of what several seeds are given: 0 where it is stacked, None where they share it.
      resident: Whether the examples are in the devices' memory.
      augment: What images go through in the step; the rest was done where they were read.
      like: Shapes and dtypes of a batch.
    """

    open: Callable[[Seeds, int], Generator[tuple[Any, ...], None, None]]
    take: Callable[..., Batch]
    axes: tuple[int | None, ...]
    resident: bool
    augment: tuple[data.Applied, ...]
    like: Batch


def make_feed(
    place: str,
    examples: data.Examples,
    batch_size: int,
    num_steps: int,
    mesh: Mesh,
    sampling: str = "uniform",
    *,
    steps_per_epoch: int | None = None,
    augment: Sequence[data.Applied] = (),
    readers: int = 0,
    views: Sequence[np.ndarray] = (),
) -> Feed:
    """Return the feed of a run.

    Args:
      place: `"device"`: every device holds all examples, and a step moves nothing between
        host and device. `"host"`: batches are read ahead by threads, each process its own part.
        `"auto"`: on the devices if the images fill at most a quarter of their memory.
      examples: The training examples.
      batch_size: Examples of a step.
      num_steps: Steps of the whole run.
      mesh: The devices.
      sampling: How an epoch draws the examples, see `data.train_batches`.
      steps_per_epoch: Its steps, for `"domains"`; None for as many as there are full batches.
      augment: What training images go through, in order. A random part of an image file is taken
        where it is decoded, if it comes first.
      readers: Processes that read batches of image files ahead; 0: threads of this one.
      views: Versions of the images that epochs take by turns; empty for `examples.images` alone.

    Raises:
      ValueError: If image files are to be on the devices.
    """
    images: Sequence[Any] = tuple(views) or (examples.images,)
    streamed = isinstance(examples.images, data.Streamed)
    if streamed:
        if place == "device":
            raise ValueError(
                "config.input 'device' needs decoded images: set config.cache to 'memory', or "
                "config.input to 'auto'."
            )
        place = "host"
    elif place == "auto":
        place = "device" if _fit(images) else "host"
    batches = functools.partial(
        data.train_batches,
        labels=examples.labels,
        batch_size=batch_size,
        sampling=sampling,
        domains=examples.extra.get(data.DOMAINS),
        steps=steps_per_epoch,
    )
    times = steps_per_epoch or len(examples) // batch_size, num_steps
    if place == "device":
        return _from_device(examples, images, batch_size, times, mesh, batches, tuple(augment))
    part, augment = divided(examples.images, augment)
    readers = readers if streamed else 0
    return _from_host(examples, images, batch_size, times, mesh, batches, augment, part, readers)


def _fit(images: Sequence[Any]) -> bool:
    """Return whether arrays fill no more than their share of a device's memory."""
    told = jax.local_devices()[0].memory_stats() or {}
    room = SHARE * told.get("bytes_limit", UNKNOWN_MEMORY)
    found = sum(one.nbytes for one in images) <= room
    if jax.process_count() > 1:
        # All must do the same, whatever else is in the memory of one's device.
        found = bool(multihost_utils.broadcast_one_to_all(np.array(found)))
    return found


def divided(
    images: Any, augment: Sequence[data.Applied]
) -> tuple[tuple[float, ...] | None, tuple[data.Applied, ...]]:
    """Return what is drawn where images are decoded, and what is left of an augmentation.

    Args:
      images: In files or in memory.
      augment: What they go through.

    Returns:
      Smallest and largest share of an image file that is taken at random, empty for the default,
      None for the fixed part; and the rest.
    """
    first = augment[0] if augment else None
    if first is None or first.name != "resized_crop" or not isinstance(images, data.Streamed):
        return None, tuple(augment)
    return first.numbers, tuple(augment[1:])


class Augmented:
    """Images that go through an augmentation when they are read, the same ones for one seed."""

    def __init__(self, images: Any, augment: Sequence[data.Applied], seed: int):
        """Take images, in files or in memory, and what they go through."""
        self.images, self.seed = images, seed
        self.part, self.augment = divided(images, augment)

    def __getitem__(self, rows: Int[np.ndarray, "m"]) -> Any:
        """Return augmented images; the draws of a batch follow from its first number."""
        if self.part is None:
            read = self.images[rows]
        else:
            read = self.images.read(rows, data.random_parts(self.seed, 0, *self.part))
        key = jax.random.fold_in(jax.random.key(self.seed), rows[0])
        return np.asarray(_augment(key, read, self.augment))


_augment = jax.jit(data.augment, static_argnums=2)


def _from_device(
    examples: data.Examples,
    images: Sequence[Any],
    batch_size: int,
    times: tuple[int, int],
    mesh: Mesh,
    batches: Batches,
    augment: tuple[data.Applied, ...],
) -> Feed:
    steps_per_epoch, num_steps = times
    views, others = meshes.put((images, _columns(examples)), meshes.replicated(mesh))

    def open_(seeds, first):
        for epoch in range(first // steps_per_epoch, num_steps // steps_per_epoch):
            order = _stacked(lambda seed, epoch=epoch: batches(seed, epoch), seeds)
            order = meshes.put(order, meshes.batched(mesh, axis=order.ndim - 1))
            for _ in range(max(first - epoch * steps_per_epoch, 0), steps_per_epoch):
                yield (views[epoch % len(views)], *others), order

    def take(step, whole, order):
        indices = order[step % order.shape[0]]
        images, labels, extra = jax.tree.map(lambda column: column[indices], whole)
        images = jax.lax.with_sharding_constraint(images, meshes.batched(mesh))
        return images, labels, extra | {"examples": indices}

    like = _shapes(examples, batch_size)
    return Feed(open_, take, (None, 0), resident=True, augment=augment, like=like)


def _from_host(
    examples: data.Examples,
    images: Sequence[Any],
    batch_size: int,
    times: tuple[int, int],
    mesh: Mesh,
    batches: Batches,
    augment: tuple[data.Applied, ...],
    part: tuple[float, ...] | None,
    readers: int,
) -> Feed:
    # Its import costs a second or two, and sets that fit the devices do without.
    import grain

    steps_per_epoch, num_steps = times
    sharding = meshes.batched(mesh)
    here = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = np.unique(np.concatenate([np.arange(batch_size)[index] for index in here]))

    def open_(seeds, first):
        read = _Read(examples, images, batches, steps_per_epoch, rows, seeds, part)
        ahead = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
        steps = grain.MapDataset.range(first, num_steps).map(read).to_iter_dataset(ahead)
        if readers:
            if not flags.FLAGS.is_parsed():
                # Grain reads flags of its own here, which notebooks and scripts never parse.
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=readers)
            steps = steps.mp_prefetch(options, _end_with_parent)
        for local in steps:
            place = functools.partial(jax.make_array_from_process_local_data, sharding)
            yield tuple(jax.tree.map(place, local))

    def take(step: Any, images, labels, extra):
        del step
        return images, labels, extra

    like = _shapes(examples, batch_size)
    return Feed(open_, take, (0, 0, 0), resident=False, augment=augment, like=like)


def _end_with_parent(index: int, count: int) -> None:
    """Let a reader process end when the one that started it is gone, even if that was killed."""
    del index, count
    parent = multiprocessing.parent_process()

    def wait():
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclasses.dataclass(eq=False)
class _Read:
    """Reads the batch of a step; it can be sent to another process.

    Attributes:
      examples: The training examples.
      images: Versions of their images, which epochs take by turns.
      batches: `(seed, epoch) -> indices`, a row a step.
      steps_per_epoch: Rows of an epoch.
      rows: Those of a batch that this process reads.
      seeds: Whose batches, see `Feed.open`.
      part: What is taken of an image file, see `divided`.
    """

    examples: data.Examples
    images: Sequence[Any]
    batches: Batches
    steps_per_epoch: int
    rows: Int[np.ndarray, "local"]
    seeds: Seeds
    part: tuple[float, ...] | None

    def __call__(self, step: int) -> Batch:
        return _stacked(lambda seed: self._of(seed, int(step)), self.seeds)

    def _of(self, seed: int, step: int) -> Batch:
        epoch, at = divmod(step, self.steps_per_epoch)
        indices = self._order(seed, epoch)[at][self.rows]
        images = self.images[epoch % len(self.images)]
        if self.part is not None:
            images = images.read(indices, data.random_parts(seed, epoch, *self.part))
        else:
            images = images[indices]
        labels, extra = jax.tree.map(lambda column: column[indices], _columns(self.examples))
        return images, labels, extra | {"examples": indices}

    @functools.cached_property
    def _order(self) -> Batches:
        # Made where the batches are read, after this was sent there.
        return functools.lru_cache(maxsize=2 * np.size(self.seeds))(self.batches)


def _stacked(make: Callable[[int], PyTree], seeds: Seeds) -> PyTree:
    """Return the arrays of a seed; of several, stacked."""
    if isinstance(seeds, int):
        return make(seeds)
    return jax.tree.map(lambda *arrays: np.stack(arrays), *map(make, seeds))


def _columns(examples: data.Examples) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return examples.labels, dict(examples.extra)


def _shapes(examples: data.Examples, batch_size: int) -> Batch:
    def shape(column):
        return jax.ShapeDtypeStruct((batch_size, *column.shape[1:]), column.dtype)

    images, labels, extra = jax.tree.map(shape, (examples.images, *_columns(examples)))
    return images, labels, extra | {"examples": jax.ShapeDtypeStruct((batch_size,), np.int32)}
