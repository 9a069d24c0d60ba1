"""Long-tailed sets, label noise and class-wise sampling, up to a run of the trainer on them."""

import hashlib
import io
import json
import pathlib
import shutil
import zlib

import numpy as np
import pytest
from rich.console import Console

from configs import digits
from lpa_jax import data
from lpa_jax.data import DataError, label_noise
from lpa_jax.methods import corrections
from lpa_jax.training import build, loop, method_config
from lpa_jax.training import config as configuration

NONE = {"kind": "none"}
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="real images are not beside the repository")


def noise(kind, rate=None, **more):
    return {"kind": kind, "rate": rate, **more}


def tail(ratio, kind="exponential"):
    return {"kind": kind, "ratio": ratio}


@pytest.fixture
def loaded(tmp_path):
    """Return a function that loads a set in which each image tells its own number."""

    def load(num_train=400, num_classes=4, **options):
        number = np.arange(num_train)
        images = np.stack([number // 256, number % 256], 1).astype(np.uint8)
        labels = np.random.default_rng(0).permutation(number % num_classes)
        test = {"x_test": images[:8].reshape(8, 1, 2), "y_test": labels[:8]}
        path = tmp_path / "set.npz"
        np.savez(path, x_train=images.reshape(-1, 1, 2), y_train=labels, **test)
        return data.load(f"npz:{path}", **{"validation_fraction": 0.2} | options), labels

    return load


def numbers(examples):
    """Return which examples of the source these are, by their images."""
    images = examples.images.reshape(len(examples.labels), 2).astype(int)
    return images[:, 0] * 256 + images[:, 1]


# ---------------------------------------------------------------- long tails


@pytest.mark.parametrize(
    ("num_classes", "size", "ratio", "total"),
    [(10, 5000, 100, 12406), (10, 5000, 10, 20431), (100, 500, 100, 10847), (100, 500, 10, 19573)],
)
def test_exponential_counts_are_the_published_ones(num_classes, size, ratio, total):
    counts = data.long_tail_counts([size] * num_classes, ratio)
    assert counts.dtype == np.int64
    assert counts.sum() == total
    assert (counts[0], counts[-1]) == (size, size // ratio)
    if (num_classes, ratio) == (10, 100):
        assert counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_counts_do_not_depend_on_the_rounding_of_a_power():
    # 900 / 30 = 30 and 810 / 90 = 9 are whole, but not as computed from the power.
    for size, ratio in ((900, 30), (810, 90), (4500, 100), (4900, 49), (3, 3)):
        assert data.long_tail_counts([size] * 7, ratio)[-1] == size // ratio


def test_step_counts():
    assert data.long_tail_counts([50] * 5, 10, "step").tolist() == [50, 50, 5, 5, 5]
    assert data.long_tail_counts([50] * 4, 1, "step").tolist() == [50] * 4
    assert data.long_tail_counts([50], 10).tolist() == [50]


@pytest.mark.parametrize("available", [[90, 50, 100], [100, 3, 100], [9, 100, 2]])
@pytest.mark.parametrize("kind", ["exponential", "step"])
def test_classes_that_differ_in_size_keep_the_profile(available, kind):
    counts = data.long_tail_counts(available, 4, kind)
    assert (counts <= available).all()
    largest = int(counts[0])
    assert counts.tolist() == data.long_tail_counts([largest] * 3, 4, kind).tolist()
    # No larger profile fits.
    shares = [1, 1 / 2, 1 / 4] if kind == "exponential" else [1, 1 / 4, 1 / 4]
    assert ((largest + 1) * np.array(shares) > available).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([50] * 3, 0.5), "ratio of the imbalance is 0.5: give a number from 1"),
        (([50] * 3, float("nan")), "give a number from 1"),
        (([50] * 3, 10, "linear"), "no imbalance 'linear': give exponential or step"),
        (([50] * 3, 51), "leaves class 2 without .* largest class having 50: give a smaller"),
        (([50, 0, 50], 2), "Class 1 has no example, so that no long tail can be made: give it"),
        (([0, 50], 1), "Class 0 has no example"),
    ],
)
def test_counts_that_cannot_be(arguments, message):
    with pytest.raises(DataError, match=message):
        data.long_tail_counts(*arguments)


def test_the_subset_is_a_function_of_the_seed_and_nested():
    labels = np.random.default_rng(0).permutation(np.arange(1000) % 10)
    kept = [data.long_tail_subset(labels, 10, r, "exponential", seed=3) for r in (10, 50, 50)]
    assert np.bincount(labels[kept[0]]).tolist() == data.long_tail_counts([100] * 10, 10).tolist()
    assert (np.diff(kept[0]) > 0).all()
    assert set(kept[1]) < set(kept[0])
    np.testing.assert_array_equal(kept[1], kept[2])
    other = data.long_tail_subset(labels, 10, 10, "exponential", seed=4)
    # Equally many of each class, but others.
    assert len(set(other) & set(kept[0])) < 0.7 * len(other)
    # This must never change: figures on one subset compare with those on no other.
    assert zlib.crc32(kept[0].astype("<i8").tobytes()) == 3382558702


def test_groups_of_classes():
    groups = data.class_groups([100, 20, 101, 19, 5000, 20, 1])
    assert groups["many"] == [2, 4]
    assert groups["medium"] == [0, 1, 5]
    assert groups["few"] == [3, 6]
    assert (groups["head"], groups["middle"], groups["tail"]) == ([0, 2, 4], [1, 5], [3, 6])
    assert set(data.class_groups([500, 400, 300])) == {"many", "head", "middle", "tail"}
    assert {name: data.class_groups([7, 7])[name] for name in ("head", "middle")} == {
        "head": [0],
        "middle": [1],
    }
    # What nothing is learned of is no part of the tail.
    groups = data.class_groups([7, 0, 6, 5, 0])
    assert groups == {"few": [0, 2, 3], "head": [0], "middle": [2], "tail": [3]}


# ---------------------------------------------------------------- label noise


@pytest.mark.parametrize("inclusive", [True, False])
def test_symmetric_noise_is_uniform_and_exact(inclusive):
    original = np.repeat(np.arange(5, dtype=np.int32), 4000)
    before = original.copy()
    noisy = label_noise.symmetric(original, 0.5, 5, seed=1, inclusive=inclusive)
    np.testing.assert_array_equal(original, before)
    assert noisy.dtype == np.int32
    table = np.zeros((5, 5), int)
    np.add.at(table, (original, noisy), 1)
    kept, others = np.diag(table), table[~np.eye(5, dtype=bool)]
    if inclusive:
        # A fifth of the 2000 drawn anew are what they were.
        assert (abs(kept - 2400) < 90).all()
        assert (abs(others - 400) < 90).all()
    else:
        assert (kept == 2000).all()
        assert (abs(others - 500) < 90).all()
    again = label_noise.symmetric(original, 0.5, 5, seed=1, inclusive=inclusive)
    np.testing.assert_array_equal(noisy, again)
    other = label_noise.symmetric(original, 0.5, 5, seed=2, inclusive=inclusive)
    assert (noisy != other).mean() > 0.4


def test_the_wrong_labels_never_change():
    noisy = label_noise.symmetric(np.arange(60) % 3, 0.4, 3, seed=0, inclusive=False)
    assert zlib.crc32(noisy.astype("<i4").tobytes()) == 354495849


def test_asymmetric_noise_follows_the_published_map_by_name():
    # The order of the classes is another one than CIFAR-10's.
    names = CIFAR10[::-1]
    labels = np.repeat(np.arange(10), 50)
    noisy = label_noise.asymmetric(labels, 0.4, names, seed=0)
    moves = {}
    for a, b in zip(labels, noisy, strict=True):
        if a != b:
            moves.setdefault((names[a], names[b]), []).append(a)
    assert set(moves) == {
        ("truck", "automobile"), ("bird", "airplane"), ("deer", "horse"), ("cat", "dog"),
        ("dog", "cat"),
    }  # fmt: skip
    assert {len(move) for move in moves.values()} == {20}


def test_asymmetric_noise_elsewhere_takes_the_next_class():
    labels = np.repeat(np.arange(3), 10)
    noisy = label_noise.asymmetric(labels, 0.3, ("a", "b", "c"), seed=0)
    assert np.bincount(noisy[labels == 2], minlength=3).tolist() == [3, 0, 7]
    assert ((noisy - labels) % 3 < 2).all()


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_outside_their_range(rate):
    with pytest.raises(DataError, match=r"rate of the label noise is .*: give 0 to 1"):
        label_noise.symmetric(np.zeros(4, int), rate, 2, seed=0, inclusive=True)
    with pytest.raises(DataError, match=r"rate of the label noise is .*: give 0 to 1"):
        label_noise.asymmetric(np.zeros(4, int), rate, ("a", "b"), seed=0)


def test_one_class_cannot_be_confused():
    with pytest.raises(DataError, match="at least 2 classes"):
        label_noise.symmetric(np.zeros(4, int), 0.5, 1, seed=0, inclusive=False)


def test_human_labels_are_read(tmp_path):
    labels = np.array([0, 1, 2, 1])
    np.savez(tmp_path / "n.npz", worse=np.array([0, 2, 2, 1], np.uint8), clean_label=labels)
    noisy = label_noise.human(str(tmp_path / "n.npz"), "worse", labels, 3)
    assert (noisy.tolist(), noisy.dtype) == ([0, 2, 2, 1], np.int32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"worst": np.zeros(4, int)}, r"lacks labels \(it has worst\): give .* as noise.key"),
        ({"labels": np.zeros(3, int)}, "has 3 labels, but the set has 4 .*to be held out too"),
        ({"labels": np.zeros((4, 1), int)}, r"labels in .* has shape \(4, 1\), not \[N\]"),
        ({"labels": np.zeros(4)}, "labels in .* has dtype float64: save integers"),
        ({"labels": np.array([0, 1, 3, 0])}, "has the label 3, outside the classes 0 to 2"),
        ({"labels": np.array([0, -1, 2, 0])}, "has the label -1, outside"),
        ({"labels": np.array([0, None, 2, 0])}, "arrays of Python objects, which are refused"),
        (
            {"labels": np.zeros(4, int), "clean_label": np.array([0, 1, 1, 2])},
            "differs from the set's own labels in 2 of 4: save its arrays in the order of",
        ),
    ],
)
def test_human_labels_that_do_not_fit(arrays, message, tmp_path):
    np.savez(tmp_path / "n.npz", **arrays)
    with pytest.raises(DataError, match=message):
        label_noise.human(str(tmp_path / "n.npz"), "labels", np.array([0, 1, 2, 1]), 3)


def test_human_labels_that_are_missing(tmp_path):
    with pytest.raises(DataError, match=r"no file .*: write it with np.savez\(path, labels=\.\.\."):
        label_noise.human(str(tmp_path / "n.npz"), "labels", np.array([0, 1]), 2)


# ---------------------------------------------------------------- tasks


def test_the_long_tail_is_drawn_after_the_validation_set_is_held_out(loaded):
    whole, labels = loaded()
    task = data.modify(whole, tail(20), NONE, seed=5)
    assert np.bincount(task.train.labels).tolist() == [80, 29, 10, 4]
    assert np.bincount(task.splits["validation"].labels).tolist() == [20] * 4
    np.testing.assert_array_equal(task.index["train"], numbers(task.train))
    np.testing.assert_array_equal(task.index["validation"], numbers(task.splits["validation"]))
    assert set(task.index["train"]) < set(whole.index["train"])
    np.testing.assert_array_equal(task.train.labels, labels[task.index["train"]])
    np.testing.assert_array_equal(task.splits["test"].labels, labels[:8])
    pixels = task.train.images / 255
    np.testing.assert_allclose(task.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(task.std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)
    assert task.name.endswith(", exponential imbalance 20")
    without = data.modify(loaded(validation_fraction=0.0)[0], tail(20), NONE)
    assert np.bincount(without.train.labels).tolist() == [100, 36, 13, 5]


@pytest.mark.parametrize("imbalance", [NONE, tail(20)], ids=["balanced", "long tail"])
def test_training_and_validation_labels_are_noisy_and_test_labels_clean(loaded, imbalance):
    whole, labels = loaded()
    task = data.modify(whole, imbalance, noise("symmetric_exclusive", 0.5), seed=5)
    for part, index in (
        (task.train, task.index["train"]),
        (task.splits["validation"], task.index["validation"]),
    ):
        np.testing.assert_array_equal(index, numbers(part))
        for c in range(4):
            of_class = labels[index] == c
            wrong = (part.labels != labels[index])[of_class].sum()
            assert wrong == round(0.5 * int(of_class.sum()))
    np.testing.assert_array_equal(task.splits["test"].labels, labels[:8])
    np.testing.assert_array_equal(task.source_labels, labels)
    rates = data.noise_rates(task)
    assert rates["train"] == np.mean(task.train.labels != labels[task.index["train"]])
    assert rates["validation"] == 0.5
    # Which examples there are does not hang on the noise.
    clean = data.modify(whole, imbalance, NONE, seed=5)
    np.testing.assert_array_equal(task.index["train"], clean.index["train"])


def test_noise_starts_from_the_source_labels_each_time(loaded):
    whole, _ = loaded()
    once = data.modify(whole, NONE, noise("asymmetric", 0.4))
    twice = data.modify(once, NONE, noise("asymmetric", 0.4))
    np.testing.assert_array_equal(once.train.labels, twice.train.labels)


def test_human_labels_reach_their_examples(loaded, tmp_path):
    whole, labels = loaded()
    given = np.random.default_rng(1).integers(0, 4, 400)
    np.savez(tmp_path / "given.npz", mine=given, clean_label=labels)
    task = data.modify(
        whole, tail(20), noise("human", path=str(tmp_path / "given.npz"), key="mine")
    )
    for part in (task.train, task.splits["validation"]):
        np.testing.assert_array_equal(part.labels, given[numbers(part)])
    assert len(task.train.labels) == 123


def test_no_task_is_the_set_itself(loaded):
    whole, _ = loaded()
    assert data.modify(whole, NONE, NONE) is whole
    assert data.noise_rates(whole) == {"train": 0.0, "validation": 0.0}
    assert set(data.noise_rates(loaded(validation_fraction=0.0)[0])) == {"train"}


def test_noise_that_leaves_a_class_without_training_labels(tmp_path):
    labels = np.repeat(np.arange(10), 5)
    images = np.zeros((50, 1, 1), np.uint8)
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "set.npz", **arrays, class_names=np.array(CIFAR10))
    whole = data.load(f"npz:{tmp_path / 'set.npz'}", validation_fraction=0.2)
    message = r"leaves no training label of classes 2 \('bird'\), 4 \('deer'\), 9 \('truck'\): give"
    with pytest.raises(DataError, match=f"asymmetric label noise {message} a smaller noise.rate"):
        data.modify(whole, NONE, noise("asymmetric", 1.0))
    given = np.where(labels == 3, 5, labels)
    # One of the cats is called so, but not in training.
    given[whole.index["validation"][3]] = 3
    np.savez(tmp_path / "given.npz", labels=given)
    human = noise("human", path=str(tmp_path / "given.npz"), key="labels")
    with pytest.raises(DataError, match=r"of class 3 \('cat'\): give labels in which every class"):
        data.modify(whole, NONE, human)


def test_a_long_tail_needs_every_class(tmp_path, loaded):
    whole, _ = loaded()
    more = whole.replace(class_names=(*whole.class_names, "emu"))
    message = r"no training example of class 4 \('emu'\): add examples, or leave that out"
    with pytest.raises(DataError, match=message):
        data.modify(more, tail(2), NONE)


def test_a_trial_without_training_examples_of_a_class_warns(caplog):
    build.build(smoke(limit=64, batch_size=8))
    assert not caplog.text
    for method in ("erm", "lpl"):
        parts = build.build(smoke(method, limit=9, batch_size=8))
        (absent,) = np.flatnonzero(np.array(parts.class_counts) == 0)[:1]
        told = f"no training example of class{'es' * (parts.class_counts.count(0) > 1)} {absent} ('"
        assert f"{told}{absent}')" in caplog.text
        assert "config.limit 9 keeps none, give more; otherwise it is never learned" in caplog.text
        caplog.clear()
    for method in ("ldam", "lpa+reweight", "lpl"):
        config = smoke(method, limit=9, batch_size=8)
        if method == "lpl":
            config.perturbation.lpl.split.name = "tail"
        message = (
            rf"of class.* {absent} \('{absent}'\).*, but config.method '.*: config.limit 9 keeps"
        )
        with pytest.raises(configuration.ConfigError, match=message):
            build.build(config)
    # What is refused is told once.
    assert not caplog.text


def test_a_class_without_examples_is_reported_or_refused(tmp_path, caplog):
    images = np.zeros((40, 8, 8, 1), np.uint8)
    arrays = {"x_train": images, "y_train": np.arange(40) % 4, "x_test": images[:8]}
    names = np.array(["ant", "bee", "cat", "dog", "emu"])
    np.savez(tmp_path / "set.npz", **arrays, y_test=np.arange(8) % 5, class_names=names)
    changes = {"dataset": f"npz:{tmp_path / 'set.npz'}", "batch_size": 8}
    build.build(smoke(**changes))
    assert (
        "no training example of class 4 ('emu'): give it examples, or leave it out" in caplog.text
    )
    with pytest.raises(configuration.ConfigError, match=r"class 4 \('emu'\), but .*'ldam' needs"):
        build.build(smoke("ldam", **changes))


def test_a_limited_run_has_the_groups_of_the_whole_task():
    """A part of a balanced set is no long tail, and a part of a long tail is one."""
    balanced = build.build(smoke(limit=15, batch_size=8))
    counts = np.bincount(balanced.dataset.train.labels, minlength=10)
    assert counts.max() >= 2 * counts.min()
    assert balanced.groups == {}
    whole, part = (build.build(smoke(limit=n, batch_size=8, **TASK)) for n in (None, 15))
    assert part.groups == whole.groups != {}


def test_unknown_noise(loaded):
    with pytest.raises(DataError, match="no label noise 'pair': give none, symmetric_inclusive"):
        data.modify(loaded()[0], NONE, noise("pair", 0.1))


def test_a_part_of_a_task_keeps_its_indices(loaded):
    task = data.modify(loaded()[0], tail(4), noise("asymmetric", 0.4))
    part = data.limited(task, 50)
    assert [
        len(p.labels) for p in (part.train, part.splits["validation"], part.splits["test"])
    ] == [50, 50, 8]
    np.testing.assert_array_equal(part.index["train"], numbers(part.train))
    np.testing.assert_array_equal(part.index["validation"], numbers(part.splits["validation"]))
    chosen = np.isin(task.index["train"], part.index["train"])
    np.testing.assert_array_equal(part.train.labels, task.train.labels[chosen])


def test_groups_are_those_of_the_source_labels_and_of_long_tails_alone(loaded):
    whole, _ = loaded()
    assert data.groups_of(whole) == {}
    assert data.groups_of(data.modify(whole, tail(1.5), NONE)) == {}
    task = data.modify(whole, tail(20), NONE)
    assert data.groups_of(task) == data.class_groups([80, 29, 10, 4])
    noisy = data.modify(whole, tail(20), noise("symmetric_exclusive", 1.0))
    assert data.groups_of(noisy) == data.groups_of(task)


# ---------------------------------------------------------------- sampling


def test_class_balanced_sampling_draws_classes_and_members_uniformly():
    # Class 2 has no examples.
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [9000, 90, 10]))
    drawn = data.class_balanced_order(3, 1, labels)
    assert (len(drawn), drawn.dtype) == (9100, np.int64)
    counts = np.bincount(labels[drawn], minlength=4)
    assert counts[2] == 0
    # Three standard deviations are 135.
    assert (abs(counts[[0, 1, 3]] - 9100 / 3) < 135).all()
    of_tail = np.bincount(drawn, minlength=9100)[labels == 3]
    assert (abs(of_tail - 303) < 75).all()
    # With replacement, 3033 of 9000 show (1 - exp(-1 / 3)) of them.
    seen = len(set(drawn[labels[drawn] == 0]))
    assert abs(seen - 9000 * (1 - np.exp(-counts[0] / 9000))) < 120


def test_class_aware_sampling_shows_every_class_a_round_and_no_example_out_of_turn():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [37, 11, 3]))
    epochs = [data.class_aware_order(3, epoch, labels) for epoch in range(7)]
    shown = {0: [], 1: [], 3: []}
    for order in epochs:
        assert (order.shape, order.dtype) == ((51,), np.int64)
        rounds = labels[order].reshape(17, 3)
        assert (np.sort(rounds, axis=1) == [0, 1, 3]).all()
        assert len({tuple(r) for r in rounds.tolist()}) > 3
        for index in order:
            shown[labels[index]].append(int(index))
    for label, indices in shown.items():
        size = int((labels == label).sum())
        cycles = [indices[i : i + size] for i in range(0, len(indices) - size + 1, size)]
        # Also across the ends of epochs.
        assert all(len(set(cycle)) == size for cycle in cycles)
        assert len({tuple(cycle) for cycle in cycles}) > 1


def test_the_last_round_of_an_epoch_may_be_cut_short():
    labels = np.array([0, 0, 0, 1, 2])
    order = data.class_aware_order(0, 4, labels)
    assert len(order) == 5
    assert sorted(labels[order[:3]]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("order", "checksum"),
    [(data.class_balanced_order, 3287167946), (data.class_aware_order, 3247696824)],
)
def test_orders_are_functions_of_seed_and_epoch(order, checksum):
    labels = np.repeat([0, 1, 2], [60, 6, 3])
    first = order(3, 1, labels)
    np.testing.assert_array_equal(first, order(3, 1, labels))
    for other in ((3, 2), (4, 1), (1, 3)):
        assert (order(*other, labels) != first).any()
    # This must never change, like `epoch_order`.
    assert zlib.crc32(first.astype("<i8").tobytes()) == checksum


def test_an_epoch_is_as_long_with_each_sampling():
    labels = np.repeat([0, 1, 2], [60, 6, 3])
    found = {
        name: data.train_batches(0, 2, labels, 8, name)
        for name in ("uniform", "class_balanced", "class_aware")
    }
    assert {(b.shape, b.dtype) for b in found.values()} == {((8, 8), np.dtype(np.int32))}
    balanced, aware = data.class_balanced_order, data.class_aware_order
    np.testing.assert_array_equal(found["class_balanced"].ravel(), balanced(0, 2, labels)[:64])
    # Within a batch in another order.
    cut_up = aware(0, 2, labels)[:64].reshape(8, 8)
    np.testing.assert_array_equal(np.sort(found["class_aware"]), np.sort(cut_up))
    again = data.train_batches(0, 2, labels, 8, "class_aware")
    np.testing.assert_array_equal(found["class_aware"], again)
    with pytest.raises(ValueError, match="no sampling 'random': give uniform, class_balanced"):
        data.train_batches(0, 2, labels, 8, "random")


@pytest.mark.parametrize("sampling", ["uniform", "class_balanced", "class_aware"])
@pytest.mark.parametrize(("num_classes", "ratio"), [(10, 1), (10, 100), (100, 100)])
def test_neighbors_in_a_batch_share_a_class_as_often_as_any_two(sampling, num_classes, ratio):
    """Mixing pairs each example with the one before it."""
    size, batch = 20000 // num_classes, 128
    counts = data.long_tail_counts([size] * num_classes, ratio)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(num_classes), counts))
    neighbors, expected, pairs = 0, 0.0, 0
    for epoch in range(4):
        batches = labels[data.train_batches(0, epoch, labels, batch, sampling)]
        neighbors += (batches == np.roll(batches, 1, axis=1)).sum()
        pairs += batches.size
        for row in batches:
            present = np.bincount(row)
            # Each example has another place in the batch, all orders being equally likely.
            expected += (present * (present - 1)).sum() / (batch - 1)
            if sampling == "class_aware":
                # A batch holds whole rounds and at most two parts of one.
                whole = batch // num_classes
                assert present.max() <= whole + 2
                assert np.bincount(row, minlength=num_classes).min() >= whole - 1
    share = expected / pairs
    # Four standard deviations, were the pairs independent.
    assert abs(neighbors - expected) < 4 * np.sqrt(pairs * share * (1 - share))


# ---------------------------------------------------------------- the trainer


def smoke(method="erm", **changes):
    config = digits.get_config(f"method={method},smoke")
    config.update_from_flattened_dict(changes)
    return config


def run(config, workdir):
    console = Console(file=io.StringIO(), width=120)
    return loop.train_and_evaluate(config, workdir, console), console.file.getvalue()


TASK = {
    "imbalance.kind": "exponential",
    "imbalance.ratio": 10,
    "noise.kind": "symmetric_exclusive",
    "noise.rate": 0.25,
    "sampling": "class_aware",
    "epochs": 1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("task")
    return workdir, *run(smoke(num_seeds=2, **TASK), workdir)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")


def test_a_run_saves_its_labels_and_their_error_rate(finished):
    workdir, summary, _ = finished
    with np.load(workdir / "labels.npz", allow_pickle=False) as file:
        arrays = dict(file)
    whole = data.load("digits")
    np.testing.assert_array_equal(arrays["clean_label"], whole.source_labels)
    np.testing.assert_array_equal(arrays["validation_index"], whole.index["validation"])
    assert (arrays["labels"].dtype, len(arrays["train_index"])) == (
        np.int32,
        summary["num_examples"]["train"],
    )
    wrong = arrays["labels"] != arrays["clean_label"]
    assert summary["noise_rate"] == {
        "train": wrong[arrays["train_index"]].mean(),
        "validation": wrong[arrays["validation_index"]].mean(),
    }
    assert summary["noise_rate"]["train"] == pytest.approx(0.25, abs=0.01)
    digest = hashlib.sha256(arrays["labels"].tobytes()).hexdigest()
    assert summary["labels_sha256"] == digest


def test_a_long_tailed_run_reports_its_groups(finished):
    workdir, summary, text = finished
    counts = [128, 99, 76, 59, 46, 35, 27, 21, 16, 12]
    assert summary["groups"] == data.class_groups(counts)
    for seed in summary["seeds"]:
        for group, classes in summary["groups"].items():
            by_class = [seed["metrics"]["test"]["class_accuracy"][c] for c in classes]
            assert seed["metrics"]["test"]["groups"][group] == pytest.approx(np.mean(by_class))
    tails = [seed["metrics"]["test"]["groups"]["tail"] for seed in summary["seeds"]]
    assert summary["metrics"]["test"]["groups"]["tail"]["mean"] == pytest.approx(np.mean(tails))
    row = json.loads((workdir / "seed0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        row["metrics"]["validation"]["groups"]
        == (summary["seeds"][0]["metrics"]["validation"]["groups"])
    )
    assert "test accuracy % by group of classes" in " ".join(text.split())
    assert "exponential imbalance 10, symmetric_exclusive noise 0.25" in text


def test_a_run_on_the_labels_that_another_saved_has_the_same_labels(finished, tmp_path):
    workdir, summary, _ = finished
    changes = {"noise.kind": "human", "noise.path": str(workdir / "labels.npz")}
    config = smoke(**{k: v for k, v in TASK.items() if k != "noise.rate"} | changes)
    again, _ = run(config, tmp_path / "again")
    assert again["labels_sha256"] == summary["labels_sha256"]
    ours, theirs = (dict(told["seeds"][0]) for told in (again, summary))
    (here,), (there,) = ours.pop("sessions"), theirs.pop("sessions")
    assert ours == theirs
    assert here["data"] == there["data"]
    assert here["configuration"] != there["configuration"]


def test_a_run_does_not_resume_with_other_labels(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    with np.load(workdir / "labels.npz") as file:
        arrays = dict(file)
    arrays["train_index"][0] += 1
    np.savez(workdir / "labels.npz", **arrays)
    with pytest.raises(configuration.ConfigError, match=r"labels.npz holds .* restore the data"):
        run(smoke(num_seeds=2, **TASK), workdir)
    (workdir / "labels.npz").write_bytes(b"no archive")
    with pytest.raises(configuration.ConfigError, match=r"labels.npz is damaged .*remove it"):
        run(smoke(num_seeds=2, **TASK), workdir)
    (workdir / "labels.npz").unlink()
    again, _ = run(smoke(num_seeds=2, **TASK), workdir)
    assert again["labels_sha256"] == finished[1]["labels_sha256"]
    assert (workdir / "labels.npz").exists()


def test_a_run_counts_and_draws_the_labels_it_trains_on(monkeypatch, tmp_path):
    given = []
    make, draw = method_config.perturbation, data.train_batches

    def counted(config, class_counts, *others):
        given.append(class_counts)
        return make(config, class_counts, *others)

    def drawn(seed, epoch, labels, batch_size, sampling, **others):
        given.append((sampling, np.bincount(labels).tolist()))
        return draw(seed, epoch, labels, batch_size, sampling, **others)

    monkeypatch.setattr(method_config, "perturbation", counted)
    monkeypatch.setattr(data, "train_batches", drawn)
    changes = {"noise.kind": "asymmetric", "noise.rate": 0.5}
    summary, _ = run(smoke("ldam", **TASK | changes), tmp_path)
    # Half of each class goes to the next.
    original = np.array([128, 99, 76, 59, 46, 35, 27, 21, 16, 12])
    moved = np.round(0.5 * original).astype(int)
    counts = (original - moved + np.roll(moved, 1)).tolist()
    assert given == [counts, ("class_aware", counts)]
    assert summary["groups"] == data.class_groups(original.tolist())


@pytest.mark.parametrize("sampling", ["class_balanced", "class_aware"])
@pytest.mark.parametrize(
    "method", ["logit_adjustment", "reweight", "drw", "ldam+drw", "lpa+reweight"]
)
def test_class_frequencies_are_corrected_once(sampling, method):
    name = corrections(method.split("+"))[0]
    message = (
        f"sampling '{sampling}' draws .*, and {name} in .*: take one of the two, .* without {name}"
    )
    with pytest.raises(configuration.ConfigError, match=message):
        build.build(smoke(method, sampling=sampling))
    build.build(smoke(method))


def test_methods_that_do_not_correct_the_prior_allow_balanced_sampling():
    """Margins and splits follow from how many different examples a class has."""
    build.build(smoke("ldam", sampling="class_balanced"))
    config = smoke("lpl+lpg", sampling="class_aware")
    config.perturbation.lpl.split.name = "tail"
    build.build(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imbalance.kind": "linear"}, "imbalance.kind must be one of none, exponential, step"),
        ({"imbalance.kind": "step"}, "kind 'step' needs config.imbalance.ratio"),
        ({"imbalance.ratio": 10.0}, "ratio has no effect where config.imbalance.kind is 'none'"),
        ({"imbalance.kind": "step", "imbalance.ratio": 0.1}, "ratio of the imbalance is 0.1"),
        ({"noise.kind": "symmetric"}, "noise.kind must be one of none, symmetric_inclusive"),
        ({"noise.kind": "asymmetric"}, "kind 'asymmetric' needs config.noise.rate"),
        ({"noise.kind": "asymmetric", "noise.rate": 2.0}, "rate of the label noise is 2.0"),
        ({"noise.rate": 0.1}, "rate has no effect where config.noise.kind is 'none'"),
        ({"noise.kind": "human"}, "kind 'human' needs config.noise.path"),
        (
            {"noise.kind": "human", "noise.path": "x.npz", "noise.rate": 0.1},
            "rate has no effect where config.noise.kind is 'human'",
        ),
        (
            {"noise.kind": "asymmetric", "noise.rate": 0.1, "noise.path": "x.npz"},
            "path has no effect where config.noise.kind is 'asymmetric'",
        ),
        ({"noise.kind": "human", "noise.path": "x.npz"}, "no file x.npz"),
        ({"sampling": "random"}, "sampling must be one of uniform, class_balanced, class_aware"),
    ],
)
def test_tasks_that_cannot_be_are_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(smoke(**changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- CIFAR-10


@pytest.fixture(scope="module")
def cifar10_labels():
    with np.load(SHARED / "cifar10" / "labels.npz", allow_pickle=False) as file:
        return file["y_train"].astype(np.int32), tuple(file["class_names"].tolist())


@pytest.fixture(scope="module")
def cifar10(cifar10_labels, tmp_path_factory):
    """CIFAR-10's labels on images of one pixel: labels are all that these tests look at."""
    labels, class_names = cifar10_labels
    path = tmp_path_factory.mktemp("cifar10") / "set.npz"
    images = np.zeros((50000, 1, 1), np.uint8)
    np.savez(
        path,
        x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10],
        class_names=np.array(class_names),
    )  # fmt: skip
    return data.load(f"npz:{path}", validation_fraction=0.0)


@real
@pytest.mark.shared_data
@pytest.mark.parametrize(("ratio", "total"), [(100, 12406), (10, 20431)])
def test_cifar10_lt_has_its_published_size(cifar10, ratio, total):
    task = data.modify(cifar10, tail(ratio), NONE)
    assert len(task.train.labels) == total
    counts = np.bincount(task.train.labels)
    assert counts.tolist() == data.long_tail_counts([5000] * 10, ratio).tolist()


@real
@pytest.mark.shared_data
def test_cifar10_symmetric_noise(cifar10):
    for kind, wrong in (("symmetric_exclusive", 0.5), ("symmetric_inclusive", 0.45)):
        task = data.modify(cifar10, NONE, noise(kind, 0.5))
        assert data.noise_rates(task)["train"] == pytest.approx(wrong, abs=0.005)


@real
@pytest.mark.shared_data
def test_cifar10_asymmetric_noise(cifar10):
    task = data.modify(cifar10, NONE, noise("asymmetric", 0.4))
    wrong = task.train.labels != task.source_labels
    names = np.array(cifar10.class_names)
    sources = set(names[task.source_labels[wrong]])
    assert sources == {"truck", "bird", "deer", "cat", "dog"}
    assert set(names[task.train.labels[wrong]]) == {"automobile", "airplane", "horse", "dog", "cat"}
    assert data.noise_rates(task)["train"] == 0.2


@real
@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("key", "published"),
    [("aggre_label", 0.0903), ("random_label1", 0.1723), ("worse_label", 0.4021)],
)
def test_cifar10n_has_its_published_rates(cifar10, key, published):
    path = str(SHARED / "cifar10n" / "labels.npz")
    task = data.modify(cifar10, NONE, noise("human", path=path, key=key))
    assert data.noise_rates(task)["train"] == pytest.approx(published, abs=3e-4)
    shuffled = cifar10.replace(source_labels=np.roll(cifar10.source_labels, 1))
    with pytest.raises(DataError, match=r"clean_label in .* differs from the set's own labels"):
        data.modify(shuffled, NONE, noise("human", path=path, key=key))
