"""What every benchmark writes beside its figures: the machine, the versions and the command."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys

import jax


def commit():
    """Return the commit checked out, "+" behind it if files differ; empty where there is none."""
    here = pathlib.Path(__file__).parent

    def git(*arguments):
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""


def write(path, rows, **more):
    """Write the rows of a benchmark as JSON, if a path is given."""
    if path is None:
        return
    packages = ("jax", "jaxlib", "flax", "optax")
    value = {
        "command": shlex.join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "commit": commit(),
        **more,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
