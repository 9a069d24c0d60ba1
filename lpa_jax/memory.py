"""What the C library does with memory that is freed."""

import ctypes
import platform

# Of mallopt, with their numbers in glibc's malloc.h.
_KEEPING = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}
# What glibc comes to by itself in a process that takes and frees large blocks.
_USUAL = {
    "M_MMAP_MAX": (-4, 2**16),
    "M_MMAP_THRESHOLD": (-3, 2**25),
    "M_TRIM_THRESHOLD": (-1, 2**26),
    "M_TOP_PAD": (-2, 2**17),
}
_kept = False


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
    global _kept
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    _kept = _set(_KEEPING)
    return _kept


def stop_keeping_memory() -> None:
    """Undo `keep_freed_memory`, if it had an effect."""
    if _kept:
        _set(_USUAL)


def _set(settings: dict[str, tuple[int, int]]) -> bool:
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(parameter, value) for parameter, value in settings.values()]
    return taken == [1] * len(taken)
