"""The command line that exports a trained network: `python -m lpa_jax.export --workdir=runs/x`."""

import pathlib
import sys
from typing import Any

# First: it says what is not installed.
from lpa_jax import commands

# isort: split
from absl import flags

from lpa_jax.commands import PRINT_CONFIG, sentences, UsageError, WORKDIR

flags.adopt_module_key_flags(commands)
# Other commands have a flag of the same name.
_SEED = flags.DEFINE_multi_integer(
    "seed", None, "Seed to export, or several; default the first.", allow_override=True
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Directory for network.jaxexport and network.json; default that of each seed."
)
_changes: dict[str, Any] = {}


def _check() -> None:
    if not WORKDIR.value:
        raise UsageError("Say which run to export, for example --workdir=runs/digits.")
    if _OUTPUT.value and len(_SEED.value or ()) > 1:
        raise UsageError("--output is for one network: give one --seed, or leave --output out.")


def _parse(argv: list[str]) -> list[str]:
    return commands.parse_with_changes(argv, _changes, _check)


def _main(_: list[str]) -> None:
    with sentences("stopped."):
        # Imported late: --help and a wrong flag need not wait for all that a run needs.
        from lpa_jax.training import config as configuration
        from lpa_jax.training import export, identity
        from lpa_jax.training.run import load_run

        workdir = pathlib.Path(str(WORKDIR.value))
        if PRINT_CONFIG.value:
            print(configuration.describe(identity.read_config(workdir, _changes)))
            sys.exit(0)
        for seed in _SEED.value or [None]:
            run = load_run(workdir, seed, changes=_changes)
            directory = pathlib.Path(_OUTPUT.value or workdir / f"seed{run.seed}")
            path = export.export_run(run, directory)
            print(f"The network of seed {run.seed}, step {run.step}, is in {path}.")


if __name__ == "__main__":
    commands.run(_main, _parse)
