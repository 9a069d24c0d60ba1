"""Image files: folders, decoding, reading ahead, and training on them."""

import io
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
from rich.console import Console

from configs import digits
import lpa_jax
from lpa_jax import data
from lpa_jax.data import decoding, folder, packed
from lpa_jax.training import feed, loop, mesh

KINDS = ("blue", "red")
ROOT = pathlib.Path(__file__).parent.parent


def encoded(color, size=(30, 20), kind="png", **options):
    file = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), size, color).save(file, kind, **options)
    return file.getvalue()


def noise(seed, size=(20, 30), kind="jpeg"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def tree(root, names, number=5):
    """Write so many images under each name, and return the root."""
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(number):
            (root / name / f"{j}.jpg").write_bytes(noise(100 * i + j))
    return root


def splits(root, *names, number=5):
    return tree(root, [f"{name}/{kind}" for name in names for kind in KINDS], number)


# ---------------------------------------------------------------- decoding


def quarters(kind="png"):
    """An image of 40 x 20 pixels: red, green, blue and white columns."""
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.repeat(colors[None], 20, 0).repeat(10, 1)).save(file, kind)
    return file.getvalue()


def test_the_parts_of_an_image_are_where_they_say():
    seen = {name: decoding.decode(quarters(), 4, part) for name, part in decoding.PARTS.items()}
    assert seen["whole"][2, 1:3].argmax(-1).tolist() == [1, 2]
    assert seen["whole"][2, ::3].min(-1).tolist() == [0, 219]
    assert seen["cover"][2].argmax(-1).tolist() == [1, 1, 2, 2]
    left, top, right, bottom = decoding.inner(40, 20)
    assert (right - left, bottom - top) == (17.5, 17.5)
    assert (left + right, top + bottom) == (40, 20)


def test_random_parts_are_of_the_areas_and_ratios_asked_for():
    draw = data.random_parts(0, 0, 0.2, 0.5)
    boxes = np.array([draw(i)(300, 200) for i in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 300).all()
    assert (boxes[:, 3] <= 200).all()
    share = width * height / 60000
    assert 0.19 < share.min() < 0.22
    assert 0.48 < share.max() < 0.51
    assert 0.73 < (width / height).min() < 0.8
    assert 1.25 < (width / height).max() < 1.36
    assert draw(3)(300, 200) == data.random_parts(0, 0, 0.2, 0.5)(3)(300, 200)
    assert draw(3)(300, 200) != data.random_parts(0, 1, 0.2, 0.5)(3)(300, 200)
    # No part of half the area has a ratio of at most 4/3 in an image this wide.
    assert data.random_parts(0, 0, 0.9, 1.0)(0)(1000, 100) == pytest.approx(
        (433.3, 0, 566.7, 100), 1e-3
    )


@pytest.mark.parametrize("size", [8, 40, 100])
def test_a_draft_shows_the_same_part(size):
    smooth = Image.fromarray(np.uint8(np.mgrid[:320, :480].sum(0)[..., None] * 0.3).repeat(3, -1))
    file = io.BytesIO()
    smooth.save(file, "jpeg", quality=95)
    part = data.random_parts(0, 0)(1)
    exact = decoding.decode(file.getvalue(), size, part)
    draft = decoding.decode(file.getvalue(), size, part, draft=True)
    assert np.abs(np.int32(exact) - draft).max() <= 6


def transparent():
    file = io.BytesIO()
    image = Image.new("P", (4, 4))
    image.putpalette([255, 0, 0] + [0] * 765)
    image.save(file, "png", transparency=bytes([0]))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "pixel"),
    [
        (encoded((255, 0, 0, 9), mode="RGBA"), [255, 0, 0]),
        (encoded(77, mode="L"), [77, 77, 77]),
        (encoded((77, 9), mode="LA"), [77, 77, 77]),
        (encoded(1, mode="1"), [255, 255, 255]),
        (transparent(), [255, 0, 0]),
        (encoded((0, 255, 255, 0), mode="CMYK", kind="tiff"), [255, 0, 0]),
    ],
    ids=["opacity", "gray", "gray with opacity", "one bit", "palette", "CMYK"],
)
def test_other_kinds_of_pixels_become_colors(content, pixel):
    assert decoding.decode(content, 2, decoding.cover)[0, 0].tolist() == pixel


def animated():
    file = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (99 * i, 0, 0)) for i in range(3)]
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    return file.getvalue()


BAD = {
    "truncated": (noise(0)[:300], "it is damaged"),
    "cut in its header": (noise(0)[:20], "it is no image that Pillow reads"),
    "empty": (b"", "it is no image that Pillow reads"),
    "text": (b"<html>not found</html>", "it is no image that Pillow reads"),
    "animated": (animated(), "it has several frames"),
    "16 bits": (encoded(70000 % 65536, mode="I;16"), "its pixels are of Pillow's mode"),
    "floats": (encoded(0.5, mode="F", kind="tiff"), "its pixels are of Pillow's mode"),
    "a damaged PNG": (encoded((1, 2, 3))[:-30], "it is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    splits(tmp_path, "train", "test")
    content, told = BAD[name]
    (tmp_path / "train/red/3.jpg").write_bytes(content or b" ")
    train = folder.read(str(tmp_path), 8, "cover", 0)["train"]
    with pytest.raises(data.DataError, match=f"1 of 10 images cannot be read. .*3.jpg: {told}"):
        train.images[:]


# ---------------------------------------------------------------- folders


def test_a_folder_with_splits(tmp_path):
    root = splits(tmp_path, "train", "val", "test")
    (root / "train/red/Thumbs.db").write_bytes(b"1")
    (root / "train/.cache").mkdir()
    found = data.load(f"folder:{root}", image_size=8)
    assert {name: len(split) for name, split in found.splits.items()} == {
        "train": 10, "validation": 10, "test": 10,
    }  # fmt: skip
    assert found.class_names == KINDS
    train = found.train
    assert train.labels.tolist() == [0] * 5 + [1] * 5
    assert train.images.shape == (10, 8, 8, 3)
    assert train.images.dtype == np.uint8
    expected = decoding.decode((root / "train/red/1.jpg").read_bytes(), 8, decoding.cover)
    np.testing.assert_array_equal(train.images[6], expected)
    np.testing.assert_array_equal(train.images[np.array([6, 0])][0], expected)
    np.testing.assert_array_equal(train[6]["image"], expected)
    assert len(found.mean) == 3


def test_a_folder_without_splits_is_divided_by_class(tmp_path):
    tree(tmp_path, KINDS, 10)
    one = data.load(f"folder:{tmp_path}", image_size=8, validation_fraction=0.25, seed=1)
    assert {name: np.bincount(split.labels).tolist() for name, split in one.splits.items()} == {
        "train": [6, 6], "validation": [2, 2], "test": [2, 2],
    }  # fmt: skip
    again = data.load(f"folder:{tmp_path}", image_size=8, validation_fraction=0.25, seed=1)
    other = data.load(f"folder:{tmp_path}", image_size=8, validation_fraction=0.25, seed=2)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
    every = np.concatenate([split.images.index for split in one.splits.values()])
    assert sorted(every) == list(range(20))


def test_a_folder_of_domains(tmp_path):
    names = [f"{domain}/{kind}" for domain in ("photo", "art") for kind in KINDS]
    tree(tmp_path, names, 5)
    found = data.load(f"domains:{tmp_path}", image_size=8, validation_fraction=0.0)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 16, "test": 4}
    test = found.splits["test"]
    assert test.extra["domains"].tolist() == [0, 0, 1, 1]
    assert test.labels.tolist() == [0, 1, 0, 1]
    store = test.images.store
    assert [store.name(int(i)).split("/")[-3:-1] for i in test.images.index] == [
        ["art", "blue"], ["art", "red"], ["photo", "blue"], ["photo", "red"],
    ]  # fmt: skip


def test_a_list_instead_of_folders_of_classes(tmp_path):
    root = splits(tmp_path, "train", "test")
    (root / "val").mkdir()
    for i in range(3):
        (root / f"val/a {i}.JPEG").write_bytes(noise(i))
    (root / "val.txt").write_text("a 0.JPEG red\na 2.JPEG 0\n\na 1.JPEG 1\n")
    found = data.load(f"folder:{root}", image_size=8)
    validation = found.splits["validation"]
    names = [validation.images.store.name(i)[-8:] for i in range(3)]
    assert names == ["a 2.JPEG", "a 0.JPEG", "a 1.JPEG"]
    assert validation.labels.tolist() == [0, 1, 1]


def test_any_name_will_do(tmp_path):
    names = ["Größe", "猫 и пёс", "a b"]
    tree(tmp_path, [f"{split}/{name}" for split in ("train", "test") for name in names], 2)
    strange = bytes(tmp_path / "train/a b") + b"/\xff.png"
    pathlib.Path(strange.decode(errors="surrogateescape")).write_bytes(noise(7))
    found = data.load(f"folder:{tmp_path}", image_size=8, validation_fraction=0.0)
    assert set(found.class_names) == set(names)
    assert len(found.train) == 7
    expected = decoding.decode(noise(7), 8, decoding.cover)
    assert any((image == expected).all() for image in found.train.images[:])


def test_a_fingerprint_tells_another_file_from_the_same_one_elsewhere(tmp_path):
    def of(root):
        return data.load(f"folder:{root}", image_size=8, validation_fraction=0.0).fingerprint()

    one, two = splits(tmp_path / "one", "train", "test"), splits(tmp_path / "two", "train", "test")
    assert of(one) == of(two)
    (two / "train/red/3.jpg").write_bytes(noise(3, (21, 30)))
    assert of(one) != of(two)
    size = data.load(f"folder:{one}", image_size=9, validation_fraction=0.0).fingerprint()
    assert size != of(one)


def change(root, what):
    (root / "train/red/note.txt").write_text("x")
    match what:
        case "no folder":
            return f"folder:{root}/nothing", "There is no folder .*nothing': give one with folders"
        case "no classes":
            (root / "empty").mkdir()
            return f"folder:{root}/empty", "empty has no folders: give folders of images"
        case "an empty class":
            for path in (root / "train/red").glob("*.jpg"):
                path.unlink()
            return f"folder:{root}", "red has no image"
        case "an empty file":
            (root / "test/red/2.jpg").write_bytes(b"")
            return f"folder:{root}", r"1 of 5 files in .* are empty, such as red/2.jpg"
        case "another class":
            tree(root, ["test/green"])
            return f"folder:{root}", "has the class 'green' in test, but not in train"
        case "a class less":
            tree(root, ["train/green"])
            return f"folder:{root}", "has the class 'green' in train, but not in test"
        case "two names":
            tree(root, ["val/red", "valid/red"])
            return f"folder:{root}", "val and valid, which are one split"
        case "train alone":
            (root / "test").rename(root / "other")
            return f"folder:{root}", "has train, but neither val nor test"
        case "no list":
            (root / "val").mkdir()
            return f"folder:{root}", "the list .*val.txt cannot be read"
        case "a wrong class":
            return listed(root, "0.jpg pink"), "Line 1 of .*val.txt is '0.jpg pink'"
        case "a wrong number":
            return listed(root, "0.jpg 2"), "a number from 0 to 1"
        case "a missing file":
            return listed(root, "1.jpg 0"), "Line 1 of .*val.txt is '1.jpg 0'"
        case "a file twice":
            return listed(root, "0.jpg 0\n0.jpg 1"), "Line 2 of"
        case "a file that is not listed":
            return listed(root, ""), "does not name 1 files .*, such as 0.jpg"
        case "domains that differ":
            tree(root, ["test/green"])
            return f"domains:{root}", "the class 'green' in one of test and train alone"
        case "no domains":
            return f"domains:{root}/train/red", "red has no folders"


def listed(root, text):
    (root / "val").mkdir()
    (root / "val/0.jpg").write_bytes(noise(0))
    (root / "val.txt").write_text(text)
    return f"folder:{root}"


MISTAKES = [
    "no folder", "no classes", "an empty class", "an empty file", "another class", "a class less",
    "two names", "train alone", "no list", "a wrong class", "a wrong number", "a missing file",
    "a file twice", "a file that is not listed", "domains that differ", "no domains",
]  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_named(tmp_path, what):
    name, message = change(splits(tmp_path, "train", "test"), what)
    with pytest.raises(data.DataError, match=message):
        data.load(name, image_size=8)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    train = folder.read(str(splits(tmp_path, "train", "test")), 8, "cover", 0)["train"]
    (tmp_path / "train/red/3.jpg").unlink()
    (tmp_path / "train/red/4.jpg").unlink()
    with pytest.raises(data.DataError, match=r"2 of 10 .*3.jpg: it cannot be read \(No such file"):
        train.images[:]


# ---------------------------------------------------------------- reading ahead


def opened(examples, readers=0, first=0, seed=0, augment="imagenet", steps=6):
    source = feed.make_feed(
        "auto", examples, 8, steps, mesh.make_mesh(8),
        augment=data.augmentations(augment), readers=readers,
    )  # fmt: skip
    return source, list(jax.device_get(list(source.open(seed, first))))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    root = splits(tmp_path_factory.mktemp("images"), "train", "test", number=12)
    return folder.read(str(root), 8, "cover", 0)["train"]


def test_batches_are_read_ahead_with_random_parts(examples):
    source, batches = opened(examples)
    assert not source.resident
    assert [change.name for change in source.augment] == ["flip"]
    order = data.train_batches(0, 1, examples.labels, 8)
    images, labels, extra = batches[4]
    np.testing.assert_array_equal(extra["examples"], order[1])
    np.testing.assert_array_equal(labels, examples.labels[order[1]])
    expected = examples.images.read(order[1], data.random_parts(0, 1))
    np.testing.assert_array_equal(images, expected)
    assert (images != examples.images[order[1]]).any()


def test_without_random_parts_the_images_are_those_of_evaluation(examples):
    source, batches = opened(examples, augment="flip")
    images, _, extra = batches[0]
    np.testing.assert_array_equal(images, examples.images[extra["examples"]])
    assert [change.name for change in source.augment] == ["flip"]


@pytest.mark.parametrize("readers", [1, 2])
def test_any_number_of_readers_gives_the_same_batches_from_any_step(examples, readers):
    _, one = opened(examples)
    _, other = opened(examples, readers, first=2)
    for left, right in zip(one[2:], other, strict=True):
        jax.tree.map(np.testing.assert_array_equal, left, right)


KILLED = """
import sys
from lpa_jax.data import folder
from lpa_jax.training import feed, mesh
examples = folder.read(sys.argv[1], 8, "cover", 0)["train"]
source = feed.make_feed("host", examples, 8, 600, mesh.make_mesh(8), readers=1)
if __name__ == "__main__":
    batches = source.open(0, 0)
    next(batches)
    import multiprocessing, os
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_readers_end_with_a_run_that_is_killed(tmp_path):
    root = splits(tmp_path / "images", "train", "test", number=12)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    # Its output is closed when the last process that writes to it has ended.
    done = subprocess.run(
        [sys.executable, script, root],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.strip()


def test_files_are_not_put_on_the_devices(examples):
    with pytest.raises(ValueError, match="needs decoded images"):
        feed.make_feed("device", examples, 8, 6, mesh.make_mesh(8))


def test_what_is_cached_is_what_is_read(tmp_path):
    found = data.load(f"folder:{splits(tmp_path, 'train', 'test')}", image_size=8)
    kept = data.cached(found)
    assert isinstance(kept.train.images, np.ndarray)
    np.testing.assert_array_equal(kept.train.images, found.train.images[:])


def test_images_can_be_sent_to_another_process(examples):
    copy = pickle.loads(pickle.dumps(examples))
    np.testing.assert_array_equal(copy.images[3], examples.images[3])
    assert copy.fingerprint() == examples.fingerprint()


# ---------------------------------------------------------------- training


def trained(root, workdir, **changes):
    config = digits.get_config("method=lpa,smoke")
    config.dataset, config.image_size, config.batch_size = f"folder:{root}", 12, 8
    config.augment, config.writers = "imagenet", ()
    config.update_from_flattened_dict(changes)
    return loop.train_and_evaluate(config, workdir, Console(quiet=True))


def seen(workdir):
    return (workdir / "seed0/metrics.jsonl").read_text()


def test_a_run_on_files_does_not_depend_on_who_reads_them(tmp_path):
    root = splits(tmp_path / "images", "train", "val", "test", number=8)
    trained(root, tmp_path / "threads")
    trained(root, tmp_path / "processes", readers=1)
    assert seen(tmp_path / "threads") == seen(tmp_path / "processes")


def test_images_kept_in_memory_train_like_those_in_files(tmp_path):
    root = splits(tmp_path / "images", "train", "val", "test", number=8)
    trained(root, tmp_path / "read", augment="crop=1+flip", input="host")
    trained(root, tmp_path / "kept", augment="crop=1+flip", cache="memory", input="host")
    read, kept = seen(tmp_path / "read"), seen(tmp_path / "kept")
    assert read == kept


# ---------------------------------------------------------------- CIFAR's binary files


def cifar(root, fine):
    """Write files of the format of CIFAR-100 or CIFAR-10, and return pixels and labels by split."""
    rng = np.random.default_rng(0)
    names = ["train.bin", "test.bin"]
    if not fine:
        names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    (root / ("fine_label_names.txt" if fine else "batches.meta.txt")).write_text("cat\ndog\n\n")
    found = {"train": [], "test": []}
    for name in names:
        images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
        labels = rng.permutation([0, 1, 0, 1]).astype(np.uint8)
        head = np.stack([np.full(4, 7, np.uint8), labels] if fine else [labels], 1)
        planes = images.transpose(0, 3, 1, 2).reshape(4, -1)
        (root / name).write_bytes(np.concatenate([head, planes], 1).tobytes())
        found["test" if "test" in name else "train"].append((images, labels))
    return {
        split: [np.concatenate(parts) for parts in zip(*pairs, strict=True)]
        for split, pairs in found.items()
    }


@pytest.mark.parametrize("fine", [False, True], ids=["CIFAR-10", "CIFAR-100"])
def test_the_binary_files_of_cifar(tmp_path, fine):
    expected = cifar(tmp_path, fine)
    found = data.load(f"cifar:{tmp_path}", validation_fraction=0.0)
    assert found.class_names == ("cat", "dog")
    for split, (images, labels) in expected.items():
        np.testing.assert_array_equal(found.splits[split].images, images)
        np.testing.assert_array_equal(found.splits[split].labels, labels)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda root: (root / "test_batch.bin").unlink(),
            "neither test_batch.bin nor",
        ),
        (lambda root: (root / "data_batch_3.bin").unlink(), "data_batch_3.bin cannot be read"),
        (lambda root: (root / "batches.meta.txt").unlink(), "batches.meta.txt cannot be read"),
        (lambda root: (root / "test_batch.bin").write_bytes(b"12"), "no multiple of 3073"),
        (lambda root: (root / "test_batch.bin").write_bytes(b""), "no multiple of 3073"),
        (lambda root: (root / "batches.meta.txt").write_text("cat\n"), "is outside the classes"),
    ],
    ids=["no set", "a file less", "no names", "truncated", "empty", "a name less"],
)
def test_binary_files_of_cifar_that_are_damaged(tmp_path, harm, message):
    cifar(tmp_path, fine=False)
    harm(tmp_path)
    with pytest.raises(data.DataError, match=message):
        data.load(f"cifar:{tmp_path}")


# ---------------------------------------------------------------- Hugging Face's datasets


# The package's own way to fingerprint its tables.
hugging_face = pytest.mark.filterwarnings("ignore:.*MonthDayNano")


@pytest.fixture
def saved(tmp_path):
    """Return what writes a set with the files of a class each, by split."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(KINDS))}
    )

    def write(*names, **columns):
        def table(name):
            root = splits(tmp_path / name, "files")
            files = sorted(map(str, root.rglob("*.jpg")))
            kinds = [path.split("/")[-2] for path in files]
            made = datasets.Dataset.from_dict({"picture": files, "kind": kinds}, features)
            for column, values in columns.items():
                made = made.add_column(column, values)
            return made

        tables = {name: table(name) for name in names}
        whole = datasets.DatasetDict(tables) if len(names) > 1 else tables[names[0]]
        whole.save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return write


@hugging_face
def test_a_set_of_hugging_face(saved, tmp_path):
    found = data.load(f"hf:{saved('train', 'test')}", image_size=8, validation_fraction=0.0)
    assert found.class_names == KINDS
    assert found.train.labels.tolist() == [0] * 5 + [1] * 5
    expected = (tmp_path / "train/files/red/1.jpg").read_bytes()
    np.testing.assert_array_equal(
        found.train.images[6], decoding.decode(expected, 8, decoding.cover)
    )
    copy = pickle.loads(pickle.dumps(found.train))
    np.testing.assert_array_equal(copy.images[6], found.train.images[6])


@hugging_face
def test_a_set_of_hugging_face_without_splits_is_divided(saved):
    found = data.load(f"hf:{saved('all')}", image_size=8, validation_fraction=0.0)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 8, "test": 2}


@hugging_face
def test_a_set_of_hugging_face_that_is_none(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(data.DataError, match="There is no folder"):
        data.load(f"hf:{tmp_path}/nothing")
    with pytest.raises(data.DataError, match=r"cannot be read .*save_to_disk"):
        data.load(f"hf:{tmp_path}")


# ---------------------------------------------------------------- packed


def pack(*arguments):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "lpa_jax.pack", *map(str, arguments)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def packed_tree(root, number=4):
    return tree(root, [f"{domain}/{kind}" for domain in ("art", "photo") for kind in KINDS], number)


def test_packed_images_are_those_of_the_files(tmp_path):
    name = f"domains:{packed_tree(tmp_path / 'files')}"
    done = pack(f"--config.dataset={name}", "--config.image_size=12", f"--output={tmp_path}/kept")
    assert done.returncode == 0, done.stderr
    assert "16 images (train 12, test 4) are in" in done.stdout
    files = data.load(name, image_size=12, validation_fraction=0.0)
    kept = data.load(f"packed:{tmp_path}/kept", validation_fraction=0.0)
    assert kept.class_names == files.class_names
    for split, examples in files.splits.items():
        found = pickle.loads(pickle.dumps(kept.splits[split]))
        np.testing.assert_array_equal(found.images[:], examples.images[:])
        np.testing.assert_array_equal(found.labels, examples.labels)
        np.testing.assert_array_equal(found.extra["domains"], examples.extra["domains"])
    smaller = data.load(f"packed:{tmp_path}/kept", image_size=6, validation_fraction=0.0)
    assert smaller.train.images[:].shape == (12, 6, 6, 3)


def written(tmp_path):
    """Pack in this process, and return the data set and where it is packed."""
    found = data.load(
        f"domains:{packed_tree(tmp_path / 'files')}", image_size=12, validation_fraction=0.0
    )
    packed.write(found, tmp_path / "kept", lambda _: None)
    return found, tmp_path / "kept"


def test_bad_files_are_all_named_and_nothing_is_kept(tmp_path):
    found = data.load(f"domains:{packed_tree(tmp_path / 'files')}", image_size=12)
    for i in range(4):
        (tmp_path / f"files/art/red/{i}.jpg").write_bytes(b"no image")
    with pytest.raises(data.DataError, match=r"4 of 16 images cannot be read. .*1.jpg") as told:
        packed.write(found, tmp_path / "kept", lambda _: None)
    assert str(told.value).endswith("And 1 more.")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


@pytest.mark.parametrize("harm", ["no about", "no labels", "truncated", "a split less"])
def test_a_damaged_pack_is_refused(tmp_path, harm):
    _, kept = written(tmp_path)
    match harm:
        case "no about":
            (kept / packed.ABOUT).unlink()
        case "no labels":
            (kept / "test/labels.npy").unlink()
        case "truncated":
            os.truncate(kept / "train/images.npy", 1000)
        case "a split less":
            shutil.rmtree(kept / "test")
    with pytest.raises(data.DataError, match="pack the set again"):
        data.load(f"packed:{kept}")


def test_what_cannot_be_packed_is_refused(tmp_path):
    found, kept = written(tmp_path)
    with pytest.raises(data.DataError, match="is there already"):
        packed.write(found, kept, lambda _: None)
    for arguments, told in (
        ([], "Say what to pack"),
        (
            ["--config.dataset=digits", "--config.epochs=3", f"--output={tmp_path}/x"],
            "config.epoch",
        ),
        (
            [f"--config.dataset=folder:{tmp_path}/no", f"--output={tmp_path}/x"],
            "There is no folder",
        ),
    ):
        done = pack(*arguments)
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "x").exists()


def test_files_are_evaluated_on_corrupted_and_attacked_images(tmp_path):
    root = splits(tmp_path / "images", "train", "val", "test", number=8)
    trained(root, tmp_path / "run", epochs=1)
    found = lpa_jax.evaluate_run(tmp_path / "run", attack=True, corrupt=True)
    conditions = found["seeds"][0]["metrics"]
    assert {"clean", "fgsm"} <= {*conditions}
    assert len(conditions) > 10
