"""A command in a container, and what it prints."""

import json
from collections.abc import Iterator
from urllib.parse import quote

from opd_core.errors import UnavailableError

from opd_cli.cluster.connection import Connection, core
from opd_cli.cluster.refusals import refusal

_PROTOCOL = "v4.channel.k8s.io"
_OUTPUT, _WORDS, _RESULT = 1, 2, 3  # its channels
_LAST_WORDS = 2000


def output_of(connection: Connection, namespace: str, pod: str, container: str, command: list[str]) -> Iterator[bytes]:
    """The standard output of `command` as it comes.

    Not by kubernetes.stream, which keeps all of it in memory (kubernetes-client/python#2302).

    Raises:
        RejectedError: not allowed. UnavailableError: the connection broke, or the command failed.
    """
    import websocket
    from kubernetes.stream.ws_client import create_websocket

    query = "&".join(
        ["stdout=true", "stderr=true", f"container={container}", *(f"command={quote(w)}" for w in command)]
    )
    path = f"{core(namespace, 'pods', pod, 'exec')}?{query}"
    headers = {"sec-websocket-protocol": _PROTOCOL}
    _, url, headers, *_ = connection.api.param_serialize(
        "GET", path, header_params=headers, auth_settings=["BearerToken"]
    )
    words, result = b"", b""
    try:
        socket = create_websocket(connection.api.configuration, "ws" + url.removeprefix("http"), headers)
        try:
            socket.settimeout(connection.timeout)
            while True:
                code, frame = socket.recv_data_frame(True)
                if code == websocket.ABNF.OPCODE_CLOSE:
                    break
                channel, data = (frame.data[0], frame.data[1:]) if frame.data else (None, b"")
                if channel == _OUTPUT:
                    yield data
                elif channel == _WORDS:
                    words = (words + data)[-_LAST_WORDS:]
                elif channel == _RESULT:
                    result += data
        finally:
            socket.close()
    except websocket.WebSocketBadStatusException as error:
        raise refusal(error.status_code, (error.resp_body or b"").decode(errors="replace"), connection.host) from error
    except (websocket.WebSocketException, OSError) as error:
        raise UnavailableError(f"pod {pod}: the connection broke ({error}); try again") from error
    outcome = json.loads(result) if result else {}
    if outcome.get("status") != "Success":
        said = words.decode(errors="replace").strip().rpartition("\n")[2] or outcome.get("message", "no result")
        raise UnavailableError(f"pod {pod}: {command[0]} failed: {said}")
