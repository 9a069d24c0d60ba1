"""Images that are read when they are asked for, in place of an array in memory."""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any, Protocol

from jaxtyping import Int, UInt8
import numpy as np

from lpa_jax.data import decoding, streams
from lpa_jax.data.errors import DataError

MOST_NAMED = 3
"""Images that an error names."""


class Store(Protocol):
    """Images by number; it can be pickled, for the processes that read."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def image(self, index: int, /) -> Any:
        """Return an image of Pillow's, or the bytes of an image file."""
        ...

    def name(self, index: int, /) -> str:
        """Return what an error calls an image."""
        ...

    def fingerprint(self) -> str:
        """Return a digest of the contents, or of what tells that they are the same."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """Images in a store, decoded when they are asked for: like an array uint8 `[N, S, S, C]`.

    Attributes:
      store: Where the images are.
      index: Which of them these are, int64 `[N]`.
      size: Side S in pixels that each is scaled to.
      part: The part of an image that is taken.
      channels: 1 for gray images, 3 for RGB, 4 with an opacity.

    Example:
      >>> from PIL import Image
      >>> class Red:
      ...     def __len__(self): return 4
      ...     def image(self, index): return Image.new("RGB", (30, 20), (255, 0, 0))
      ...     def name(self, index): return f"red {index}"
      ...     def fingerprint(self): return "red"
      >>> images = Streamed(Red(), np.arange(4), size=8)
      >>> images.shape, images.take(np.array([2, 0]))[:1].shape
      ((4, 8, 8, 3), (1, 8, 8, 3))
    """

    store: Store
    index: Int[np.ndarray, "n"]
    size: int
    part: decoding.Part = decoding.cover
    channels: int = 3

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the images when they are read."""
        return len(self.index), self.size, self.size, self.channels

    def take(self, chosen: Any) -> "Streamed":
        """Return the images that indices or a mask choose, unread."""
        return dataclasses.replace(self, index=self.index[chosen])

    def __getitem__(self, at: Any) -> UInt8[np.ndarray, "..."]:
        """Read the images that an index, a slice, indices or a mask choose.

        Raises:
          DataError: If some cannot be read; it names them and tells how many.
        """
        numbers = np.arange(len(self))[at]
        if numbers.ndim == 0:
            return self.read(numbers[None])[0]
        return self.read(numbers)

    def read(
        self,
        chosen: Int[np.ndarray, "m"],
        part: Callable[[int], decoding.Part] | None = None,
    ) -> UInt8[np.ndarray, "m size size channels"]:
        """Read images.

        Args:
          chosen: Their numbers.
          part: The part that is taken of an image by its number; None for `self.part` of all.
        """
        images = np.empty((len(chosen), *self.shape[1:]), np.uint8)
        if bad := self.read_into(images, chosen, part):
            raise DataError(unreadable(bad, len(chosen)))
        return images

    def read_into(
        self,
        images: UInt8[np.ndarray, "m size size channels"],
        chosen: Int[np.ndarray, "m"],
        part: Callable[[int], decoding.Part] | None = None,
    ) -> list[str]:
        """Read images into an array, and return what is wrong with those that cannot be read."""

        def read(row: int) -> str | None:
            number = int(chosen[row])
            taken = self.part if part is None else part(number)
            index = int(self.index[number])
            try:
                images[row] = decoding.decode(
                    self.store.image(index), self.size, taken,
                    channels=self.channels, draft=part is not None,
                )  # fmt: skip
            except DataError as error:
                return f"{self.store.name(index)}: {error}"
            except OSError as error:
                return f"{self.store.name(index)}: it cannot be read ({error.strerror})."
            return None

        # Pillow decodes without holding the lock of the interpreter.
        return [told for told in _threads().map(read, range(len(chosen))) if told]

    def fingerprint(self) -> str:
        """Return a digest of what the images are and how they are scaled."""
        about = [self.store.fingerprint(), self.size, self.part.__name__, self.channels]
        digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.index, np.int64))
        return digest.hexdigest()


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "read")


def unreadable(bad: list[str], number: int) -> str:
    """Return the sentence for images that cannot be read.

    Example:
      >>> unreadable(["a.jpg: it is damaged: replace or remove it."], 20)
      '1 of 20 images cannot be read. a.jpg: it is damaged: replace or remove it.'
    """
    more = f" And {len(bad) - MOST_NAMED} more." if len(bad) > MOST_NAMED else ""
    return f"{len(bad)} of {number} images cannot be read. {' '.join(bad[:MOST_NAMED])}{more}"


def random_parts(
    seed: int, epoch: int, low: float = 0.08, high: float = 1.0
) -> Callable[[int], decoding.Part]:
    """Return the random part of each image in an epoch, the same on every machine."""

    def part(number: int) -> decoding.Part:
        def draw(width: int, height: int) -> decoding.Box:
            rng = streams.stream("part", seed, epoch, number)
            return decoding.random_box(rng, width, height, low, high)

        return draw

    return part
