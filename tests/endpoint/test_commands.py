"""`opd generate` against an endpoint and on a student directory: the same files, errors that say what to do."""

import socket
import stat
import sys
import threading

import pytest
from opd_cli.generate import Image, request_images, write_images
from opd_cli.main import main
from opd_cli.serve import claims_around
from opd_core.errors import InvalidError, RefusedError, StorageError, UnavailableError
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
    code, printed, _ = opd(*options, f"--output={tmp_path / 'served.png'}", f"--url={endpoint.url}")
    assert (code, printed) == (0, f"{tmp_path / 'served.png'}  seed 7\n")
    assert (
        opd(
            *options,
            f"--output={tmp_path / 'here.png'}",
            f"--student={student}",
            f"--claims={tiny_claims}",
            "--device=cpu",
        )[0]
        == 0
    )
    assert (tmp_path / "served.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    assert Pillow.open(tmp_path / "here.png").size == (40, 24)


def test_several_images_are_numbered_and_formats_follow_the_name(opd, endpoint, tmp_path):
    _, printed, _ = opd(
        "generate", "a red 3", "-n2", "--seed=7", f"-o{tmp_path / 'x.webp'}", f"--url={endpoint.url}/v1/"
    )
    assert printed.split() == [str(tmp_path / "x-0.webp"), "seed", "7", str(tmp_path / "x-1.webp"), "seed", "8"]
    assert Pillow.open(tmp_path / "x-1.webp").format == "WEBP"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--size=33x32",), ExitCode.INVALID, "multiple of 8"),
        (("--output=x.bmp",), ExitCode.INVALID, "write one of .png"),
        (("--url=nowhere",), ExitCode.INVALID, "http://HOST:PORT"),
        (("--student=nowhere",), ExitCode.INVALID, "not a student directory"),
    ],
)
def test_errors_are_one_message_and_a_code(opd, endpoint, tmp_path, arguments, code, words):
    options = (f"--output={tmp_path / 'x.png'}", f"--url={endpoint.url}", *arguments)
    ended, printed, message = opd("generate", "a", *options)
    assert (ended, printed) == (code, "")
    assert message.startswith("error: ")
    assert words in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_student_directory_refuses_what_the_endpoint_refuses(opd, student, tiny_claims, tmp_path):
    code, _, message = opd(
        "generate", "a", "--steps=0", f"--student={student}", f"--claims={tiny_claims}", f"-o{tmp_path / 'x.png'}"
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


def test_files_are_written_as_a_whole_and_readable_by_others(tmp_path):
    (file,) = write_images([Image(b"new", 1)], tmp_path / "folder" / "x.png")
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(StorageError, match="another --output"):
        write_images([Image(b"new", 1)], file / "y.png")


def test_the_claims_of_the_run_around_a_student_are_found(tmp_path):
    student = tmp_path / "run" / "student"
    (tmp_path / "run" / "claims").mkdir(parents=True)
    assert claims_around(str(student)) == tmp_path / "run" / "claims"
    assert claims_around(str(tmp_path / "run" / "claims" / "students" / "x")) == tmp_path / "run" / "claims"
