"""The metrics of one seed while it trains: `metrics.jsonl`, and writers beside it."""

from collections.abc import Mapping, Sequence
import contextlib
import json
import pathlib
from typing import Any

from lpa_jax.training.files import finite, replace_text, write_through, writing
from lpa_jax.training.writers import MakeWriter


class MetricLog:
    """The metrics of one seed.

    Args:
      directory: Of the seed.
      step: Step the run resumes from; rows that were recorded after it are discarded, since they
        will be recorded again.
      writers: What makes the writers beside `metrics.jsonl`.
      write: Whether to write anything, or only to keep `rows`.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        step: int,
        writers: Sequence[MakeWriter] = (),
        *,
        write: bool = True,
    ):
        """Open the file and the writers."""
        self._path, self._write, self._writers = directory / "metrics.jsonl", write, []
        # All processes decide by these what is to be computed next.
        self.rows = [row for row in read_rows(self._path) if row["step"] <= step]
        if not write:
            return
        with writing(str(self._path)):
            directory.mkdir(parents=True, exist_ok=True)
            replace_text(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        for make in writers:
            with self._recording(make):
                self._writers.append(make(directory, step))

    def write(self, row: dict[str, Any]) -> None:
        """Record a row, in which metrics are nested; `row["step"]` says when."""
        row = finite(row)
        self.rows.append(row)
        if not self._write:
            return
        with writing(str(self._path)), self._path.open("a") as file:
            write_through(file, json.dumps(row) + "\n")
        # Writers name metrics by split alone.
        others = {name: value for name, value in row.items() if name not in ("step", "metrics")}
        named = scalars({**others, **row.get("metrics", {})})
        for writer in self._writers:
            with self._recording(type(writer)):
                writer.write(row["step"], named)

    def close(self) -> None:
        """Close the writers."""
        for writer in self._writers:
            with self._recording(type(writer)):
                writer.close()

    def _recording(self, made: Any) -> contextlib.AbstractContextManager[None]:
        # Errors of any kind: what writes is a library, or the user's own code.
        return writing(f"What {getattr(made, '__name__', made)} records", Exception)


def scalars(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of nested dictionaries by names joined with slashes, for writers.

    Example:
      >>> scalars({"train": {"loss": 0.5, "by_class": [1, 2]}, "epoch": 3})
      {'train/loss': 0.5, 'epoch': 3}
    """
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{key}"] = value
    return found


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`, up to a line cut short by a crash or otherwise damaged."""
    rows = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                if not isinstance(row["step"], int):
                    break
            except (ValueError, TypeError, KeyError):
                break
            rows.append(row)
    return rows
