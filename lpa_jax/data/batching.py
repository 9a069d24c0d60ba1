"""Which examples are in which batch: pure functions of a seed, the same on every machine."""

from collections.abc import Iterator

from jaxtyping import Float32, Int, Int32, Int64, Shaped
import numpy as np

from lpa_jax.data import streams

SAMPLINGS = ("uniform", "class_balanced", "class_aware", "domains")
"""Ways in which an epoch draws its examples, see `train_batches`."""
BALANCING = ("class_balanced", "class_aware")
"""Those that draw all classes equally often."""


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
    return streams.stream("epoch_order", seed, epoch).permutation(num_examples)


def class_balanced_order(
    seed: int, epoch: int, labels: Int[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """Return examples drawn with replacement: a class uniformly, then one of its examples.

    Args:
      seed: At least 0.
      epoch: At least 0.
      labels: Labels of the training examples; classes without any are never drawn.

    Returns:
      Indices of examples, int64, as many as there are.

    Example:
      >>> labels = np.array([0] * 900 + [1] * 100)
      >>> int((labels[class_balanced_order(0, 0, labels)] == 1).sum())
      496
    """
    rng = streams.stream("epoch_order", seed, epoch)
    by_class, first, counts = _by_class(labels)
    classes = rng.integers(len(counts), size=len(labels))
    return by_class[first[classes] + rng.integers(counts[classes])]


def class_aware_order(
    seed: int, epoch: int, labels: Int[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """Return examples in rounds that show each class once, in an order shuffled for each round.

    The examples of a class take turns, in an order shuffled anew when all have had theirs; the
    turns continue from one epoch to the next. *Ours*: an epoch begins with a new round.

    Args:
      seed: At least 0.
      epoch: At least 0.
      labels: Labels of the training examples; classes without any have no place in the rounds.

    Returns:
      Indices of examples, int64, as many as there are.

    Example:
      >>> labels = np.array([0, 0, 0, 0, 1, 2])
      >>> labels[class_aware_order(0, 0, labels)].reshape(2, 3)
      array([[0, 2, 1],
             [2, 0, 1]])

    References:
      Shen et al., Relay Backpropagation for Effective Learning of Deep Convolutional Neural
      Networks, ECCV 2016, arXiv:1512.05830 (class-aware sampling).
    """
    by_class, first, counts = _by_class(labels)
    rounds = -(-len(labels) // len(counts))
    shown = np.empty((rounds, len(counts)), np.int64)
    for i, (start, count) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
        # The class's turns are one endless sequence, of which this epoch shows a part.
        cycle, skipped = divmod(epoch * rounds, count)
        members = by_class[start : start + count]
        turns = [
            streams.stream("class_turns", seed, i, number).permutation(members)
            for number in range(cycle, cycle + -(-(skipped + rounds) // count))
        ]
        shown[:, i] = np.concatenate(turns)[skipped : skipped + rounds]
    rng = streams.stream("epoch_order", seed, epoch)
    return rng.permuted(shown, axis=1).ravel()[: len(labels)]


def _by_class(labels: Int[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the examples sorted by class; where each class present begins, and how many it has."""
    _, counts = np.unique(labels, return_counts=True)
    return np.argsort(labels, kind="stable"), np.cumsum(counts) - counts, counts


def train_batches(
    seed: int,
    epoch: int,
    labels: Shaped[np.ndarray, "n ..."],
    batch_size: int,
    sampling: str = "uniform",
    domains: Int[np.ndarray, "n"] | None = None,
    steps: int | None = None,
) -> Int32[np.ndarray, "steps batch"]:
    """Return the full batches of an epoch; examples left over wait for the next epoch.

    Args:
      seed: At least 0.
      epoch: At least 0.
      labels: Labels of the training examples, at least `batch_size`: `[N]`, or of `"uniform"` of
        any shape.
      batch_size: At least 1.
      sampling: `"uniform"`, each example once (`epoch_order`); `"class_balanced"` or
        `"class_aware"`, in which rare classes come as often as frequent ones. The epoch is as long
        with each. The examples of each batch are in random order, those of `"class_aware"` too,
        whose rounds only decide which batch an example is in. `"domains"`: each batch has equally
        many examples of each domain, drawn with replacement as by DomainBed.
      domains: The domain of each training example, for `"domains"`.
      steps: Of an epoch, for `"domains"`, whose epochs may have any length; None for as many as
        there are full batches.

    Returns:
      Indices of examples, int32, a row a step.

    Raises:
      ValueError: If `batch_size` or `sampling` is none of these, for `"domains"` no multiple of the
        number of domains, or `steps` is given for another sampling.

    Example:
      >>> train_batches(0, 0, labels=np.zeros(10, np.int32), batch_size=4).shape
      (2, 4)
      >>> domains = np.repeat([0, 1], [9, 3])
      >>> batches = train_batches(0, 0, np.zeros(12, np.int32), 4, "domains", domains)
      >>> domains[batches].sum(axis=1)
      array([2, 2, 2])

    References:
      Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization, ICLR 2021, arXiv:2007.01434
      (equal batches of all domains).
    """
    num_examples = len(labels)
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size is {batch_size}, but a batch takes 1 to {num_examples} examples, as many "
            "as there are to train on: choose a batch_size in that range."
        )
    if steps is not None and (sampling != "domains" or steps < 1):
        raise ValueError(
            f"steps is {steps} with the sampling {sampling!r}: give at least 1 with 'domains', and "
            "leave it out with others, whose epochs show as many examples as there are."
        )
    steps = steps or num_examples // batch_size
    if sampling == "uniform":
        order = epoch_order(seed, epoch, num_examples)
    elif sampling == "class_balanced":
        order = class_balanced_order(seed, epoch, labels)
    elif sampling == "class_aware":
        order = class_aware_order(seed, epoch, labels)
    elif sampling == "domains":
        if domains is None:
            raise ValueError("The sampling 'domains' needs the domain of each example: give them.")
        return _domain_batches(seed, epoch, domains, batch_size, steps)
    else:
        raise ValueError(f"There is no sampling {sampling!r}: give {', '.join(SAMPLINGS)}.")
    batches = order[: steps * batch_size].astype(np.int32).reshape(steps, batch_size)
    if sampling == "class_aware":
        # Mixing pairs neighbors, and those of a round never share their class.
        batches = streams.stream("order_in_batch", seed, epoch).permuted(batches, axis=1)
    return batches


def _domain_batches(
    seed: int, epoch: int, domains: Int[np.ndarray, "n"], batch_size: int, steps: int
) -> Int32[np.ndarray, "steps batch"]:
    by_domain, first, counts = _by_class(domains)
    share, left = divmod(batch_size, len(counts))
    if left:
        raise ValueError(
            f"batch_size is {batch_size}, but each batch has equally many examples of the "
            f"{len(counts)} domains to train on: choose a multiple of {len(counts)}."
        )
    rng = streams.stream("epoch_order", seed, epoch)
    drawn = rng.integers(counts[:, None], size=(steps, len(counts), share))
    batches = by_domain[first[:, None] + drawn].reshape(steps, batch_size)
    return rng.permuted(batches, axis=1).astype(np.int32)


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
