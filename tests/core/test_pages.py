"""The small server of probes and metrics: whoever asks how, an honest question is answered."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
from opd_core import pages
from opd_core.ports import listen

from tests.questions import asked

QUESTION = b"GET /page HTTP/1.1\r\n\r\n"


def served(play: Callable[[int], Awaitable[None]]) -> None:
    async def page() -> pages.Page:
        return pages.text(200, "here\n")

    async def run() -> None:
        listening = listen("127.0.0.1", 0)
        server = await pages.serve(listening, {"/page": page})
        async with asyncio.timeout(60):
            await play(listening.getsockname()[1])
        server.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (b"GET /elsewhere HTTP/1.1\r\n\r\n", b" 404 "), (b"POST /page HTTP/1.1\r\n\r\n", b" 405 "),
        (b"HEAD /page HTTP/1.1\r\n\r\n", b" 200 "), (b"\r\n\r\n", b" 405 "), (b"GET\r\n\r\n", b" 405 "),
        (b"GET \xff\x00 HTTP\r\n\r\n", b" 404 "), (b"x" * 100_000 + b"\r\n\r\n", b""),
    ],
)  # fmt: skip
def test_an_odd_question_is_its_own_trouble(question: bytes, answer: bytes) -> None:
    async def play(port: int) -> None:
        assert answer in await asked(port, question)
        assert b" 200 " in await asked(port, QUESTION)

    served(play)


def test_a_client_that_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_SECONDS", 0.2)

    async def play(port: int) -> None:
        assert await asked(port, b"GET /page") == b""

    served(play)


def test_beside_many_that_say_nothing_a_question_is_answered_and_the_oldest_go() -> None:
    def connected(port: int) -> list[socket.socket]:
        return [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * pages._MOST)]

    async def play(port: int) -> None:
        silent = await asyncio.to_thread(connected, port)
        assert b" 200 " in await asked(port, QUESTION)
        kept = 0
        for each in silent:
            each.setblocking(False)
            try:
                assert each.recv(1) == b""
            except BlockingIOError:
                kept += 1
            except ConnectionResetError:
                pass
            each.close()
        assert kept == pages._MOST - 1  # one made room for the question

    served(play)
