"""Where the metrics of a run are sent beside `metrics.jsonl`: one class each."""

from collections.abc import Callable, Mapping
import pathlib
from typing import Protocol

from lpa_jax.registry import Registry
from lpa_jax.training.files import replace_text


class Writer(Protocol):
    """What metrics are sent to. A class of your own needs these two methods alone.

    Seeds that are trained together have one each, all open at once. A class that cannot be open
    twice has an attribute `alone = True`.
    """

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars by name, such as `"validation/accuracy"`, of a step."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


MakeWriter = Callable[[pathlib.Path, int], Writer]
"""`(directory of the seed, step that it resumes from) -> writer`."""


class TensorBoard:
    """Events for TensorBoard, in `tensorboard/`.

    Args:
      directory: Of the seed.
      step: Step that it resumes from: later events of an interrupted run are discarded.
    """

    def __init__(self, directory: pathlib.Path, step: int):
        """Open the file of events."""
        # Its import costs more than all else here, and only a run needs it.
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars of a step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the events."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases (`pip install wandb`), in the project that `WANDB_PROJECT` names.

    Args:
      directory: Of the seed, whose name and that of the run become the name there. The number of
        the run is kept in `wandb_run`, so that an interrupted one is resumed.
      step: Step that it resumes from.
    """

    package, alone = "wandb", True

    def __init__(self, directory: pathlib.Path, step: int):
        """Begin the run, or resume it."""
        import wandb  # pyright: ignore[reportMissingImports]

        known = _known(directory / "wandb_run", step)
        # Not the name, which runs of other directories may have as well.
        resume = "allow" if known else None
        self._run = wandb.init(id=known, name="-".join(directory.parts[-2:]), resume=resume)
        replace_text(directory / "wandb_run", self._run.id)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars of a step."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow (`pip install mlflow`), on the server that `MLFLOW_TRACKING_URI` names.

    Args:
      directory: Of the seed, whose name and that of the run become the name there. The number of
        the run is kept in `mlflow_run`, so that an interrupted one is resumed.
      step: Step that it resumes from.
    """

    package, alone = "mlflow", True

    def __init__(self, directory: pathlib.Path, step: int):
        """Begin the run, or resume it."""
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow, path = mlflow, directory / "mlflow_run"
        name = "-".join(directory.parts[-2:])
        run = mlflow.start_run(run_id=_known(path, step), run_name=name)
        replace_text(path, run.info.run_id)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars of a step."""
        self._mlflow.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._mlflow.end_run()


def _known(path: pathlib.Path, step: int) -> str | None:
    """Return the number of the run that is resumed, if there is one."""
    return path.read_text() if step and path.exists() else None


WRITERS: Registry[MakeWriter] = Registry(
    "writer", {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}, Callable
)
"""By name, as in `config.writers`."""
