"""Servers that die, come back, come back as another, or answer nonsense."""

import dataclasses
import re
import shutil
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml
from opd_core.errors import InvalidError, RefusedError, UnavailableError
from opd_core.exit_codes import ExitCode
from opd_core.teachers.grpc_client import GrpcTeachers, Patience, connect
from opd_core.termination import read_last_words
from opd_serving.teacher import arguments, server_binary
from opd_serving.teacher import probe as probe_program
from opd_serving.teacher.prepare import prepare
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tcp_proxy import TcpProxy
from tests.teacher.conftest import QUICK, spec_text

PATIENT = Patience(attempt_seconds=20, total_seconds=240, longest_pause=0.5)
BRIEF = Patience(attempt_seconds=2, total_seconds=3, longest_pause=0.5)


def test_a_server_that_leaves_or_dies_is_found_again_unless_it_is_another(make_server, rows):
    """Told to stop, as when a pod is deleted: on its way out Triton still answers, that it has no such model. Then its
    stub is killed. The client waits, registers its prompts again and gets the same."""
    server = make_server().start()
    client = connect([server.address], PATIENT)
    before = rows.ask(client, "ocr").result()
    asked = []
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(server.stop)
        while not stopping.done():
            asked.append(rows[:1].ask(client, "ocr"))
            time.sleep(0.2)
    server.start()
    for answer in asked:
        torch.testing.assert_close(answer.result(), before[:1], rtol=0, atol=2e-3)
    torch.testing.assert_close(rows.ask(client, "ocr").result(), before, rtol=0, atol=0)
    assert client.stats.retries > 0
    assert client.stats.registrations >= 2 * 33

    server.stub().kill()
    began, retries = time.monotonic(), client.stats.retries
    lost = rows.ask(client, "ocr")  # "Stub process ... is not healthy", while the server is up
    assert server.wait() == ExitCode.UNAVAILABLE
    assert time.monotonic() - began < 15
    assert "the Python process behind the model is gone" in server.log.splitlines()[-1]
    assert not list(Path("/dev/shm").glob(f"opd_teacher_{server.ports['grpc']}_*"))
    server.start()
    torch.testing.assert_close(lost.result(), before, rtol=0, atol=0)
    assert client.stats.retries > retries

    server.stop()
    spec = server.folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("teachers/ocr}", "teachers/aesthetic}"))
    server.start()
    with pytest.raises(RefusedError, match="came back as another one"):
        rows[:1].ask(client, "ocr").result()
    client.close()


def test_dedicated_servers_share_the_teachers_and_a_dead_replica_is_passed_over(make_server, rows):
    of_ocr, of_both = make_server("ocr"), make_server("ocr", "aesthetic")
    of_ocr.start(), of_both.start()
    client = connect([of_ocr.address, of_both.address], QUICK)
    assert set(client.describe().teachers) == {"ocr", "aesthetic"}
    expected = rows.ask(client, "ocr").result()
    rows.ask(client, "aesthetic").result()
    of_ocr.kill()
    for _ in range(20):
        torch.testing.assert_close(rows.ask(client, "ocr").result(), expected, rtol=0, atol=5e-3)
    assert client.stats.retries == 1  # nobody asks the dead one again: it costs no query a pause

    of_ocr.start()
    before, deadline = nv_requests(of_ocr), time.monotonic() + 60
    while nv_requests(of_ocr) == before:  # and is asked again once it answers
        assert time.monotonic() < deadline
        asked = [rows[i : i + 1].ask(client, "ocr") for i in range(8)]
        assert all(torch.isfinite(future.result()).all() for future in asked)
    client.close()


def nv_requests(server) -> float:
    """Requests that a server has answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("nv_inference_request_success"))


def test_a_server_on_a_machine_that_is_off_is_given_up_and_its_successor_found(server, rows):
    """Nothing closes the connection, as when a node is lost, and its address leads to another pod: a Service does that."""
    proxy = TcpProxy("127.0.0.1", server.ports["grpc"])
    client = connect([f"127.0.0.1:{proxy.port}"], dataclasses.replace(PATIENT, attempt_seconds=200, silence_seconds=1))
    expected = rows[:1].ask(client, "ocr").result()
    proxy.mute_open_connections()
    answer = rows[:1].ask(client, "ocr")
    torch.testing.assert_close(answer.result(timeout=60), expected, rtol=0, atol=0)
    client.close()
    proxy.close()


# In the process that prepares a server: a small cache, and a model whose forward pass fails as files of a folder say.
FAULTS = """
import sys
if "opd_serving.teacher.prepare" in sys.orig_argv:
    from opd_serving.teacher import repository
    repository.CACHE_BYTES = {cache}
    repository._MODEL_PY += {model!r}
"""
MODEL = """
import os, time, torch
from opd_core.models.pipeline import Model
real = Model.forward
def forward(self, latents, *rest):
    if os.path.exists({folder!r} + "/slow"):
        time.sleep(2)
    if os.path.exists({folder!r} + "/full") or len(latents) > 9:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if os.path.exists({folder!r} + "/broken"):
        raise ZeroDivisionError("a defect")
    return real(self, latents, *rest)
Model.forward = forward
"""


def test_a_server_short_of_memory_and_time_is_waited_for(make_server, rows, client, tmp_path, monkeypatch):
    """Its GPU has room for nine rows, its cache for ten prompts; then for nothing; then it is slow; then broken."""
    expected = {teacher: rows.ask(client, teacher).result() for teacher in ("ocr", "geneval")}
    (tmp_path / "faults").mkdir()
    faults = FAULTS.format(cache=10 * rows.negative.nbytes, model=MODEL.format(folder=str(tmp_path)))
    (tmp_path / "faults" / "sitecustomize.py").write_text(faults)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "faults"), prepend=":")
    server = make_server().start()
    faulty = connect([server.address], Patience(attempt_seconds=100, total_seconds=200, longest_pause=0.5))

    torch.testing.assert_close(rows[:7].ask(faulty, "ocr").result(), expected["ocr"][:7], rtol=0, atol=5e-3)
    assert faulty.stats.retries == 0  # it halves its batches by itself

    (tmp_path / "full").touch()
    asked = rows[:4].ask(faulty, "ocr")
    while faulty.stats.retries < 3 and not asked.done():
        time.sleep(0.05)
    assert not asked.done()
    (tmp_path / "full").unlink()
    torch.testing.assert_close(asked.result(), expected["ocr"][:4], rtol=0, atol=5e-3)

    hasty = connect([server.address], Patience(attempt_seconds=1, total_seconds=60, longest_pause=0.5))
    (tmp_path / "slow").touch()
    torch.testing.assert_close(rows[:1].ask(hasty, "ocr").result(), expected["ocr"][:1], rtol=0, atol=5e-3)
    retries = hasty.stats.retries
    assert retries > 0
    rows[:1].ask(hasty, "ocr").result()  # gets the time at once that the last one took
    assert hasty.stats.retries == retries
    hasty.close()

    pinging = connect([server.address], Patience(attempt_seconds=100, silence_seconds=1))
    torch.testing.assert_close(rows[:7].ask(pinging, "ocr").result(), expected["ocr"][:7], rtol=0, atol=5e-3)
    assert pinging.stats.retries == 0  # who pings while it waits is not sent away
    pinging.close()
    (tmp_path / "slow").unlink()

    def ask(first: int) -> tuple[int, int]:
        """Four rows; how many prompts were registered for them, and how often they were asked again."""
        before = faulty.stats.registrations, faulty.stats.retries
        part = rows[first : first + 4].ask(faulty, "geneval").result()
        torch.testing.assert_close(part, expected["geneval"][first : first + 4], rtol=0, atol=5e-3)
        return faulty.stats.registrations - before[0], faulty.stats.retries - before[1]

    assert [ask(first) for first in (8, 12, 16, 20, 24, 28)] == [(4, 0)] * 6  # more than the cache holds
    assert ask(8) == (4, 1)  # they have been forgotten
    assert ask(28) == (0, 0)  # these have not

    (tmp_path / "broken").touch()
    with pytest.raises(RefusedError, match="refused: .*ZeroDivisionError: a defect"):
        rows[:2].ask(faulty, "ocr").result()
    (tmp_path / "broken").unlink()
    deadline = time.monotonic() + 20
    while "a defect" not in server.log:  # it goes through a pipe
        assert time.monotonic() < deadline
        time.sleep(0.05)
    torch.testing.assert_close(rows[:2].ask(faulty, "ocr").result(), expected["ocr"][:2], rtol=0, atol=5e-3)
    faulty.close()


@pytest.fixture
def damaged_claims(tiny_world, tmp_path):
    """A function that changes the tensors of the teacher ocr, and gives claims with a world that is whole otherwise."""

    def make(change):
        world = tmp_path / "claims" / "tiny-world"
        (world / "teachers" / "ocr").mkdir(parents=True)
        for name in ("base", "prompts", "teachers/geneval", "teachers/aesthetic"):
            (world / name).symlink_to(tiny_world / name)
        file = "teachers/ocr/pytorch_lora_weights.safetensors"
        with safe_open(tiny_world / file, "pt") as opened:
            metadata = opened.metadata()
        save_file(change(load_file(tiny_world / file)), world / file, metadata)
        return tmp_path / "claims"

    return make


def test_a_teacher_that_answers_nan_ends_its_server(make_server, damaged_claims):
    """Its file is whole and its numbers are finite: the server tries every teacher before it answers anybody."""
    huge = damaged_claims(
        lambda tensors: {key: torch.full_like(t, 3e38, dtype=torch.float32) for key, t in tensors.items()}
    )
    server = make_server(claims=huge)
    program = server.launch()
    assert server.wait() == ExitCode.REFUSED
    words = "teacher ocr answered NaN or infinity; check its weights and the precision"
    assert program.last_words().startswith(words)
    assert read_last_words(server.folder / "teachers.json")["message"] == words


def test_loras_are_loaded_when_they_are_asked_for(make_server, damaged_claims, rows):
    """In a server with room for one: health and the others stay, whatever becomes of a file."""
    claims = damaged_claims(lambda tensors: tensors)
    file = claims / "tiny-world" / "teachers" / "ocr" / "pytorch_lora_weights.safetensors"
    server = make_server(claims=claims, options=["--adapter-bytes=1"]).start()
    began = loras(server)
    assert began["opd_teacher_adapters"] == 1
    client = connect([server.address], QUICK)
    asked = [rows[i : i + 2].ask(client, name) for i, name in enumerate(("geneval", "ocr", "aesthetic", "geneval"))]
    assert all(torch.isfinite(future.result()).all() for future in asked)
    ended = loras(server)
    loads, drops = (ended[f"opd_teacher_adapter_{kind}_total"] for kind in ("loads", "drops"))
    assert (ended["opd_teacher_adapters"], loads - drops) == (1, 1)
    assert loads >= began["opd_teacher_adapter_loads_total"] + 2
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(RefusedError, match="teacher ocr cannot be loaded: .*ocr.* put the file back as it was"):
        rows[:2].ask(client, "ocr").result()
    assert torch.isfinite(rows[:2].ask(client, "aesthetic").result()).all()
    probe_program.probe(server.http, 20)
    file.write_bytes(whole)
    assert torch.isfinite(rows[:2].ask(client, "ocr").result()).all()
    client.close()


def loras(server):
    """Its metrics of LoRAs."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics", timeout=5).read().decode()
    found = re.findall(r"^(opd_teacher_\w+)(?:{.*})? ([0-9.e+]+)$", page, re.M)
    return {name: float(value) for name, value in found}


def test_nobody_at_the_address(free_port):
    with pytest.raises(UnavailableError, match=r"teacher server: no answer from 127\.0\.0\.1:\d+ within 3 s"):
        connect([f"127.0.0.1:{free_port()}"], BRIEF)


def test_told_to_stop_it_gives_up_what_it_asks_again():
    """Of a server that speaks HTTP/2 and answers nothing; the second try has ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        client = GrpcTeachers([f"127.0.0.1:{silent.getsockname()[1]}"], Patience(attempt_seconds=5))
        described = pool.submit(client.describe)
        connection, _ = silent.accept()
        connection.sendall(b"\0\0\0\4\0\0\0\0\0")  # its settings: none
        while client.stats.retries == 0:
            time.sleep(0.05)
        client.stop_waiting()
        with pytest.raises(UnavailableError, match="2 tries; told to stop; the last error was: it did not answer"):
            described.result(timeout=8)
        client.close()
        connection.close()
        client.stop_waiting()  # a late signal


def test_cancelling_and_closing_leave_nothing_behind(server, rows):
    client = connect([server.address], QUICK)
    asked = [rows.ask(client, "ocr") for _ in range(4)]
    asked[-1].cancel()
    assert asked[-1].cancelled()
    assert torch.isfinite(asked[0].result()).all()
    client.close()
    assert not client._thread.is_alive()


def test_another_service_at_the_address_is_refused(tmp_path, free_port):
    port = free_port()
    files = ThreadingHTTPServer(("127.0.0.1", port), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    config = tmp_path / "v2" / "models" / "teacher" / "config"
    config.parent.mkdir(parents=True)
    config.write_text('{"name": "teacher"}')
    Thread(target=files.serve_forever, daemon=True).start()
    with pytest.raises(RefusedError, match="not as a teacher server does"):
        probe_program.probe(f"127.0.0.1:{port}", 5)
    files.shutdown()
    files.server_close()


# ---------------------------------------------------------------- starts that fail


def test_a_taken_port_is_named(make_server):
    server = make_server()
    for name, port in server.ports.items():
        with socket.socket() as squatter:
            squatter.bind(("127.0.0.1", port))
            squatter.listen()
            program = server.launch()
            assert server.wait() == ExitCode.UNAVAILABLE, name
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in program.last_words()


def test_a_server_for_an_unknown_teacher_does_not_start(make_server):
    server = make_server("pickscore")
    program = server.launch()
    assert server.wait() == ExitCode.INVALID
    words = "--teacher pickscore: the spec has no such teacher; it has geneval, ocr, aesthetic"
    assert words in program.last_words()


def test_a_server_of_tasks_without_teachers_does_not_start(tmp_path, tiny_claims):
    learning = {"method": "RL", "reinforcement": {"algorithm": "DiffusionNFT"}}
    content = yaml.safe_load(spec_text({}))
    for task in content["spec"]["teachers"]:
        del task["adapter"]
    content["spec"]["training"] |= learning
    content["spec"]["evaluation"]["gate"] = []
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content))
    options = arguments.parse(
        [f"--spec={tmp_path / 'spec.yaml'}", f"--claims={tiny_claims}", f"--repository={tmp_path}"]
    )
    with pytest.raises(InvalidError, match="the tasks of the spec have no teachers"):
        prepare(options)


def test_the_log_of_a_server_tells_of_a_scale_that_nobody_states(tmp_path, tiny_world, capsys):
    claims = Path(shutil.copytree(tiny_world, tmp_path / "claims" / "tiny-world")).parent
    (silent,) = (claims / "tiny-world" / "teachers" / "ocr").glob("*.safetensors")
    save_file(load_file(silent), silent)
    (tmp_path / "spec.yaml").write_text(spec_text({}))
    where = [f"--spec={tmp_path / 'spec.yaml'}", f"--claims={claims}", f"--repository={tmp_path / 'repository'}"]
    prepare(arguments.parse([*where, "--device=cpu"]))
    note, last = capsys.readouterr().out.splitlines()
    assert note.startswith("teacher server: spec.teachers[1].adapter.uri is pvc://tiny-world/teachers/ocr: ")
    assert "does not state its scale" in note
    assert last.startswith("teacher server: geneval, ocr, aesthetic for sha256:")


def test_adapters_and_sizes_that_do_not_fit_are_told_before_triton_starts(make_server, damaged_claims):
    """All of them in one message, for people in the log and for the operator in the pod's last words."""
    other = damaged_claims(lambda tensors: {key.replace("blocks.0.", "blocks.9."): t for key, t in tensors.items()})
    server = make_server(claims=other, change={"width: 32": "width: 72"})
    program = server.launch()
    assert server.wait() == ExitCode.INVALID
    said = read_last_words(server.folder / "teachers.json")
    assert said["exitCode"] == ExitCode.INVALID
    for words in (
        "2 problems",
        "spec.training.resolution.width is 72: this model needs a multiple of 8 up to 64",
        "spec.teachers[1].adapter.uri is pvc://tiny-world/teachers/ocr: ",
        "adapts transformer_blocks.9.",
    ):
        assert words in said["message"]
        assert words in program.last_words()
        assert words in server.log
    assert "tritonserver" not in server.log.replace("opd_serving", "")


def test_an_adapter_that_holds_nan_is_told_with_the_models_own_words(make_server, damaged_claims):
    """Its header says nothing about that: the model refuses it inside Triton."""
    nan = damaged_claims(lambda tensors: {key: tensor * float("nan") for key, tensor in tensors.items()})
    server = make_server(claims=nan)
    program = server.launch()
    assert server.wait() == ExitCode.INVALID
    assert re.match(r".*/ocr/pytorch_lora_weights.safetensors holds NaN or infinite numbers in", program.last_words())
    assert "holds NaN" in server.log.splitlines()[-1]


def test_a_stub_that_ends_as_it_starts_ends_the_server(make_server, tmp_path, monkeypatch):
    """Triton itself would wait for it without end: https://github.com/triton-inference-server/python_backend/issues/401"""
    found = server_binary.find_server()
    own, blank = tmp_path / "tritonserver", tmp_path / "a blank"
    own.write_text(
        '#!/bin/bash\nargs=()\nfor a in "$@"; do case "$a" in --model-repository=*) '
        f'ln -s "${{a#*=}}" "{blank}"; a="--model-repository={blank}";; esac; args+=("$a"); done\n'
        f"export LD_LIBRARY_PATH={found.env['LD_LIBRARY_PATH']} PATH={found.env['PATH']}\n"
        f'exec {found.binary} --backend-directory={found.backends[0]} "${{args[@]}}"\n'
    )
    own.chmod(0o755)
    monkeypatch.setenv("TRITONSERVER", str(own))
    server = make_server()
    program = server.launch()
    assert server.wait() == ExitCode.UNAVAILABLE
    assert "the Python process behind the model is gone" in program.last_words()


@pytest.mark.parametrize(
    ("stubs", "reason"),
    [
        (True, "Internal: ModuleNotFoundError: No module named 'opd_serving'"),
        (False, "Invalid argument: unable to find backend library for backend 'python'"),
    ],
    ids=["another Python", "no backends"],
)
def test_a_failed_start_of_triton_is_told_with_its_own_reason(make_server, tmp_path, monkeypatch, stubs, reason):
    """A tritonserver of the user's own whose stub runs in a Python without this project, or that has no backends."""
    found = server_binary.find_server()
    own = tmp_path / "tritonserver"
    libraries, backends = found.env["LD_LIBRARY_PATH"], f"--backend-directory={found.backends[0]}" if stubs else ""
    own.write_text(
        f"#!/bin/sh\nunset VIRTUAL_ENV\nLD_LIBRARY_PATH={libraries} PATH=/usr/bin:/bin "
        f'exec {found.binary} {backends} "$@"\n'
    )
    own.chmod(0o755)
    monkeypatch.setenv("TRITONSERVER", str(own))
    server = make_server()
    program = server.launch()
    assert server.wait() == ExitCode.INTERNAL
    assert program.last_words().startswith(f"tritonserver did not start: {reason}")
    assert "failed to load all models" in server.log  # the last line, which used to stand here instead
