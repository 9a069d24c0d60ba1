"""How fast image files are read beside torchvision's reader, who waits for them, what they hold.

    python benchmarks/image_reading.py [--rounds=5] [--sizes 500x375 1000x750] [--out=FILE.json]

All of it runs on one core, and the files are in the system's cache: disks are not measured.

- Speed: images a second, decoded and augmented for training at 224 pixels (random resized crop,
  flip, floats), of the trainer's feed and of torchvision's `ImageFolder` with a `DataLoader`, from
  the same files, without and with one process that reads ahead. Each reader is a process of its
  own that waits for its turn; ratios are of runs of the same round. Streams run on before the
  clock starts, until what is read ahead no longer grows. This library decodes a JPEG that is much
  larger than needed at a fraction of its size ("draft"), which torchvision does not: rows without
  it are the comparison. Without torchvision only this library is timed. Compared are
  seconds of the processor, of all processes of a reader, since other work on the core changes
  those on the wall.
- Wait: the share of the time that training waits for its next batch, with a step that takes twice
  as long as reading one. In "idle" that is an accelerator that is played: the host sleeps, but for
  giving it work. "shared" is the trainer's step of a small network, which needs the core that reads
  as well. Both are given steps ahead as by the trainer, and the wait is when none is left.
- Memory: the peak of a process that lists files and reads 50 batches, by the number of files.

The images are made here: clipped Gaussian fields whose amplitude falls as one over the frequency,
as in photographs, with correlated colors; JPEG of quality 90.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing as mp
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from lpa_jax import data, memory
from lpa_jax.data import folder

ROOT = pathlib.Path(__file__).parent.parent
SIDE = 224
AUGMENT = "resized_crop=0.08,1+flip"
CLASSES = 8
AHEAD = 12
"""Batches before the clock starts: more than any of the readers reads ahead."""
LONGER = 2
"""How many times as long as reading a batch a step takes that is not to wait."""
FIRST_STEPS = 4
"""Steps before waits are counted, while the first batches are read."""
MEMORY_CLASSES, MEMORY_BATCHES, MEMORY_BATCH = 100, 50, 32


def photograph(rng, width, height):
    """Return a random image with the spectrum of a photograph."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf

    def field():
        spectrum = rng.normal(size=(2, *frequency.shape)) / frequency
        plane = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], (height, width))
        return plane / plane.std()

    gray, warm, cold = field(), 0.3 * field(), 0.3 * field()
    pixels = 128 + 50 * np.stack([gray + warm, gray, gray + cold], -1)
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))


def encoded(image):
    file = io.BytesIO()
    image.save(file, "jpeg", quality=90)
    return file.getvalue()


def write_photographs(root, size, number):
    """Write photographs in `train` and one of each class in `val`; return their mean bytes."""
    rng = np.random.default_rng(0)
    width, height = map(int, size.split("x"))
    sizes = []
    for i in range(number):
        content = encoded(photograph(rng, width, height))
        sizes.append(len(content))
        for split in ("train", "val") if i < CLASSES else ("train",):
            path = pathlib.Path(root, split, f"class{i % CLASSES}", f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return statistics.mean(sizes)


@dataclasses.dataclass
class WithoutDraft:
    """Files whose JPEGs are decoded whole, as torchvision decodes them."""

    files: folder.Files

    def __len__(self):
        return len(self.files)

    def image(self, index, /):
        opened = Image.open(io.BytesIO(self.files.image(index)))
        opened.draft = lambda mode, size: None
        return opened

    def name(self, index, /):
        return self.files.name(index)

    def fingerprint(self):
        return self.files.fingerprint()


def training_examples(root, *, draft=True):
    """Return the training examples of a folder."""
    examples = data.load(f"folder:{root}", image_size=SIDE, validation_fraction=0.0).train
    if draft:
        return examples
    images = dataclasses.replace(examples.images, store=WithoutDraft(examples.images.store))
    return dataclasses.replace(examples, images=images)


def clocks():
    """Return the seconds on the wall, and those of processors that this and its children took."""
    # The processor clock of another process, by its number as Linux has it.
    others = [time.clock_gettime(~child.pid << 3 | 2) for child in mp.active_children()]
    return np.array([time.perf_counter(), time.process_time() + sum(others)])


def timed(work, images):
    """Do some work, and return the seconds an image by both clocks."""
    began = clocks()
    work()
    return ((clocks() - began) / images).tolist()


def timed_stream(stream, args):
    """Return the seconds an image of a stream of batches, once it runs steadily."""
    with contextlib.closing(stream):
        collections.deque(itertools.islice(stream, AHEAD), 0)
        count = itertools.islice(stream, args.count)
        return timed(lambda: collections.deque(count, 0), args.count * args.batch)


# ---------------------------------------------------------------- speed


def ours(args):
    """Return what is timed of this library: functions by name that return what `timed` does."""
    import jax

    from lpa_jax.training import feed, mesh

    devices = mesh.make_mesh(args.batch)
    whole, drafted = (training_examples(args.root, draft=draft) for draft in (False, True))
    # So many that those behind the last that is timed are read like it.
    steps = 2 * AHEAD + args.count
    changes = data.augmentations(AUGMENT)

    @jax.jit
    def finish(key, images):
        return data.to_float(data.augment(key, images, changes[1:]))

    def run(images):
        return jax.block_until_ready(finish(jax.random.key(0), images))

    def stream(examples, readers):
        source = feed.make_feed(
            "auto", examples, args.batch, steps, devices, augment=changes, readers=readers
        )
        with contextlib.closing(source.open(0, 0)) as batches:
            for images, *_ in batches:
                yield run(images)

    def total(examples, readers):
        return lambda: timed_stream(stream(examples, readers), args)

    def host(examples):
        parts = data.random_parts(0, 0, *changes[0].numbers)
        order = np.resize(np.arange(len(examples)), (args.count, args.batch))
        return timed(lambda: [examples.images.read(some, parts) for some in order], order.size)

    def device():
        images = jax.device_put(np.zeros((args.batch, SIDE, SIDE, 3), np.uint8))
        run(images)
        return timed(lambda: [run(images) for _ in range(args.count)], args.count * args.batch)

    return {
        "total, 0": total(whole, 0),
        "total, 1": total(whole, 1),
        "host part": lambda: host(whole),
        "device part": device,
        "total with draft, 0": total(drafted, 0),
        "host part with draft": lambda: host(drafted),
    }


def torchvisions(args):
    """Return what is timed of torchvision, likewise."""
    import torch
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    crop = transforms.RandomResizedCrop(SIDE)
    usual = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()]

    def stream(changes, workers):
        files = datasets.ImageFolder(f"{args.root}/train", transforms.Compose(changes))
        number = (2 * AHEAD + args.count) * args.batch
        # In one epoch, at whose beginning workers are started.
        order = torch.utils.data.RandomSampler(files, replacement=True, num_samples=number)
        yield from torch.utils.data.DataLoader(
            files, args.batch, sampler=order, num_workers=workers
        )

    def total(changes, workers):
        return lambda: timed_stream(stream(changes, workers), args)

    return {
        "total, 0": total(usual, 0),
        "total, 1": total(usual, 1),
        "without flip and floats": total([crop, transforms.PILToTensor()], 0),
    }


SERVED = {
    "lpa_jax": ours,
    "torchvision": torchvisions,
    "torchvision, memory kept": torchvisions,
}


def serve(args):
    """Time what a line names whenever one comes in, and answer with seconds an image."""
    if args.serve != "torchvision":
        # As the command lines do.
        memory.keep_freed_memory()
    served = SERVED[args.serve](args)
    print(json.dumps(list(served)), flush=True)
    for line in sys.stdin:
        print(json.dumps(served[line.strip()]()), flush=True)


class Server:
    """A process that times one of the readers when it is asked to."""

    def __init__(self, args, reader, root):
        words = [f"--serve={reader}", f"--root={root}"]
        words += [f"--batch={args.batch}", f"--count={args.count}"]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment(),
        )  # fmt: skip
        self.names = self.answer()

    def ask(self, name):
        print(name, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        return json.loads(self.process.stdout.readline())


def environment():
    """Return the environment of the processes."""
    added = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **added}


def spread(values):
    """Return the median of the rounds, the least and the most."""
    return {"median": np.median(values), "least": min(values), "most": max(values)}


def speed(args, size, readers):
    """Return the rows of files of one size, everything timed once a round."""
    with tempfile.TemporaryDirectory() as root:
        file_bytes = write_photographs(root, size, args.images)
        servers = {reader: Server(args, reader, root) for reader in readers}
        seconds = {
            (reader, name): []
            for reader in readers
            for name in servers[reader].names
            # Of further sizes, only what the size changes.
            if size == args.sizes[0] or (name.startswith("total") and name.endswith("0"))
        }
        # Those that are compared run one after another.
        order = sorted(seconds, key=lambda key: key[1])
        for round_ in range(args.rounds + 1):
            for reader, name in order:
                taken = servers[reader].ask(name)
                if round_ > 0:  # The first compiles and warms up.
                    seconds[reader, name].append(taken)
        for server in servers.values():
            server.process.stdin.close()
            server.process.wait()
    rows = []
    for (reader, name), both in seconds.items():
        what, _, workers = name.partition(", ")
        wall, processor = np.array(both).T
        row = {
            "measured": "speed",
            "size": size,
            "file_bytes": file_bytes,
            "reader": reader,
            "what": what,
            "readers": int(workers or 0),
            "images_per_core_second": 1 / np.median(processor),
            "milliseconds_of_processor": spread(1e3 * processor),
            "milliseconds": spread(1e3 * wall),
        }
        rivals = [r for r in readers if r != "lpa_jax" and what.startswith("total")]
        for rival in rivals if reader == "lpa_jax" else ():
            wall, processor = (np.array(seconds[rival, f"total, {workers}"]) / np.array(both)).T
            row[f"times {rival}"] = {"processor": spread(processor), "wall": spread(wall)}
        rows.append(row)
    return rows


# ---------------------------------------------------------------- wait


def waits(args):
    """Return the rows of training from files with a step twice as long as reading a batch."""
    import jax
    import jax.numpy as jnp
    import optax

    import lpa_jax
    from lpa_jax import models
    from lpa_jax.tasks import classification
    from lpa_jax.training import feed, mesh, progress, step
    from lpa_jax.training.network import Network

    memory.keep_freed_memory()
    with tempfile.TemporaryDirectory() as root:
        write_photographs(root, args.sizes[0], args.images)
        examples = training_examples(root)
        changes = data.augmentations(AUGMENT)
        devices = mesh.make_mesh(args.wait_batch)
        parts = data.random_parts(0, 0, *changes[0].numbers)

        def source(readers=0):
            number = FIRST_STEPS + args.steps + AHEAD
            return feed.make_feed(
                "auto", examples, args.wait_batch, number, devices, augment=changes, readers=readers
            )

        def reading():
            """Return the seconds that reading a batch takes now."""
            order = np.resize(np.arange(len(examples)), (8, args.wait_batch))
            return timed(lambda: [examples.images.read(some, parts) for some in order], 8)[0]

        model = models.create(
            "small_cnn", num_classes=CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3, width=args.width
        )
        perturbed = lpa_jax.value_and_grad(model.apply, lpa_jax.chain(), num_classes=CLASSES)
        like = source()
        steps = step.make_steps(
            Network(model), classification, perturbed, optax.sgd(0.01), devices, like.like,
            like.take, augment=like.augment,
        )  # fmt: skip
        state = steps.init(np.int32(0))
        numbers = mesh.put((np.int32(0), np.int32(1)), mesh.replicated(devices))

        def give(batch, repeats=1):
            """Give the network some steps, and return what is there when they are done."""
            nonlocal state
            for _ in range(repeats):
                state = steps.train(state, *numbers, *batch)
            # A copy, since the next step overwrites the state.
            return jnp.copy(min(jax.tree.leaves(state), key=lambda leaf: leaf.nbytes))

        batch = next(like.open(0, 0))
        jax.block_until_ready(give(batch))

        def wait(host, readers):
            """Return the share of the time in a round, and the seconds of reading and of a step."""
            waited = began = 0.0
            needed = reading()
            alone = timed(lambda: jax.block_until_ready(give(batch)), 1)[0]
            repeats = math.ceil(LONGER * needed / alone)
            length = LONGER * needed if host == "idle" else repeats * alone
            given = collections.deque()
            with contextlib.closing(source(readers).open(0, 0)) as batches:
                taken = next(batches)
                finish = time.perf_counter()
                for number in range(FIRST_STEPS + args.steps):
                    if number == FIRST_STEPS:
                        waited, began = 0.0, time.perf_counter()
                    if host == "idle":
                        finish = max(finish, time.perf_counter()) + length
                        ahead = progress.IN_FLIGHT * length
                        time.sleep(max(0.0, finish - ahead - time.perf_counter()))
                    else:
                        given.append(give(taken, repeats))
                        if len(given) > progress.IN_FLIGHT:
                            jax.block_until_ready(given.popleft())
                    asked = time.perf_counter()
                    taken = next(batches)
                    now = time.perf_counter()
                    if host == "idle":
                        waited += max(0.0, now - finish)
                    elif given[-1].is_ready():
                        waited += now - asked  # At most, since some was there for a part of it.
                total = now - began
            return waited / total, needed, length, total / args.steps

        settings = [("idle", 0), ("idle", 1), ("shared", 0)]
        rounds = [[wait(*setting) for setting in settings] for _ in range(args.rounds)]
    names = ("wait", "seconds_of_reading", "seconds_of_step_alone", "seconds_of_step")
    return [
        {"measured": "wait", "host": host, "readers": readers, "batch": args.wait_batch}
        | {"steps": args.steps}
        | {name: spread(values) for name, values in zip(names, np.transpose(several), strict=True)}
        for (host, readers), several in zip(settings, np.swapaxes(rounds, 0, 1), strict=True)
    ]


# ---------------------------------------------------------------- memory


def resident(most=True):
    """Return the bytes that this process has in memory, or the most that it had."""
    # Not `resource.getrusage`, which begins with what the process had that started this one.
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    name = "VmHWM" if most else "VmRSS"
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def hold(args):
    """List files, read batches of them, and print what that took of memory."""
    from lpa_jax.training import feed, mesh

    devices = mesh.make_mesh(MEMORY_BATCH)
    before = resident()
    examples = training_examples(args.root)
    images, files = examples.images, examples.images.store
    listed = resident()
    source = feed.make_feed(
        "auto", examples, MEMORY_BATCH, args.batches + AHEAD, devices,
        augment=data.augmentations(AUGMENT),
    )  # fmt: skip
    with contextlib.closing(source.open(0, 0)) as batches:
        for batch in itertools.islice(batches, args.batches):
            del batch
    list_bytes = files.names.nbytes + files.sizes.nbytes
    print(json.dumps({
        "list_bytes_of_a_file": list_bytes / len(files),
        "before_bytes": before,
        "listed_bytes": listed,
        "read_bytes": resident(),
        "held_bytes": resident(most=False),
        "decoded_bytes": len(examples) * int(np.prod(images.shape[1:])),
    }))  # fmt: skip


def memories(args):
    """Return the rows of memory by the number of files."""
    rng = np.random.default_rng(0)
    contents = [encoded(photograph(rng, 64, 48)) for _ in range(8)]
    rows = []
    for number in args.files:
        with tempfile.TemporaryDirectory() as root:
            for i in range(number):
                path = pathlib.Path(root, f"class_{i % MEMORY_CLASSES:03}", f"image_{i:08}.jpg")
                if i < MEMORY_CLASSES:
                    path.parent.mkdir()
                path.write_bytes(contents[i % len(contents)])
            words = ["--hold", f"--root={root}", f"--batches={args.batches}"]
            command = [sys.executable, __file__, *words]
            done = subprocess.run(
                command, env=environment(), check=True, stdout=subprocess.PIPE, text=True
            )
        rows.append({"measured": "memory", "files": number} | json.loads(done.stdout))
    return rows


NOTES = {
    "speed": "Processor seconds are the comparison, of all processes of a reader; where other work "
    "is on the core, seconds on the wall favor the reader with more threads. Medians of rounds.",
    "wait": "idle: no accelerator, but a clock that plays one whose step takes twice the seconds "
    "that reading a batch took just before, while the host sleeps. shared: the trainer's step, on "
    "this core. Up to two steps are given ahead, as by the trainer; the wait is when none is left.",
    "memory": "Peaks: before, the packages; listed, with the list and the mean and deviation of a "
    "thousand images; read, with batches. held: what is left. decoded: all images in memory.",
}
COLUMNS = {
    "speed": (
        "size", "reader", "what", "readers", "images_per_core_second",
    ),
    "wait": (
        "host", "readers", "seconds_of_reading", "seconds_of_step_alone", "seconds_of_step", "wait"
    ),
    "memory": (
        "files", "list_bytes_of_a_file", "before_bytes", "listed_bytes", "read_bytes",
        "held_bytes", "decoded_bytes",
    ),
}  # fmt: skip


def show(rows):
    def cell(value):
        if isinstance(value, dict):
            return "{median:.3g} ({least:.3g} to {most:.3g})".format(**value)
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    for measured, columns in COLUMNS.items():
        table = Table(title=measured)
        for column in columns:
            table.add_column(column.replace("_", " "))
        for row in rows:
            if row["measured"] == measured:
                table.add_row(*(cell(row[column]) for column in columns))
        Console().print(table)
    for row in rows:
        for name, ratio in row.items():
            if name.startswith("times "):
                shown = ", ".join(f"{cell(value)} by {clock}" for clock, value in ratio.items())
                what = f"{row['size']}, {row['what']}, {row['readers']} readers"
                print(f"{what}: {name[6:]} takes, relative to lpa_jax, {shown}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["500x375", "1000x750"])
    parser.add_argument("--images", type=int, default=64, help="Of each size, at least 8.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--count", type=int, default=16, help="Batches in each round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wait_batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="Whose wait is measured.")
    parser.add_argument("--width", type=int, default=1, help="Of the network that waits.")
    parser.add_argument("--files", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    # What the processes it starts are told.
    parser.add_argument("--serve", choices=list(SERVED), help=argparse.SUPPRESS)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=MEMORY_BATCHES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    if args.hold:
        hold(args)
        return

    import record  # It imports JAX, which a process that times torchvision goes without.

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    readers = ["lpa_jax"]
    if importlib.util.find_spec("torchvision"):
        readers = list(SERVED)
    else:
        print("torchvision is not installed (pip install torchvision): it is not compared with.")
    rows = [row for size in args.sizes for row in speed(args, size, readers)]
    rows += waits(args) + memories(args)
    show(rows)
    versions = {}
    for name in ("numpy", "pillow", "grain", "torch", "torchvision"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    record.write(args.out, rows, readers_versions=versions, cores_used=1, notes=NOTES)


if __name__ == "__main__":
    main()
