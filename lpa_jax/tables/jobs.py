"""The runs of a table in processes of their own: several at once here, or on a Slurm cluster."""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time
from typing import Any, NamedTuple

from rich.console import Console

from lpa_jax import data
from lpa_jax.tables import runs, tuning
from lpa_jax.tables.catalogue import Table
from lpa_jax.training import display, fit, loop, progress
from lpa_jax.training.config import ConfigError
from lpa_jax.training.files import replace_text, writing

PAUSE = 0.2
"""Seconds between looks at the processes."""


class Job(NamedTuple):
    """One run of a table.

    Attributes:
      row: Name of the directory of its row.
      kind: `"seed"`, or `"trial"` of a search.
      number: Of the seed or the trial.
    """

    row: str
    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.row}/{self.kind}{self.number}"


def job(name: str) -> Job:
    """Return the job of a name.

    Raises:
      ConfigError: If it is none.

    Example:
      >>> job("lpa/seed2")
      Job(row='lpa', kind='seed', number=2)
    """
    found = re.fullmatch(r"(?P<row>.+)/(?P<kind>seed|trial)(?P<number>\d+)", name)
    if found is None:
        raise ConfigError(f"{name!r} is no run of a table: give ROW/seedN or ROW/trialN.")
    return Job(found["row"], found["kind"], int(found["number"]))


def seeds(table: Table, protocol: runs.Protocol, workdir: pathlib.Path) -> list[Job]:
    """Return the seeds that are not trained.

    The directory of each row is claimed for it, so that its seeds can be trained at once.

    Raises:
      ConfigError: As `runs.build_all`.
      DataError: If the data cannot be read.
    """
    found: dict[Job, None] = {}
    for name, (parts, _) in runs.build_all(table, protocol, workdir).items():
        # Rows that share their networks share the directory.
        place = workdir / runs.directory(name, table.rows[name])
        loop.claim(parts, place)
        for seed in parts.plan.seeds:
            if not (place / f"seed{seed}" / "result.json").exists():
                found[Job(place.name, "seed", seed)] = None
    return list(found)


def trials(table: Table, protocol: runs.Protocol, number: int, workdir: pathlib.Path) -> list[Job]:
    """Return the trials that have not ended of searches of so many.

    Raises:
      ConfigError: As `tuning.begin`.
      DataError: If the data cannot be read.
    """
    tuning.mend(workdir)
    searches = tuning.begin(table, protocol, workdir)
    return [
        Job(name, "trial", trial)
        for name, search in searches.items()
        for trial in search.left(number)
    ]


def run_one(
    one: Job, table: Table, protocol: runs.Protocol, number: int, workdir: pathlib.Path,
    console: Console,
) -> None:  # fmt: skip
    """Train one run of a table, what a process of its own does.

    Args:
      one: The run.
      table: The table.
      protocol: What all its runs have in common.
      number: Of the trials of each search; 0 for the defaults.
      workdir: Directory of the table.
      console: Where to print.

    Raises:
      ConfigError: If the table has no such run.
    """
    rows = {name: row for name, row in table.rows.items() if runs.directory(name, row) == one.row}
    if not rows:
        raise ConfigError(f"The table has no row {one.row!r} to run {one} of.")
    # Rows that share their networks are one here.
    name, row = next(iter(rows.items()))
    with data.loaded_once():
        if one.kind == "trial" or number:
            alone = table._replace(rows={name: row})
            (search,) = tuning.begin(alone, protocol, workdir / "tuning").values()
            if one.kind == "trial":
                if one.number in search.left(one.number + 1):
                    search.attempt(one.number, console)
                return
            if left := search.left(number):
                raise ConfigError(f"{one} needs trial {left[0]} of {one.row}, which has not ended.")
            told = search.run(number, Console(quiet=True), progress.Left(), 0)
            row = row._replace(changes={**row.changes, **told["chosen"]})
        table = table._replace(rows={name: row})
        home = runs.home(workdir, number)
        ((parts, _),) = runs.build_all(table, protocol, home).values()
        if one.number not in parts.plan.seeds:
            raise ConfigError(f"{one} is no run of the table: give --config.num_seeds more.")
        seed = range(one.number, one.number + 1)
        parts = parts._replace(plan=parts.plan._replace(seeds=seed))
        loop.train_seeds(parts, home / one.row, console)


class Place(NamedTuple):
    """Where a process runs.

    Attributes:
      name: For people.
      cores: The processor cores that it is bound to.
      variables: Of its environment.
    """

    name: str
    cores: frozenset[int]
    variables: Mapping[str, str] = {}


def places(number: int | None) -> list[Place]:
    """Return where so many processes run at once; None for as many as there are GPUs, or cores.

    On a machine with NVIDIA GPUs each process has one of them, else its share of the cores: a
    network on a CPU gains more from a second run than from a second core for the first.

    Raises:
      ConfigError: If there are fewer GPUs, or fewer cores, than processes.

    Example:
      >>> [place.name for place in places(1)]
      ['all cores']
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    gpus = _gpus()
    if number == 1:
        return [Place("all cores", frozenset(cores))]
    what = gpus or [str(core) for core in cores]
    number = len(what) if number is None else number
    if number > len(what):
        kind = "GPUs" if gpus else "cores"
        raise ConfigError(f"--jobs={number} needs as many {kind}, but there are {len(what)}.")
    shares = [frozenset(cores[i::number]) or frozenset(cores) for i in range(number)]
    if gpus:
        return [
            Place(f"GPU {gpu}", share, {"CUDA_VISIBLE_DEVICES": gpu})
            for gpu, share in zip(gpus, shares, strict=False)
        ]
    return [Place(f"cores {', '.join(map(str, sorted(share)))}", share) for share in shares]


def _gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, without touching them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [gpu for gpu in told.split(",") if gpu]
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu") or not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False
    )
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")]


class _Running(NamedTuple):
    process: subprocess.Popen
    job: Any
    place: Place
    log: pathlib.Path
    began: float


def run_all(
    jobs: Sequence[Any],
    command: Sequence[str],
    where: Sequence[Place],
    logs: pathlib.Path,
    console: Console,
) -> dict[Any, str]:
    """Run each job in a process of its own, as many at once as there are places.

    What a process prints is in a file of `logs`. One that fails is reported, and the others go on.

    Args:
      jobs: The runs, which `str` names.
      command: What runs one, with `--job=NAME` behind it.
      where: The places.
      logs: Directory of the files.
      console: Where to print.

    Returns:
      Why a run failed, by the run.

    Raises:
      PreemptedError: If this process was sent SIGTERM, after all processes have ended.
    """
    failed: dict[Any, str] = {}
    waiting, free, running = list(jobs), list(where), []
    with contextlib.ExitStack() as stack:
        with writing(str(logs)):
            logs.mkdir(parents=True, exist_ok=True)
        bar = stack.enter_context(progress.bar(console, "runs", len(jobs), unit="run"))
        stack.callback(_stop, running)
        came = []
        before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
        stack.callback(signal.signal, signal.SIGTERM, before)
        while (waiting or running) and not came:
            while waiting and free:
                running.append(_start(waiting.pop(0), free.pop(0), command, logs))
            ended = [one for one in running if one.process.poll() is not None]
            if not ended:
                time.sleep(PAUSE)
            for one in ended:
                running.remove(one)
                free.append(one.place)
                taken = f"in {progress.clock(time.monotonic() - one.began)} on {one.place.name}"
                if one.process.returncode == 0:
                    display.say(console, f"{one.job}: finished {taken}{_memory(one.log)}")
                else:
                    failed[one.job] = _why(one)
                    display.say(console, f"{one.job}: failed {taken}. {failed[one.job]}")
                bar.finished()
        if came:
            raise fit.PreemptedError("SIGTERM came; the runs that had begun are saved.")
    return failed


def _start(one: Any, place: Place, command: Sequence[str], logs: pathlib.Path) -> _Running:
    path = logs / f"{str(one).replace('/', '.')}.log"
    bound = hasattr(os, "sched_setaffinity")
    ours = os.sched_getaffinity(0) if bound else set()
    with path.open("w") as log:
        try:
            # A process inherits the cores of the thread that starts it; JAX has as many threads.
            if bound:
                os.sched_setaffinity(0, place.cores)
            process = subprocess.Popen(
                [*command, f"--job={one}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place.variables},
                # Ctrl-C is for this process, which stops the others in order.
                start_new_session=True,
            )
        finally:
            if bound:
                os.sched_setaffinity(0, ours)
    return _Running(process, one, place, path, time.monotonic())


def _stop(running: Iterable[_Running]) -> None:
    """Ask what still runs to save and end, and wait for it."""
    for one in running:
        one.process.send_signal(signal.SIGTERM)
    for one in running:
        one.process.wait()


MEMORY = "Peak memory: "


def tell_memory() -> None:
    """Print the most memory that this process had, as the last line of its log."""
    import resource

    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{MEMORY}{kibibytes / 2**20:.2f} GiB", flush=True)


def _memory(log: pathlib.Path) -> str:
    *_, last = log.read_text(errors="replace").splitlines() or [""]
    return f", {last.removeprefix(MEMORY)}" if last.startswith(MEMORY) else ""


def _why(one: _Running) -> str:
    """Return the last sentence of a process, or what ended it."""
    code = one.process.returncode
    if code < 0:
        told = f"It was ended by {signal.Signals(-code).name}"
        hint = "; if memory was short, give a smaller --jobs" if -code == signal.SIGKILL else ""
        return f"{told}{hint}. See {one.log}."
    lines = [line for line in one.log.read_text(errors="replace").splitlines() if line.strip()]
    sentence = lines[-1].removeprefix("lpa_jax: ") if lines else f"It ended with code {code}."
    return f"{sentence} See {one.log}."


SCRIPT = """\
#!/bin/bash
# One run of the table, by the number that Slurm gives it. Rerunning resumes what was interrupted.
cd {directory}
runs=({names})
exec {command} --job="${{runs[$SLURM_ARRAY_TASK_ID]}}"
"""


def slurm(
    stages: Sequence[tuple[str, Sequence[str]]],
    command: Sequence[str],
    options: Sequence[str],
    workdir: pathlib.Path,
) -> pathlib.Path:
    """Write the array scripts of a table for Slurm, and the script that submits them in order.

    Args:
      stages: A name and the names of the runs of each stage; a stage waits for the one before.
      command: What runs one, with `--job=NAME` behind it, and by itself collects the results.
      options: Of `sbatch`.
      workdir: Directory of the table.

    Returns:
      The path of the script that submits, `submit.sh`.

    Raises:
      WriteError: If they cannot be written.
    """
    home = workdir.absolute() / "slurm"
    words = shlex.join(command)
    lines = ["#!/bin/bash", "# Submits the runs of the table, and what collects their results.",
             "set -e", "after=()"]  # fmt: skip
    with writing(str(home)):
        home.mkdir(parents=True, exist_ok=True)
        for name, names in stages:
            script = SCRIPT.format(
                directory=shlex.quote(os.getcwd()), names=shlex.join(names), command=words
            )
            replace_text(home / f"{name}.sh", script)
            call = ["sbatch", "--parsable", *options, f"--array=0-{len(names) - 1}",
                    f"--output={home}/{name}.%a.log"]  # fmt: skip
            lines.append(
                f'id=$({shlex.join(call)} "${{after[@]}}" {shlex.quote(str(home / name))}.sh)'
            )
            # A run that fails keeps none of the others from being collected.
            lines.append('after=(--dependency="afterany:$id")')
        call = ["sbatch", *options, f"--output={home}/table.log", f"--wrap={words}"]
        lines.append(f'{shlex.join(call)} --chdir={shlex.quote(os.getcwd())} "${{after[@]}}"')
        replace_text(home / "submit.sh", "\n".join(lines) + "\n")
    return home / "submit.sh"
