"""Clients that send slowly, or not at all, or do not take their answer: none costs more than a while."""

import contextlib
import dataclasses
import http.client
import json
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from opd_serving.endpoint import connections
from opd_serving.endpoint.bodies import Bodies
from opd_serving.endpoint.server import make_service, uvicorn_config

from tests.endpoint.conftest import running, status, wait_until
from tests.endpoint.test_server import started
from tests.endpoint.test_under_load import HEAD


@contextlib.contextmanager
def connected(url: str, sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=30) as connection:
        connection.sendall(sent)
        yield connection


def answer(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    content = b""
    while part := connection.recv(65536):
        content += part
    return content


@pytest.fixture
def quick(settings, monkeypatch):
    """An endpoint that waits for half a second where others wait for twenty."""

    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.5)
    service = make_service(dataclasses.replace(settings, steps=100))
    service.bodies.seconds = 0.5
    with running(service) as endpoint:
        yield endpoint


def test_a_body_that_does_not_come_is_answered_408_and_the_connection_closed(quick):
    with connected(quick.url, HEAD.format(100).encode() + b'{"prompt":') as connection:
        content = answer(connection)
    assert content.startswith(b"HTTP/1.1 408")
    assert json.loads(content.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
    assert quick.metric('opd_endpoint_requests_total{code="408",model="tiny"}') == 1


@pytest.mark.parametrize("sent", [b"POST /v1/images", b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_does_not_come_ends_the_connection_however_slowly_it_is_sent(quick, sent):
    with connected(quick.url) as connection, contextlib.suppress(ConnectionError):
        for byte in sent:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
        assert answer(connection) == b""


def test_the_head_of_a_second_request_has_a_deadline_as_well(quick):
    with connected(quick.url, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        wait_until(lambda: b"live" in connection.recv(4096))
        connection.sendall(b"GET /liv")
        with contextlib.suppress(ConnectionError):
            assert answer(connection) == b""


def test_many_half_sent_requests_hold_up_nobody(settings):
    """The body that has taken longest is given up when there are too many; 400 were open after 45 s."""

    service = dataclasses.replace(make_service(settings), bodies=Bodies(most=8))
    with running(service) as endpoint, contextlib.ExitStack() as held:
        held_up = [held.enter_context(connected(endpoint.url, HEAD.format(100).encode() + b"{")) for _ in range(20)]
        for connection in held_up[:12]:
            assert answer(connection).startswith(b"HTTP/1.1 408")
        assert len(endpoint.client().images.generate(prompt="a", extra_body={"steps": 1}).data) == 1
        assert endpoint.status("/livez") == 200


def test_idle_connections_outlive_those_of_proxies(settings):
    """Proxies keep theirs for 60 to 75 s, and answer 502 where the server closes first: kserve/kserve#5446,
    vllm-project/vllm#18472, ray-project/ray#54127."""

    assert uvicorn_config(make_service(settings), 1).timeout_keep_alive > 75


def test_an_idle_connection_is_used_again(quick):
    """After longer than a head may take: being idle is not being slow."""
    connection = http.client.HTTPConnection(urlsplit(quick.url).netloc)
    for _ in range(2):
        connection.request("GET", "/v1/models")
        assert connection.getresponse().read()
        time.sleep(1)
    connection.close()


def test_a_half_sent_body_does_not_hold_up_the_end(student, tiny_claims, free_port, tmp_path):
    """It held it for all of --drain-seconds, and then there was a stack trace."""
    arguments = (f"--student={student}", f"--claims={tiny_claims}", "--drain-seconds=60")
    with started(tmp_path, free_port(), *arguments) as (program, url):
        wait_until(lambda: status(url, "/readyz") == 200, 300)
        with connected(url, HEAD.format(100).encode() + b"{") as connection, connected(url, b"GET /v1/mod"):
            time.sleep(0.2)
            began = time.monotonic()
            program.send_signal(signal.SIGTERM)
            assert answer(connection).startswith(b"HTTP/1.1 503")
            assert program.wait(30) == 0
        assert time.monotonic() - began < 30
        assert "Traceback" not in program.log.read_text()


def test_an_answer_that_is_taken_slowly_while_the_server_drains_arrives_whole(
    student, tiny_claims, free_port, tmp_path
):
    with started(tmp_path, free_port(), f"--student={student}", f"--claims={tiny_claims}") as (program, url):
        wait_until(lambda: status(url, "/readyz") == 200, 300)
        body = json.dumps({"prompt": "a", "n": 10, "size": "64x64", "steps": 12}).encode()
        with connected(url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(HEAD.format(len(body)).encode() + body)
            wait_until(
                lambda: b"opd_endpoint_active_samples 0.0" not in urllib.request.urlopen(f"{url}/metrics").read()
            )
            program.send_signal(signal.SIGTERM)
            content = b""
            while part := connection.recv(2048):
                content += part
                time.sleep(0.001)
        assert len(json.loads(content.partition(b"\r\n\r\n")[2])["data"]) == 10
        assert program.wait(60) == 0


def test_several_images_of_a_client_that_leaves_are_all_given_up(quick):
    body = json.dumps({"prompt": "a", "n": 10, "steps": 100}).encode()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(quick.client().images.generate, prompt="b", extra_body={"steps": 60, "seed": 3})
        with connected(quick.url, HEAD.format(len(body)).encode() + body):
            wait_until(lambda: quick.metric("opd_endpoint_active_samples") >= 10)
        wait_until(lambda: quick.metric("opd_endpoint_active_samples") <= 1)
        assert other.result().data[0].seed == 3
    assert quick.metric("opd_endpoint_images_total") == 1
    assert quick.service.engine.idle
