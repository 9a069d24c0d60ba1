"""The command line that judges a run: `python -m lpa_jax.evaluate --workdir=runs/digits`."""

import sys

from absl import app, flags, logging

from lpa_jax.commands import fail, IO_ERROR, parse, UsageError, WORKDIR

_SEED = flags.DEFINE_multi_integer("seed", None, "Seed to judge, or several; default all.")
_PART = flags.DEFINE_enum("part", "test", ["test", "validation"], "Images to judge by.")
_ATTACKS = flags.DEFINE_bool("attacks", False, "Attack the networks too, by FGSM and PGD-20.")
_CORRUPTIONS = flags.DEFINE_bool("corruptions", False, "Judge by corrupted images too.")
_LOGIT_ADJUSTMENT = flags.DEFINE_float(
    "logit_adjustment", None, "Judge too with this times log(prior) subtracted from the logits."
)


def _check() -> None:
    if WORKDIR.value is None:
        raise UsageError("Say which run to judge, for example --workdir=runs/digits.")


def _main(_: list[str]) -> None:
    # Imported late: --help and a wrong flag need not wait for jax.
    from lpa_jax.data import DataError
    from lpa_jax.training import checkpoints, evaluate, records
    from lpa_jax.training.config import ConfigError

    # Orbax narrates every checkpoint.
    logging.set_verbosity(logging.WARNING)
    try:
        evaluate.evaluate_run(
            str(WORKDIR.value),
            seeds=_SEED.value,
            part=_PART.value,  # pyright: ignore[reportArgumentType]
            attack=_ATTACKS.value,
            corrupt=_CORRUPTIONS.value,
            logit_adjustment=_LOGIT_ADJUSTMENT.value,
        )
    except records.WriteError as error:
        fail(error, IO_ERROR)
    except (OSError, ConfigError, DataError, checkpoints.CheckpointError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("lpa_jax: stopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(_main, flags_parser=lambda argv: parse(argv, _check))
