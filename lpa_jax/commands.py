"""What the command lines share: flags, and errors that end in a sentence."""

import ast
from collections.abc import Callable, Iterator
import contextlib
import difflib
import importlib
import io
import itertools
import os
import re
import sys
from typing import Any, NoReturn

from lpa_jax import extras, memory
from lpa_jax.registry import reason

try:
    extras.require_train("The command line")
except ImportError as error:
    # Of a command, the sentence is enough.
    print(f"lpa_jax: {error}", file=sys.stderr)
    sys.exit(2)

from absl import app, flags, logging

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run or table; rerunning resumes what was interrupted.",
)
LIST = flags.DEFINE_bool(
    "list", False, "List methods, networks, data sets, tasks, tables, writers and configurations."
)
flags.DEFINE_multi_string(
    "import", [], "Module of yours to import first: it may register methods, readers and more."
)
PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Print every key of the configuration, with its meaning."
)
_KEEP_MEMORY = flags.DEFINE_bool(
    "keep_memory",
    True,
    "Keep memory that is freed and use it again, up to 2 GiB: steps on a CPU are faster.",
)

TEMPORARY = 75
"""Exit code of a run that rerunning resumes, EX_TEMPFAIL in sysexits.h: SIGTERM stopped it after
it was saved, or it lost one of its processes."""

IO_ERROR = 74
"""Exit code of a run whose work directory takes no more, EX_IOERR in sysexits.h."""


class UsageError(ValueError):
    """A command line that does not say what to do."""


def run(main: Callable[[list[str]], None], parse: Callable[[list[str]], list[str]]) -> None:
    """Run a command to its end, whether or not anything can still read what it prints.

    Args:
      main: What the command does, given the words that are left.
      parse: Parses the words of the command line.
    """
    keep_printing()
    app.run(main, flags_parser=parse)


class _Output(io.FileIO):
    """A standard stream that drops what it cannot write: to a closed pipe, or to a full disk."""

    told = False

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # Whoever closed a pipe, as `head` does, knows that; one sentence tells of a full disk.
            if not (self.told or isinstance(error, BrokenPipeError) or self.fileno() == 2):
                self.told = True
                print(
                    f"lpa_jax: What is printed is lost ({error.strerror}); the command continues.",
                    file=sys.stderr,
                    flush=True,
                )
            return memoryview(data).nbytes


def keep_printing() -> None:
    """Let no standard stream raise: neither for what it cannot write nor for what it cannot encode.

    A stream that was closed before the command began stays without a reader.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                # Or the next file that is opened would take its number, and what C++ prints.
                while os.open(os.devnull, os.O_RDWR) < number:
                    pass
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            continue
        stream.flush()
        made = io.TextIOWrapper(
            io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors="backslashreplace" if name == "stderr" else "replace",
            line_buffering=name == "stderr" or stream.line_buffering,
        )
        setattr(sys, name, made)


def parse(
    argv: list[str],
    check: Callable[[], None],
    explain: Callable[[list[str], Exception], str | None] = lambda *_: None,
) -> list[str]:
    """Parse the flags; whatever is wrong with them ends in a sentence and exit code 2.

    Args:
      argv: The words of the command line.
      check: Raises an error if the flags do not say what to do.
      explain: Says what an error means, where it can: `explain(argv, error)`.
    """
    # What a file's reader warns of, the sentences below say.
    logging.set_verbosity(logging.ERROR)
    if {"--help", "-help", "--helpshort", "-?", "-h"} & set(argv):
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    try:
        # Before the configuration is read, which may name what they register.
        for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
            if named := re.fullmatch(r"--?import(?:=(.+))?", word):
                _import(named[1] or after)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UsageError(f"What is {rest[1]!r}? Options are written --name=value.")
        if _KEEP_MEMORY.value:
            memory.keep_freed_memory()
        if LIST.value:
            # Imported late, as what is below.
            from lpa_jax import listing

            print(listing.everything())
            sys.exit(0)
        check()
    except flags.IllegalFlagValueError as error:
        fail(UsageError(explain(argv, error) or _about_value(error)))
    except flags.UnrecognizedFlagError as error:
        fail(UsageError(explain(argv, error) or _about_flag(error)))
    except Exception as error:
        told = explain(argv, error)
        if told is None and (lacking := re.fullmatch(r"Missing value for flag (\S+)", str(error))):
            told = f"{lacking[1]} needs a value: {lacking[1]}=VALUE."
        fail(error if told is None else UsageError(told))
    return rest


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # Of any kind: the module is the user's.
        raise UsageError(
            f"--import={name} cannot be imported ({reason(error)}): give a module that is "
            "installed, or in the current directory."
        ) from error


KEY = re.compile(r"--?config\.(?P<key>[^\W\d]\w*(?:\.[^\W\d]\w*)*)=(?P<value>.*)", re.DOTALL)


def changes(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the words `--config.KEY=VALUE` out of a command line without a configuration file.

    Returns:
      The other words, and the values by key: of Python where they are, else strings.

    Raises:
      UsageError: If a key has no value, or is no name.

    Example:
      >>> changes(["command", "--config.epochs=3", "--config.model.name=wrn_16_2", "--dry_run"])
      (['command', '--dry_run'], {'epochs': 3, 'model.name': 'wrn_16_2'})
    """
    rest, found = [], {}
    for word in argv:
        if not re.match(r"--?(?:no)?config\.", word):
            rest.append(word)
            continue
        parsed = KEY.fullmatch(word)
        if parsed is None:
            raise UsageError(f"{word!r} sets no key: write --config.KEY=VALUE.")
        try:
            found[parsed["key"]] = ast.literal_eval(parsed["value"])
        except (ValueError, SyntaxError):
            words = {"true": True, "false": False}
            found[parsed["key"]] = words.get(parsed["value"], parsed["value"])
    return rest, found


def parse_with_changes(
    argv: list[str],
    changed: dict[str, Any],
    check: Callable[[], None],
    explain: Callable[[list[str], Exception], str | None] = lambda *_: None,
) -> list[str]:
    """Parse as `parse` does, after putting the values that `changes` finds into `changed`."""
    with sentences("stopped."):
        argv, found = changes(argv)
    changed.update(found)
    return parse(argv, check, explain)


def _about_flag(error: flags.UnrecognizedFlagError) -> str:
    known = [name for name in flags.FLAGS if len(name) > 1]
    close = difflib.get_close_matches(error.flagname.replace("-", "_"), known, n=1)
    hint = f"did you mean --{close[0]}? " if close else ""
    return f"There is no --{error.flagname}: {hint}--help lists what there is."


def _about_value(error: flags.IllegalFlagValueError) -> str:
    """Say which values a flag takes, where its parser does not."""
    flag, equals, told = str(error).removeprefix("flag ").partition("=")
    name = flag.removeprefix("--")
    cause = f": {error.__context__}"
    if not equals or name not in flags.FLAGS or not told.endswith(cause):
        return str(error)
    parser, value = flags.FLAGS[name].parser, told.removesuffix(cause)
    kinds = {"bool": "true or false", "tuple": 'a tuple such as "(100.0, 150.0)"'}
    wanted = getattr(parser, "syntactic_help", "") or kinds.get(parser.flag_type())
    if "as a ConfigDict" in cause:
        wanted = f"a dictionary such as \"{{'key': 1}}\", or set its keys alone, {flag}.KEY=VALUE"
    if isinstance(parser, flags.EnumParser):
        wanted = " or ".join(parser.enum_values)
    if wanted is None:
        return f"{flag} cannot be {value!r}{cause}."
    return f"{flag} cannot be {value!r}: give {wanted}."


@contextlib.contextmanager
def sentences(stopped: str) -> Iterator[None]:
    """Let what can go wrong in a command end in a sentence and the exit code that it has.

    Args:
      stopped: What is said where the user stops it.
    """
    # Imported late: --help and a wrong flag need not wait for all that a run needs.
    from lpa_jax.data import DataError
    from lpa_jax.training import checkpoints, files, fit
    from lpa_jax.training.config import ConfigError

    wrong = (
        *(OSError, UsageError, DataError),
        *(ConfigError, fit.NonFiniteLossError, checkpoints.CheckpointError),
    )
    # Orbax narrates every checkpoint, and every failure at the length of a page.
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
    try:
        yield
    except files.WriteError as error:
        # On the way out, threads that could not write either would tell it at length.
        fail(error, IO_ERROR, at_once=True)
    except fit.PreemptedError as error:
        fail(fit.PreemptedError(f"{error} Rerun the command to resume."), TEMPORARY)
    except wrong as error:
        fail(error)
    except KeyboardInterrupt:
        print(f"lpa_jax: {stopped}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # An exit in order would wait for all that the devices were given to do, maybe minutes.
        os._exit(130)


def fail(error: Exception, code: int = 2, *, at_once: bool = False) -> NoReturn:
    """Say in a sentence what is wrong, and end; `at_once`: without waiting for other processes."""
    sentence = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    # What a configuration file raises arrives with its traceback in the text.
    if "Traceback" in sentence:
        sentence = sentence.rpartition("Error: ")[2].removesuffix(" .")
    print(f"lpa_jax: {sentence.removeprefix('ERROR:: ')}", file=sys.stderr, flush=True)
    if at_once:
        os._exit(code)
    sys.exit(code)
