"""`opd generate` against an endpoint and on a student directory: the same files, errors that say what to do."""

import io
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from opd_cli.generate import Image, request_images, write_images
from opd_cli.main import main
from opd_cli.serve import claims_around
from opd_core.errors import InvalidError, OPDError, RefusedError, StorageError, UnavailableError
from opd_core.exit_codes import ExitCode
from PIL import Image as Pillow


@pytest.fixture
def opd(monkeypatch, capsys):
    """Runs the command line as its entry point does: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opd", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_an_endpoint_and_a_student_directory_give_the_same_file(opd, endpoint, student, tiny_claims, tmp_path):
    options = ("generate", "a red 3", "--seed=7", "--size=40x24")
    code, printed, _ = opd(*options, f"--out={tmp_path / 'served.png'}", f"--url={endpoint.url}")
    assert (code, printed) == (0, f"{tmp_path / 'served.png'}  seed 7\n")
    assert (
        opd(
            *options,
            f"--out={tmp_path / 'here.png'}",
            f"--student={student}",
            f"--claims={tiny_claims}",
            "--device=cpu",
        )[0]
        == 0
    )
    assert (tmp_path / "served.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    assert Pillow.open(tmp_path / "here.png").size == (40, 24)


def test_a_prompt_may_come_from_standard_input(opd, endpoint, monkeypatch, tmp_path):
    files = [tmp_path / "given.png", tmp_path / "read.png"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red 3\n"))
    for prompt, file in zip(("a red 3", "-"), files, strict=True):
        code, *_ = opd("generate", prompt, "--seed=7", "--size=16x16", f"--out={file}", f"--url={endpoint.url}")
        assert code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    code, _, error = opd("generate", "-", f"--out={tmp_path / 'none.png'}", f"--url={endpoint.url}")
    assert code == ExitCode.INVALID
    assert "prompt is ''" in error


def test_several_images_are_numbered_and_formats_follow_the_name(opd, endpoint, tmp_path):
    _, printed, _ = opd(
        "generate", "a red 3", "-n2", "--seed=7", f"--out={tmp_path / 'x.webp'}", f"--url={endpoint.url}/v1/"
    )
    assert printed.split() == [str(tmp_path / "x-0.webp"), "seed", "7", str(tmp_path / "x-1.webp"), "seed", "8"]
    assert Pillow.open(tmp_path / "x-1.webp").format == "WEBP"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--size=33x32",), ExitCode.INVALID, "multiple of 8"),
        (("--out=x.bmp",), ExitCode.INVALID, "write one of .png"),
        (("--url=nowhere",), ExitCode.INVALID, "http://HOST:PORT"),
        (("--student=nowhere",), ExitCode.INVALID, "not a student directory"),
    ],
)
def test_errors_are_one_message_and_a_code(opd, endpoint, tmp_path, arguments, code, words):
    options = (f"--out={tmp_path / 'x.png'}", f"--url={endpoint.url}", *arguments)
    ended, printed, message = opd("generate", "a", *options)
    assert (ended, printed) == (code, "")
    assert message.startswith("error: ")
    assert words in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_picture_is_not_replaced_unasked(opd, endpoint, tmp_path):
    there = tmp_path / "x-1.png"
    there.write_bytes(b"mine")
    options = ("generate", "a", "-n2", f"--out={tmp_path / 'x.png'}", f"--url={endpoint.url}")
    code, _, message = opd(*options)
    assert code == ExitCode.INVALID
    assert message == f"error: {there} is there already; choose another --out, or replace it with --force\n"
    assert [file.name for file in tmp_path.iterdir()] == ["x-1.png"]
    assert there.read_bytes() == b"mine"
    assert opd(*options, "--force")[0] == 0
    assert there.read_bytes() != b"mine"


def test_files_and_seeds_as_json(opd, endpoint, tmp_path):
    _, printed, _ = opd("generate", "a", "--seed=7", f"--out={tmp_path / 'x.png'}", f"--url={endpoint.url}", "-ojson")
    assert json.loads(printed) == [{"file": str(tmp_path / "x.png"), "seed": 7}]


def test_a_student_directory_refuses_what_the_endpoint_refuses(opd, student, tiny_claims, tmp_path):
    code, _, message = opd(
        "generate", "a", "--steps=0", f"--student={student}", f"--claims={tiny_claims}", f"--out={tmp_path / 'x.png'}"
    )
    assert code == ExitCode.INVALID
    assert "steps is 0" in message


def test_an_address_where_nobody_listens_may_work_later(free_port):
    with pytest.raises(UnavailableError, match="opd serve"):
        request_images(f"http://127.0.0.1:{free_port()}", "a")


def test_something_else_behind_the_address_is_refused(endpoint):
    with pytest.raises(InvalidError, match="/elsewhere"):
        request_images(f"{endpoint.url}/elsewhere", "a")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RefusedError, match="not as an image endpoint"):
            request_images(f"http://127.0.0.1:{other.getsockname()[1]}", "a")
        thread.join()


@contextmanager
def web(answer):
    """A server whose requests are collected; `answer(handler)` replies."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(dict(self.headers))
            answer(self)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_):
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_is_not_carried_to_where_a_server_redirects(status):
    with web(lambda handler: handler.send_error(500)) as (elsewhere, asked_elsewhere):

        def redirect(handler):
            handler.send_response(status)
            handler.send_header("Location", f"{elsewhere}/v1")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        with web(redirect) as (here, asked):
            with pytest.raises(RefusedError, match=f"redirects to {elsewhere}/v1; .*--url"):
                request_images(here, "a", api_key="sk-secret")
            assert asked[0]["Authorization"] == "Bearer sk-secret"
        assert asked_elsewhere == []


def test_a_proxy_is_not_asked_for_this_machine(endpoint, monkeypatch):
    with web(lambda handler: handler.send_error(502)) as (proxy, asked):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises((RefusedError, OPDError), match=r"example\.invalid"):
            request_images("http://example.invalid", "a")
        assert len(asked) == 1  # the proxy is one
        assert len(request_images(endpoint.url, "a", seed=1)) == 1
        assert len(asked) == 1


def test_a_key_in_clear_is_remarked_unless_it_stays_here(endpoint, capsys):
    with pytest.raises(UnavailableError):
        request_images("http://nowhere.invalid", "a", api_key="k", timeout=5)
    assert "the API key travels to nowhere.invalid in clear" in capsys.readouterr().err
    request_images(endpoint.url, "a", api_key="k", seed=1)
    assert capsys.readouterr().err == ""


def test_serve_says_how_to_ask_and_serves(student, tiny_claims, free_port):
    port = free_port()
    command = [sys.executable, "-m", "opd_cli.main", "serve", str(student), f"--claims={tiny_claims}", f"--port={port}"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--device=cpu", "--fixed-rows=0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        shown = [process.stdout.readline().strip() for _ in range(4)]
        call = shlex.split(shown[1])
        assert call[0] == "curl"
        python = shown[2].replace("OpenAI(", "openai.OpenAI(timeout=60, max_retries=30, ")
        answer = eval(python, {"openai": openai})
        assert answer.data[0].b64_json
        answer = subprocess.run([*call, "-sf"], capture_output=True, text=True, check=True).stdout
        assert json.loads(answer)["data"][0]["b64_json"]
        with pytest.raises(InvalidError):
            request_images(shlex.split(shown[3])[-1], "a", steps=0)
    finally:
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log


def test_files_are_written_as_a_whole_and_readable_by_others(tmp_path):
    (file,) = write_images([Image(b"new", 1)], tmp_path / "folder" / "x.png")
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(StorageError, match="another --out"):
        write_images([Image(b"new", 1)], file / "y.png")


def test_the_claims_of_the_run_around_a_student_are_found(tmp_path):
    student = tmp_path / "run" / "student"
    (tmp_path / "run" / "claims").mkdir(parents=True)
    assert claims_around(str(student)) == tmp_path / "run" / "claims"
    assert claims_around(str(tmp_path / "run" / "claims" / "students" / "x")) == tmp_path / "run" / "claims"
