"""What is shown of long work: how much is finished, at which measured rate, and the time left."""

from collections import deque
from collections.abc import Callable, Iterator
import contextlib
import datetime
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

from lpa_jax.training import display
from lpa_jax.training.predict import wait

IN_FLIGHT = 2
"""Marks that are not reached yet, each half a second of work or one step, before the host waits."""


class Bar:
    """The progress of one piece of work: a line where there is news and, on a terminal, a bar.

    Counts and rates are of what the devices have finished, not of what they were given to do, and
    the time of compilation is in no rate. See `bar`.

    Attributes:
      done: Count of what is known to be finished.
    """

    def __init__(
        self,
        console: Console,
        shown: Progress,
        task: TaskID,
        unit: str,
        done: int,
        work: float,
        compiled: set[Any],
    ) -> None:
        self._console, self._shown, self._task, self._unit = console, shown, task, unit
        self._first = self.done = done
        self._work, self._work_done = work, 0.0
        self._compiled, self._untold = compiled, not compiled
        # Both are put off by compilation. The rate has a clock of its own, which stops.
        self._began = self._since = time.monotonic()
        self._running, self._seconds = False, 0.0
        self._marks: deque[tuple[int, Any]] = deque()
        self._next_mark = done

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(*arguments)`; its first call is shown as compilation, and not timed."""
        if function in self._compiled:
            return function(*arguments)
        self._compiled.add(function)
        if self._untold and not self._console.is_terminal:
            self._line("compiling")
        self._untold = False
        self._shown.update(self._task, rate="compiling")
        began = time.monotonic()
        try:
            return function(*arguments)
        finally:
            compiling = time.monotonic() - began
            self._began += compiling
            self._since += compiling
            self._shown.update(self._task, rate=self._rate())

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `call` of what is counted: the time until `finished_to` is that of the rate."""
        if not self._running:
            self._since, self._running = time.monotonic(), True
        return self.call(function, *arguments)

    def given(self, done: int, array: jax.Array) -> None:
        """Take note that the devices were given the work up to `done`, of which `array` comes.

        The host waits here rather than run more than about a second of work ahead, so that it
        obeys a signal in time. The devices never wait for it.

        Args:
          done: Count of what was given.
          array: A small array that is there as soon as that is finished; it may be donated later.
        """
        if done >= self._next_mark:
            mark = self.call(jnp.copy, array.addressable_data(0))
            self._marks.append((done, mark))
            self._next_mark = done + max(1, int(0.5 * (self.rate or 0.0)))
        finished = None
        while self._marks and (len(self._marks) > IN_FLIGHT or self._marks[0][1].is_ready()):
            finished, mark = self._marks.popleft()
            wait(mark)
        if finished is not None:
            self.finished(finished - self.done)

    def finished(self, count: int = 1, work: float = 1.0) -> None:
        """Add `count` to what is finished, `work` each in the unit of the whole's work."""
        self.done += count
        self._work_done += count * work
        self._show()

    def finished_to(self, done: int) -> None:
        """Take note that all up to `done` is finished; what follows until `run` is in no rate."""
        self._marks.clear()
        self.finished(done - self.done)
        if self._running:
            self._seconds += time.monotonic() - self._since
            self._running = False

    def begin(self, name: str) -> None:
        """Name the part that follows, which has a rate of its own."""
        self._shown.update(self._task, description=name, rate="")
        self._untold = True
        self._first, self._running, self._seconds = self.done, False, 0.0

    def say(self, news: str) -> None:
        """Print a line of news, with the rate and the time left."""
        self._line(", ".join(filter(None, (news, self._rate(), self._left()))))

    @property
    def rate(self) -> float | None:
        """What was finished a second, on average; None before anything was."""
        seconds = self._seconds + (time.monotonic() - self._since if self._running else 0.0)
        return (self.done - self._first) / seconds if self.done > self._first and seconds else None

    def _rate(self) -> str:
        rate = self.rate
        if rate is None:
            return ""
        # Slow work in seconds rather than in fractions.
        if rate < 1:
            return f"{1 / rate:.1f} s/{self._unit}"
        return f"{rate:.1f} {self._unit}{'es' if self._unit == 'batch' else 's'}/s"

    def _left(self) -> str:
        if not self._work_done:
            return ""
        # What is in no rate, judging for instance, takes its time again.
        seconds = time.monotonic() - self._began
        return f"{clock((self._work / self._work_done - 1) * seconds)} left"

    def _show(self) -> None:
        self._shown.update(self._task, completed=self.done, rate=self._rate(), left=self._left())

    def _line(self, text: str) -> None:
        name = self._shown.tasks[self._task].description
        display.say(self._console, f"{name}: {text}")


@contextlib.contextmanager
def bar(
    console: Console,
    name: str,
    total: int,
    *,
    unit: str = "step",
    done: int = 0,
    work: float | None = None,
    compiled: set[Any] | None = None,
) -> Iterator[Bar]:
    """Show the progress of one piece of work, from `done` to `total`.

    Args:
      console: Where to show it.
      name: Of the work.
      total: Count at its end.
      unit: What is counted, in the singular.
      done: Count at which it begins.
      work: Of the whole that is left, where the parts differ; None for one of each.
      compiled: Functions that were called before, see `Bar.call`; shared by several bars.
    """
    columns = (
        TextColumn("{task.description}"),
        # Where the terminal is narrow, it is the bar that gives way.
        BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task(name, total=total, completed=done, rate="", left="")
        work = total - done if work is None else work
        yield Bar(console, shown, task, unit, done, work, set() if compiled is None else compiled)


class Left:
    """The time that is left of like pieces of work, from those that were done here.

    Example:
      >>> left = Left()
      >>> left(3)
      ''
      >>> with left.timed():
      ...     pass
      >>> left(3)
      ', about 0:00:00 left'
    """

    def __init__(self) -> None:
        self._seconds, self._count = 0.0, 0

    @contextlib.contextmanager
    def timed(self, count: int = 1) -> Iterator[None]:
        """Measure `count` pieces of work; results that were only read do not count: give 0."""
        began = time.monotonic()
        yield
        if count:
            self._seconds += time.monotonic() - began
            self._count += count

    def __call__(self, count: int) -> str:
        """Return the words for the time that `count` more take."""
        if not self._count:
            return ""
        return f", about {clock(count * self._seconds / self._count)} left"


def clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))
