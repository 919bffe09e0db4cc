"""SIGTERM and Ctrl-C: the first ends training after the current round and a checkpoint, the second ends it at once."""

import os
import signal
from collections.abc import Callable
from types import FrameType


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
