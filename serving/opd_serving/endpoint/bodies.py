"""Reading requests' bodies from clients that may be slow, or want to be."""

import asyncio

from starlette.requests import Request

from opd_serving.endpoint.errors import CLOSE, ApiError

_MAX_BODY = 2**20
_MOST = 128  # bodies that are on their way at once; with _MAX_BODY, 128 MiB
_SECONDS = 20.0


class Bodies:
    """Every body has a deadline. Where too many are on their way, the one that has taken longest is given up: whoever
    sends at once is not held up by those who do not."""

    def __init__(self, most: int = _MOST, seconds: float = _SECONDS) -> None:
        self.seconds = seconds
        self._most = most
        self._deadlines: dict[asyncio.Timeout, None] = {}  # in order of arrival
        self._closed = False

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            ApiError: 408 too slow, 413 too large, 503 the server does not wait for bodies any more.
        """
        deadline = asyncio.timeout(self.seconds)
        content = b""
        try:
            async with deadline:
                self._deadlines[deadline] = None
                if len(self._deadlines) > self._most:
                    self._give_up(next(iter(self._deadlines)))
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > _MAX_BODY:
                        message = f"the body is larger than {_MAX_BODY} bytes"
                        raise ApiError(413, message, code="body_too_large", headers=CLOSE)
        except TimeoutError:
            if self._closed:
                message = "the server is shutting down; send the request again"
                raise ApiError(503, message, code="draining", retry_after=2, headers=CLOSE) from None
            raise ApiError(
                408, f"the body did not come within {self.seconds:g} seconds", code="body_timeout", headers=CLOSE
            ) from None
        finally:
            self._deadlines.pop(deadline, None)
        return content

    def close(self) -> None:
        """Wait for no body any more: a half-sent one does not hold up the end of the server."""
        self._closed = True
        for deadline in list(self._deadlines):
            self._give_up(deadline)

    def _give_up(self, deadline: asyncio.Timeout) -> None:
        self._deadlines.pop(deadline, None)
        deadline.reschedule(asyncio.get_running_loop().time())
