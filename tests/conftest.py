"""Shared by all tests: eight host devices, and shapes checked at run time."""

import os
import signal
import tempfile
import typing

from beartype import beartype, BeartypeConf

# Programs are tiny here: what XLA gains by optimizing them is lost many times over in compiling.
# Before JAX begins, and for the commands that tests start.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Many tests train the same network. The processes of one test run share what they compile.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="lpa_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# isort: split
import jax
import jaxtyping
from jaxtyping import install_import_hook
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# A shell's background jobs ignore Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# An int is welcome where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typechecker(function):
    """Check the arguments of `function`; where they are protocols, that the methods are there."""
    for hint in getattr(function, "__annotations__", {}).values():
        # beartype refuses protocols, optax's among them, that are not marked as checkable.
        if getattr(hint, "_is_protocol", False):
            typing.runtime_checkable(hint)
    return checked(function)


# Must come before the package is first imported.
install_import_hook("lpa_jax", f"{__name__}.typechecker")


@pytest.fixture
def unchecked():
    """Switch the tests' type checker off, which would refuse before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
