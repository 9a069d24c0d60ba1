"""Changes of a data set: a long tail of classes, wrong labels, or a part of it for trials."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxtyping import Int32
import numpy as np

from lpa_jax.data import label_noise
from lpa_jax.data.dataset import Dataset, pixel_statistics
from lpa_jax.data.long_tail import class_groups, long_tail_subset
from lpa_jax.data.source import DataError, missing_classes

NOISES = ("symmetric_inclusive", "symmetric_exclusive", "asymmetric", "human")


def modify(
    dataset: Dataset, imbalance: Mapping[str, Any], noise: Mapping[str, Any], *, seed: int = 0
) -> Dataset:
    """Return a long-tailed set, or one with wrong labels, or one with both.

    The validation set has been held out of the original training set by now, class by class. The
    long-tailed training set is made, by original labels, of what is left; the validation set keeps
    the source's class frequencies, as the test set does. Labels are wrong in training and in what
    was held out of it alike, since whoever has noisy labels has no clean ones to tune on; those of
    the other splits stay clean.

    Args:
      dataset: A set as `load` returns it.
      imbalance: `kind`, `"none"` or one of `long_tail_counts`, and its `ratio`.
      noise: `kind`, `"none"`, `"symmetric_inclusive"`, `"symmetric_exclusive"`, `"asymmetric"` or
        `"human"`; its `rate`; for human labels `path` and `key` instead. See `label_noise`.
      seed: Decides which examples are kept, and which labels are wrong; at least 0.

    Returns:
      The set with the training examples kept, their labels and pixel statistics.

    Raises:
      DataError: If an argument is outside its range, human labels cannot be used, or a class would
        be left without a training example.

    Example:
      >>> from lpa_jax import data
      >>> digits = data.load("digits")
      >>> tail = modify(digits, {"kind": "exponential", "ratio": 10}, {"kind": "none"})
      >>> np.bincount(tail.train.labels).tolist()
      [128, 99, 76, 59, 46, 35, 27, 21, 16, 12]
      >>> noisy = modify(digits, {"kind": "none"}, {"kind": "symmetric_exclusive", "rate": 0.4})
      >>> {split: round(rate, 2) for split, rate in noise_rates(noisy).items()}
      {'train': 0.4, 'validation': 0.4}
    """
    changed = {imbalance["kind"], noise["kind"]} != {"none"}
    if changed and dataset.source_labels.ndim > 1:
        raise DataError(
            f"The labels of {dataset.name!r} are [N, C], of which neither a long tail nor label "
            "noise can be made: leave out imbalance and noise, or give numbers of classes, [N]."
        )
    if imbalance["kind"] != "none":
        ratio = imbalance["ratio"]
        labels = dataset.source_labels[dataset.index["train"]]
        if absent := missing_classes(range(dataset.num_classes), labels, dataset.class_names):
            raise DataError(
                f"No imbalance can be made, since there is no training example of {absent}: add "
                "examples, or leave that out of the class names and number the classes anew."
            )
        kept = long_tail_subset(labels, dataset.num_classes, ratio, imbalance["kind"], seed)
        train = dataset.train.take(kept)
        mean, std = pixel_statistics(train.images)
        dataset = dataset.replace(
            name=f"{dataset.name}, {imbalance['kind']} imbalance {ratio:g}",
            splits={**dataset.splits, "train": train},
            index={**dataset.index, "train": dataset.index["train"][kept]},
            mean=mean,
            std=std,
        )
    if noise["kind"] != "none":
        rate = "" if noise["kind"] == "human" else f" {noise['rate']:g}"
        labels = _noisy_labels(dataset, noise, seed)
        chosen = dataset.index["train"]
        clean = dataset.source_labels[chosen]
        if absent := missing_classes(clean, labels[chosen], dataset.class_names):
            remedy = "labels in which every class occurs" if rate == "" else "a smaller noise.rate"
            raise DataError(
                f"The {noise['kind']} label noise leaves no training label of {absent}: give "
                f"{remedy}."
            )
        noisy = {
            split: dataclasses.replace(dataset.splits[split], labels=labels[index])
            for split, index in dataset.index.items()
        }
        dataset = dataset.replace(
            name=f"{dataset.name}, {noise['kind']} noise{rate}",
            splits={**dataset.splits, **noisy},
        )
    return dataset


def _noisy_labels(
    dataset: Dataset, noise: Mapping[str, Any], seed: int
) -> Int32[np.ndarray, "source"]:
    labels, kind = dataset.source_labels, noise["kind"]
    if kind not in NOISES:
        raise DataError(f"There is no label noise {kind!r}: give none, {', '.join(NOISES)}.")
    if kind == "human":
        return label_noise.human(noise["path"], noise["key"], labels, dataset.num_classes)
    noisy = labels.copy()
    # Each split by itself, so that each has the rate asked for.
    for index in dataset.index.values():
        noisy[index] = _drawn(labels[index], kind, noise["rate"], dataset.class_names, seed)
    return noisy


def _drawn(
    labels: Int32[np.ndarray, "n"], kind: str, rate: float, class_names: tuple[str, ...], seed: int
) -> Int32[np.ndarray, "n"]:
    if kind == "asymmetric":
        return label_noise.asymmetric(labels, rate, class_names, seed)
    inclusive = kind == "symmetric_inclusive"
    return label_noise.symmetric(labels, rate, len(class_names), seed, inclusive=inclusive)


def noise_rates(dataset: Dataset) -> dict[str, float]:
    """Return the share of wrong labels in `"train"` and, if it was held out, in `"validation"`."""
    return {
        split: float(np.mean(dataset.splits[split].labels != dataset.source_labels[index]))
        for split, index in dataset.index.items()
    }


def training_labels(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return what says which examples a set consists of and what their labels are.

    `label_noise.human` reads a file of these arrays.

    Returns:
      `"labels"`, int32 `[N]`, for all training examples of the source in its order, the original
      one for an example that is not in use; `"clean_label"`, the original ones; and
      `"train_index"` and, if a validation set was held out, `"validation_index"`.
    """
    labels = dataset.source_labels.copy()
    for split, index in dataset.index.items():
        labels[index] = dataset.splits[split].labels
    indices = {f"{split}_index": index for split, index in dataset.index.items()}
    return {"labels": labels, "clean_label": dataset.source_labels, **indices}


def groups_of(dataset: Dataset) -> dict[str, list[int]]:
    """Return `class_groups` of a long-tailed training set, by original labels; else nothing.

    *Ours*: it is long-tailed if its largest class has at least twice the examples of the smallest
    that has any.
    """
    labels = dataset.source_labels[dataset.index["train"]]
    if labels.ndim > 1:
        return {}
    counts = np.bincount(labels, minlength=dataset.num_classes)
    long_tailed = counts.max() >= 2 * counts[counts > 0].min()
    return class_groups(counts.tolist()) if long_tailed else {}


def limited(dataset: Dataset, limit: int) -> Dataset:
    """Return at most `limit` examples of each split, evenly spaced: files are often sorted.

    The pixel statistics stay those of all. A class may be left without a training example.
    """
    kept = {
        split: np.linspace(0, len(examples) - 1, min(limit, len(examples))).astype(int)
        for split, examples in dataset.splits.items()
    }
    return dataset.replace(
        splits={split: dataset.splits[split].take(chosen) for split, chosen in kept.items()},
        index={split: index[kept[split]] for split, index in dataset.index.items()},
    )
