"""The weights of a run as a directory that others can use: safetensors, and a model card."""

from collections.abc import Mapping
import json
import pathlib
import shutil
import tempfile
from typing import Any

import lpa_jax
from lpa_jax.models import weight_files
from lpa_jax.models.pretrained import Inputs
from lpa_jax.training import files, identity, provenance
from lpa_jax.training.build import GIVEN
from lpa_jax.training.config import ConfigError
from lpa_jax.training.metric_log import read_rows
from lpa_jax.training.run import Run

WEIGHTS, CARD = "model.safetensors", "README.md"
SCALE = ("mean", "std")
"""Attributes of a network that normalizes its inputs."""


def check_free(directory: pathlib.Path) -> None:
    """Raise `ConfigError` if there is something already where weights are to be written."""
    if directory.exists():
        raise ConfigError(f"{directory} is there already: give another directory, or remove it.")


def write_weights(
    run: Run, workdir: pathlib.Path, directory: pathlib.Path, *, average: bool = False
) -> pathlib.Path:
    """Write `model.safetensors`, named by paths of variables, and `README.md`, whole or not at all.

    Args:
      run: From `load_run`.
      workdir: Of the run, whose records are told.
      directory: What to make; it must not be there.
      average: Whether to write the average of the weights.

    Returns:
      The path of the first.

    Raises:
      ConfigError: If the directory is there, or the run kept no average.
      WriteError: If it cannot be written; nothing is kept.
    """
    check_free(directory)
    arrays = run.arrays(average=average)
    text = card(run, workdir / f"seed{run.seed}", average=average)
    with files.writing(str(directory)):
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(".partial", directory.name, directory.parent))
        # What is temporary is made for its owner alone.
        partial.chmod(directory.parent.stat().st_mode)
        try:
            weight_files.write(partial / WEIGHTS, arrays, inputs_of(run))
            (partial / CARD).write_text(text, encoding="utf-8")
            partial.replace(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return directory / WEIGHTS


def _weights(optimizer: Mapping[str, Any]) -> str:
    decay = optimizer["ema_decay"]
    return "average of SWAD" if decay is None else f"average, decay {decay}"


def inputs_of(run: Run) -> Inputs | None:
    """Return what a run's network takes, if these are images that it normalizes itself."""
    shape = run.dataset.train.images.shape[1:]
    if len(shape) != 3 or not hasattr(run.model, "mean"):
        return None
    model: Any = run.model
    return Inputs(tuple(model.mean), tuple(model.std), shape[0])


def card(run: Run, records: pathlib.Path, *, average: bool = False) -> str:
    """Return the model card of a run's weights, which names no directory of this machine.

    Args:
      run: The run.
      records: The directory of its seed.
      average: Whether the weights are their average.
    """
    config, dataset = run.config, run.dataset
    model, name = config["model"], config["model"]["name"]
    network = name.removeprefix(GIVEN).partition("(")[0]
    # The scale of the inputs is told apart.
    options = {key: value for key, value in model["options"].items() if key not in SCALE}
    images = dataset.train.images
    kinds = ["image-classification"] if len(images.shape) == 4 else []
    kinds = kinds if config["task"] == "classification" else []
    epoch, metrics = _metrics(run, records, "average" if average else "metrics")
    accuracy = metrics.get("test", {}).get("accuracy") if kinds else None
    data_name = _public(config["dataset"])

    front: dict[str, Any] = {"library_name": "lpa_jax"}
    front |= {"pipeline_tag": kinds[0]} if kinds else {}
    front |= {"tags": ["jax", "flax", *kinds]}
    if accuracy is not None:
        found = {
            "task": {"type": kinds[0]},
            "dataset": {"name": data_name, "type": data_name},
            "metrics": [{"type": "accuracy", "value": accuracy}],
        }
        front |= {"metrics": ["accuracy"]}
        front |= {"model-index": [{"name": f"{network} on {data_name}", "results": [found]}]}

    inputs = inputs_of(run)
    whole = str(images.dtype) == "uint8"
    shape = ", ".join(["batch", *map(str, images.shape[1:])])
    made = provenance.recorded(records / "sessions.json")
    facts: dict[str, Any] = {
        "network": network,
        "options": _json(options) if options else None,
        "data set": data_name,
        "classes": dataset.num_classes,
        "inputs": f"float [{shape}]{', pixels in [0, 1]' if whole else ''}",
        "image size": None if inputs is None else inputs.image_size,
        "mean, subtracted by the network": None if inputs is None else _json(inputs.mean),
        "deviation, divided by": None if inputs is None else _json(inputs.std),
        "method": config["method"],
        "first weights": model["pretrained"] and _public(model["pretrained"]),
        "seed": run.seed,
        "step": f"{run.step} of {run.parts.plan.num_steps}",
        "weights": _weights(config["optimizer"]) if average else "last",
        "made with": ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        "commit": made["commit"],
    }
    return "\n".join(
        [
            "---",
            # JSON is YAML too.
            *(f"{key}: {_json(value)}" for key, value in front.items()),
            "---",
            "",
            f"# {network} on {data_name}",
            "",
            f"Trained by lpa_jax {lpa_jax.__version__}.",
            "",
            *_table(("", ""), ((key, value) for key, value in facts.items() if value is not None)),
            "",
            "## Use",
            "",
            "```python",
            *_code(run),
            "```",
            "",
            "To fine-tune them:",
            f"`lpa-jax main --config.model.pretrained=safetensors:{WEIGHTS} ...`",
            "",
            *_results(run, metrics, epoch),
            *_block("Classes", [*dataset.class_names]),
            *_block("Perturbation", config["perturbation"]),
        ]
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _block(title: str, value: Any) -> list[str]:
    # In one line, which no name of a class can end.
    return [f"## {title}", "", "```json", _json(value), "```", ""] if value else []


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([str(cell).replace("|", r"\|") for cell in line] for line in lines)
    return [f"| {' | '.join(line)} |" for line in cells]


def _public(name: str) -> str:
    """Return a name of data or weights without the directories of this machine.

    Example:
      >>> _public("folder:/home/me/photos"), _public("tfds:mnist:3.0.1"), _public("digits")
      ('folder:photos', 'tfds:mnist:3.0.1', 'digits')
    """
    kind, colon, rest = name.removeprefix(GIVEN).partition(":")
    return f"{kind}:{pathlib.PurePath(rest).name}" if colon else kind


def _metrics(run: Run, records: pathlib.Path, name: str) -> tuple[int, Mapping[str, Any]]:
    """Return the epoch and the metrics by split that were recorded of these weights, if any."""
    rows = [row for row in read_rows(records / "metrics.jsonl") if row["step"] == run.step]
    ended = records / "result.json"
    if run.step == run.parts.plan.num_steps and ended.exists():
        # The last epoch is evaluated on the test split here, whichever was best.
        rows.append(files.read_json(ended) | {"epoch": run.parts.plan.epochs})
    found = [row for row in rows if row.get(name)]
    return (found[-1]["epoch"], found[-1][name]) if found else (0, {})


def _results(run: Run, metrics: Mapping[str, Any], epoch: int) -> list[str]:
    shown = {
        name: metric
        for name, metric in run.task.shown.items()
        if any(name in found for found in metrics.values())
    }
    if not shown:
        return []
    rows = (
        (
            split,
            *(
                f"{metric.scale * found[name]:.{metric.digits}f}" if name in found else ""
                for name, metric in shown.items()
            ),
        )
        for split, found in metrics.items()
    )
    head = ("split", *(metric.label for metric in shown.values()))
    return [f"## Metrics of epoch {epoch}", "", *_table(head, rows), ""]


def _code(run: Run) -> list[str]:
    """Return the lines that load the weights."""
    model, network = run.config["model"], run.parts.network
    name = model["name"]
    if name.startswith(GIVEN):
        made = f"model = ...  # {type(run.model).__name__}, as it was given to the trainer"
    else:
        scale = {key: getattr(run.model, key, getattr(run.dataset, key)) for key in SCALE}
        options = {**scale, **model["options"]}
        # JSON has no tuples, which Flax modules need of their attributes.
        arguments = [f"{key}={identity.tuples(value)!r}" for key, value in options.items()]
        arguments += [f"head={model['head']!r}"] if model["head"] != "linear" else []
        arguments += [f"dtype=jnp.{model['dtype']}"] if model["dtype"] != "float32" else []
        arguments = [repr(name), f"num_classes={run.dataset.num_classes}", *arguments]
        made = f"model = models.create({', '.join(arguments)})"
    shape = (1, *run.dataset.train.images.shape[1:])
    train = ", train=False" if network.takes_train else ""
    return [
        "import jax",
        "import jax.numpy as jnp",
        "from lpa_jax import models",
        "from lpa_jax.models.weights import load_pretrained",
        "",
        made,
        f"variables = model.init(jax.random.key(0), jnp.zeros({shape}){train})",
        f'variables = load_pretrained("safetensors:{WEIGHTS}", model, variables)',
    ]
