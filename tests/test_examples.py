"""The trainers of examples/ learn the digits."""

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_learns_the_digits(name):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    *_, last = re.findall(r"test accuracy ([0-9.]+) %", done.stdout)
    assert float(last) > 85
