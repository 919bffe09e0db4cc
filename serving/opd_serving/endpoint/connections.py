"""uvicorn's connections, with an end to the patience: its own protocol waits for a request's head without limit."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Proxies keep idle connections for 60 to 75 s; a server that closes earlier makes them answer 502 now and then.
KEEP_ALIVE_SECONDS = 90
_HEAD_SECONDS = 20.0  # from the first byte of a request to the last of its head
_MOST = 512  # connections of a port; beyond, the one that has been idle longest goes


class Connection(H11Protocol):
    """Adds deadlines: for the first byte, for a request's head, and for a client that does not take its answer."""

    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waiting_since = self.loop.time()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        same = [each for each in self.connections if isinstance(each, Connection) and each.server == self.server]
        if len(same) > _MOST:
            idle = [each for each in same if each.idle and each is not self]
            min(idle, key=lambda each: each.waiting_since, default=self).transport.abort()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.idle and self._head_due is None and not self.transport.is_closing():
            self._head_due = self.loop.call_later(_HEAD_SECONDS, self._too_slow)
        elif not self.idle:
            self._forget_head()

    def on_response_complete(self) -> None:
        self.waiting_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # the answer is not taken; closing would wait until it is
        else:
            super().timeout_keep_alive_handler()

    def _forget_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing() and self.conn.our_state is h11.IDLE:
            self.transport.abort()
