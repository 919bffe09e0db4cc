"""A few pages of a process on a port of its own: probes for the kubelet, metrics for Prometheus.

Whoever can reach the port may ask: a question is bounded in bytes, a connection in time, and their number by the one
that has been there longest, which goes. An answer takes milliseconds, so who asks is answered however many say nothing.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping

_SECONDS = 10.0  # of a connection
_LARGEST = 8192  # bytes of a question
_MOST = 128  # connections

Page = tuple[int, str, bytes]  # status, content type, content
Pages = Mapping[str, Callable[[], Awaitable[Page]]]  # by path


async def serve(listening: socket.socket, pages: Pages) -> asyncio.Server:
    """Answer on the running loop until the server is closed."""
    connections: dict[asyncio.StreamWriter, None] = {}  # the oldest first

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(connections) == _MOST:
            oldest = next(iter(connections))
            del connections[oldest]
            oldest.transport.abort()
        connections[writer] = None
        try:
            async with asyncio.timeout(_SECONDS):
                await _answer(reader, writer, pages)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # it has hung up, made room for others, or is no HTTP client
        finally:
            connections.pop(writer, None)
            writer.transport.abort()

    return await asyncio.start_server(connected, sock=listening, limit=_LARGEST)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pages: Pages) -> None:
    question = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
    method, path = question[0], question[1].partition(b"?")[0].decode(errors="replace") if len(question) > 1 else ""
    if method not in (b"GET", b"HEAD"):
        status, kind, content = text(405, "GET only\n")
    elif path not in pages:
        status, kind, content = text(404, f"{', '.join(pages)}\n")
    else:
        status, kind, content = await pages[path]()
    head = f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode())
    if method == b"GET":
        writer.write(content)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def text(status: int, words: str) -> Page:
    return status, "text/plain; charset=utf-8", words.encode()
