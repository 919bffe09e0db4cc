"""`python -m opd_trainer.rewards.serve REWARD...`: any reward behind HTTP, one batch at a time (`wire` says what is
asked and answered).

A question is bounded in bytes, in pixels and in time, and so is the number of those that wait; whoever comes then is
told to come again, and asks another server. Who may ask at all is up to the network.
"""

import argparse
import json
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from opd_core.device import choose_device
from opd_core.errors import InvalidError, OPDError, RefusedError
from opd_core.exit_codes import ExitCode
from opd_core.ports import in_url, listen

from opd_trainer.rewards.registry import RewardFn, load_reward
from opd_trainer.rewards.replicas import cut
from opd_trainer.rewards.wire import printable, read_question

PORT = 8500
LARGEST = 2**28  # bytes of a question
MOST_WAITING = 16  # questions that are being read, wait or are computed
SECONDS_TO_ASK = 60  # from the connection until the question must be here
_MOST_CONNECTIONS = 128


class Server(ThreadingHTTPServer):
    daemon_threads = False  # the last answers are given before it ends

    def __init__(self, listening: socket.socket, rewards: Mapping[str, RewardFn]) -> None:
        super().__init__(listening.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.rewards = rewards
        self.waiting = threading.BoundedSemaphore(MOST_WAITING)
        self.computing = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        if threading.active_count() > 2 * _MOST_CONNECTIONS:  # a connection has a thread, and a timer
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS_TO_ASK  # of a single write

    def setup(self) -> None:
        super().setup()
        self._late = threading.Timer(SECONDS_TO_ASK, cut, [self.connection])
        self._late.daemon = True
        self._late.start()

    def finish(self) -> None:
        self._late.cancel()
        super().finish()

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._answer(200, {"rewards": list(self.server.rewards)})
        else:
            self._answer(404, {"error": "GET /healthz, or POST /score"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/score":
            self._answer(404, {"error": f"there is no {printable(self.path)}; POST to /score"})
        elif not length.isascii() or not length.isdecimal():
            self._answer(411, {"error": "a question needs its Content-Length"})
        elif len(length) > 15 or int(length) > LARGEST:
            self._answer(413, {"error": f"a question has {LARGEST} bytes at most; ask for fewer images at a time"})
        elif not self.server.waiting.acquire(blocking=False):
            self._answer(503, {"error": f"{MOST_WAITING} questions wait already; come again"})
        else:
            try:
                content = self.rfile.read(int(length))
                self._late.cancel()
                if len(content) == int(length):  # else it was cut, or has hung up
                    self._answer(*self._score(content))
            finally:
                self.server.waiting.release()

    def _score(self, content: bytes) -> tuple[int, Any]:
        rewards = self.server.rewards
        try:
            question = read_question(content)
        except ValueError as error:
            return 400, {"error": f"the question cannot be read: {error}"}
        if question.reward not in rewards:
            known = ", ".join(rewards)
            return 404, {"error": f"reward {printable(question.reward)} is not served here; there are {known}"}
        with self.server.computing:
            if _has_left(self.connection):
                return 408, {"error": "whoever asked has left"}
            try:
                scores = rewards[question.reward](question.images, question.prompts, question.metadata)
            except InvalidError as error:
                return 400, {"error": str(error)}
            except RefusedError as error:
                return 422, {"error": str(error)}
            except Exception as error:  # another server may be luckier, so who asks must hear of it
                traceback.print_exc()
                return 500, {"error": f"{type(error).__name__}: {error}"}
        return 200, {"scores": scores.double().tolist()}

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """One line for each question that is not answered; the kubelet's are of no interest."""
        if self.command == "POST" and args[1:2] != ("200",):
            print(f"{self.client_address[0]}: {printable(format % args)}", file=sys.stderr, flush=True)


def _has_left(connection: socket.socket) -> bool:
    """Whether nobody waits for an answer any more: it came too late for them, and they have asked somebody else."""
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="python -m opd_trainer.rewards.serve", description="Rewards behind HTTP.")
    described.add_argument("rewards", nargs="+", metavar="REWARD", help="registered name or module:function")
    described.add_argument("--host", default="127.0.0.1", help="address to listen on; :: is all")
    described.add_argument("--port", type=int, default=PORT, help=f"port; {PORT} where it is not given")
    described.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return described


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        device = torch.device(choose_device(args.device))
        rewards = {name: load_reward(name, device) for name in args.rewards}
        server = Server(listen(args.host, args.port), rewards)
    except OPDError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code

    def end(*_: object) -> None:
        threading.Thread(target=server.shutdown).start()  # it waits for the loop, which is in this thread

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    print(f"{', '.join(args.rewards)} at http://{in_url(args.host)}:{args.port} on {device}", flush=True)
    with server:
        server.serve_forever()
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
