"""The program: starting, refusing to start, keys, draining. `python -m opd_serving.endpoint` as a process where signals count."""

import contextlib
import dataclasses
import hashlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from opd_core.errors import InvalidError
from opd_core.exit_codes import ExitCode
from opd_serving.endpoint.__main__ import main
from opd_serving.endpoint.errors import ApiError
from opd_serving.endpoint.keys import KeyFile
from opd_serving.endpoint.server import make_service

from tests.endpoint.conftest import running, status, wait_until
from tests.forks import Program


@contextlib.contextmanager
def started(folder: Path, port: int, *arguments: object) -> Iterator[tuple[Program, str]]:
    url = f"http://127.0.0.1:{port}"
    options = ["--device=cpu", f"--port={port}", *map(str, arguments)]
    program = Program("opd_serving.endpoint.__main__", options, folder / "endpoint.log")
    try:
        wait_until(lambda: status(url, "/livez") is not None, 300)
        yield program, url
    finally:
        program.kill()
        program.wait()


@pytest.fixture
def refusal(capsys):
    """Runs the program with arguments that it has to refuse: exit code and what it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        code = main(["--device=cpu", *map(str, arguments)])
        return code, capsys.readouterr().err

    return run


def test_it_loads_guards_serves_drains_and_exits_0(student, tiny_claims, free_port, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(
        f"# users\n{hashlib.sha256(b'sesame').hexdigest()}  -\nsha256:{hashlib.sha256(b'other').hexdigest()} ci\n"
    )
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "opd_serving.endpoint", "--device=cpu", f"--port={port}", f"--student={student}"]
    program = subprocess.Popen([*command, f"--claims={tiny_claims}", f"--api-keys={keys}", "--served-name=mine"])
    try:
        wait_until(lambda: status(url, "/readyz") == 200, 300)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0)
        assert client.models.list().data[0].id == "mine"
        assert client.with_options(api_key="other").images.generate(prompt="a").data

        with pytest.raises(openai.AuthenticationError) as unknown:
            client.with_options(api_key="wrong").models.list()
        assert unknown.value.code == "invalid_api_key"
        assert unknown.value.response.headers["WWW-Authenticate"] == "Bearer"
        assert status(url, "/v1/models") == 401
        assert status(url, "/metrics") == 200

        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(client.images.generate, prompt="a", n=4, extra_body={"steps": 60})
            wait_until(lambda: b"opd_endpoint_active_samples 4.0" in urllib.request.urlopen(f"{url}/metrics").read())
            program.send_signal(signal.SIGTERM)
            wait_until(lambda: status(url, "/readyz") == 503, 5)
            assert status(url, "/livez") == 200
            with pytest.raises(openai.InternalServerError) as draining:
                client.images.generate(prompt="b")
            assert draining.value.code == "draining"
            assert int(draining.value.response.headers["Retry-After"]) > 0
            assert len(accepted.result().data) == 4
        assert program.wait(20) == 0
    finally:
        program.kill()
        program.wait()


def test_keys_have_names_and_a_changed_file_counts_without_a_restart(settings, tmp_path, caplog):
    """As Kubernetes exchanges a mounted Secret: a link to a link to a folder."""

    def digest(key: str) -> str:
        return hashlib.sha256(key.encode("latin-1")).hexdigest()

    def mount(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(text)
        (tmp_path / "next").symlink_to(name)
        (tmp_path / "next").replace(tmp_path / "..data")

    mount("first", f"{digest('one')} alice\n{digest('schlüssel')} bob\n")
    (tmp_path / "keys").symlink_to("..data/keys")
    keys = KeyFile(tmp_path / "keys")

    def owner(key: str) -> str | None:
        keys._looked = 0.0  # a second has gone by
        try:
            return keys.owner(f"Bearer {key}")
        except ApiError as error:
            assert error.status == 401
            return None

    assert [owner(key) for key in ("one", "schlüssel", "two", "")] == ["alice", "bob", None, None]
    mount("second", f"{digest('one')} alice\n{digest('two')} alice  # the new one\n{digest('three')}  -\n")
    assert [owner(key) for key in ("one", "two", "three", "schlüssel")] == ["alice", "alice", "key-3", None]
    mount("third", "in clear text\n")
    assert owner("two") == "alice"
    assert "keys from before go on to count" in caplog.text
    assert "clear text" not in caplog.text
    mount("fourth", f"{digest('two')} alice\n")
    assert [owner(key) for key in ("one", "two")] == [None, "alice"]


def test_health_and_metrics_on_a_port_of_their_own_leave_the_api_alone(student, tiny_claims, free_port, tmp_path):
    port, metrics_port = free_port(), free_port()
    arguments = (f"--student={student}", f"--claims={tiny_claims}", f"--metrics-port={metrics_port}", "--host=::")
    with started(tmp_path, metrics_port, f"--port={port}", *arguments) as (_, metrics_url):
        url = f"http://[::1]:{port}"  # as `::` says, it is reached on both families
        wait_until(lambda: status(metrics_url, "/readyz") == 200, 300)
        for path in ("/livez", "/readyz", "/health", "/v2", "/metrics"):
            assert (status(url, path), status(metrics_url, path)) == (404, 200)
        for path in ("/v1/models", "/"):
            assert (status(url, path), status(metrics_url, path)) == (200, 404)


@pytest.mark.parametrize(("name", "code"), [("acme/tiny-opd", 0), ("a b", ExitCode.INVALID), ("/a", ExitCode.INVALID)])
def test_a_served_name_can_stand_in_an_address(settings, name, code):
    """A listed model can be retrieved, whatever it is called: FlashML-org/FreeToken#108, mlx-openai-server#291."""
    named = dataclasses.replace(settings, served_name=[name])
    if code:
        with pytest.raises(InvalidError, match="--served-name"):
            make_service(named)
        return
    with running(make_service(named)) as endpoint:
        client = endpoint.client()
        assert client.models.retrieve(client.models.list().data[0].id).id == name
        assert endpoint.status(f"/v2/models/{name}/ready") == 200


def test_a_model_has_aliases_for_clients_that_ask_for_a_name_of_their_own(settings):
    """LibreChat's image tool asks for gpt-image-1, whatever is there (OpenAIImageTools.js); OpenWebUI's and LiteLLM's
    bodies are those of their routers, with a name that was listed."""
    named = dataclasses.replace(settings, served_name=["tiny-opd", "gpt-image-1"])
    with running(make_service(named)) as endpoint:
        client = endpoint.client()
        assert [card.id for card in client.models.list().data] == ["tiny-opd", "gpt-image-1"]
        assert client.models.retrieve("gpt-image-1").id == "gpt-image-1"
        assert endpoint.status("/v2/models/gpt-image-1/ready") == 200
        bodies = [
            {"model": "gpt-image-1", "prompt": "a red 3", "n": 1, "quality": "auto", "background": "auto",
             "output_format": "png", "user": "u"},
            {"model": "tiny-opd", "prompt": "a red 3", "n": 1, "size": "32x32", "response_format": "b64_json"},
        ]  # fmt: skip
        for body in bodies:
            answer = client.images.generate(**body)
            assert answer.data[0].b64_json
            assert answer.model_dump()["model"] == "tiny-opd"
        with pytest.raises(openai.NotFoundError, match="'dall-e-3' is not served here; use 'tiny-opd'"):
            client.images.generate(model="dall-e-3", prompt="a red 3")


def test_a_second_signal_does_not_wait(student, tiny_claims, free_port, tmp_path):
    with started(tmp_path, free_port(), f"--student={student}", f"--claims={tiny_claims}") as (program, url):
        wait_until(lambda: status(url, "/readyz") == 200, 300)
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = json.dumps({"prompt": "a", "n": 10, "steps": 100})
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        wait_until(lambda: b"opd_endpoint_active_samples 10.0" in urllib.request.urlopen(f"{url}/metrics").read())
        program.send_signal(signal.SIGINT)
        wait_until(lambda: status(url, "/readyz") == 503, 5)
        program.send_signal(signal.SIGINT)
        program.wait(10)
        connection.close()


def test_a_taken_port_is_said_at_once(refusal, student, tiny_claims):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = refusal(f"--student={student}", f"--claims={tiny_claims}", f"--port={port}")
    assert code == ExitCode.UNAVAILABLE
    assert f"127.0.0.1:{port}" in text


def test_a_base_that_the_student_was_not_trained_on_is_refused(refusal, make_student, tiny_claims, free_port, tmp_path):
    student = make_student(tmp_path / "student", base_fingerprint="sha256:other")
    code, text = refusal(f"--student={student}", f"--claims={tiny_claims}", f"--port={free_port()}")
    assert code == ExitCode.REFUSED
    assert "sha256:other" in text


def test_altered_weights_are_refused(refusal, make_student, tiny_claims, free_port, tmp_path):
    student = make_student(tmp_path / "student")
    with (student / "pytorch_lora_weights.safetensors").open("ab") as file:
        file.write(b"x")
    code, text = refusal(f"--student={student}", f"--claims={tiny_claims}", f"--port={free_port()}")
    assert code == ExitCode.REFUSED
    assert "copy the student again" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": "nowhere"}, "not a student directory"),
        ({"claims": "nowhere"}, "nothing is there"),
        ({"precision": "FP8"}, "--precision FP8"),
        ({"device": "abacus"}, "--device abacus"),
        ({"api-keys": "plain"}, "line 1"),
        ({"api-keys": "nowhere"}, "cannot be read"),
    ],
)
def test_settings_that_cannot_work_are_named(refusal, student, tiny_claims, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    Path("plain").write_text("a-key-in-clear-text\n")
    arguments = {"student": student, "claims": tiny_claims} | change
    code, text = refusal(*(f"--{name}={value}" for name, value in arguments.items()))
    assert code == ExitCode.INVALID
    assert words in text
    assert "clear-text" not in text


def test_a_client_with_an_open_connection_loses_nothing_while_the_server_leaves(
    student, tiny_claims, free_port, tmp_path
):
    """As behind a Kubernetes Service: what is connected stays connected until one side closes."""
    arguments = (f"--student={student}", f"--claims={tiny_claims}", "--leave-seconds=3")
    with started(tmp_path, free_port(), *arguments) as (program, url):
        wait_until(lambda: status(url, "/readyz") == 200, 300)
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = json.dumps({"prompt": "a", "steps": 2})

        def ask() -> http.client.HTTPResponse:
            connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            return answer

        assert ask().headers["Connection"] is None
        program.send_signal(signal.SIGTERM)
        wait_until(lambda: status(url, "/readyz") == 503, 2)
        answer = ask()  # on the connection from before
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        assert ask().status == 200, "on a new connection, from whoever has not noticed yet"
        assert program.wait(20) == 0
