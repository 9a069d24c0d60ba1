"""The command line: `python -m lpa_jax.main --config=digits:method=lpa --workdir=runs/digits`."""

import difflib
import os
import pathlib
import re
import sys
from typing import Any

# First: it says what is not installed.
from lpa_jax import commands

# isort: split
from absl import flags
import jax
from ml_collections import config_flags

from lpa_jax import configs
from lpa_jax.commands import fail, PRINT_CONFIG, sentences, TEMPORARY, UsageError, WORKDIR

flags.adopt_module_key_flags(commands)
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    f"The configuration: one of {', '.join(configs.FILES)}, or a FILE.py of your own; NAME:method="
    "METHOD,smoke chooses the method and a run of seconds. --config.KEY=VALUE after it sets one of "
    "its keys, such as --config.epochs=3, --config.perturbation.lpa.epsilon=0.1 or "
    "--config.model.options.width=8; "
    "--print_config shows all keys.",
    # What is set that is no key, the check below finds, and says it better.
    lock_config=False,
    accept_new_attributes=True,
)
# A name stands for the file of that name that comes with the package.
_PARSER: Any = flags.FLAGS["config"].parser
_PARSER.parse = lambda argument, parse=_PARSER.parse: parse(configs.resolve(argument))
_ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_config_change",
    False,
    "Let a run continue with another configuration, as far as its state fits; it is recorded.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of the first of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the processes that the cluster's environment names."
)

HEARTBEAT_TIMEOUT = 30
"""Seconds without a sign of life after which JAX takes another process of the run for lost."""


class LostError(RuntimeError):
    """Another process of the run is gone."""


def _check() -> None:
    if PRINT_CONFIG.value and not flags.FLAGS["config"].present:
        from lpa_jax.training import config as configuration

        print(configuration.describe())
        sys.exit(0)
    if flags.FLAGS["config"].value is None:
        if flags.FLAGS["config"].present:
            raise UsageError("get_config of --config returns None: return a configuration.")
        raise UsageError("Say what to run, for example --config=digits:method=lpa.")
    # A file that cannot be read shows only when the configuration is first used.
    _CONFIG.value.to_dict()
    # Imported late: a wrong flag need not wait for it.
    from lpa_jax.training import config as configuration

    configuration.check(_CONFIG.value)
    if PRINT_CONFIG.value:
        print(configuration.describe(_CONFIG.value))
        sys.exit(0)
    if not WORKDIR.value:
        raise UsageError("Say where to put the run, for example --workdir=runs/digits.")


def _parse(argv: list[str]) -> list[str]:
    argv, cleared = _without_cleared(argv)

    def check():
        if cleared and flags.FLAGS["config"].value is not None:
            _CONFIG.value.update_from_flattened_dict(dict.fromkeys(cleared))
        _check()

    return commands.parse(argv, check, _explain)


def _without_cleared(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the words but those `--config.KEY=None` that leave a key out, and these keys."""
    pairs = [re.fullmatch(r"--?config\.([\w.]+)=(.*)", word, re.DOTALL) for word in argv]
    last = {pair[1]: pair[2] for pair in pairs if pair is not None}
    if "None" not in last.values():
        return argv, []
    # Imported late, as above.
    from lpa_jax.training import config as configuration

    optional = {name for name, key in configuration.keys().items() if key.kind is not None}
    cleared = [key for key, value in last.items() if value == "None" and key in optional]
    words = zip(argv, pairs, strict=True)
    return [word for word, pair in words if pair is None or pair[1] not in cleared], cleared


def _explain(argv: list[str], error: Exception) -> str | None:
    """Return what is wrong with a key of the configuration, if it caused the error."""
    from lpa_jax.training import config as configuration

    try:
        words = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    except flags.Error:
        return None
    files = [i for i, word in enumerate(words) if re.match(r"--?config(=|$)", word)]
    matches = [(i, re.match(r"--?(?:no)?config\.([^=]*)", word)) for i, word in enumerate(words)]
    keys = [(i, found[1]) for i, found in matches if found]
    for i, key in keys:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", key):
            like = key.replace("-", "_") if re.fullmatch(r"[a-z][\w.-]*", key) else "model.name"
            return f"--config.{key} is no key: keys are names and dots, such as --config.{like}."
        if not files or i < files[0]:
            return f"--config.{key} changes a configuration: give --config=FILE.py before it."
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname.replace("-", "_")
        known = configuration.flat(configuration.default().to_dict())
        like = [key for key in known if name in (key, key.rpartition(".")[2])]
        return f"There is no --{error.flagname}: did you mean --config.{like[0]}?" if like else None
    if isinstance(error, configuration.ConfigError) or not files:
        return None
    _, equals, value = words[files[-1]].partition("=")
    value = value if equals else "".join(words[files[-1] + 1 :][:1])
    path = value.partition(":")[0]
    if path and path not in configs.FILES and not os.path.exists(path):
        like = f"{path.partition(',')[0].removesuffix('.py')}.py"
        close = difflib.get_close_matches(pathlib.PurePath(like).stem, configs.FILES, n=1)
        close = [like] if os.path.exists(like) else close
        hint = f"did you mean {close[0]}? " if close else ""
        known = ", ".join(configs.FILES)
        return f"There is no configuration {path}: {hint}Give one of {known}, or a FILE.py."
    try:
        config: Any = flags.FLAGS["config"].parser.parse(value)
        config.to_dict()
    except Exception:
        # What is wrong is in the file: the error tells of it.
        return None
    return next((told for _, key in keys if (told := configuration.absent(config, key))), None)


def _join() -> None:
    """Join the other processes of a run on several machines, where there are any."""
    several = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if any(value is not None for value in several) and None in several:
        raise UsageError(
            "--coordinator_address, --num_processes and --process_id go together; on a cluster "
            "that JAX knows, --distributed stands for all three."
        )
    if _COORDINATOR.value is not None:
        # JAX takes whatever else this may be, and crashes.
        host, _, port = _COORDINATOR.value.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UsageError(
                f"--coordinator_address is {_COORDINATOR.value!r}: give HOST:PORT, such as "
                "localhost:12345."
            )
    if None not in several or _DISTRIBUTED.value:
        try:
            jax.distributed.initialize(*several, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
        except (ValueError, RuntimeError) as error:
            raise UsageError(
                f"The processes cannot join ({error}): give --coordinator_address, "
                "--num_processes and --process_id."
            ) from error
    # Where there is a cache (JAX_COMPILATION_CACHE_DIR), keep what compiles in a moment as well.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _tells_of_a_loss(error: BaseException) -> bool:
    # What it is raised as depends on where it is met: a step, a transfer, a barrier, a save.
    words = "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Bb]arrier|heartbeat|Connection (reset|closed)"
    return re.search(words, str(error)) is not None


def _main(_: list[str]) -> None:
    with sentences("stopped; rerun the command to resume from the last checkpoint."):
        # Imported late: --help and a wrong flag need not wait for all that a run needs.
        from lpa_jax.training import loop

        try:
            _join()
            loop.train_and_evaluate(
                _CONFIG.value, str(WORKDIR.value), allow_config_change=_ALLOW_CHANGE.value
            )
        except Exception as error:
            cause = error.__cause__ or error
            if jax.distributed.is_initialized() and _tells_of_a_loss(cause):
                reason = str(cause).strip().partition("\n")[0]
                lost = LostError(
                    f"Another process of the run, or the way to it, is lost ({reason}). Rerun the "
                    "commands to resume from the last checkpoint."
                )
                fail(lost, TEMPORARY, at_once=True)
            raise


if __name__ == "__main__":
    commands.run(_main, _parse)
