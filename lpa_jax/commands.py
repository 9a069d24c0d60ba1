"""What the command lines share: flags, and errors that end in a sentence."""

from collections.abc import Callable, Iterator
import contextlib
import os
import sys
from typing import NoReturn

from absl import flags, logging

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; a run cut off goes on there.")

TEMPORARY = 75
"""Exit code of a run that the same command takes on, EX_TEMPFAIL in sysexits.h: SIGTERM stopped it,
after it was saved, or it lost one of its processes."""

IO_ERROR = 74
"""Exit code of a run whose work directory takes no more, EX_IOERR in sysexits.h."""


class UsageError(ValueError):
    """A command line that does not say what to do."""


def parse(argv: list[str], check: Callable[[], None]) -> list[str]:
    """Parse the flags; whatever is wrong with them ends in a sentence and exit code 2.

    Args:
      argv: The words of the command line.
      check: Raises an error if the flags do not say what to do.
    """
    # What a file's reader warns of, the sentences below say.
    logging.set_verbosity(logging.ERROR)
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UsageError(f"What is {rest[1]!r}? Options are written --name=value.")
        check()
    except Exception as error:
        fail(error)
    return rest


@contextlib.contextmanager
def sentences(stopped: str) -> Iterator[None]:
    """Let what can go wrong in a command end in a sentence and the exit code that it has.

    Args:
      stopped: What is said where the user stops it.
    """
    # Imported late: --help and a wrong flag need not wait for all that a run needs.
    from lpa_jax.data import DataError
    from lpa_jax.training import checkpoints, loop, records

    wrong = (
        *(OSError, UsageError, DataError),
        *(loop.ConfigError, loop.NonFiniteLossError, checkpoints.CheckpointError),
    )
    # Orbax narrates every checkpoint, and every failure at the length of a page.
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
    try:
        yield
    except records.WriteError as error:
        # On the way out, threads that could not write either would tell it at length.
        fail(error, IO_ERROR, at_once=True)
    except loop.PreemptedError as error:
        fail(loop.PreemptedError(f"{error} The same command goes on from there."), TEMPORARY)
    except wrong as error:
        fail(error)
    except KeyboardInterrupt:
        print(f"lpa_jax: {stopped}", file=sys.stderr)
        sys.exit(130)


def fail(error: Exception, code: int = 2, *, at_once: bool = False) -> NoReturn:
    """Say in a sentence what is wrong, and end; `at_once`: without waiting for other processes."""
    sentence = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    # What a configuration file raises arrives with its traceback in the text.
    if "Traceback" in sentence:
        sentence = sentence.rpartition("Error: ")[2]
    print(f"lpa_jax: {sentence}", file=sys.stderr, flush=True)
    if at_once:
        os._exit(code)
    sys.exit(code)
