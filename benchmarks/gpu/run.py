"""Measure and train what needs a GPU, on a machine that is lent in slices of minutes.

    python benchmarks/gpu/run.py --out=OUT [--state=IN] [--data=cifar10.npz] [--minutes=9.5]
    python benchmarks/gpu/run.py --out=OUT --tiny               # a rehearsal, also on a CPU
    python benchmarks/gpu/run.py pack --data=cifar10.npz --out=PACKS
    python benchmarks/gpu/run.py unpack PACKS/pack0 --data=/tmp/cifar10.npz
    python benchmarks/gpu/run.py collect --state=IN [--out=benchmarks/results/gpu]

A slice goes on where the one that left IN stopped, and leaves in OUT all that the next one needs,
on this machine or another. It ends with code 0 if all is finished, 75 if another slice is needed,
and 1 if only what failed is left. README.md beside this file has the whole procedure.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import NamedTuple
import zlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A bare machine has the clone alone. The library is imported late: unpacking needs none of it.
sys.path.insert(0, str(ROOT))

MODELS = ("wrn_28_10", "resnet_32")
DTYPES = ("float32", "bfloat16")
TABLES = ("cifar10_lt", "cifar10_noisy")
DATA = "cifar10.npz"
"""The name of the data in the work directory: a configuration records it, and must not change."""
LEFT = 75
"""Exit code if another slice is needed; a table that was stopped has it too."""
PART_BYTES = 15 * 2**20
"""Of each file of a state, at most."""
PACK_BYTES = 45 * 2**20
"""Of the images of each pack, at most."""
LABELS = ("y_train", "y_test", "class_names")
SHARD, COLUMNS = 1000, 40
"""Images of one WebP file, and how many stand side by side in it."""


class Task(NamedTuple):
    """Something to measure or train.

    Attributes:
      name: Of its results: NAME.json, or the directory NAME of a table.
      command: What to run, with Python, in the work directory. Another command is another task.
      resumes: Whether it goes on where it was stopped, as tables do.
    """

    name: str
    command: list[str]
    resumes: bool = False


def tasks(seeds: int, tiny: bool) -> list[Task]:
    """Return what is to be done, in order."""
    pairs = [(model, dtype) for model in MODELS for dtype in DTYPES]
    cost = ["--rounds=30"]
    torch = ["--rounds=10", "--repeats=10"]
    # Few checkpoints: one is saved at the end of a slice anyway.
    table = [f"--config.num_seeds={seeds}", "--config.model.dtype=bfloat16",
             "--config.checkpoint_every=10.0", "--config.writers=()"]  # fmt: skip
    rows = {"cifar10_lt": [], "cifar10_noisy": []}
    if tiny:
        pairs = [("wrn_10_1", "float32")]
        cost, torch = ["--batch=8", "--rounds=1", "--sites", "group3"], ["--batch=8", "--rounds=1"]
        table = ["--config.num_seeds=2", "--config.model.name=resnet_8", "--config.epochs=2",
                 "--config.batch_size=32", "--config.checkpoint_every=0.5",
                 "--config.writers=()"]  # fmt: skip
        # Those that the state treats differently: trained, evaluated from another's checkpoints.
        rows = {"cifar10_lt": ["--methods=erm,post_hoc_logit_adjustment,lpa"],
                "cifar10_noisy": ["--methods=erm,lpg"]}  # fmt: skip
    found = [
        _benchmark("step_cost", f"step_cost_{model}_{dtype}", model, dtype, cost)
        for model, dtype in pairs
    ]
    # It has wide residual networks alone.
    found += [
        _benchmark("against_pytorch", f"against_pytorch_{model}_{dtype}", model, dtype, torch)
        for model, dtype in pairs
        if model.startswith("wrn")
    ]
    for name in TABLES:
        words = [f"--table={name}", f"--workdir={name}", f"--config.dataset=npz:{DATA}"]
        command = ["-m", "lpa_jax.table", *words, *table, *rows[name]]
        found.append(Task(name, command, resumes=True))
    return found


def _benchmark(script: str, name: str, model: str, dtype: str, words: list[str]) -> Task:
    path = str(ROOT / "benchmarks" / f"{script}.py")
    return Task(name, [path, f"--model={model}", f"--dtype={dtype}", *words, f"--out={name}.json"])


# --- The state: all that the next slice needs, in a few files. ------------------------------------


def newest(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of the newest whole state in a folder, in order; none if there is none."""
    found: dict[int, dict[int, pathlib.Path]] = {}
    for path in folder.glob("state*"):
        if named := re.fullmatch(r"state(\d+)\.(\d+)of(\d+)", path.name):
            number, part, parts = map(int, named.groups())
            found.setdefault(number, dict.fromkeys(range(1, parts + 1)))[part] = path
    whole = [number for number, paths in found.items() if all(paths.values())]
    return list(found[max(whole)].values()) if whole else []


def load(folder: pathlib.Path, work: pathlib.Path) -> dict:
    """Unpack the newest state of a folder into the work directory, and return what it says."""
    paths = newest(folder)
    if not paths:
        raise SystemExit(
            f"There is no whole state in {folder}: give the folder that the last slice left, or "
            "leave --state out in the first slice."
        )
    packed = io.BytesIO(b"".join(path.read_bytes() for path in paths))
    try:
        with tarfile.open(fileobj=packed, mode="r:gz") as archive:
            archive.extractall(work, filter="data")
        return json.loads((work / "state.json").read_text())
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise SystemExit(
            f"The state in {folder} is damaged ({error}): copy it again, or give that of the slice "
            "before."
        ) from error


def save(state: dict, work: pathlib.Path, out: pathlib.Path) -> None:
    """Write the work directory as files of at most `PART_BYTES`, in place of those before."""
    state["saved"] += 1
    (work / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in sorted(work.rglob("*")):
            if path != work / DATA:
                archive.add(path, path.relative_to(work), recursive=False)
    content = packed.getvalue()
    starts = range(0, len(content), PART_BYTES)
    out.mkdir(parents=True, exist_ok=True)
    former = list(out.glob("state*of*"))
    for part, start in enumerate(starts, 1):
        path = out / f"state{state['saved']:06}.{part}of{len(starts)}"
        path.write_bytes(content[start : start + PART_BYTES])
    for path in former:
        path.unlink()
    print(
        f"The state is in {out}: {len(starts)} files, {len(content) / 2**20:.1f} MiB.", flush=True
    )


def prune(work: pathlib.Path) -> None:
    """Remove the checkpoints that no later slice reads.

    That leaves the newest of each seed that is not finished, and of rows whose networks another row
    evaluates.
    """
    from lpa_jax.tables import catalogue, runs

    for name in TABLES:
        rows = catalogue.TABLES[name].rows.items()
        read = {runs.directory(row, about) for row, about in rows if about.post_hoc is not None}
        for folder in (work / name).glob("*/seed*/checkpoints"):
            row, seed = folder.parent.parent.name, folder.parent
            kept = row in read or not (seed / "result.json").exists()
            steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
            for path in folder.iterdir():
                if not (kept and steps and path.name == str(steps[-1])):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- A slice. -------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Do what a slice has time for, and return its exit code."""
    end = time.monotonic() + 60 * args.minutes
    if newest(args.out) and (args.state is None or args.out.resolve() != args.state.resolve()):
        raise SystemExit(
            f"{args.out} holds a state already: continue it by --state={args.out}, or give --out "
            "another folder."
        )
    if args.data is not None and not args.data.is_file():
        raise SystemExit(f"There is no file {args.data}: make it by `run.py unpack`.")
    from lpa_jax.training import provenance

    # What a slice is of must not differ from what the others are of.
    ours = {"code": provenance.of_code(), "tiny": args.tiny}
    state = {**ours, "saved": 0, "finished": {}, "failed": {}}
    with tempfile.TemporaryDirectory(prefix="lpa_jax_gpu_") as place:
        work = pathlib.Path(place)
        if args.state is not None:
            state = load(args.state, work)
        for key, remedy in (("code", "use the commit that it was made with"),
                            ("tiny", "a rehearsal needs a state of its own")):  # fmt: skip
            if state[key] != ours[key]:
                raise SystemExit(
                    f"The state in {args.state} has {key} {state[key]}, not {ours[key]}: {remedy}."
                )
        if args.retry:
            state["failed"] = {}
        if args.tiny and args.data is None:
            random_data(work / DATA)
        elif args.data is not None:
            (work / DATA).symlink_to(args.data.resolve())
        if not args.tiny:
            check_gpu()
        everything = tasks(args.seeds, args.tiny)
        hindered = hindrances(everything, work / DATA)
        # A tenth of the slice is for saving, the first half of it for what was running.
        part = Slice(work, end - 6 * args.minutes, 3 * args.minutes, args.tiny)
        signal.signal(signal.SIGTERM, part.stop)
        for task in everything:
            if not part.over and why_not(task, state, hindered) is None:
                attempt(task, state, part, args.minutes)
                prune(work)
                save(state, work, args.out)
        if not part.ran:
            save(state, work, args.out)
        print(report(everything, state, hindered, work), flush=True)
    told = [why_not(task, state, hindered) or "left" for task in everything]
    if any(re.match("left(?! out)", words) for words in told):
        print("Another slice is needed: give it this one's --out as --state.", flush=True)
        return LEFT
    return 1 if any(words.startswith("failed") for words in told) else 0


class Slice:
    """The time of this slice, which SIGTERM ends too.

    Attributes:
      work: Its work directory.
      ran: Whether it has run anything.
      stopped: Whether SIGTERM came.
    """

    def __init__(self, work: pathlib.Path, stop_at: float, grace: float, tiny: bool = False):
        """Begin; `grace` is how many seconds what is stopped has to save."""
        self.work, self.stop_at, self.grace = work, stop_at, grace
        self.ran = self.stopped = False
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if tiny:
            # Most of a rehearsal is compilation.
            self.environment.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

    def stop(self, *_) -> None:
        """End it, as a handler of signals does."""
        self.stopped = True

    @property
    def over(self) -> bool:
        """Whether it is time to save."""
        return self.stopped or time.monotonic() >= self.stop_at

    def run(self, command: list[str], log: pathlib.Path) -> tuple[int, bool]:
        """Run a command with Python, and return its exit code, and whether it was asked to stop."""
        self.ran = True
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=self.work, env=self.environment, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        while process.poll() is None and not self.over:
            time.sleep(0.2)
        asked = process.poll() is None
        if asked:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.grace)
        # Also what it started itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait(), asked


def attempt(task: Task, state: dict, part: Slice, minutes: float) -> None:
    """Run a task, and put into the state how that ended."""
    print(f"{task.name} begins.", flush=True)
    whole, began = not part.ran, time.monotonic()
    log = part.work / "logs" / f"{task.name}.log"
    code, asked = part.run(task.command, log)
    seconds = round(time.monotonic() - began)
    if code == 0:
        state["finished"][task.name] = {"command": task.command, "seconds": seconds}
    elif asked and code in (LEFT, -signal.SIGTERM, -signal.SIGKILL):
        # What cannot resume and had all the time there is would take it again, and again.
        if whole and not task.resumes and not part.stopped:
            state["failed"][task.name] = (
                f"it did not end in a slice of {minutes:g} minutes: give --retry and more --minutes"
            )
    elif code != LEFT:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        told = lines[-1] if lines else "it printed nothing"
        state["failed"][task.name] = f"code {code}, {told!r:.300}: mend that and give --retry"
    ended = state["failed"].get(task.name) or ("finished" if code == 0 else "stopped")
    print(f"{task.name}: {ended} after {seconds} s.", flush=True)


def why_not(task: Task, state: dict, hindered: dict[str, str]) -> str | None:
    """Return why a task is not to be run now; None if it is."""
    done = state["finished"].get(task.name)
    # Where the clone is may differ between machines.
    if done and done["command"][1:] == task.command[1:]:
        return "finished"
    if task.name in state["failed"]:
        return f"failed: {state['failed'][task.name]}"
    return hindered.get(task.name)


def hindrances(everything: list[Task], data: pathlib.Path) -> dict[str, str]:
    """Return what some tasks lack on this machine, by their names."""
    found = {}
    for task in everything:
        if task.name.startswith("against_pytorch") and importlib.util.find_spec("torch") is None:
            found[task.name] = "left out: PyTorch is not installed here"
        if task.name in TABLES and (lacked := lacks(task, data)):
            found[task.name] = lacked
    return found


def lacks(task: Task, data: pathlib.Path) -> str | None:
    """Return what the data lack for a table; None if they lack nothing."""
    if not data.is_file():
        return "left, needs --data"
    with np.load(data) as file:
        # A file that was not unpacked from packs has all images.
        if "present" not in file.files or (present := file["present"]).all():
            return None
    absent = int(np.count_nonzero(~present[used(task, data)]))
    return f"left, needs {absent} more images: unpack the other packs" if absent else None


def used(task: Task, data: pathlib.Path) -> np.ndarray:
    """Return which images a table reads, as indices of the training and then the test images.

    The choice depends on the labels alone, so that the other images may be missing.
    """
    from lpa_jax import commands
    from lpa_jax import data as library
    from lpa_jax.tables import catalogue, runs

    _, changes = commands.changes([*task.command, f"--config.dataset=npz:{data}"])
    seeds = changes.pop("num_seeds")
    table = catalogue.TABLES[task.name]
    protocol = runs.Protocol(seeds, changes.pop("epochs", None), changes)
    config, _ = runs.configure(table, next(iter(table.rows.values())), protocol)
    loaded = library.load(
        config.dataset, validation_fraction=config.validation_fraction, seed=config.data_seed
    )
    modified = library.modify(
        loaded, dict(config.imbalance), dict(config.noise), seed=config.data_seed
    )
    tests = len(loaded.source_labels) + np.arange(len(modified.splits["test"]))
    return np.sort(np.concatenate([*modified.index.values(), tests]))


def check_gpu() -> None:
    """Refuse to measure on anything but a GPU; another process asks, which then frees it."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    backend = done.stdout.strip()
    if backend != "gpu":
        raise SystemExit(
            f"JAX sees no GPU here ({backend or done.stderr.strip()[-300:]}): install JAX with "
            "CUDA, such as jax[cuda13], or rehearse with --tiny."
        )


def report(
    everything: list[Task], state: dict, hindered: dict[str, str], work: pathlib.Path
) -> str:
    """Return a table of what is finished and what is left."""
    width = max(len(task.name) for task in everything)
    lines = []
    for task in everything:
        told = why_not(task, state, hindered) or "left"
        if told == "finished":
            told += f", {state['finished'][task.name]['seconds']} s in its last slice"
        lines.append(f"{task.name:{width}}  {told}")
        if task.name in TABLES and told.startswith("left"):
            lines += [f"{'':{width}}  {found}" for found in progress(work / task.name)]
    return "\n".join(lines)


def progress(table: pathlib.Path) -> list[str]:
    """Return how far each row of a table that was begun is, in words."""
    found = []
    for row in sorted({seed.parent for seed in table.glob("*/seed*")}):
        seeds = len(list(row.glob("seed*/result.json")))
        words = f"{row.name}: {seeds} seeds finished"
        for checkpoint in row.glob("seed*/checkpoints/*"):
            seed = checkpoint.parent.parent
            if checkpoint.name.isdigit() and not (seed / "result.json").exists():
                words += f", {seed.name} at step {checkpoint.name}"
        found.append(words)
    return found


# --- Images, in packs that are small enough to send. ----------------------------------------------


def random_data(path: pathlib.Path) -> None:
    """Write a small data set for a rehearsal, the same each time."""
    rng = np.random.default_rng(0)
    labels = np.arange(1000) % 10
    images = rng.integers(0, 256, (1000, 8, 8, 3), np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images[:50], y_test=labels[:50])


def pack(data: pathlib.Path, out: pathlib.Path) -> None:
    """Write the images as packs of at most `PACK_BYTES`; the long tail needs the first alone."""
    from PIL import Image

    if any(out.glob("pack*")):
        raise SystemExit(f"{out} holds packs already: remove them, or give --out another folder.")
    with np.load(data) as file:
        if "present" in file.files and not file["present"].all():
            raise SystemExit(f"{data} lacks images itself: give the file with all of them.")
        images = np.concatenate([file["x_train"], file["x_test"]])
        labels = {name: file[name] for name in LABELS if name in file.files}
    if images.ndim != 4 or images.shape[3] != 3:
        raise SystemExit(f"{data} has images of shape {images.shape[1:]}: give RGB, [H, W, 3].")
    (tail,) = (task for task in tasks(1, False) if task.name == "cifar10_lt")
    first = used(tail, data)
    rest = np.setdiff1d(np.arange(len(images)), first)
    packs: list[list[tuple[np.ndarray, bytes]]] = []
    for indices in (first, rest):
        shards: list[tuple[np.ndarray, bytes]] = []
        for start in range(0, len(indices), SHARD):
            index, shard = indices[start : start + SHARD], io.BytesIO()
            # The pixels are kept exactly.
            Image.fromarray(mosaic(images[index])).save(shard, "webp", lossless=True, quality=80)
            size = sum(len(content) for _, content in shards) + len(shard.getvalue())
            if not shards or size > PACK_BYTES:
                shards = []
                packs.append(shards)
            shards.append((index, shard.getvalue()))
    for number, shards in enumerate(packs):
        folder = out / f"pack{number}"
        folder.mkdir(parents=True)
        for place, (_, content) in enumerate(shards):
            (folder / f"{place:03}.webp").write_bytes(content)
        index = np.concatenate([index for index, _ in shards])
        np.savez_compressed(folder / "labels.npz", index=index, shape=images.shape, **labels)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {len(index)} images, {size / 2**20:.1f} MiB")


def unpack(packs: list[pathlib.Path], data: pathlib.Path) -> None:
    """Put the images of packs into an npz file, beside those that are there; the others are 0."""
    from PIL import Image

    images, labels = None, {}
    if data.exists():
        with np.load(data) as file:
            labels = {name: file[name] for name in file.files}
        if "present" not in labels:
            raise SystemExit(f"{data} has all images already: remove it, or give --data another.")
        images = np.concatenate([labels.pop("x_train"), labels.pop("x_test")])
        present = labels.pop("present")
    for folder in packs:
        if not (folder / "labels.npz").is_file():
            raise SystemExit(f"{folder} holds no pack: give folders that `run.py pack` wrote.")
        with np.load(folder / "labels.npz") as file:
            told = {name: file[name] for name in LABELS if name in file.files}
            index, shape = file["index"], tuple(file["shape"])
        if images is None:
            images, present, labels = np.zeros(shape, np.uint8), np.zeros(shape[0], bool), told
        same = labels.keys() == told.keys() and images.shape == shape
        if not same or not all(np.array_equal(labels[name], told[name]) for name in told):
            raise SystemExit(f"{folder} is of other data than {data}: remove that and try again.")
        paths = sorted(folder.glob("*.webp"))
        if len(paths) != -(-len(index) // SHARD):
            raise SystemExit(f"{folder} lacks some of its WebP files: copy it again.")
        for place, path in enumerate(paths):
            shard = index[SHARD * place : SHARD * (place + 1)]
            with Image.open(path) as image:
                images[shard] = tiles(np.asarray(image.convert("RGB")), *shape[1:3])[: len(shard)]
        present[index] = True
    train = len(labels["y_train"])
    partial = data.with_name(f"{data.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, x_train=images[:train], x_test=images[train:], present=present, **labels)
    partial.replace(data)
    print(f"{data} has {np.count_nonzero(present)} of {len(present)} images.")


def mosaic(images: np.ndarray) -> np.ndarray:
    """Return images `[N, H, W, C]` side by side, `COLUMNS` in a row, the last row filled with 0."""
    n, h, w, c = images.shape
    lines = -(-n // COLUMNS)
    padded = np.zeros((lines * COLUMNS, h, w, c), np.uint8)
    padded[:n] = images
    grid = padded.reshape(lines, COLUMNS, h, w, c).swapaxes(1, 2)
    return grid.reshape(lines * h, COLUMNS * w, c)


def tiles(grid: np.ndarray, h: int, w: int) -> np.ndarray:
    """Return the images of a mosaic, those that filled it too."""
    lines, columns = grid.shape[0] // h, grid.shape[1] // w
    return grid.reshape(lines, h, columns, w, -1).swapaxes(1, 2).reshape(lines * columns, h, w, -1)


# --- The results. ---------------------------------------------------------------------------------


def collect(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Copy the results of a state to where they are committed, and say which commit they are of."""
    from lpa_jax.training import provenance

    with tempfile.TemporaryDirectory() as place:
        work = pathlib.Path(place)
        state = load(folder, work)
        if state["code"] != provenance.of_code():
            raise SystemExit(
                f"The results in {folder} are of other code (fingerprint {state['code']}): collect "
                "them in a clone at the commit that they were made with."
            )
        for path in [*work.glob("*_*.json"), *work.glob("*/table.*")]:
            target = out / path.relative_to(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            print(target)
        # The machine may have no git repository to ask.
        about = {"commit": provenance.commit(), **state}
        (out / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", default="run",
                        choices=["run", "pack", "unpack", "collect"])  # fmt: skip
    parser.add_argument("packs", nargs="*", type=pathlib.Path, help="Folders to unpack.")
    parser.add_argument("--state", type=pathlib.Path, help="Folder that the last slice left.")
    parser.add_argument("--out", type=pathlib.Path, help="Folder to write to.")
    parser.add_argument("--data", type=pathlib.Path, help="CIFAR-10, x_train, y_train, ... as npz.")
    parser.add_argument("--minutes", type=float, default=9.5, help="Of the slice, all included.")
    parser.add_argument("--seeds", type=int, default=5, help="Of each row of the tables.")
    parser.add_argument("--retry", action="store_true", help="Try again what failed.")
    parser.add_argument("--tiny", action="store_true", help="Rehearse with tiny settings.")
    args = parser.parse_args()
    if args.action == "collect" and args.out is None:
        args.out = ROOT / "benchmarks" / "results" / "gpu"
    needed = {"run": ("out",), "pack": ("data", "out"), "unpack": ("data", "packs"),
              "collect": ("state",)}  # fmt: skip
    for name in needed[args.action]:
        if not getattr(args, name):
            told = "folders of packs" if name == "packs" else f"--{name}"
            parser.error(f"{args.action} needs {told}")
    if args.packs and args.action != "unpack":
        parser.error(f"what is {args.packs[0]}? Only unpack takes folders")
    if args.action == "pack":
        pack(args.data, args.out)
    elif args.action == "unpack":
        unpack(args.packs, args.data)
    elif args.action == "collect":
        collect(args.state, args.out)
    else:
        return run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
