"""The part of a kubelet that an API server asks for logs, and to run commands: here, beside the test."""

import base64
import hashlib
import json
import queue
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from devcluster import pki


class Kubelet:
    """`lines[pod]` is its log; None in it ends the container."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.lines: dict[str, queue.SimpleQueue[str | None]] = {}
        self.asked: list[tuple[str, str, dict[str, list[str]]]] = []  # pod, container, query
        self.breaks_after: int | None = None  # bytes of a command's output

    def prints(self, pod: str, *lines: str | None) -> None:
        log = self.lines.setdefault(pod, queue.SimpleQueue())
        for line in lines:
            log.put(line)


@contextmanager
def kubelet(folder: Path, port: int) -> Iterator[Kubelet]:
    pki.make_authority(folder)
    pki.make_certificate(folder, "kubelet", "/CN=kubelet", "IP:127.0.0.1")
    state = Kubelet(port)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            _, kind, _, pod, container = url.path.split("/")  # kind/namespace/pod/container
            query = parse_qs(url.query)
            state.asked.append((pod, container, query))
            if kind == "exec":
                self.execute(query["command"])
                return
            if "previous" in query:
                self.send_error(400, "previous terminated container not found")
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while (line := state.lines[pod].get()) is not None:
                data = line.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")

        def execute(self, command: list[str]) -> None:
            """v4.channel.k8s.io: binary frames, each with the number of its channel first."""
            key = self.headers["Sec-WebSocket-Key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key).digest()).decode())
            self.send_header("Sec-WebSocket-Protocol", self.headers["Sec-WebSocket-Protocol"])
            self.end_headers()
            done = subprocess.run(command, capture_output=True, check=False)
            for start in range(0, len(done.stdout), 30_000):
                self.frame(1, done.stdout[start : start + 30_000])
                if state.breaks_after is not None and start >= state.breaks_after:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
            self.frame(2, done.stderr)
            self.frame(3, json.dumps({"status": "Failure" if done.returncode else "Success"}).encode())
            self.wfile.write(b"\x88\x00")
            self.close_connection = True

        def frame(self, channel: int, data: bytes) -> None:
            payload = bytes([channel]) + data
            self.wfile.write(b"\x82\x7e" + len(payload).to_bytes(2, "big") + payload)

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "kubelet.crt", folder / "kubelet.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
