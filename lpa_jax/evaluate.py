"""The command line that evaluates a run: `python -m lpa_jax.evaluate --workdir=runs/digits`."""

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
    "seed", None, "Seed to evaluate, or several; default all.", allow_override=True
)
_SPLIT = flags.DEFINE_string("split", "test", "Split to evaluate on, such as validation.")
_ATTACKS = flags.DEFINE_bool("attacks", False, "Attack the networks too, by FGSM and PGD-20.")
_CORRUPTIONS = flags.DEFINE_bool("corruptions", False, "Evaluate on corrupted images too.")
_LOGIT_ADJUSTMENT = flags.DEFINE_float(
    "logit_adjustment",
    None,
    "Evaluate too with this times log(prior) subtracted from the logits.",
    lower_bound=0.0,
)
_changes: dict[str, Any] = {}


def _check() -> None:
    if not WORKDIR.value:
        raise UsageError("Say which run to evaluate, for example --workdir=runs/digits.")


def _parse(argv: list[str]) -> list[str]:
    return commands.parse_with_changes(argv, _changes, _check)


def _main(_: list[str]) -> None:
    with sentences("stopped."):
        # Imported late: --help and a wrong flag need not wait for all that a run needs.
        from lpa_jax.evaluation import evaluate
        from lpa_jax.training import config as configuration
        from lpa_jax.training import identity

        workdir = str(WORKDIR.value)
        if PRINT_CONFIG.value:
            print(configuration.describe(identity.read_config(workdir, _changes)))
            sys.exit(0)
        evaluate.evaluate_run(
            workdir,
            seeds=_SEED.value,
            split=_SPLIT.value,
            attack=_ATTACKS.value,
            corrupt=_CORRUPTIONS.value,
            logit_adjustment=_LOGIT_ADJUSTMENT.value,
            changes=_changes,
        )


if __name__ == "__main__":
    commands.run(_main, _parse)
