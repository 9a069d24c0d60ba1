"""What the C library does with memory that is freed."""

import ctypes
import platform

# Of mallopt, with their numbers in glibc's malloc.h.
_SETTINGS = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, up to 2 GiB, and use it again.

    A training step on a CPU takes and frees hundreds of megabytes. By default glibc returns them
    to the system after every step, and each page of the next step is a page fault. The command
    lines call this unless they are given `--nokeep_memory`; importing the package does not. In a
    script or notebook call it first, before JAX computes anything.

    Returns:
      Whether it had an effect: only on Linux with glibc.

    Example:
      >>> isinstance(keep_freed_memory(), bool)
      True
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(parameter, value) for parameter, value in _SETTINGS.values()]
    return taken == [1] * len(taken)
