"""Whether a network's confidence is its accuracy."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
import numpy as np

BINS = 15


class Reliability(NamedTuple):
    """What a reliability diagram shows; accuracy and confidence are 0 in an empty bin.

    Attributes:
      examples: Number of examples of each bin, int64 `[bins]`.
      accuracy: Share of these that are classified correctly, float64 `[bins]`.
      confidence: Mean of their confidence, float64 `[bins]`.
    """

    examples: Int[np.ndarray, "bins"]
    accuracy: Float[np.ndarray, "bins"]
    confidence: Float[np.ndarray, "bins"]


def reliability(
    correct: Bool[np.ndarray, "n"], confidence: Float[np.ndarray, "n"], bins: int = BINS
) -> Reliability:
    """Sort examples by confidence into bins of equal width, `((b - 1) / bins, b / bins]`.

    Args:
      correct: Whether each example is classified correctly.
      confidence: Probability of the class that was predicted, in [0, 1].
      bins: Number of bins, at least 1.

    Example:
      >>> found = reliability(np.array([True, False]), np.array([0.9, 0.2]), bins=2)
      >>> found.examples.tolist(), found.accuracy.tolist(), found.confidence.tolist()
      ([1, 1], [0.0, 1.0], [0.2, 0.9])
    """
    # Edges closed on the right, so that a confidence of 1 needs no bin of its own.
    at = np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    count = np.bincount(at, minlength=bins)
    filled = np.maximum(count, 1)
    return Reliability(
        count,
        np.bincount(at, correct, bins) / filled,
        np.bincount(at, confidence, bins) / filled,
    )


def expected_calibration_error(
    correct: Bool[np.ndarray, "n"], confidence: Float[np.ndarray, "n"], bins: int = BINS
) -> float:
    r"""Return the mean distance of accuracy from confidence, over examples by their bins.

    .. math::
        \mathrm{ECE} = \sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|

    Args:
      correct: Whether each example is classified correctly, at least one.
      confidence: Probability of the class that was predicted, in [0, 1].
      bins: Number of bins of equal width, at least 1.

    Returns:
      A number in [0, 1].

    Example:
      >>> expected_calibration_error(np.array([True, False]), np.array([0.9, 0.2]))
      0.15

    References:
      Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599 (equation 3
      and its 15 bins).
    """
    found = reliability(correct, confidence, bins)
    return float(found.examples @ np.abs(found.accuracy - found.confidence) / len(correct))
