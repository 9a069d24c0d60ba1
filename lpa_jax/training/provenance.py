"""What a result came of: data, code and configuration by fingerprint, commit, device, versions."""

import ast
from collections.abc import Callable, Mapping, Sequence
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import subprocess
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

import lpa_jax
from lpa_jax import data
from lpa_jax.training import records
from lpa_jax.training.config import Config, ConfigError, flat

Session = dict[str, Any]
"""`"data"`, `"code"`, `"configuration"` (fingerprints), `"epochs"`, `"commit"`, `"device"`,
`"versions"`; where it is recorded also `"from_step"`, the step of the seed it went on from."""
FINGERPRINTS = ("data", "code", "configuration")
PACKAGE = pathlib.Path(lpa_jax.__file__).parent
TRAINER = "lpa_jax.training.loop"


def fingerprints(config: Config, dataset: data.Dataset) -> Session:
    """Return what decides whether results may be pooled, and the commit."""
    return {
        "data": of_data(dataset),
        "code": of_code(),
        "configuration": of_config(config.to_dict()),
        "epochs": config.epochs,
        "commit": commit(),
    }


def session(config: Config, dataset: data.Dataset, devices: Mesh) -> Session:
    """Return what is recorded of training that begins now, the same in all processes.

    Raises:
      ConfigError: If the processes do not have the same data, code and configuration.
    """
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    versions = {package: importlib.metadata.version(package) for package in packages}
    ours = fingerprints(config, dataset) | {
        "device": f"{devices.size} x {jax.devices()[0].device_kind}",
        "versions": {"lpa_jax": lpa_jax.__version__, "python": platform.python_version()}
        | versions,
    }
    if jax.process_count() == 1:
        return ours
    first = _from_first(ours)
    same = np.array([first[name] == ours[name] for name in FINGERPRINTS])
    same = multihost_utils.process_allgather(same).reshape(-1, len(FINGERPRINTS)).all(axis=0)
    if not same.all():
        differing = [name for name, equal in zip(FINGERPRINTS, same, strict=True) if not equal]
        raise ConfigError(
            f"The processes of this run differ in their {' and '.join(differing)}: give all of "
            "them the same."
        )
    return first


def of_data(dataset: data.Dataset) -> str:
    """Return a fingerprint of what is trained on and judged by: images, labels and classes.

    Example:
      >>> digits = data.load("digits")
      >>> of_data(digits) == of_data(data.load("digits"))
      True
      >>> of_data(digits) == of_data(digits._replace(test=digits.validation))
      False
    """
    digest = hashlib.blake2b(digest_size=16)
    # Mean and deviation are of the whole source, of which `train` may be a part.
    digest.update(json.dumps([dataset.class_names, dataset.mean, dataset.std]).encode())
    for examples in (dataset.train, dataset.validation, dataset.test):
        for array in examples:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


# Once a process: what is edited while it runs is not what it runs.
@functools.cache
def of_code(package: pathlib.Path = PACKAGE) -> str:
    """Return a fingerprint of the modules of `lpa_jax` that training imports.

    These are found from the import statements, so that it does not matter what else the process
    has imported: the same run from `lpa_jax.main`, `lpa_jax.table` or a notebook has the same code.

    Args:
      package: Directory of the package.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, content in sorted(_imported(package).items()):
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _imported(package: pathlib.Path) -> dict[str, bytes]:
    """Return the source of each module that the trainer imports, directly or through others."""
    found: dict[str, bytes] = {}
    waiting = [TRAINER]
    while waiting:
        name = waiting.pop()
        top, *rest = name.split(".")
        path = package.joinpath(*rest)
        is_package = path.is_dir()
        path = path / "__init__.py" if is_package else path.with_suffix(".py")
        # What is imported from a module is a module of its own, or a name in it.
        if top != "lpa_jax" or name in found or not path.is_file():
            continue
        found[name] = path.read_bytes()
        parent = name.rpartition(".")[0]
        waiting.append(parent)
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origin = "." * node.level + (node.module or "")
                origin = importlib.util.resolve_name(origin, name if is_package else parent)
                waiting += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return found


def of_config(config: Mapping[str, Any]) -> str:
    """Return a fingerprint of a configuration, without the keys that are free to differ.

    Example:
      >>> of_config({"epochs": 2, "num_seeds": 1}) == of_config({"epochs": 2.0, "num_seeds": 5})
      True
    """
    # 1 and 1.0 are the same configuration, and so are tuples and lists.
    entries = flat(json.loads(json.dumps(config), parse_int=float))
    counted = {key: value for key, value in entries.items() if key not in records.FREE}
    text = json.dumps(counted, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@functools.cache
def commit() -> str | None:
    """Return the git commit of the package, `-dirty` behind it if files differ; None without."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(PACKAGE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # An installed package may lie in the repository of something else.
        if git("ls-files", "--error-unmatch", "__init__.py") is None:
            return None
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except OSError:
        return None
    return f"{head}-dirty" if head and changed else head


def standing(
    workdir: pathlib.Path,
    config: Config,
    ours: Session,
    num_steps: int,
    *,
    allow_change: bool = False,
) -> tuple[list[int], list[int]]:
    """Find how far each seed of a run is, and that it can be pooled with what is made now.

    Nothing is written. Of a finished seed whose configuration is allowed to change, only the epochs
    can be raised; it then goes on from its last checkpoint.

    Args:
      workdir: Directory of the run.
      config: Its configuration.
      ours: From `session`, or the `fingerprints` alone.
      num_steps: Steps of the whole run.
      allow_change: Whether the run of another configuration may go on with this one.

    Returns:
      The seeds that are finished, and those that go on from a checkpoint.

    Raises:
      ConfigError: If a seed came of other data, other code, or another configuration that was not
        allowed to change, does not record what it came of, or has taken more steps than these.
    """
    finished, resumed = [], []
    with records.serving(workdir):
        change = records.config_change(workdir, config.to_dict(), allow_change=allow_change)
        allowed = allow_change or (workdir / "config.json").exists()
        for seed in range(config.seed, config.seed + config.num_seeds):
            directory, ended = workdir / f"seed{seed}", False
            found = (directory / "checkpoints").glob("*")
            last_step = max((int(path.name) for path in found if path.name.isdigit()), default=0)
            result_path = directory / "result.json"
            if result_path.exists():
                last = recorded(result_path, "seed", "test_accuracy", "perturbation")
                before = {**config.to_dict(), "epochs": last["epochs"]}
                longer = config.epochs > last["epochs"]
                longer = longer and of_config(before) == last["configuration"]
                _refuse(directory, last, ours, change, allowed and longer and last_step > 0)
                ended = last["configuration"] == ours["configuration"]
            elif not last_step:
                continue
            if not ended:
                _refuse(directory, recorded(directory / "sessions.json"), ours, change, allowed)
            if last_step > num_steps:
                raise ConfigError(
                    f"{directory} has taken {last_step} steps, but this configuration has "
                    f"{num_steps}: give config.epochs more."
                )
            (finished if ended else resumed).append(seed)
    return finished, resumed


def recorded(path: pathlib.Path, *keys: str) -> Session:
    """Return the last session that `result.json` or `sessions.json` names.

    Raises:
      ConfigError: If the file is damaged, lacks one of `keys`, or names no session.
    """
    sessions = _sessions(path, *keys)
    if not sessions:
        raise ConfigError(
            f"{path.parent} does not record the data and the code it came of, so that nothing can "
            "be pooled with it: give --workdir another directory, or remove that one."
        )
    return sessions[-1]


def _sessions(path: pathlib.Path, *keys: str) -> list[Session]:
    """Return the sessions that a file names, none if there is no file."""
    sessions = records.read_json(path, *keys).get("sessions", []) if path.exists() else []
    wanted = {*FINGERPRINTS, "epochs", "from_step"}
    if not isinstance(sessions, list) or not all(
        isinstance(made, dict) and wanted <= set(made) for made in sessions
    ):
        raise ConfigError(
            f"{path} is damaged: its sessions are no list of {', '.join(sorted(wanted))}. Restore "
            f"it, or remove {path.parent}."
        )
    return sessions


def _refuse(
    directory: pathlib.Path,
    old: Session,
    new: Session,
    change: Mapping[str, Any],
    config_may_differ: bool,
) -> None:
    """Raise `ConfigError` if a seed came of anything that may not differ, naming all of it."""
    differing = [name for name in FINGERPRINTS if old.get(name) != new[name]]
    if not differing or (config_may_differ and differing == ["configuration"]):
        return
    told = []
    for name in differing:
        was, here = (f"{made.get(name)}"[:8] for made in (old, new))
        if name == "configuration" and change:
            told.append(f"another configuration ({records.in_words(change)})")
        elif name == "configuration":
            told.append(f"another configuration (fingerprint {was} instead of {here})")
        else:
            commits = [made.get("commit") for made in (old, new)]
            if name == "code" and any(commits):
                was, here = (
                    f"{fingerprint} at commit {made or 'unknown'}"
                    for fingerprint, made in zip((was, here), commits, strict=True)
                )
            told.append(f"other {name} (fingerprint {was} instead of {here})")
    hints = {
        "data": "Or restore the data.",
        "code": "Or use the code it was made with: a git worktree fixed at one commit lets a long "
        "measurement go on while the code changes.",
        "configuration": "Of a finished seed only config.epochs can be changed, to more, with "
        "--allow_config_change and its checkpoints.",
    }
    hinted = [hints[name] for name in differing if name != "configuration" or not config_may_differ]
    raise ConfigError(
        f"{directory} came of {' and '.join(told)}. Results of both are not pooled: give --workdir "
        f"another directory, or remove {directory}. {' '.join(hinted)}"
    )


def check_judged(directories: Sequence[pathlib.Path], dataset: data.Dataset) -> None:
    """Raise `ConfigError` unless seeds came of these data, and all of the same code.

    Args:
      directories: Of the seeds.
      dataset: What they are to be judged by.
    """
    made = [recorded(directory / "sessions.json") for directory in directories]
    fingerprint = of_data(dataset)
    for directory, last in zip(directories, made, strict=True):
        wanted = {**made[0], "data": fingerprint, "configuration": last["configuration"]}
        _refuse(directory, last, wanted, {}, True)


def begin(directory: pathlib.Path, ours: Session, step: int) -> list[Session]:
    """Record in `sessions.json` that a session takes a seed on from a step.

    Returns:
      All sessions that the seed came of, in order; those alike in succession are one.

    Raises:
      ConfigError: If what is there is damaged.
      WriteError: If it cannot be written.
    """
    path = directory / "sessions.json"
    sessions = _sessions(path)
    # Nothing is left of what was done after the checkpoint that is gone on from.
    sessions = [made for made in sessions if made["from_step"] < step]
    if not sessions or sessions[-1] != {"from_step": sessions[-1]["from_step"], **ours}:
        sessions.append({"from_step": step, **ours})
    with records.writing(str(path)):
        directory.mkdir(parents=True, exist_ok=True)
        records.write_json(path, {"sessions": sessions})
    return sessions


def by_first(decide: Callable[[], Any]) -> Any:
    """Return in every process what `decide` returns in the first, as JSON, or raise its error.

    Raises:
      ConfigError: If the first process does.
      WriteError: Likewise.
    """
    if jax.process_count() == 1:
        return decide()
    told: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            told["value"] = decide()
        except (ConfigError, records.WriteError) as error:
            # The others wait for what the first has to say, its errors too.
            told = {"error": str(error), "full": isinstance(error, records.WriteError)}
    told = _from_first(told)
    if "error" in told:
        raise (records.WriteError if told["full"] else ConfigError)(told["error"])
    return told["value"]


def _from_first(value: Any) -> Any:
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # All must give as much; what the others have is not looked at.
    sent = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    return json.loads(np.asarray(sent, np.uint8).tobytes())
