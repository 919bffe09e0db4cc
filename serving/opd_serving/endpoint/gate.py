"""Around all routes, of plain ASGI: Starlette's BaseHTTPMiddleware hides a client's disconnect from the route
(https://github.com/encode/starlette/issues/2094), and what runs inside of it does not see its answer to a crash."""

import asyncio
import ipaddress
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

from opd_serving.endpoint.errors import ApiError
from opd_serving.endpoint.service import Service

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it, the metrics count it
GENERATIONS = "/v1/images/generations"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_log = logging.getLogger(__name__)


class Gate:
    """Names every request, checks whom it is addressed to, leads it to the API or to the operators' port, and counts,
    times and logs what became of it: never what it said."""

    def __init__(self, service: Service, api: App, operations: App) -> None:
        self._service, self._api, self._operations = service, api, operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._api(scope, receive, send)
            return
        service, path, began = self._service, str(scope["path"]), time.monotonic()
        request_id, status, started = f"req_{uuid.uuid4().hex}", 500, False
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        on_operations = service.metrics_port is not None and scope["server"][1] == service.metrics_port
        app = self._operations if on_operations else self._api
        # A route that answers GET answers HEAD; the server leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def send_named(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                own = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                headers = list(message.get("headers", ()))
                if service.engine.leaving and (b"connection", b"close") not in headers:
                    own.append((b"connection", b"close"))  # the client's next request finds another pod
                message["headers"] = [*headers, *own]
            await send(message)

        try:
            if refusal := self._refusal(scope):
                await refusal.answer(path)(scope, receive, send_named)
            else:
                await app(inner, receive, send_named)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except Exception:
            _log.exception("%s failed", request_id)
            if not started:
                raise
        except asyncio.CancelledError:  # the server waits no longer
            if not started:
                stopped = ApiError(503, "the server stopped before the answer was there", code="stopped", retry_after=2)
                await stopped.answer(path)(scope, receive, send_named)
        finally:
            if path.startswith("/v1/"):
                seconds = time.monotonic() - began
                service.metrics.requests.labels(service.served.name, str(status)).inc()
                if path == GENERATIONS:
                    service.metrics.request_seconds.labels(str(status)).observe(seconds)
                what = f"{state.get('client', '-')} {state.get('what', '')}".strip()
                _log.info("%s %s %d %.2f s %s", request_id, _shown(path), status, seconds, what)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """A page of the web can make a browser ask a server that listens on the browser's own machine, under any name
        that the page's owner lets point there. Without keys, only those who know whom they ask are answered."""
        service = self._service
        if service.keys or not service.loopback:
            return None
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if name == "localhost" or name.endswith(".localhost") or is_loopback(name.strip("[]")):
            return None
        message = (
            f"this server is for its own machine and has no API keys, so it does not answer as {_shown(host)!r}; "
            "ask for 127.0.0.1 or localhost, or start it with --api-keys"
        )
        return ApiError(403, message, code="host_not_allowed")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(text: str) -> str:
    """In one line of a log or an answer, whatever a client wrote."""
    return text[:100].encode("ascii", "backslashreplace").decode() if text.isprintable() else repr(text[:100])
