"""What the command lines share: flags, and errors that end in a sentence."""

from collections.abc import Callable
import sys
from typing import NoReturn

from absl import flags


class UsageError(ValueError):
    """A command line that does not say what to do."""


def parse(argv: list[str], check: Callable[[], None]) -> list[str]:
    """Parse the flags; whatever is wrong with them ends in a sentence and exit code 2.

    Args:
      argv: The words of the command line.
      check: Raises an error if the flags do not say what to do.
    """
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UsageError(f"What is {rest[1]!r}? Options are written --name=value.")
        check()
    except Exception as error:
        fail(error)
    return rest


def fail(error: Exception) -> NoReturn:
    """Print what went wrong in one sentence, and end with exit code 2."""
    sentence = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    # What a configuration file raises arrives with its traceback in the text.
    if "Traceback" in sentence:
        sentence = sentence.rpartition("Error: ")[2]
    print(f"lpa_jax: {sentence}", file=sys.stderr)
    sys.exit(2)
