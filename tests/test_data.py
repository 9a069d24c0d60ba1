"""Sources of examples and their errors, splits, batches, augmentation."""

import functools
import itertools
import pathlib
import pickle
import subprocess
import sys
import zlib

import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest
from tfds_fixture import png, write_examples, write_tfds

from lpa_jax import data
from lpa_jax.data import augmentation, DataError, digits, rand_augment
from lpa_jax.evaluation import corruptions


def make_arrays(num_train=40, num_test=8, shape=(6, 5, 3), num_classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (num_train, *shape), dtype=np.uint8),
        "y_train": np.arange(num_train) % num_classes,
        "x_test": rng.integers(0, 256, (num_test, *shape), dtype=np.uint8),
        "y_test": np.arange(num_test) % num_classes,
    }


@pytest.fixture
def npz(tmp_path):
    """Return a function that writes arrays, some of them replaced, and gives their name."""

    def write(**changes):
        arrays = {k: v for k, v in (make_arrays() | changes).items() if v is not None}
        np.savez(tmp_path / "set.npz", **arrays)
        return f"npz:{tmp_path / 'set.npz'}"

    return write


def rows(examples):
    """Return images as bytes: sets of them can be compared."""
    return [image.tobytes() for image in examples.images]


# Splits


def test_digits_are_scikit_learns():
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(digits.FILE, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["images"], bunch.images)
        np.testing.assert_array_equal(arrays["labels"], bunch.target)


def test_digits_keep_every_image_and_stretch_its_range():
    whole = data.load("digits", validation_fraction=0.0)
    assert whole.train.images.dtype == np.uint8
    assert whole.train.labels.dtype == np.int32
    assert list(whole.splits) == ["train", "test"]
    assert whole.class_names == tuple("0123456789")
    pixels = np.concatenate([whole.train.images, whole.splits["test"].images])[..., 0]
    labels = np.concatenate([whole.train.labels, whole.splits["test"].labels])
    assert pixels.max() == 255
    with np.load(digits.FILE, allow_pickle=False) as arrays:
        theirs = sorted((x.tobytes(), y) for x, y in zip(*arrays.values(), strict=True))
    counts = np.round(pixels / 255 * 16).astype(np.uint8)
    assert theirs == sorted((x.tobytes(), y) for x, y in zip(counts, labels, strict=True))


def test_the_test_set_is_the_same_for_every_seed_and_on_every_machine():
    first, second = data.load("digits"), data.load("digits", seed=7, validation_fraction=0.3)
    np.testing.assert_array_equal(first.splits["test"].images, second.splits["test"].images)
    np.testing.assert_array_equal(first.splits["test"].labels, second.splits["test"].labels)
    assert zlib.crc32(first.splits["test"].images.tobytes()) == 2984794286
    assert len(first.splits["test"].labels) == 359


def test_splits_are_disjoint_stratified_and_complete():
    whole = data.load("digits", validation_fraction=0.0)
    digits = data.load("digits", validation_fraction=0.1, seed=3)
    # Some of the images are the same, so that counts of them are compared, not sets.
    assert sorted(rows(digits.train) + rows(digits.splits["validation"])) == sorted(
        rows(whole.train)
    )
    counts = [
        np.bincount(e.labels, minlength=10) for e in (whole.train, digits.splits["validation"])
    ]
    assert counts[1].tolist() == [round(0.1 * int(n)) for n in counts[0]]
    per_test = np.bincount(whole.splits["test"].labels) / (
        counts[0] + np.bincount(whole.splits["test"].labels)
    )
    np.testing.assert_allclose(per_test, 0.2, atol=0.004)


def test_validation_split_is_a_function_of_the_seed(npz):
    name = npz()
    first, again, other = (data.load(name, seed=s, validation_fraction=0.2) for s in (5, 5, 6))
    assert rows(first.splits["validation"]) == rows(again.splits["validation"])
    assert rows(first.train) == rows(again.train)
    assert rows(first.splits["validation"]) != rows(other.splits["validation"])
    assert not set(rows(first.splits["validation"])) & set(rows(first.train))
    assert np.bincount(first.splits["validation"].labels).tolist() == [2, 2, 2, 2]


def test_a_small_class_has_one_example_held_out(npz):
    labels = np.array([0] * 37 + [1, 1] + [2])
    name = npz(y_train=np.minimum(labels, 1), y_test=np.zeros(8, np.uint8))
    assert np.bincount(data.load(name).splits["validation"].labels).tolist() == [4, 1]
    name = npz(y_train=labels, class_names=np.array(["cat", "dog", "emu", "fox"]))
    with pytest.raises(DataError, match="no training example of class 'emu', which has 1: give"):
        data.load(name)
    assert data.load(name, validation_fraction=0.0).num_classes == 4


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_validation_fraction_outside_its_range(fraction):
    with pytest.raises(DataError, match=r"validation_fraction is .*: give 0 up to less than 1"):
        data.load("digits", validation_fraction=fraction)


@pytest.mark.parametrize(("size", "message"), [(0, "at least 1"), (16, "no effect on 'npz:")])
def test_image_size_where_it_means_nothing(npz, size, message):
    with pytest.raises(DataError, match=f"image_size .*{message}"):
        data.load(npz(), image_size=size)


def test_digits_are_enlarged_for_networks_of_photographs():
    small, large = (data.load("digits", image_size=size).train.images for size in (None, 16))
    assert large.shape == (1295, 16, 16, 3)
    means = large.reshape(-1, 8, 2, 8, 2, 3).mean(axis=(2, 4))
    assert np.corrcoef(means[..., 0].ravel(), small.ravel())[0, 1] > 0.95


def test_pixel_statistics(npz):
    loaded = data.load(npz(), validation_fraction=0.2)
    pixels = loaded.train.images / 255
    np.testing.assert_allclose(loaded.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(loaded.std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)
    assert isinstance(loaded.mean[0], float)


# Files of arrays


def test_npz_is_read_as_it_was_written(npz):
    arrays = make_arrays()
    loaded = data.load(npz(), validation_fraction=0.0)
    np.testing.assert_array_equal(loaded.train.images, arrays["x_train"])
    np.testing.assert_array_equal(loaded.splits["test"].labels, arrays["y_test"])
    assert loaded.class_names == ("0", "1", "2", "3")
    gray = npz(x_train=arrays["x_train"][..., 0], x_test=arrays["x_test"][..., 0])
    assert data.load(gray).splits["test"].images.shape == (8, 6, 5, 1)
    named = npz(class_names=np.array(["a", "b", "c", "d", "e"]))
    assert data.load(named).class_names == ("a", "b", "c", "d", "e")


def test_a_class_that_is_named_may_have_no_training_example(npz):
    loaded = data.load(npz(class_names=np.array([*"abcdefghi"])))
    assert (loaded.num_classes, loaded.train.labels.max()) == (9, 3)
    # It makes no long tail.
    assert data.groups_of(loaded) == {}
    classes = "classes 4 ('e'), 5 ('f'), 6 ('g') and 2 more"
    assert data.missing_classes(range(9), loaded.train.labels, loaded.class_names) == classes
    assert data.missing_classes(range(4), loaded.train.labels, loaded.class_names) == ""


def test_a_class_that_is_not_named_must_have_a_training_example(npz):
    labels = make_arrays()["y_train"]
    for shifted, message in (
        (labels + 1, r"class 0 \('0'\): the labels look as if .* from 1, so subtract 1 from y_tr"),
        (labels + 2, r"classes 0 \('0'\), 1 \('1'\): number the classes of all splits from 0"),
        (labels * 2, r"classes 1 \('1'\), 3 .*, or save class_names for all of them"),
        (np.maximum(labels, 1) * 2 - 1, r"classes 0 \('0'\), 2 \('2'\).*: number the classes"),
    ):
        with pytest.raises(DataError, match=rf"y_train in .* has no example of {message}"):
            data.load(npz(y_train=shifted, y_test=shifted[:8]))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_with_their_channels_first_are_refused(channels, npz):
    arrays = make_arrays(shape=(6, 5, channels))
    last = {key: arrays[key] for key in ("x_train", "x_test")}
    assert data.load(npz(**last)).train.images.shape[1:] == (6, 5, channels)
    first = {key: np.transpose(images, (0, 3, 1, 2)) for key, images in last.items()}
    remedy = r"looks like \[N, C, H, W\], .*: save np.transpose\(x, \(0, 2, 3, 1\)\)"
    with pytest.raises(
        DataError, match=rf"x_train .* has shape \(40, {channels}, 6, 5\), .*{remedy}"
    ):
        data.load(npz(**first))
    with pytest.raises(DataError, match=r"x_test .* looks like"):
        data.load(npz(**last | {"x_test": first["x_test"]}))
    # Small images are what they are said to be.
    small = make_arrays(shape=(3, 4, 3))
    assert data.load(npz(x_train=small["x_train"], x_test=small["x_test"])).mean


def test_a_single_array_is_no_npz(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(DataError, match="no npz file"):
        data.load(f"npz:{tmp_path / 'x.npy'}")


# tensorflow-datasets


def write(data_dir, name="tiny_shapes", **options):
    return write_tfds(data_dir, name, *make_arrays().values(), **options)


def test_tfds_is_read_without_tensorflow(tmp_path):
    imported_by_others = "tensorflow" in sys.modules
    write(tmp_path)
    loaded = data.load("tiny_shapes", data_dir=str(tmp_path), validation_fraction=0.0)
    arrays = make_arrays()
    for ours, part in ((loaded.train, "train"), (loaded.splits["test"], "test")):
        np.testing.assert_array_equal(ours.images, arrays[f"x_{part}"])
        np.testing.assert_array_equal(ours.labels, arrays[f"y_{part}"])
    assert loaded.class_names == ("0", "1", "2", "3")
    pinned = data.load("tiny_shapes:1.*.*", data_dir=str(tmp_path))
    assert len(pinned.splits["validation"].labels) == 4
    assert ("tensorflow" in sys.modules) == imported_by_others


def test_tfds_set_that_tensorflow_datasets_itself_defines(tmp_path):
    import tensorflow_datasets as tfds

    arrays = make_arrays(shape=(28, 28, 1))
    write_tfds(tmp_path, "mnist", *arrays.values(), version=str(tfds.builder_cls("mnist").VERSION))
    loaded = data.load("mnist", data_dir=str(tmp_path), validation_fraction=0.0)
    np.testing.assert_array_equal(loaded.train.images, arrays["x_train"])


def test_tfds_validation_replaces_a_missing_test_split(tmp_path):
    write(tmp_path, splits=("train", "validation"))
    loaded = data.load("tiny_shapes", data_dir=str(tmp_path))
    np.testing.assert_array_equal(loaded.splits["test"].images, make_arrays()["x_test"])
    write(tmp_path, "tiny_parts", splits=("train", "extra"))
    with pytest.raises(
        DataError, match=r"in the splits train, extra, but.*save the images with np"
    ):
        data.load("tiny_parts", data_dir=str(tmp_path))


def test_tfds_images_that_differ_in_size(tmp_path):
    plain = np.full((9, 14, 3), 70, np.uint8)
    halves = np.full((8, 16, 3), 200, np.uint8)
    halves[:, 8:] = 10
    write_tfds(tmp_path, "tiny_sizes", [plain, halves], [0, 1], [halves], [1])
    with pytest.raises(DataError, match="may differ in size: give image_size"):
        data.load("tiny_sizes", data_dir=str(tmp_path))
    loaded = data.load("tiny_sizes", data_dir=str(tmp_path), image_size=8, validation_fraction=0.0)
    assert loaded.train.images.shape == (2, 8, 8, 3)
    assert (loaded.train.images[0] == 70).all()
    # The middle of the picture is kept, at its own scale.
    np.testing.assert_array_equal(loaded.splits["test"].images[0], halves[:, 4:12])
    # They are read when they are needed, by other processes too.
    copy = pickle.loads(pickle.dumps(loaded.train))
    assert (copy.images[0] == 70).all()
    assert copy.fingerprint() == loaded.train.fingerprint()


def test_tfds_name_that_is_unknown(tmp_path):
    message = r"no dataset 'cifar11' \(did you mean .*'cifar10'.*\?\): give"
    with pytest.raises(DataError, match=message):
        data.load("cifar11", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="did you mean 'digits'"):
        data.load("digit", data_dir=str(tmp_path))
    for name in ("no name", "", "cifar10:1.2.*", "cifar10_corrupted/x"):
        with pytest.raises(
            DataError, match=r"(cannot open|is no name of) .*give 'digits', 'npz:PATH', 'NAME'"
        ) as e:
            data.load(name, data_dir=str(tmp_path))
        assert "\n" not in str(e.value)


def test_tfds_set_that_is_not_prepared(tmp_path):
    with pytest.raises(DataError, match=r"'cifar10' is not prepared in .*TensorFlow") as error:
        data.load("cifar10", data_dir=str(tmp_path))
    sentence = str(error.value)
    assert "pip install 'lpa_jax[tfds,prepare]'" in sentence
    assert "npz:PATH" in sentence
    # The command is one that Python can read.
    command = sentence.partition('python -c "')[2].partition('"')[0]
    compile(command, "command", "exec")
    assert f"data_dir={str(tmp_path)!r}, file_format='array_record'" in command


def test_tfds_set_in_a_format_of_tensorflows(tmp_path):
    info = write(tmp_path) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match="only TensorFlow reads: remove that folder; preparing"):
        data.load("tiny_shapes", data_dir=str(tmp_path))


def test_tfds_files_that_are_damaged(tmp_path):
    folder = write(tmp_path)
    records = folder / "tiny_shapes-train.array_record-00000"
    whole = records.read_bytes()
    for content in (b"", whole[:1000], bytes(len(whole))):
        records.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read .*truncated or corrupted, remove"):
            data.load("tiny_shapes", data_dir=str(tmp_path))
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot open 'tiny_shapes'"):
        data.load("tiny_shapes", data_dir=str(tmp_path))


def test_tfds_image_that_is_damaged_or_of_another_size(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(6, 5, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    contents = {
        r"cannot identify image": b"no image",
        r"could not broadcast .* shape \(5,6,3\)": png(np.zeros((5, 6, 3), np.uint8)),
    }
    for i, (message, content) in enumerate(contents.items()):
        parts = {split: [{"image": content, "label": 0}] for split in ("train", "test")}
        write_examples(tmp_path, f"tiny_wrong{i}", features, parts)
        with pytest.raises(DataError, match=rf"cannot be read \({message}"):
            data.load(f"tiny_wrong{i}", data_dir=str(tmp_path))


def test_tfds_set_that_is_empty_or_lacks_labels(tmp_path):
    import tensorflow_datasets as tfds

    text = {"text": tfds.features.Text()}
    write_examples(tmp_path, "tiny_text", text, {"train": [{"text": "a"}], "test": []})
    with pytest.raises(DataError, match="no 8-bit 'image' with a class as its 'label'"):
        data.load("tiny_text", data_dir=str(tmp_path))
    arrays = make_arrays(num_test=0)
    write_tfds(tmp_path, "tiny_empty", *arrays.values())
    with pytest.raises(DataError, match=r"'tiny_empty' has examples in the splits train, but"):
        data.load("tiny_empty", data_dir=str(tmp_path))


def test_tfds_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    message = r"neither 'digits' .* missing \(.*\): pip install 'lpa_jax\[tfds\]'"
    with pytest.raises(DataError, match=message):
        data.load("cifar10")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((8,), np.arange(8) % 2, r"shape \(8,\): give at least one, \[N, \.\.\.\]"),
        ((8, 3), np.arange(8) % 2.0, r"save integers, y\.astype"),
        ((8, 3), np.array(["a", "b"] * 4), "save integers, as in names"),
        (
            (7, 3),
            np.eye(2)[np.arange(8) % 2],
            r"the shape \(7, 2\), a number for each",
        ),
        ((8, 3), np.zeros((8, 2, 2)), r"not \(8, 2, 2\)"),
    ],
)
def test_arrays_that_are_no_examples_are_refused(images, labels, message, unchecked):
    given = np.zeros(images, np.float32), labels
    with pytest.raises(DataError, match=message):
        data.make_dataset("mine", {"train": given, "test": given})


def test_examples_made_by_hand_are_checked_like_others(unchecked):
    images, labels = np.zeros((8, 3), np.float32), np.arange(8) % 4
    made = data.Examples(images, labels, ("a", "b"))
    with pytest.raises(DataError, match="the label 2 is outside the classes 0 to 1"):
        data.make_dataset("mine", {"train": made, "test": made})
    several = np.eye(4)[labels]
    splits = {"train": (images, several), "test": (images, several[:, :3])}
    with pytest.raises(DataError, match="differ in their labels of shape"):
        data.make_dataset("mine", splits)


def test_labels_of_several_classes_have_examples_held_out_too():
    images, labels = np.zeros((40, 3), np.float32), np.eye(4)[np.arange(40) % 4]
    made = data.make_dataset("mine", {"train": (images, labels), "test": (images, labels)})
    assert {split: len(found) for split, found in made.splits.items()} == {
        "train": 36, "validation": 4, "test": 40,
    }  # fmt: skip
    assert made.splits["validation"].labels.shape == (4, 4)
    noise = {"kind": "asymmetric", "rate": 0.5}
    with pytest.raises(DataError, match="neither a long tail nor label noise"):
        data.modify(made, {"kind": "none"}, noise)


def test_the_fingerprint_does_not_depend_on_the_order_of_the_splits():
    images, labels = np.zeros((40, 3), np.float32), np.arange(40) % 4
    splits = {"train": (images, labels), "test": (images, labels), "other": (images, labels)}
    one, other = (
        data.make_dataset("mine", dict(order))
        for order in (splits.items(), reversed(splits.items()))
    )
    assert one.fingerprint() == other.fingerprint()


def test_importing_the_package_imports_no_source():
    code = (
        "import sys, lpa_jax.data; "
        "print([m for m in ('sklearn', 'tensorflow_datasets', 'PIL') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Batches


def test_epoch_order_is_a_permutation_that_seed_and_epoch_decide():
    order = data.epoch_order(3, 1, 50)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(50))
    np.testing.assert_array_equal(order, data.epoch_order(3, 1, 50))
    for other in ((3, 2), (4, 1), (1, 3)):
        assert (data.epoch_order(*other, 50) != order).any()
    # This must never change: a resumed run continues where it was, whatever was updated since.
    assert data.epoch_order(3, 1, 8).tolist() == [1, 2, 4, 5, 3, 6, 0, 7]


def test_train_batches_are_slices_of_the_order():
    batches = data.train_batches(0, 2, np.zeros(50, int), 8)
    assert batches.shape == (6, 8)
    assert batches.dtype == np.int32
    np.testing.assert_array_equal(batches.ravel(), data.epoch_order(0, 2, 50)[:48])


@pytest.mark.parametrize("batch_size", [51, 0])
def test_train_batches_refuse_at_once(batch_size):
    with pytest.raises(ValueError, match=f"is {batch_size}, but a batch takes 1 to 50.*choose"):
        data.train_batches(0, 0, np.zeros(50, int), batch_size)


@pytest.mark.parametrize("num_examples", [0, 1, 8, 19])
def test_eval_batches_visit_each_example_once(num_examples):
    batches = list(data.eval_batches(num_examples, 8))
    assert len(batches) == -(-num_examples // 8)
    assert all(i.shape == w.shape == (8,) for i, w in batches)
    assert all((i.dtype, w.dtype) == (np.int32, np.float32) for i, w in batches)
    assert sum(w.sum() for _, w in batches) == num_examples
    assert [int(j) for i, w in batches for j in i[w > 0]] == list(range(num_examples))
    assert all(i.max() < num_examples for i, _ in batches)
    with pytest.raises(ValueError, match="batch_size is 0: give at least 1"):
        data.eval_batches(num_examples, 0)


# Random streams


def test_every_purpose_has_a_stream_of_its_own(monkeypatch):
    """Take the first numbers of every generator that is made with one seed, by what made it."""
    made, default_rng = [], np.random.default_rng

    def recorded(seed):
        made.append(tuple(default_rng(seed).integers(2**63, size=4).tolist()))
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", recorded)

    def first_numbers(draw, *arguments):
        made.clear()
        draw(*arguments)
        return set(made)

    for seed in (0, 1, 2, 2**31 - 1):
        # Class numbers and epochs reach those of the other streams.
        labels = np.repeat(np.arange(8), [40, 20, 10, 5, 3, 2, 2, 2])
        found = {
            "held out": first_numbers(data.source.held_out, labels, 0.1, seed, tuple("abcdefgh")),
            "long tail": first_numbers(
                data.long_tail_subset, np.arange(80) % 8, 8, 2, "exponential", seed
            ),
            "noise": first_numbers(
                functools.partial(data.label_noise.symmetric, inclusive=True), labels, 0.5, 8, seed
            ),
            "corruptions": first_numbers(
                corruptions.corrupt, np.zeros((1, 2, 2, 1), np.uint8), "gaussian_noise", 1, seed
            ),
        }
        for epoch in range(8):
            for order in (data.epoch_order, data.class_balanced_order):
                examples = len(labels) if order is data.epoch_order else labels
                numbers = first_numbers(order, seed, epoch, examples)
                # A run has one of these orders.
                assert found.setdefault(f"order {epoch}", numbers) == numbers
            # Besides, the turns of each class and the order within batches.
            aware = first_numbers(data.train_batches, seed, epoch, labels, 8, "class_aware")
            assert len(aware - found[f"order {epoch}"]) >= 9
            found[f"class-aware {epoch}"] = aware - found[f"order {epoch}"]
        fixed = {k: v for k, v in found.items() if not k.startswith("class-aware")}
        turns = set.union(*(v for k, v in found.items() if k.startswith("class-aware")))
        assert all(len(numbers) == 1 for numbers in fixed.values())
        assert len(set.union(*fixed.values())) == len(fixed)
        assert not turns & set.union(*fixed.values())


def test_streams_come_from_one_place():
    root = pathlib.Path(data.__file__).parents[1]
    using = [p.name for p in root.rglob("*.py") if "np.random.default_rng(" in p.read_text()]
    assert using == ["streams.py"]
    keys = list(data.streams.KEYS.values())
    # Before the numbers that follow: no key begins another one, but for the one that takes none.
    assert data.streams.KEYS["held_out"] == ()
    assert len({key[:1] for key in keys}) == len(keys)


def test_the_held_out_examples_never_change():
    """Results compare across versions as long as the validation and test sets are the same."""
    held = data.source.held_out(np.arange(40) % 4, 0.2, 5, tuple("abcd"))
    rng = np.random.default_rng(5)
    expected = [rng.permutation(np.flatnonzero(np.arange(40) % 4 == c))[:2] for c in range(4)]
    assert sorted(np.flatnonzero(held)) == sorted(np.concatenate(expected))


# Augmentation


@pytest.fixture
def images():
    # No zeros: they are the border's.
    pixels = np.random.default_rng(1).integers(1, 256, (32, 7, 6, 3), dtype=np.uint8)
    return jax.numpy.asarray(pixels)


crop = jax.jit(data.random_crop, static_argnums=2)
flip = jax.jit(data.random_flip)


@pytest.mark.parametrize(("padding", "dtype"), [(0, "uint8"), (3, "uint8"), (3, "float32")])
def test_random_crop_is_a_window_of_the_padded_image(images, padding, dtype):
    key = jax.random.key(3)
    images = images.astype(dtype)
    crops = np.asarray(crop(key, images, padding))
    assert crops.dtype == images.dtype
    draws = np.asarray(jax.random.randint(key, (32, 2), 0, 2 * padding + 1))
    for image, result, (top, left) in zip(np.asarray(images), crops, draws, strict=True):
        padded = np.zeros((7 + 2 * padding, 6 + 2 * padding, 3), dtype)
        padded[padding : padding + 7, padding : padding + 6] = image
        np.testing.assert_array_equal(result, padded[top : top + 7, left : left + 6])
    # All places are drawn, the outermost too.
    assert set(draws.ravel().tolist()) == set(range(2 * padding + 1))


def test_random_flip_mirrors_about_half(images):
    flipped = np.asarray(flip(jax.random.key(0), images))
    mirrored = 0
    for image, result in zip(np.asarray(images), flipped, strict=True):
        is_mirrored = np.array_equal(result, image[:, ::-1])
        assert is_mirrored or np.array_equal(result, image)
        mirrored += is_mirrored
    assert 8 < mirrored < 24
    twice = flip(jax.random.key(0), jax.numpy.asarray(flipped))
    np.testing.assert_array_equal(twice, images)


def test_augment_is_crop_then_flip_with_independent_keys(images):
    key = jax.random.key(5)
    augment = jax.jit(data.augment, static_argnums=2)
    changes = data.augmentations("crop=3+flip")
    crop_key, flip_key = jax.random.split(key)
    both = np.asarray(flip(flip_key, crop(crop_key, images, 3)))
    np.testing.assert_array_equal(augment(key, images, changes), both)
    assert (np.asarray(augment(jax.random.key(6), images, changes)) != both).any()
    cropped = data.augment(key, images, changes[:1])
    np.testing.assert_array_equal(cropped, crop(crop_key, images, 3))
    assert data.augment(key, images, ()) is images


def enhanced(enhancer):
    return lambda image, amount: enhancer(image).enhance(1 + 0.9 * amount)


def warped(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


BY_PILLOW = {
    "identity": lambda image, _: image,
    "shear_x": lambda image, amount: warped(image, 1, 0.3 * amount, 0, 0, 1, 0),
    "shear_y": lambda image, amount: warped(image, 1, 0, 0, 0.3 * amount, 1, 0),
    "translate_x": lambda image, amount: warped(
        image, 1, 0, image.width * amount * 150 / 331, 0, 1, 0
    ),
    "translate_y": lambda image, amount: warped(
        image, 1, 0, 0, 0, 1, image.height * amount * 150 / 331
    ),
    "rotate": lambda image, amount: image.rotate(30 * amount, Image.Resampling.BILINEAR),
    "brightness": enhanced(ImageEnhance.Brightness),
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "posterize": lambda image, amount: ImageOps.posterize(image, 8 - round(4 * abs(amount))),
    "solarize": lambda image, amount: ImageOps.solarize(image, 256 * (1 - abs(amount))),
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}
one_operation = jax.jit(rand_augment.operation)


@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
def test_an_operation_of_rand_augment_is_that_of_pillow(name):
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:21, :16]
    given = [
        rng.integers(0, 256, (21, 16, 3)),
        # Smooth, of few levels, and of one level.
        np.stack([5 * y + 6 * x + 20, 200 - 4 * y, 90 + 3 * x], -1),
        60 + rng.integers(0, 3, (21, 16, 3)) * [1, 40, 0],
    ]
    which = jax.numpy.array(rand_augment.OPERATIONS.index(name))
    changed = False
    for pixels, amount in itertools.product(given, (0.9, -0.9, 0.37, 1.0, -1.0)):
        pixels = pixels.astype(np.uint8)
        found = one_operation(jax.numpy.asarray(pixels), which, jax.numpy.float32(amount))
        expected = np.asarray(BY_PILLOW[name](Image.fromarray(pixels), amount))
        apart = np.abs(np.asarray(found, int) - expected)
        # What is rounded otherwise is one level apart.
        assert apart.max() <= 1
        assert apart.mean() < 0.1
        changed |= (np.asarray(found) != pixels).any()
    assert changed == (name != "identity")


def test_rand_augment_draws_for_each_image_and_each_turn(images):
    draw = jax.jit(rand_augment.rand_augment, static_argnums=(2, 3))
    # One image, many times.
    key, images = jax.random.key(2), jax.numpy.repeat(images[:1], 200, axis=0)
    expected = [images[0]] * 40
    for each in jax.random.split(key, 2):
        which_key, sign_key = jax.random.split(each)
        which = jax.random.randint(which_key, (200,), 0, 14)
        amounts = jax.random.rademacher(sign_key, (200,), np.float32) / 2
        assert set(which.tolist()) == set(range(14))
        expected = list(map(one_operation, expected, which, amounts))
    found = draw(key, data.to_float(images), 2, 5.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:40], np.stack(expected) / 255, atol=1e-6)
    integers = jax.eval_shape(rand_augment.rand_augment, key, images)
    assert (integers.shape, integers.dtype) == (images.shape, np.uint8)


def test_presets_are_lists_of_augmentations():
    for name in augmentation.PRESETS:
        data.augmentations(name)
    names = [change.name for change in data.augmentations("imagenet_strong")]
    assert names == ["resized_crop", "flip", "rand_augment", "random_erasing"]
    (change,) = data.augmentations("rand_augment=3.0,4.5")
    assert str(change.numbers) == "(3, 4.5)"


def test_to_float():
    levels = jax.numpy.arange(256, dtype=jax.numpy.uint8).reshape(2, 8, 16, 1)
    floats = data.to_float(levels)
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, np.arange(256).reshape(2, 8, 16, 1) / 255, rtol=1e-6)
