"""Command lines keep the memory that is freed; nothing else does."""

import json
import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from lpa_jax import memory
kept = memory.keep_freed_memory() if sys.argv[1] == "keep" else None
import jax, jax.numpy as jnp
step = jax.jit(lambda rows: (rows @ rows.T).sum())
# Between the product and the sum it takes 100 MB.
rows = jnp.ones((5000, 2))
for _ in range(3):
    step(rows).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step(rows).block_until_ready()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc")
def test_steps_take_no_new_pages_where_freed_memory_is_kept():
    found = {}
    for how in ("keep", "leave"):
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, how],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[how] = json.loads(ended.stdout)
    assert found["keep"][0] is True
    assert found["keep"][1] < 0.1 * found["leave"][1]


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
