"""One port per pod: /metrics for Prometheus, /progress for the operator and `opd run`, /healthz for the kubelet."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opd_core.ports import listen
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from opd_trainer.metrics import Metrics


def serve(metrics: Metrics, host: str, port: int) -> ThreadingHTTPServer:
    """Answer on a background thread until the process ends or `shutdown` is called.

    Raises:
        UnavailableError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages: dict[str, Callable[[], tuple[str, bytes]]] = {
                "/metrics": lambda: (CONTENT_TYPE_LATEST, generate_latest(metrics.registry)),
                "/progress": lambda: ("application/json", json.dumps(metrics.progress).encode()),
                "/healthz": lambda: ("text/plain", b"ok\n"),
            }
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                self.send_error(404)
                return
            kind, body = page()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """A line per scrape says nothing."""

    server = ThreadingHTTPServer((host, port), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listen(host, port)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
