"""The command line of weights: `python -m lpa_jax.weights --source=run:runs/x --output=x`."""

import pathlib
import re
from typing import Any

# First: it says what is not installed.
from lpa_jax import commands

# isort: split
from absl import flags

from lpa_jax.commands import PRINT_CONFIG, sentences, UsageError, WORKDIR

flags.adopt_module_key_flags(commands)
# Other commands have flags of the same names.
_SOURCE = flags.DEFINE_string("source", None, "Weights: safetensors:PATH, run:WORKDIR or another.")
_MODEL = flags.DEFINE_string("model", None, "Network that they may fit, such as vit_s_16.")
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Directory to make, of model.safetensors and a model card, for the weights of a run.",
    allow_override=True,
)
_SEED = flags.DEFINE_integer("seed", None, "Seed of a run; default the first.", allow_override=True)
_AVERAGE = flags.DEFINE_bool("average", False, "Take the average of the weights that a run kept.")
_changes: dict[str, Any] = {}
STATISTICS = re.compile(r"batch_stats/.*|.*\b(running_mean|running_var|num_batches_tracked)")
"""Names of what is no parameter."""


def _check() -> None:
    if not _SOURCE.value:
        told = f"run:{WORKDIR.value}" if WORKDIR.value else "safetensors:model.safetensors"
        raise UsageError(f"Say which weights, for example --source={told}.")
    if WORKDIR.value:
        raise UsageError("Leave --workdir out: --source=run:WORKDIR names a run.")
    if PRINT_CONFIG.value:
        raise UsageError("Leave --print_config out: weights have no configuration.")
    of_run = {
        "--output": _OUTPUT.value,
        "--seed": _SEED.value is not None,
        "--average": _AVERAGE.value,
        "--config": _changes,
    }
    told = [name for name, given in of_run.items() if given]
    if told and not _SOURCE.value.startswith("run:"):
        raise UsageError(f"{told[0]} is of a run: leave it out, or give --source=run:WORKDIR.")
    if _OUTPUT.value and _MODEL.value:
        raise UsageError("A run's network is known: leave --model out, or --output.")


def _parse(argv: list[str]) -> list[str]:
    return commands.parse_with_changes(argv, _changes, _check)


def _main(_: list[str]) -> None:
    with sentences("stopped; nothing is kept."):
        # Imported late: --help and a wrong flag need not wait for all that a run needs.
        from lpa_jax.models import weight_files

        # Registers the runs among the sources.
        from lpa_jax.training import model_card, pretrained  # noqa: F401
        from lpa_jax.training.build import as_config_error
        from lpa_jax.training.run import load_run

        source = str(_SOURCE.value)
        if not source.startswith("run:"):
            with as_config_error():
                arrays, inputs = weight_files.read(source), weight_files.inputs_of(source)
                _show(source, arrays, inputs, _MODEL.value)
            return
        workdir = pathlib.Path(source.removeprefix("run:"))
        directory = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
        if directory is not None:
            # Before the run is loaded, which takes its time.
            model_card.check_free(directory)
        run = load_run(workdir, _SEED.value, changes=_changes)
        if directory is None:
            with as_config_error():
                arrays, inputs = run.arrays(average=_AVERAGE.value), model_card.inputs_of(run)
                _show(source, arrays, inputs, _MODEL.value)
            return
        path = model_card.write_weights(run, workdir, directory, average=_AVERAGE.value)
        print(
            f"The weights of seed {run.seed}, step {run.step}, are in {path}: "
            f"--config.model.pretrained=safetensors:{path}"
        )


def _show(source: str, arrays: dict[str, Any], inputs: Any, model: str | None) -> None:
    """Print what there is, and how it fits the network that was named."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown = Table("name", "shape", "dtype", title=Text(_plain(source)))
    for name, array in arrays.items():
        shown.add_row(Text(_plain(name), overflow="fold"), str(array.shape), str(array.dtype))
    console.print(shown)
    counts = [0, 0]
    for name, array in arrays.items():
        counts[STATISTICS.fullmatch(name) is not None] += array.size
    others = f", and {counts[1]:,} running statistics" if counts[1] else ""
    print(f"{counts[0]:,} parameters in {len(arrays)} arrays{others}.")
    if model is not None:
        _show_fit(source, arrays, inputs, model, console)


def _show_fit(source: str, arrays: dict[str, Any], inputs: Any, name: str, console: Any) -> None:
    """Print all that does not fit a network.

    Raises:
      ValueError: If anything does not.
    """
    import jax
    import jax.numpy as jnp
    from rich.table import Table
    from rich.text import Text

    from lpa_jax import models
    from lpa_jax.models import weights
    from lpa_jax.models.pretrained import IMAGENET, Pretrainable
    from lpa_jax.training.network import Network

    # Of another number of classes the head is not compared.
    model = models.create(name, num_classes=2, mean=(0.0,), std=(1.0,))
    inputs = inputs or (model.pretrained_inputs() if isinstance(model, Pretrainable) else IMAGENET)
    shape = (1, inputs.image_size, inputs.image_size, len(inputs.mean))
    variables = jax.eval_shape(Network(model).init, jax.random.key(0), jnp.zeros(shape))
    fit = weights.compare(arrays, source, model, variables)
    if told := weights.misfit(fit, source, model):
        apart = Table("name", "what is wrong", title=Text(f"What does not fit {name}"))
        for words, names in (("missing", fit.missing), ("left over", fit.left_over)):
            for path in names:
                apart.add_row(Text(_plain(path), overflow="fold"), words)
        for path, (theirs, ours) in fit.reshaped.items():
            apart.add_row(Text(_plain(path), overflow="fold"), f"{theirs} for {ours}")
        console.print(apart)
        raise ValueError(told)
    head = "but have no head" if fit.classes is None else f"with a head of {fit.classes} classes"
    print(f"They fit {name}, {head}.")


def _plain(name: str) -> str:
    """Return a name without what a terminal would obey."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in name)


if __name__ == "__main__":
    commands.run(_main, _parse)
