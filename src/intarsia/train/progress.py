"""Progress of a long loop: a bar with the time left on a terminal, one plain line per event elsewhere, or nothing.

`NO_COLOR` and `TERM=dumb` are respected (by rich).  Everything goes to standard error, so that results can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """What loops report to."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A loop of `total` steps begins, `done` of them already behind."""

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """`done` steps are behind; `values` are worth a line (loss, learning rate ...)."""

    def note(self, text: str) -> None:
        """A sentence for the user."""

    def stop(self) -> None:
        """The loop has ended."""


class Quiet:
    """Says nothing."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        pass

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


class Clock:
    """Estimates the time left from the pace since the start.

    Args:
        now: a clock in seconds.
    """

    def __init__(self, total: int, done: int = 0, now: Any = time.monotonic) -> None:
        self.now = now
        self.total = total
        self.first = done
        self.began = now()

    def left(self, done: int) -> float | None:
        """Seconds left, None before the first step."""
        steps = done - self.first
        return None if steps <= 0 else (self.now() - self.began) / steps * max(self.total - done, 0)


def duration(seconds: float) -> str:
    """`7s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def shown(values: Mapping[str, float]) -> str:
    """`loss 0.4127  learning rate 0.00047`."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


class Plain:
    """One line per event that is worth one, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.what = ""
        self.clock = Clock(0)

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.clock = what, Clock(total, done)
        self.note(f"{what}: {total} steps" + (f", going on after step {done}" if done else ""))

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        if values is None:
            return
        left = self.clock.left(done)
        rest = f"  {duration(left)} left" if left is not None and done < self.clock.total else ""
        self.note(f"{self.what} {done}/{self.clock.total}  {shown(values)}{rest}")

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def stop(self) -> None:
        pass


class Bar:
    """A bar on a terminal, drawn by rich."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        self.console = Console(file=stream or sys.stderr)
        self._bar: Any = None
        self._task: Any = None

    def start(self, what: str, total: int, done: int = 0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.stop()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[values]}"))
        self._bar = RichProgress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(what, total=total, completed=done, values="")
        self._bar.start()

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, **({} if values is None else {"values": shown(values)}))

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def reporter(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """The progress that fits the stream (standard error by default)."""
    stream = stream or sys.stderr
    if quiet:
        return Quiet()
    return Bar(stream) if stream.isatty() else Plain(stream)


class Shown:
    """`with Shown(progress): ...` stops the progress whatever happens."""

    def __init__(self, inner: Progress) -> None:
        self.inner = inner

    def __enter__(self) -> Progress:
        return self.inner

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.inner.stop()
