"""The command line: `python -m lpa_jax.main --config=configs/digits.py --workdir=runs/digits`."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from lpa_jax.commands import fail, parse, UsageError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File of the configuration, FILE.py or FILE.py:method=NAME,smoke.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; a run cut off goes on there."
)


_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of the first of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the processes that the cluster's environment names."
)


PREEMPTED = 75
"""Exit code of a run that SIGTERM stopped, after it was saved: the EX_TEMPFAIL of sysexits.h."""


def _check() -> None:
    if flags.FLAGS["config"].value is None:
        raise UsageError("Say what to run, for example --config=configs/digits.py:method=lpa.")
    # A file that cannot be read shows only when the configuration is first used.
    _CONFIG.value.to_dict()
    if _WORKDIR.value is None:
        raise UsageError("Say where to put the run, for example --workdir=runs/digits.")


def _join() -> None:
    """Join the other processes of a run on several machines, where there are any."""
    import jax

    several = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if any(value is not None for value in several) and None in several:
        raise UsageError(
            "--coordinator_address, --num_processes and --process_id go together; on a cluster "
            "that JAX knows, --distributed stands for all three."
        )
    if None not in several or _DISTRIBUTED.value:
        try:
            jax.distributed.initialize(*several)
        except (ValueError, RuntimeError) as error:
            raise UsageError(
                f"The processes cannot join ({error}): give --coordinator_address, "
                "--num_processes and --process_id."
            ) from error
    # Where there is a cache (JAX_COMPILATION_CACHE_DIR), keep what compiles in a moment as well.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _main(_: list[str]) -> None:
    # Imported late: --help and a wrong flag need not wait for jax.
    from lpa_jax.data import DataError
    from lpa_jax.training import checkpoints, loop

    stops = (OSError, UsageError, loop.ConfigError, DataError, loop.NonFiniteLossError)
    # Orbax narrates every checkpoint.
    logging.set_verbosity(logging.WARNING)
    try:
        _join()
        loop.train_and_evaluate(_CONFIG.value, str(_WORKDIR.value))
    except (*stops, checkpoints.CheckpointError) as error:
        fail(error)
    except loop.PreemptedError as error:
        print(f"lpa_jax: {error} The same command goes on from there.", file=sys.stderr)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        print(
            "lpa_jax: stopped; the same command goes on from the last checkpoint.", file=sys.stderr
        )
        sys.exit(130)


if __name__ == "__main__":
    app.run(_main, flags_parser=lambda argv: parse(argv, _check))
