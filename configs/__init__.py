"""Configurations by name: each other file of this folder, which the package installs, is one."""

import pathlib

from lpa_jax.registry import Registry

FILES = Registry(
    "configuration",
    {
        path.stem: path
        for path in sorted(pathlib.Path(__file__).parent.glob("*.py"))
        if path.name != "__init__.py"
    },
)


def resolve(argument: str) -> str:
    """Return `NAME` or `NAME:ARGUMENT` with the file in place of the name; another path as it is.

    Example:
      >>> resolve("digits:method=lpa")
      '.../configs/digits.py:method=lpa'
      >>> resolve("mine.py:smoke")
      'mine.py:smoke'
    """
    name, colon, rest = argument.partition(":")
    return f"{FILES[name]}{colon}{rest}" if name in FILES else argument
