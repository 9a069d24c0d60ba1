"""Imported by a run: notes which training images it reads, `READS` is the file."""

import os

from lpa_jax import data

_read_into = data.Streamed.read_into


def _noting(self, images, chosen, part=None):
    # Only training takes random parts.
    if part is not None:
        with open(os.environ["READS"], "a", encoding="utf-8") as file:
            file.write(" ".join(map(str, chosen)) + "\n")
    return _read_into(self, images, chosen, part)


data.Streamed.read_into = _noting
