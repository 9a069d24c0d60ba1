"""Files that are written whole or not at all, and what is said where they cannot be."""

from collections.abc import Iterator
import contextlib
import errno
import json
import math
import os
import pathlib
from typing import Any, TextIO

from lpa_jax.training.config import ConfigError


class WriteError(RuntimeError):
    """The work directory takes no more, for instance because its disk is full."""


def _is_full(error: Exception) -> bool:
    """Return whether a disk or a quota is full, which errors of libraries tell in words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or "quota" in str(error)


@contextlib.contextmanager
def writing(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn an `OSError`, or one of `errors`, into a `WriteError` that names what was written."""
    try:
        yield
    except (OSError, *errors) as error:
        told = (error.strerror if isinstance(error, OSError) else None) or str(error)
        # Of the many words of the libraries the first reason is enough.
        reason = "No space left on device" if "No space left" in str(error) else told
        remedy = "make room" if _is_full(error) else "correct that"
        raise WriteError(
            f"{what} cannot be written ({reason}). What was saved before is kept: {remedy}, and "
            "rerun the command to resume."
        ) from error


@contextlib.contextmanager
def serving(workdir: pathlib.Path) -> Iterator[None]:
    """Turn an `OSError` into a `ConfigError` that the work directory cannot serve as one."""
    if "\0" in str(workdir):
        raise ConfigError(f"{str(workdir)!r} cannot be a work directory: it has a null in it.")
    try:
        yield
    except OSError as error:
        if _is_full(error):
            # The directory is right, and there may be room in it again.
            with writing(str(workdir)):
                raise
        raise ConfigError(f"{workdir} cannot be a work directory: {error}.") from error


def read_json(path: pathlib.Path, *keys: str) -> dict[str, Any]:
    """Read what `write_json` wrote, a dictionary with the keys given.

    Raises:
      ConfigError: If it holds anything else.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict) or not set(keys) <= set(value):
            raise ValueError("something is missing")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it and try again.") from error
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a file whole or not at all; numbers that are not finite become null.

    Raises:
      OSError: If it cannot be written; what was there before is kept.
    """
    replace_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return a value for JSON, in which numbers that are not finite are None."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w") as file:
            write_through(file, text)
        partial.replace(path)
    except OSError:
        # What could not be finished must not take the room that is wanted.
        partial.unlink(missing_ok=True)
        raise


def write_through(file: TextIO, text: str) -> None:
    """Write to the disk itself: what is saved later must not outlive what was recorded before."""
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
