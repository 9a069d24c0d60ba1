"""The command line: `python -m lpa_jax.main --config=configs/digits.py --workdir=runs/digits`."""

import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File of the configuration, FILE.py or FILE.py:method=NAME,smoke.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; a run cut off goes on there."
)


class UsageError(ValueError):
    """A command line that does not say what to run."""


def _parse(argv: list[str]) -> list[str]:
    """Parse the flags; whatever is wrong with them ends in a sentence and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UsageError(f"What is {rest[1]!r}? Options are written --name=value.")
        if flags.FLAGS["config"].value is None:
            raise UsageError("Say what to run, for example --config=configs/digits.py:method=lpa.")
        # A file that cannot be read shows only when the configuration is first used.
        _CONFIG.value.to_dict()
        if _WORKDIR.value is None:
            raise UsageError("Say where to put the run, for example --workdir=runs/digits.")
    except Exception as error:
        _fail(error)
    return rest


def _fail(error: Exception) -> NoReturn:
    sentence = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    # What a configuration file raises arrives with its traceback in the text.
    if "Traceback" in sentence:
        sentence = sentence.rpartition("Error: ")[2]
    print(f"lpa_jax: {sentence}", file=sys.stderr)
    sys.exit(2)


def _main(_: list[str]) -> None:
    # Imported late: --help and a wrong flag need not wait for jax.
    from lpa_jax.data import DataError
    from lpa_jax.training import loop

    # Orbax narrates every checkpoint.
    logging.set_verbosity(logging.WARNING)
    try:
        loop.train_and_evaluate(_CONFIG.value, str(_WORKDIR.value))
    except (loop.ConfigError, DataError, loop.NonFiniteLossError) as error:
        _fail(error)
    except KeyboardInterrupt:
        print(
            "lpa_jax: stopped; the same command goes on from the last checkpoint.", file=sys.stderr
        )
        sys.exit(130)


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)
