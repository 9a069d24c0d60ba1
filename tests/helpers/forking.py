"""The command line, many times over: a process that imports all of it once, and forks for each.

Started as `python tests/helpers/forking.py`; for each line of its input, the arguments as JSON, it
writes a line with the exit code and what went to the standard error. Where the first of them is no
option, it is the command, in place of main.
"""

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import warnings

import jax
import orbax.checkpoint
import tensorboardX
import tensorflow_datasets

from lpa_jax import commands, main
from lpa_jax.__main__ import COMMANDS
from lpa_jax.training import loop

SECONDS = 300
"""After which a call is killed."""
# Imported for the forks, which find them there.
IMPORTED = (orbax.checkpoint, tensorboardX, tensorflow_datasets, loop, main)


def call(arguments):
    """Return the exit code and the standard error of `python -m lpa_jax.main` with `arguments`."""
    name = "main"
    if arguments and arguments[0] in COMMANDS:
        name, *arguments = arguments
    with tempfile.TemporaryFile() as errors:
        # No backend has been started here, whose threads a fork would leave behind.
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            # ml_collections looks for the keys that are set there.
            sys.argv = [f"lpa_jax.{name}", *arguments]
            code = 0
            try:
                module = importlib.import_module(f"lpa_jax.{name}")
                commands.run(module._main, module._parse)
            except SystemExit as stop:
                code = stop.code or 0
            # To take all that was imported to pieces again would cost more than the call.
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read().decode(errors="backslashreplace")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(call(json.loads(line))), flush=True)
