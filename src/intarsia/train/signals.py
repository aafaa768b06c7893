"""Stopping a training in good order: the first signal asks, the second quits.

After SIGINT, SIGTERM or SIGHUP the running optimiser step is finished, a checkpoint written and `Interrupted` raised; its
exit code is 128 + the signal's number, as shells have it (130, 143, 129).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from intarsia.errors import TrainingError

SIGNALS = tuple(s for s in (getattr(signal, n, None) for n in ("SIGINT", "SIGTERM", "SIGHUP")) if s is not None)


class Interrupted(TrainingError):
    """Training was stopped by a signal and can be resumed."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Stop:
    """Whether to stop.

    Attributes:
        received: number of the signal, 0 if none came.
    """

    def __init__(self) -> None:
        self.received = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: finishing this step and saving; once more quits at once\n".encode())


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Catch signals in this block; outside the main thread, where Python has no handlers, nothing is caught."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[Any, Any] = {}
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            before[number] = signal.signal(number, stop._handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
