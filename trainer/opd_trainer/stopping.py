"""SIGTERM and Ctrl-C: the first ends training after the current round and a checkpoint, the second ends it at once.

Before the first round there is nothing to save, and a rank waits for the others in native code, where it would hear no
handler of Python's: until a `StopSignal` is made, a stop signal ends the process as the kernel does."""

import os
import signal
from collections.abc import Callable
from types import FrameType


def leave_at_once() -> None:
    """For whoever has nothing to save yet."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class StopSignal:
    """The first stop signal this process received."""

    def __init__(self) -> None:
        self.number = 0
        self._hurry: list[Callable[[], None]] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
        for hurry in self._hurry:
            hurry()

    def then(self, hurry: Callable[[], None]) -> None:
        """Call `hurry` when the signal comes, or now if it has come."""
        self._hurry.append(hurry)
        if self.number:
            hurry()

    def requested(self) -> bool:
        return self.number != 0

    @property
    def exit_code(self) -> int:
        # Another rank, on another node, may have been the one that was told to stop.
        return 128 + (self.number or signal.SIGTERM)
