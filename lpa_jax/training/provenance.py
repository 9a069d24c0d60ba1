"""What made a result: data, code and configuration by fingerprint, commit, device, versions."""

import ast
from collections.abc import Callable, Iterator, Mapping
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
from lpa_jax.training.config import ConfigError, flat, FREE
from lpa_jax.training.files import read_json, write_json, WriteError, writing

Session = dict[str, Any]
"""`"data"`, `"code"`, `"configuration"` (fingerprints), `"epochs"`, `"commit"`, `"device"`,
`"versions"`; where it is recorded also `"from_step"`, the step of the seed it went on from."""
FINGERPRINTS = ("data", "code", "configuration")
PACKAGE = pathlib.Path(lpa_jax.__file__).parent
TRAINER = "lpa_jax.training.loop"


def fingerprints(config: Mapping[str, Any], dataset: data.Dataset) -> Session:
    """Return what decides whether results may be pooled, and the commit."""
    return {
        "data": dataset.fingerprint(),
        "code": of_code(),
        "configuration": of_config(config),
        "epochs": config["epochs"],
        "commit": commit(),
    }


def session(config: Mapping[str, Any], dataset: data.Dataset, devices: Mesh) -> Session:
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
        for node in _executed(ast.parse(found[name])):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origin = "." * node.level + (node.module or "")
                origin = importlib.util.resolve_name(origin, name if is_package else parent)
                waiting += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return found


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and all below it, but for what only type checkers read."""
    yield node
    unread = []
    names = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    if isinstance(node, ast.If) and ast.unparse(node.test) in names:
        unread = node.body
    for child in ast.iter_child_nodes(node):
        if child not in unread:
            yield from _executed(child)


def of_config(config: Mapping[str, Any]) -> str:
    """Return a fingerprint of a configuration, without the keys that are free to differ.

    Example:
      >>> of_config({"epochs": 2, "num_seeds": 1}) == of_config({"epochs": 2.0, "num_seeds": 5})
      True
    """
    # 1 and 1.0 are the same configuration, and so are tuples and lists.
    entries = flat(json.loads(json.dumps(config), parse_int=float))
    counted = {key: value for key, value in entries.items() if key not in FREE}
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


def recorded(path: pathlib.Path, *keys: str) -> Session:
    """Return the last session that `result.json` or `sessions.json` names.

    Raises:
      ConfigError: If the file is damaged, lacks one of `keys`, or names no session.
    """
    sessions = _sessions(path, *keys)
    if not sessions:
        raise ConfigError(
            f"{path.parent} does not record the data and the code that made it, so that nothing "
            "can be pooled with it: give --workdir another directory, or remove that one."
        )
    return sessions[-1]


def _sessions(path: pathlib.Path, *keys: str) -> list[Session]:
    """Return the sessions that a file names, none if there is no file."""
    sessions = read_json(path, *keys).get("sessions", []) if path.exists() else []
    wanted = {*FINGERPRINTS, "epochs", "from_step"}
    if not isinstance(sessions, list) or not all(
        isinstance(made, dict) and wanted <= set(made) for made in sessions
    ):
        raise ConfigError(
            f"{path} is damaged: its sessions are no list of {', '.join(sorted(wanted))}. Restore "
            f"it, or remove {path.parent}."
        )
    return sessions


def begin(directory: pathlib.Path, ours: Session, step: int) -> list[Session]:
    """Record in `sessions.json` that a session takes a seed on from a step.

    Returns:
      All sessions that made the seed, in order; equal ones in succession are one.

    Raises:
      ConfigError: If what is there is damaged.
      WriteError: If it cannot be written.
    """
    path = directory / "sessions.json"
    sessions = _sessions(path)
    # What was done after the checkpoint that is resumed from is lost.
    sessions = [made for made in sessions if made["from_step"] < step]
    if not sessions or sessions[-1] != {"from_step": sessions[-1]["from_step"], **ours}:
        sessions.append({"from_step": step, **ours})
    with writing(str(path)):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, {"sessions": sessions})
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
        except (ConfigError, WriteError) as error:
            # The others wait for what the first has to say, its errors too.
            told = {"error": str(error), "full": isinstance(error, WriteError)}
    told = _from_first(told)
    if "error" in told:
        raise (WriteError if told["full"] else ConfigError)(told["error"])
    return told["value"]


def _from_first(value: Any) -> Any:
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # All must give as much; what the others have is not looked at.
    sent = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    return json.loads(np.asarray(sent, np.uint8).tobytes())
