"""What a pod says about itself is text on the terminal of whoever looks, and stops nobody from looking."""

import io
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opd_cli.cluster import download
from opd_cli.cluster.logs import Role, Wanted, choose
from opd_cli.terminal import make_console, plain
from opd_core.artifacts import MANIFEST, WEIGHTS
from opd_core.errors import RefusedError
from rich.table import Table
from rich.text import Text

from tests.cli.conftest import Done, make_pod, say
from tests.cli.kubelet import Kubelet
from tests.operator.live import Api

Opd = Callable[..., Done]

# The clipboard (OSC 52), the whole screen, the same in one C1 byte, a line over this one, the direction of writing.
EVIL = "\x1b]52;c;ZXZpbA==\x07 \x1b[2J \x9b2J \rReady \x08\x0b\x0c \u202e"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


def test_control_characters_become_a_sign_and_text_stays() -> None:
    assert plain("round 1\tloss 0.5\n中文, é, 👩\u200d🔬") == "round 1\tloss 0.5\n中文, é, 👩\u200d🔬"
    assert not OBEYED.search(plain(EVIL))
    assert plain("a\x1b[2Jb") == "a\ufffd[2Jb"
    plain("\ud800").encode()


def test_a_console_keeps_its_own_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = make_console()
    table = Table(EVIL)
    table.add_row(Text(EVIL, style="red"))
    with console.capture() as captured:
        console.print(EVIL, table, Text(EVIL), style="bold", markup=False)
    own = re.compile(r"\x1b\[[0-9;]*m")
    assert own.search(captured.get())
    assert not OBEYED.search(own.sub("", captured.get()))


def test_everything_is_printed_in_one_place(repository: Path) -> None:
    """`guardian` and `preflight` are programs whose output is a log, or read by this project."""
    sources = (repository / "cli" / "opd_cli").rglob("*.py")
    others = [file for file in sources if file.name not in ("terminal.py", "guardian.py", "preflight.py")]
    printing = re.compile(r"typer\.(secho|echo)|(?<!\.)\bprint\(|\bConsole\(|sys\.std(out|err)\.write|traceback\.print")
    found = [
        f"{file.name}: {line}" for file in others for line in file.read_text().splitlines() if printing.search(line)
    ]
    assert not found


@pytest.fixture
def hostile(api: Api, node: tuple[str, Kubelet]) -> Kubelet:
    """An object that has failed with the last words, conditions and events of somebody who means it."""
    api.submit()
    say(
        api,
        conditions={"Trained": ("False", "Failed", EVIL), "Failed": ("True", "BackoffLimitExceeded", EVIL)},
        phase="Failed",
        lastFailure={"stage": "Trained", "reason": "Failed", "message": EVIL, "pod": "p", "exitCode": 1},
        teachers=[{"name": EVIL, "ready": False}],
        student={"digest": "sha256:" + "c" * 64, "uri": "pvc://a/b", "scores": [{"task": EVIL, "reward": EVIL}]},
    )
    uid = api.get("tiny")["metadata"]["uid"]
    about = {"kind": "OPDDistillation", "name": "tiny", "namespace": api.namespace, "uid": uid}
    event = {"metadata": {"name": "e"}, "involvedObject": about, "reason": "Evil", "message": EVIL, "type": "Warning",
             "lastTimestamp": "2026-01-01T00:00:00Z"}  # fmt: skip
    api.call("POST", api.path("events"), event)
    name, running = node
    make_pod(api, "p", "trainer", name, job="j")
    running.prints("p", f"{EVIL}\n", None)
    return running


@pytest.mark.parametrize(
    "command",
    ["status", "status tiny", "status tiny -w", "status tiny -o yaml", "status tiny -o json", "events tiny",
     "logs tiny trainer", "wait tiny --for=Ready"],
)  # fmt: skip
def test_no_command_lets_a_control_character_through(command: str, opd: Opd, hostile: Kubelet) -> None:
    done = opd(*command.split())
    assert done.out + done.err
    assert not OBEYED.search(done.out + done.err)


def pod(**more: Any) -> dict[str, Any]:
    metadata = {"name": "p", "creationTimestamp": "t", "labels": {"job-name": "j"}, **more.pop("metadata", {})}
    return {"metadata": metadata, "status": {"phase": "Running", **more}}


@pytest.mark.parametrize(
    "one",
    [
        pod(metadata={"annotations": {"batch.kubernetes.io/job-completion-index": "9" * 5000}}),
        pod(containerStatuses=[{"name": "c", "state": {"terminated": {"exitCode": 1, "message": "[" * 4096}}}]),
        pod(containerStatuses=[{"name": "c", "state": {"terminated": {"exitCode": 1, "message": "9" * 5000}}}]),
        pod(containerStatuses=["nonsense"]),
        pod(conditions=[7]),
        pod(containerStatuses=[{"state": {"terminated": {}}}]),
    ],
    ids=["index", "deep", "digits", "container", "condition", "nameless"],
)
def test_a_status_that_makes_no_sense_hides_no_log(one: dict[str, Any]) -> None:
    honest = pod(metadata={"name": "honest"})
    for role in (Role.ENDPOINT, Role.TRAINER):
        found = choose([one, honest], Wanted(role, all_ranks=True))
        assert {(view.name, view.phase) for view in found} == {("p", "Running"), ("honest", "Running")}


SOURCE = download.Source("n", "p", "c", "python", "/claims/students/x")


def sent(*files: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                archive.addfile(file)
                continue
            member = tarfile.TarInfo(file[0])
            member.size = len(file[1])
            archive.addfile(member, io.BytesIO(file[1]))
    return content.getvalue()


def linked(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (sent((f"./{WEIGHTS}", bytes(2000)), (f"./{MANIFEST}", b"{}")), "more than 1000 bytes"),
        (sent(linked(f"./{WEIGHTS}"))[:900], "something else"),
        (b"no archive", "something else"),
    ],
    ids=["large", "link", "nonsense"],
)
def test_a_pod_cannot_fill_the_disk_or_plant_a_link(
    data: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "output_of", lambda *_: iter([data[:600], data[600:]]))
    with pytest.raises(RefusedError, match=words):
        download.copy_student(None, SOURCE, tmp_path / "x", "sha256:0", "pvc://a/b", limit=1000)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_unpacks_to_more_than_was_sent_is_no_student(tmp_path: Path) -> None:
    member = tarfile.TarInfo(f"./{WEIGHTS}")
    member.size = 1 << 40
    archive = tmp_path / "archive"
    archive.write_bytes(member.tobuf())
    with pytest.raises(RefusedError, match="something else"):
        download._unpack(archive, tmp_path / "x", SOURCE, 1 << 30)


def test_other_files_of_the_folder_are_left_there(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(sent((f"./{WEIGHTS}", b"w"), (f"./{MANIFEST}", b"{}"), ("./.bashrc", b"x"), ("../y", b"x")))
    download._unpack(archive, tmp_path / "x", SOURCE, 1000)
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == sorted([WEIGHTS, MANIFEST])
    shutil.rmtree(tmp_path / "x")
