"""A request to stop from outside: SIGTERM (a scheduler's preemption, torchrun) or SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While the context lasts, the first signal is only noted; the second does what it did before.

    Attributes:
        received: name of the signal that came, such as "SIGTERM"; None where none did.
        event: set when it comes, for threads that wait.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.event = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.event.set()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
