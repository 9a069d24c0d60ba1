"""Command lines keep the memory that is freed; nothing else does."""

import json
import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, pathlib, sys
import numpy as np
from lpa_jax import memory
kept = memory.keep_freed_memory() if sys.argv[1] != "leave" else None
if sys.argv[1] == "stop":
    memory.stop_keeping_memory()
def resident():
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
before = resident()
array = np.ones(25_000_000)
del array
print(json.dumps([kept, resident() - before]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc")
def test_what_is_freed_stays_with_the_process():
    found = {}
    for how in ("keep", "stop", "leave"):
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, how],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[how] = json.loads(ended.stdout)
    assert found["keep"][0] is True
    # Of 200 MB.
    assert found["keep"][1] > 150e6
    assert found["stop"][1] < 50e6
    assert found["leave"][1] < 50e6


CALL = """
import sys
from lpa_jax import commands, memory
memory.keep_freed_memory = lambda: print("kept")
commands.parse(sys.argv, lambda: None)
"""


@pytest.mark.parametrize(("arguments", "kept"), [([], True), (["--nokeep_memory"], False)])
def test_commands_keep_it_unless_they_are_told_not_to(arguments, kept):
    ended = subprocess.run(
        [sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, check=True
    )
    assert ("kept" in ended.stdout) == kept
