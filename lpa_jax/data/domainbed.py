"""DomainBed's domains: its seeds, its split of each, and the splits of a run that tests on some."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import re
from typing import NamedTuple

from absl import logging
from jaxtyping import Int64
import numpy as np

from lpa_jax.data import digits, streams
from lpa_jax.data.errors import DataError
from lpa_jax.data.folder import DOMAINS, split_by_class
from lpa_jax.data.source import Examples, joined

OUT_SHARE = 0.2
"""Of each domain, which is not trained on."""
ANGLES = (0, 15, 30, 45, 60, 75)
"""Degrees, counterclockwise, of the domains of RotatedMNIST."""
COLORS = {"90": 0.1, "80": 0.2, "-90": 0.9}
"""By domain of ColoredMNIST, how often the color is not that of the label."""
LABEL_NOISE = 0.25
"""Of ColoredMNIST."""
MARGIN = 2
"""Black pixels around the digits of 8 x 8, which no rotation then cuts off."""


class Known(NamedTuple):
    """What is known of a set.

    Attributes:
      letters: By domain, how tables name it.
      classes: Their number.
      images: Their number in all domains, and where it is that.
    """

    letters: Mapping[str, str]
    classes: int
    images: Mapping[int, str]


KNOWN = {
    "VLCS": Known(
        {"Caltech101": "C", "LabelMe": "L", "SUN09": "S", "VOC2007": "V"},
        5,
        {10729: "DomainBed's copy"},
    ),
    "PACS": Known(
        {"art_painting": "A", "cartoon": "C", "photo": "P", "sketch": "S"},
        7,
        {9991: "DomainBed's copy"},
    ),
    "OfficeHome": Known(
        {"Art": "A", "Clipart": "C", "Product": "P", "Real World": "R"},
        65,
        {15588: "DomainBed's copy"},
    ),
    "TerraIncognita": Known(
        {"location_100": "L100", "location_38": "L38", "location_43": "L43", "location_46": "L46"},
        10,
        {24788: "papers", 24330: "today's download"},
    ),
    "DomainNet": Known(
        {
            "clipart": "clip", "infograph": "info", "painting": "paint", "quickdraw": "quick",
            "real": "real", "sketch": "sketch",
        },
        345,
        {586575: "DomainBed's copy"},
    ),
}  # fmt: skip
"""Sets of image files, which are known by the names of their domains."""


def seed_hash(*parts: object) -> int:
    """Return the seed that DomainBed makes of some objects, in [0, 2**31).

    Example:
      >>> [seed_hash(0, domain) for domain in range(4)]
      [894182419, 1514274641, 1325548499, 1796103049]
      >>> seed_hash("PACS", "ERM", [0], 0, 0)
      94828300
    """
    return int(hashlib.md5(str(parts).encode(), usedforsecurity=False).hexdigest(), 16) % 2**31


def in_and_out(
    number: int, domain: int, trial_seed: int
) -> tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "k"]]:
    """Return which examples of a domain are *in*, to train on, and which *out*, to choose by.

    Args:
      number: Of examples in the domain, at least 0.
      domain: Number of the domain among all, test domains included, by the order of their names.
      trial_seed: Of the trial, at least 0; it has another split of each domain.

    Returns:
      Indices of both, in DomainBed's order. The *out* split is a fifth, rounded down.

    Example:
      >>> inside, outside = in_and_out(2048, 0, trial_seed=0)  # Art paintings of PACS.
      >>> len(inside), len(outside), outside[:5]
      (1639, 409, array([ 548,  677, 1997,  977, 1553]))
    """
    keys = np.arange(number)
    np.random.RandomState(seed_hash(trial_seed, domain)).shuffle(keys)
    outside = int(OUT_SHARE * number)
    return keys[outside:], keys[:outside]


def split_name(domain: str) -> str:
    """Return what the names of a domain's splits begin with: other signs than those are `_`.

    Example:
      >>> split_name("Real World")
      'Real_World'
    """
    return re.sub(r"[^\w-]", "_", domain, flags=re.ASCII)


def splits(
    domains: Mapping[str, Examples], test_domains: Sequence[str], trial_seed: int
) -> dict[str, Examples]:
    """Return the splits of a run that learns from all domains but some.

    Args:
      domains: Examples by domain, in the order that numbers them.
      test_domains: Names of the domains that are not learned from: one, or for leave-one-domain-out
        cross-validation two.
      trial_seed: Draws the split of each domain, see `in_and_out`.

    Returns:
      `"train"`, the *in* splits of all other domains, and `"validation"`, their *out* splits, both
      with the number of the domain among these in `extra["domains"]`; and for each domain, test
      domains included, `"DOMAIN/in"` and `"DOMAIN/out"`. In their names, what is no letter, digit,
      `_` or `-` is `_`.

    Raises:
      DataError: If a test domain is none of them, none is left to learn from, a domain has fewer
        than five examples, or they cannot be joined.

    Example:
      >>> one = Examples(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10) % 2, ("cat", "dog"))
      >>> found = splits({"Art": one, "Photo": one, "Real World": one}, ["Photo"], trial_seed=0)
      >>> {name: len(split) for name, split in found.items()}
      {'train': 16, 'validation': 4, 'Art/in': 8, 'Art/out': 2, 'Photo/in': 8, 'Photo/out': 2,
       'Real_World/in': 8, 'Real_World/out': 2}
      >>> np.bincount(found["train"].extra["domains"])
      array([8, 8])
    """
    if odd := [name for name in test_domains if name not in domains]:
        raise DataError(f"There is no domain {odd[0]!r}: give some of {', '.join(domains)}.")
    if not {*domains} - {*test_domains}:
        raise DataError(f"All domains are test domains ({', '.join(domains)}): leave some out.")
    names = {domain: split_name(domain) for domain in domains}
    if len({*names.values()}) < len(names):
        raise DataError(
            f"The domains {', '.join(domains)} differ in signs alone that names of splits cannot "
            "have: rename one."
        )
    training: list[tuple[Examples, Examples]] = []
    evaluated: dict[str, Examples] = {}
    for number, (domain, examples) in enumerate(domains.items()):
        inside, outside = in_and_out(len(examples), number, trial_seed)
        if not len(outside):
            raise DataError(
                f"The domain {domain!r} has {len(examples)} examples, of which a fifth is none: "
                "give it at least 5."
            )
        both = examples.take(inside), examples.take(outside)
        evaluated[f"{names[domain]}/in"], evaluated[f"{names[domain]}/out"] = both
        if domain not in test_domains:
            training.append(both)
    train, validation = (_with_domains(parts) for parts in zip(*training, strict=True))
    return {"train": train, "validation": validation, **evaluated}


def together(domains: Mapping[str, Examples], seed: int) -> dict[str, Examples]:
    """Return the examples of all domains, with the number of each one's in `extra["domains"]`.

    Args:
      domains: Examples by domain, in the order that numbers them.
      seed: Draws a fifth of each class of each domain as the test split.

    Returns:
      `"train"` and `"test"`.

    Raises:
      DataError: If they cannot be joined.

    Example:
      >>> one = Examples(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10) % 2, ("cat", "dog"))
      >>> {name: len(part) for name, part in together({"Art": one, "Photo": one}, 0).items()}
      {'train': 16, 'test': 4}
    """
    whole = _with_domains([*domains.values()])
    return split_by_class(whole, whole.extra[DOMAINS] * len(whole.class_names) + whole.labels, seed)


def _with_domains(parts: Sequence[Examples]) -> Examples:
    together = joined(parts)
    numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    return dataclasses.replace(together, extra={**together.extra, DOMAINS: numbers})


def letters(domains: Sequence[str]) -> tuple[str, ...]:
    """Return how tables name the domains of a set: those of DomainBed's by its letters.

    Example:
      >>> letters(["art_painting", "cartoon", "photo", "sketch"])
      ('A', 'C', 'P', 'S')
      >>> letters(["90", "80", "-90"])
      ('+90%', '+80%', '-90%')
      >>> letters(["summer", "winter"])
      ('summer', 'winter')
    """
    if [*domains] == [*COLORS]:
        return tuple(f"{int(domain):+d}%" for domain in domains)
    for known in KNOWN.values():
        if [*domains] == [*known.letters]:
            return tuple(known.letters.values())
    return tuple(domains)


def check_counts(domains: Mapping[str, Examples]) -> None:
    """Warn if a set of DomainBed's has other numbers of classes or images than are known.

    Args:
      domains: Examples by domain, of image files; a set is known by the names of its domains.

    Example:
      >>> one = Examples(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10) % 7, tuple("abcdefg"))
      >>> check_counts(dict.fromkeys(["art_painting", "cartoon", "photo", "sketch"], one))
      >>> # WARNING: PACS has 40 images here, but 9991 in DomainBed's copy: ...
    """
    for name, known in KNOWN.items():
        if [*domains] != [*known.letters]:
            continue
        images = sum(map(len, domains.values()))
        classes = len(next(iter(domains.values())).class_names)
        told = [f"{number} in {where}" for number, where in known.images.items()]
        if images not in known.images:
            logging.warning(
                "%s has %d images here, but %s: its numbers do not compare with published ones.",
                name, images, " and ".join(told),
            )  # fmt: skip
        elif len(told) > 1:
            logging.info("%s has %d images, as in %s.", name, images, known.images[images])
        if classes != known.classes:
            logging.warning(
                "%s has %d classes here, but %d in DomainBed's copy: its numbers do not compare "
                "with published ones.",
                name, classes, known.classes,
            )  # fmt: skip


def rotated(whole: Examples, seed: int) -> dict[str, Examples]:
    """Return six domains of images that are rotated by 0 to 75 degrees, as in RotatedMNIST.

    All are shuffled, and domain i takes every sixth from the i-th. Rotation is bilinear, and what
    comes from outside is black. DomainBed shuffles by PyTorch's global generator, which it seeds
    by the run; *ours*: by a NumPy generator of `seed`, so that all methods of a trial see the same.

    Args:
      whole: Images uint8 `[N, H, W, C]` with C of 1, 3 or 4; of MNIST, those of the training set
        and then of the test set.
      seed: At least 0: the trial's.

    Raises:
      DataError: If the images are no pixels.

    Example:
      >>> pixels = np.zeros((12, 8, 8, 1), np.uint8)
      >>> pixels[:, 3:5] = 255
      >>> domains = rotated(Examples(pixels, np.zeros(12, np.int32), ("bar",)), seed=0)
      >>> {name: len(examples) for name, examples in domains.items()}
      {'0': 2, '15': 2, '30': 2, '45': 2, '60': 2, '75': 2}
      >>> domains["45"].images[0, :3, -3:, 0]
      array([[ 21,   0,   0],
             [202, 255,   0],
             [255, 202,  21]], dtype=uint8)

    References:
      Ghifary et al., Domain Generalization for Object Recognition with Multi-task Autoencoders,
      ICCV 2015, arXiv:1508.07680.
    """
    from PIL import Image

    _check_pixels(whole, (1, 3, 4))
    order = streams.stream("domains", seed).permutation(len(whole))
    found = {}
    for first, angle in enumerate(ANGLES):
        examples = whole.take(order[first :: len(ANGLES)])
        # Pillow knows gray images without an axis of channels.
        pixels = np.array([
            np.asarray(
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).rotate(
                    angle, Image.Resampling.BILINEAR
                )
            ).reshape(image.shape)
            for image in examples.images[:]
        ])  # fmt: skip
        found[str(angle)] = dataclasses.replace(examples, images=pixels)
    return found


def colored(whole: Examples, seed: int) -> dict[str, Examples]:
    """Return three domains of colored digits of two classes, as in ColoredMNIST.

    All are shuffled, and domain i takes every third from the i-th. The label of a digit below five
    is 1, and is flipped with probability 0.25. The color is the label, flipped with probability
    0.1, 0.2 or 0.9: the domains are named by the correlation in percent. The image is in the
    channel of its color, and the other is black. Generators are as in `rotated`.

    Args:
      whole: Images uint8 `[N, H, W, 1]` of the digits that their labels say.
      seed: At least 0: the trial's.

    Raises:
      DataError: If the images are no gray pixels.

    Example:
      >>> pixels, digits = np.full((30000, 1, 1, 1), 9, np.uint8), np.arange(30000) % 10
      >>> domains = colored(Examples(pixels, digits, tuple("0123456789")), seed=0)
      >>> for name, examples in domains.items():
      ...     color = examples.images[:, 0, 0].argmax(axis=1)
      ...     print(name, examples.images.shape, round((color == examples.labels).mean(), 2))
      90 (10000, 1, 1, 2) 0.9
      80 (10000, 1, 1, 2) 0.8
      -90 (10000, 1, 1, 2) 0.1

    References:
      Arjovsky et al., Invariant Risk Minimization, 2019, arXiv:1907.02893.
    """
    _check_pixels(whole, (1,))
    rng = streams.stream("domains", seed)
    order = rng.permutation(len(whole))
    found = {}
    for first, (domain, flipped) in enumerate(COLORS.items()):
        examples = whole.take(order[first :: len(COLORS)])
        labels = (examples.labels < 5) ^ (rng.random(len(examples)) < LABEL_NOISE)
        color = labels ^ (rng.random(len(examples)) < flipped)
        in_channel = np.arange(2) == color[:, None, None, None]
        found[domain] = dataclasses.replace(
            examples,
            images=np.where(in_channel, examples.images[:], np.uint8(0)),
            labels=labels.astype(np.int32),
            class_names=("5 to 9", "0 to 4"),
        )
    return found


def rotated_digits(seed: int) -> dict[str, Examples]:
    """Return the digits of the package as six domains, see `rotated`, of 12 x 12 pixels.

    Example:
      >>> domains = rotated_digits(seed=0)
      >>> domains["75"].images.shape, sum(map(len, domains.values()))
      ((299, 12, 12, 1), 1797)
    """
    whole = joined([*digits.read().values()])
    wide = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
    return rotated(dataclasses.replace(whole, images=np.pad(whole.images[:], wide)), seed)


def _check_pixels(whole: Examples, channels: Sequence[int]) -> None:
    images = whole.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in channels:
        wanted = " or ".join(map(str, channels))
        raise DataError(
            f"The images are {images.dtype} of shape {images.shape}: give pixels, uint8 "
            f"[N, H, W, C] with C = {wanted}."
        )
