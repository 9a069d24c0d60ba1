"""Random numbers drawn on the host: a stream for each purpose, all of them named here."""

import numpy as np

KEYS = {
    "held_out": (),
    "long_tail": (1,),
    "label_noise": (2,),
    "epoch_order": (3,),
    "class_turns": (4,),
    "corruption": (5,),
    "order_in_batch": (6,),
    "part": (7,),
    "test_split": (8,),
    "view": (9,),
    "domains": (10,),
    "validation": (11,),
}
"""What the spawn key of each purpose begins with; a number is never given to another purpose."""


def stream(purpose: str, seed: int, *numbers: int) -> np.random.Generator:
    """Return the generator of a purpose, the same on every machine.

    Args:
      purpose: One of `KEYS`. Streams of different purposes are independent at equal seeds.
      seed: At least 0.
      *numbers: What else the stream depends on, such as the epoch, each at least 0, and equally
        many for all streams of a purpose; `"held_out"` takes none.

    Returns:
      A NumPy generator. That of `"held_out"` is `np.random.default_rng(seed)`.

    Example:
      >>> int(stream("epoch_order", 0, 3).integers(1000))
      890
    """
    # Not `default_rng((seed, *numbers))`: NumPy pads with zeros, so that (0, 0) is the same as 0.
    sequence = np.random.SeedSequence(seed, spawn_key=(*KEYS[purpose], *numbers))
    return np.random.default_rng(sequence)
