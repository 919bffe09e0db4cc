"""Runs tritonserver as long as it is of use, and says why it ended.

By itself it stays up, and ready, when the Python process behind its model is gone
(https://github.com/triton-inference-server/server/issues/7230), and the reason of a failed start stands far above the
last lines of its log, which are a table of its options.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from threading import Thread
from types import FrameType
from typing import IO

import psutil
from opd_core.errors import InvalidError, OPDError, RefusedError, UnavailableError
from opd_core.process import die_with_parent

_STUB = "triton_python_backend_stub"[:15]  # as the kernel calls the process, also when it has ended
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 2.0  # a server that fails to start loses its stub as well, and then ends by itself
_REASONS = (
    re.compile(r"failed to load '[^']*' version \d+: (.*)"),  # the model's own
    re.compile(r"^error: (.*)"),  # the server's last
)
_ERRORS = {error.__name__: error for error in (InvalidError, RefusedError)}  # that the model's own code ends with
_OURS = re.compile(rf"({'|'.join(_ERRORS)}): (.*)", re.S)


def run(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Exit code of the server, 128 + N where signal N ended it. SIGTERM and SIGINT are passed on to it, and whatever it
    makes of them is well: 0.

    Raises:
        InvalidError, RefusedError: the model was refused by its own code. UnavailableError: the model's process died.
        OPDError: the server did not start, with its own reason.
    """
    received: list[int] = []
    server: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        if server is not None:
            server.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    server = subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent,
    )
    if received:  # between the handler and the server
        server.send_signal(received[-1])
    reasons: dict[int, str] = {}
    assert server.stdout is not None
    reader = Thread(target=_copy, args=(server.stdout, reasons), daemon=True)
    reader.start()
    code = _watch(server, received)
    reader.join(timeout=2)  # whatever still holds the other end is not waited for
    if received:
        return 0
    if code > 0 and reasons:
        raise _failure(reasons[min(reasons)])
    return 128 - code if code < 0 else code


def _watch(server: "subprocess.Popen[bytes]", received: Sequence[int]) -> int:
    """Wait for the server's end; end it when its stub is gone."""
    stub: psutil.Process | None = None
    lost_at: float | None = None
    while True:
        try:
            return server.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        if received:
            continue  # everything ends, in its own order
        if stub is None:
            stub = _stub(server)
        elif lost_at is None and not _runs(stub):
            lost_at = time.monotonic()
        if lost_at is not None and time.monotonic() - lost_at > _GRACE_SECONDS:
            server.kill()
            server.wait()
            raise UnavailableError(
                "the Python process behind the model is gone, so the server was ended; start it again. Was it killed "
                "for its memory?"
            )


def _stub(server: "subprocess.Popen[bytes]") -> psutil.Process | None:
    """The process that runs the model, once it is there: the repository has one model with one instance. A child that
    has ended already was to become it, and Triton waits for it without end
    (https://github.com/triton-inference-server/python_backend/issues/401)."""
    try:
        children = psutil.Process(server.pid).children()
        return next((child for child in children if child.name() == _STUB or not _runs(child)), None)
    except psutil.NoSuchProcess:  # one of them has just ended
        return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _copy(output: IO[bytes], reasons: dict[int, str]) -> None:
    """Pass the server's output on, and keep the first line that answers to each of `_REASONS`, by its place there."""
    for line in output:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        text = line.decode(errors="replace").strip()
        for place, pattern in enumerate(_REASONS):
            if place not in reasons and (match := pattern.search(text)):
                reasons[place] = match[1]


def _failure(reason: str) -> OPDError:
    """The error behind `Internal: InvalidError: words\\n\\nAt:\\n  file(line): function`, as the server logs it."""
    words = reason.replace(r"\n", "\n").replace(r"\"", '"').partition("\n\nAt:")[0].rstrip('"')
    ours = _OURS.search(words)
    return _ERRORS[ours[1]](ours[2]) if ours else OPDError(f"tritonserver did not start: {words}")
