"""Ctrl-C and termination wait until a step is done, so that the state can be saved. A second Ctrl-C does not wait; a second
termination does: schedulers and torchrun tell a process twice."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context; `asked` turns true when the process is asked to stop, and `stop` raises what the signal would have."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.asked is not None and (kind is None or issubclass(kind, Exception)):
            os.kill(os.getpid(), self.asked)  # nobody has stopped for it: something else came first

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def stop(self) -> None:
        """KeyboardInterrupt for Ctrl-C (and where another process was asked); SystemExit for a termination."""
        if self.asked == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
