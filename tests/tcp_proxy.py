"""A TCP proxy whose open connections can fall silent, as behind a dead load balancer or to a machine that is off."""

import asyncio
import threading


class TcpProxy:
    """Runs on a thread of its own; `port` is where it listens on the loopback, `count` how many have connected."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._silent: set[int] = set()
        self._open: set[int] = set()
        self.count = 0
        ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(ready),), daemon=True)
        self._thread.start()
        ready.wait()

    def mute_open_connections(self) -> None:
        """What is open now brings nothing any more and is not closed; new connections work."""
        self._silent |= self._open

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._closing.wait()
        server.close()  # and `asyncio.run` cancels what is open

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        number = self.count
        self._open.add(number)
        up, down = await asyncio.open_connection(*self._target)
        try:
            await asyncio.gather(self._pump(number, reader, down), self._pump(number, up, writer))
        except (OSError, asyncio.CancelledError):
            pass  # one of the two has hung up, as clients do, or the test is over
        finally:
            self._open.discard(number)
            writer.close()
            down.close()

    async def _pump(self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if number not in self._silent:
                sink.write(data)
                await sink.drain()
        if number not in self._silent:
            sink.close()
