"""The command line that judges a run: `python -m lpa_jax.evaluate --workdir=runs/digits`."""

from absl import flags

from lpa_jax import commands
from lpa_jax.commands import sentences, UsageError, WORKDIR

flags.adopt_module_key_flags(commands)
_SEED = flags.DEFINE_multi_integer("seed", None, "Seed to judge, or several; default all.")
_PART = flags.DEFINE_enum("part", "test", ["test", "validation"], "Images to judge by.")
_ATTACKS = flags.DEFINE_bool("attacks", False, "Attack the networks too, by FGSM and PGD-20.")
_CORRUPTIONS = flags.DEFINE_bool("corruptions", False, "Judge by corrupted images too.")
_LOGIT_ADJUSTMENT = flags.DEFINE_float(
    "logit_adjustment",
    None,
    "Judge too with this times log(prior) subtracted from the logits.",
    lower_bound=0.0,
)


def _check() -> None:
    if not WORKDIR.value:
        raise UsageError("Say which run to judge, for example --workdir=runs/digits.")


def _main(_: list[str]) -> None:
    with sentences("stopped."):
        # Imported late: --help and a wrong flag need not wait for all that a run needs.
        from lpa_jax.training import evaluate

        evaluate.evaluate_run(
            str(WORKDIR.value),
            seeds=_SEED.value,
            part=_PART.value,  # pyright: ignore[reportArgumentType]
            attack=_ATTACKS.value,
            corrupt=_CORRUPTIONS.value,
            logit_adjustment=_LOGIT_ADJUSTMENT.value,
        )


if __name__ == "__main__":
    commands.run(_main, lambda argv: commands.parse(argv, _check))
