"""Which examples stand in which batch: pure functions of a seed, the same on every machine."""

from collections.abc import Iterator

from jaxtyping import Float32, Int32, Int64
import numpy as np


def epoch_order(seed: int, epoch: int, num_examples: int) -> Int64[np.ndarray, "num_examples"]:
    """Return the order in which an epoch visits the examples.

    Args:
      seed: At least 0.
      epoch: At least 0.
      num_examples: At least 0.

    Returns:
      A permutation of `range(num_examples)`, int64.

    Example:
      >>> sorted(epoch_order(seed=0, epoch=3, num_examples=4).tolist())
      [0, 1, 2, 3]
    """
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def train_batches(
    seed: int, epoch: int, num_examples: int, batch_size: int
) -> Int32[np.ndarray, "steps batch"]:
    """Return the full batches of an epoch; examples left over wait for the next epoch.

    Args:
      seed: At least 0.
      epoch: At least 0.
      num_examples: Number of training examples, at least `batch_size`.
      batch_size: At least 1.

    Returns:
      Indices of examples, int32, a row a step.

    Raises:
      ValueError: If `batch_size` is outside its range.

    Example:
      >>> train_batches(0, 0, num_examples=10, batch_size=4).shape
      (2, 4)
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size is {batch_size}, but a batch takes 1 to {num_examples} examples, as many "
            "as there are to train on: choose a batch_size in that range."
        )
    steps = num_examples // batch_size
    order = epoch_order(seed, epoch, num_examples).astype(np.int32)
    return order[: steps * batch_size].reshape(steps, batch_size)


def eval_batches(
    num_examples: int, batch_size: int
) -> Iterator[tuple[Int32[np.ndarray, "batch"], Float32[np.ndarray, "batch"]]]:
    """Iterate over all examples in order, the last batch padded to the size of the others.

    Args:
      num_examples: At least 0.
      batch_size: At least 1.

    Yields:
      Indices of examples, int32 `[batch_size]`, and weights, float32 `[batch_size]`: 1 for an
      example, 0 for padding, which repeats example 0.

    Raises:
      ValueError: If `batch_size` is less than 1.

    Example:
      >>> list(eval_batches(num_examples=3, batch_size=2))[1]
      (array([2, 0], dtype=int32), array([1., 0.], dtype=float32))
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1.")
    steps = -(-num_examples // batch_size)
    indices = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
    real = indices < num_examples
    return zip(np.where(real, indices, 0), real.astype(np.float32), strict=True)
