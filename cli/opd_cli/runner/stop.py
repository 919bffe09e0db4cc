"""Ctrl-C and SIGTERM: the first drains, the second ends everything now."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from opd_core.errors import OPDError
from opd_core.exit_codes import ExitCode


class InterruptedRunError(OPDError):
    """The user stopped the run; what was reached is on disk."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode.TERMINATED if number == signal.SIGTERM else ExitCode.INTERRUPTED  # type: ignore[misc]


class StopSignal:
    """The stop signals received so far."""

    def __init__(self) -> None:
        self.number = 0
        self.twice = False

    @property
    def asked(self) -> bool:
        return self.number != 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        old = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.asked:
            self.number = number
        elif not self.twice:  # a third press would break the killing off
            self.twice = True
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises InterruptedRunError once a stop has been asked for."""
        if self.asked:
            raise self.error("stopped; the same command continues here")

    def error(self, message: str) -> InterruptedRunError:
        return InterruptedRunError(message, self.number)
