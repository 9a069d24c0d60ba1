"""The signal to stop, SIGTERM, as the processes of a run agree on it."""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Give a function, to be called in every dispatch, that tells whether SIGTERM has come."""
    if jax.process_count() > 1:
        # It may have come to any of the processes; they agree on the call at which they stop.
        calls = itertools.count()
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    if threading.current_thread() is not threading.main_thread():
        # Signals are the main thread's alone.
        yield lambda: False
        return
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
