"""Training against a real tritonserver: the answers, a server that dies in the middle, a server of another spec."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.api.load import load_spec
from opd_core.artifacts import read_student
from opd_core.exit_codes import ExitCode
from opd_core.models.teacher_files import teacher_fingerprint
from opd_core.roles import teacher_servers
from opd_trainer.engine import World
from opd_trainer.loop import play_round
from opd_trainer.run import Run
from opd_trainer.setup import build_run

from tests.forks import Program
from tests.teacher_server import TeacherServer

from .conftest import MakeSpec, Trainer

REMOTE: dict[str, Any] = {"spec.teacherServing.placement": "Shared", "spec.training.rounds": 8}


@pytest.fixture(scope="module")
def server(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherServer]:
    started = TeacherServer(tmp_path_factory.mktemp("server"), trainer.spec(REMOTE), trainer.claims).start()
    yield started
    started.stop()


def numbers(log: list[dict[str, Any]]) -> list[Any]:
    return [(line["round"], line["tasks"], line["grad_norm"]) for line in log]


@pytest.fixture(scope="module")
def steady(trainer: Trainer, server: TeacherServer) -> list[dict[str, Any]]:
    """The log of a run that nothing disturbs."""
    code, output = trainer.run("steady", REMOTE, "--teachers", server.address)
    assert code == 0, output
    return trainer.log("steady")


def test_a_server_lost_in_the_middle_changes_nothing_but_time(
    trainer: Trainer, server: TeacherServer, steady: list[dict[str, Any]]
) -> None:
    assert steady[-1]["teacher_retries"] == 0
    process = trainer.start("disturbed", REMOTE, "--teachers", server.address)
    wait_for_round(trainer, "disturbed", 3, process)
    server.kill()
    server.launch()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert trainer.log("disturbed")[-1]["teacher_retries"] > 0
    assert numbers(trainer.log("disturbed")) == numbers(steady)


def test_remote_and_local_teachers_teach_the_same(make_run: Callable[..., Run], steady: list[dict[str, Any]]) -> None:
    """A velocity travels as float16, so the losses agree to about three digits."""
    run = make_run()
    losses = (play_round(run, 0).losses / run.training.images_per_task).sum(1).tolist()
    for task, loss in zip(run.tasks, losses, strict=True):
        assert steady[0]["tasks"][task.name]["loss"] == pytest.approx(loss, rel=2e-3)


def test_both_branches_come_from_afar_as_from_near(
    make_run: Callable[..., Run], make_spec: MakeSpec, world: World, tiny_claims: Path, server: TeacherServer
) -> None:
    pdm = {"spec.training.objective": {"type": "PDM"}}
    far = build_run(make_spec({**REMOTE, **pdm}).spec, tiny_claims, [server.address], "cpu", world)
    try:
        ours, theirs = play_round(far, 0), play_round(make_run(pdm), 0)
    finally:
        far.method.close()
        far.engine.close()
    assert float(theirs.losses.min()) > 0
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=2e-3, atol=0)
    torch.testing.assert_close(ours.errors, theirs.errors, rtol=1e-2, atol=0)


def test_a_round_of_a_lora_and_a_model_of_its_own_is_that_of_two_loras(
    trainer: Trainer, whole_claims: Path, tmp_path: Path, steady: list[dict[str, Any]]
) -> None:
    """Two real servers, one for each kind. The model is the LoRA in its base, added in float32."""
    mixed = {**REMOTE, "spec.training.rounds": 2}
    mixed |= {"spec.teachers.1.adapter": None, "spec.teachers.1.model": {"uri": "pvc://models/ocr"}}
    spec = trainer.spec(mixed)
    servers = []
    try:
        for group in teacher_servers(load_spec(spec).spec):
            (tmp_path / group[0]).mkdir()
            servers.append(TeacherServer(tmp_path / group[0], spec, whole_claims, group).start())
        addresses = ",".join(server.address for server in servers)
        code, output = trainer.run("mixed", mixed, "--teachers", addresses, claims=whole_claims)
    finally:
        for server in servers:
            server.stop()
    assert code == 0, output
    line = trainer.log("mixed")[0]
    for task, numbers_ in line["tasks"].items():
        assert numbers_["loss"] == pytest.approx(steady[0]["tasks"][task]["loss"], rel=2e-3)
    student, _ = read_student(trainer.folder / "mixed" / "student")
    model = next(teacher for teacher in student.teachers if teacher.name == "ocr")
    assert model.uri == "pvc://models/ocr"
    assert model.fingerprint == teacher_fingerprint(whole_claims / "models" / "ocr")


def test_a_server_with_other_teachers_is_refused(trainer: Trainer, server: TeacherServer) -> None:
    swapped = {**REMOTE, "spec.teachers.0.adapter.uri": "pvc://tiny-world/teachers/ocr"}
    code, output = trainer.run("swapped", swapped, "--teachers", server.address)
    assert code == ExitCode.REFUSED, output
    assert "teacher geneval: the server has sha256:" in output
    assert not (trainer.folder / "swapped" / "checkpoints").exists()


def test_told_to_stop_while_the_server_is_away_it_does_not_wait_for_it(
    trainer: Trainer, server: TeacherServer, tmp_path: Path
) -> None:
    last_words = tmp_path / "last-words"
    often = {**REMOTE, "spec.training.checkpoint": {"everyRounds": 1, "keep": 1}}
    process = trainer.start("left", often, "--teachers", server.address, env={"OPD_TERMINATION_LOG": str(last_words)})
    wait_for_round(trainer, "left", 3, process)
    server.kill()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == ExitCode.TERMINATED, output
    assert "told to stop while others were away" in json.loads(last_words.read_text())["message"]
    done = trainer.log("left")[-1]["round"]
    assert (trainer.folder / "left" / "checkpoints" / "latest").read_text() == f"round-{done:06d}\n"


def wait_for_round(trainer: Trainer, work: str, round_: int, process: "subprocess.Popen[str] | Program") -> None:
    deadline = time.monotonic() + 120
    while len(trainer.log(work)) < round_:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
