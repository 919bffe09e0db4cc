"""`opd run` with the real programs, and real faults: a small run, once undisturbed and once disturbed throughout."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from opd_cli.ablation.grid import Cell
from opd_cli.ablation.results import as_markdown, read_result
from opd_core.api.load import load_spec
from opd_core.exit_codes import ExitCode
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.browser import browsing

from .conftest import alive, wait_for

ROUNDS = 16
PROGRAM = (sys.executable, "-m", "opd_cli.main")
pytestmark = pytest.mark.timeout(1200)


class Opd:
    """`opd run` as a process, and everything it started."""

    def __init__(self, spec: Path, work: Path, claim: str, *options: str) -> None:
        self.work = work
        self.began = time.monotonic()
        self.output = work.with_suffix(f".{time.monotonic_ns()}.txt")
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*PROGRAM, "run", str(spec), "--work", str(work), "--claim", claim, "--device", "cpu", *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: set[int] = set()

    def descendants(self, words: str = "") -> list[psutil.Process]:
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen.update(process.pid for process in found)
        return [process for process in found if words in " ".join(_command(process))]

    def wait(self, seconds: float = 600.0) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text()
            self.descendants()
            time.sleep(0.1)
        return self.process.returncode

    def text(self) -> str:
        logs = [f"--- {log}\n{log.read_text()[-3000:]}" for log in sorted(self.work.glob("logs/*.log"))]
        return "\n".join([self.output.read_text(), *logs])

    def until(self, condition: Callable[[], object]) -> None:
        def check() -> object:
            self.descendants()
            assert self.process.poll() is None, self.text()
            return condition()

        try:
            wait_for(check, 300)
        except AssertionError as error:
            raise AssertionError(self.text()) from error

    def rounds(self) -> list[int]:
        file = self.work / "train" / "log.jsonl"
        return [json.loads(line)["round"] for line in file.read_text().splitlines()] if file.exists() else []

    def reasons(self, stage: str) -> list[str]:
        file = self.work / "events.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [event["reason"] for event in events if event.get("stage") == stage]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@pytest.fixture(scope="module")
def start(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Opd]]:
    """Starts `opd run` on a small spec in a work folder of that name."""
    folder = tmp_path_factory.mktemp("runs")
    content: dict[str, Any] = yaml.safe_load((repository / "examples" / "tiny" / "distill.yaml").read_text())
    spec = content["spec"]
    spec["training"].update(rounds=ROUNDS, imagesPerTask=2, checkpoint={"everyRounds": 1, "keep": 2})
    spec["training"]["sampler"]["steps"] = 3
    spec["evaluation"].update(promptsPerTask=4, sampler={"steps": 3})
    started: list[Opd] = []

    def run(
        work: str,
        *options: str,
        gate: float | None = None,
        world: Path | None = None,
        train: dict[str, Any] | None = None,
        learning: dict[str, Any] | None = None,
    ) -> Opd:
        """`train`: how the last teacher is made, whose adapter is not given then. `learning`: how the student learns
        from rewards; the tasks have no teachers then."""
        rules = [] if gate is None else [{"task": "ocr", "reward": "tiny-ocr", "atLeast": gate}]
        spec["evaluation"]["gate"] = rules
        file = folder / f"{work}.yaml"
        teachers = spec["teachers"]
        if train is not None:
            own = {key: value for key, value in teachers[-1].items() if key != "adapter"}
            teachers = [*teachers[:-1], {**own, "training": train}]
        if learning is not None:
            teachers = [{key: value for key, value in task.items() if key != "adapter"} for task in teachers]
        method = {} if learning is None else {"method": "RL", "reinforcement": learning, "guidanceScale": 1.0}
        training = {**spec["training"], **method}
        file.write_text(yaml.safe_dump({**content, "spec": {**spec, "teachers": teachers, "training": training}}))
        claim = f"tiny-world={world or repository / 'examples' / 'tiny' / 'tiny-world'}"
        started.append(Opd(file, folder / work, claim, *options))
        return started[-1]

    yield run
    for opd in started:
        opd.process.kill()
        opd.process.wait()


@pytest.fixture(scope="module")
def undisturbed(start: Callable[..., Opd]) -> Opd:
    opd = start("undisturbed", "--tensorboard")
    assert opd.wait() == 0, opd.text()
    return opd


def student_digest(opd: Opd) -> str:
    digest: str = json.loads((opd.work / "summary.json").read_text())["student"]["digest"]
    return digest


def test_a_student_that_learns_from_rewards_has_no_teacher_servers(start: Callable[..., Opd]) -> None:
    """Nor teachers that anything is compared with: tasks with rewards are enough."""
    learning = {"algorithm": "DiffusionNFT", "groupSize": 3, "promptsPerRound": 2}
    opd = start("rewards", "--set=evaluation.everyRounds=2", gate=0.0, learning=learning)
    assert opd.wait() == 0, opd.text()
    assert opd.reasons("TeachersTrained") == opd.reasons("TeachersReady") == ["Disabled"]
    assert "the teachers' gains" not in opd.text()
    assert opd.rounds() == list(range(1, ROUNDS + 1))
    summary = json.loads((opd.work / "summary.json").read_text())
    assert list(summary["scores"]) == ["base", "student"]
    assert (summary["kept"], [check["passed"] for check in summary["gate"]]) == ({}, [True])
    report = (opd.work / "report.html").read_text()
    assert "Student, geneval: reward" in report
    assert "Reward: ocr" in report
    assert not re.search(r"<td>teacher</td>|teacher (geneval|ocr|aesthetic)", report)
    result = read_result(Cell({}, 1, ()), load_spec(opd.work / "spec.json").spec, opd.work)
    assert (result.mean_kept, result.curve) == (None, [])
    assert set(result.kept) == {"geneval", "ocr", "aesthetic"}
    assert as_markdown([result]).splitlines()[2].endswith("| - | - | - | - |")
    assert json.loads((opd.work / "student" / "manifest.json").read_text())["teachers"] == []


def test_ends_with_scores_report_student_and_picture(undisturbed: Opd) -> None:
    work, text = undisturbed.work, undisturbed.output.read_text()
    summary = json.loads((work / "summary.json").read_text())
    assert set(summary["scores"]) == {"base", "teacher:geneval", "teacher:ocr", "teacher:aesthetic", "student"}
    assert set(summary["kept"]) == {"geneval", "ocr", "aesthetic"}
    assert all(summary["stageSeconds"][stage] > 0 for stage in ("TeachersReady", "Trained", "Evaluated", "Deployed"))
    assert (work / "report.html").is_file()
    assert (work / "images" / "student.png").read_bytes().startswith(b"\x89PNG")
    assert (work / "claims" / "students" / "tiny-three-tasks" / "manifest.json").is_file()
    assert list((work / "train" / "tensorboard").glob("events.out.tfevents.*"))
    for line in ("of the teachers' gains the student keeps: ", f"report:  {work / 'report.html'}", "picture: "):
        assert line in text
    assert undisturbed.rounds() == list(range(1, ROUNDS + 1))
    assert undisturbed.reasons("TeachersReady") == ["Starting", "Completed", "Freed"]
    assert undisturbed.reasons("Trained") == ["Starting", "Running", "Completed"]


def test_its_report_is_one_file_that_a_browser_shows_whole(undisturbed: Opd, tmp_path: Path) -> None:
    alone = Path(shutil.copy(undisturbed.work / "report.html", tmp_path))
    with browsing() as (page, wrong):
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(alone.as_uri())
        page.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
        assert [url for url in asked if not url.startswith("data:")] == [alone.as_uri()]
        assert page.locator("img").count() >= 3 * 5, "three prompts, five models"
        assert page.locator("svg").count() >= 1
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it is wider than its window"
        assert not wrong


def test_leaves_no_process(undisturbed: Opd) -> None:
    assert undisturbed.seen
    assert not alive(sorted(undisturbed.seen))


def test_a_finished_run_is_up_to_date_in_seconds(start: Callable[..., Opd], undisturbed: Opd) -> None:
    before = student_digest(undisturbed)
    again = start("undisturbed")
    assert again.wait() == 0, again.text()
    for stage in ("Trained", "Evaluated", "Deployed"):
        assert again.reasons(stage)[-1] == "UpToDate"
    assert not again.seen  # nothing was started
    assert student_digest(again) == before


def test_a_student_that_is_not_where_it_should_be_is_published_again(
    start: Callable[..., Opd], undisturbed: Opd
) -> None:
    place = undisturbed.work / "claims" / "students" / "tiny-three-tasks"
    shutil.rmtree(place)
    opd = start("undisturbed")
    assert opd.wait() == 0, opd.text()
    assert opd.reasons("Trained")[-1] == "UpToDate"
    assert opd.reasons("Evaluated")[-1] == "Completed"
    assert (place / "manifest.json").is_file()


def test_claims_of_eval_are_those_of_the_run_around_the_student(undisturbed: Opd, tmp_path: Path) -> None:
    command = [*PROGRAM, "eval", str(undisturbed.work / "spec.json"), "--student", str(undisturbed.work / "student")]
    command += ["--models", "student", "--out", str(tmp_path), "--device", "cpu", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scored = json.loads(done.stdout)["scores"]["student"]
    known = json.loads((undisturbed.work / "summary.json").read_text())["scores"]["student"]
    assert scored.keys() == known.keys()
    for reward, score in scored.items():  # another number of threads, other last bits
        assert score == pytest.approx(known[reward], abs=1e-4)


def test_endpoint_is_kept_until_ctrl_c_and_its_port_is_free_then(start: Callable[..., Opd], undisturbed: Opd) -> None:
    opd = start("undisturbed", "--serve")
    opd.until(lambda: "until Ctrl-C" in opd.output.read_text())
    port = int(re.findall(r"serving on http://127\.0\.0\.1:(\d+)/v1", opd.output.read_text())[-1])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["tiny-three-tasks"]
    opd.process.send_signal(signal.SIGINT)
    assert opd.wait() == 0, opd.text()
    assert not alive(sorted(opd.seen))
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_missed_gate_is_told_by_the_exit_code(start: Callable[..., Opd], undisturbed: Opd) -> None:
    opd = start("undisturbed", gate=0.99)
    assert opd.wait() == ExitCode.GATE, opd.text()
    assert "tiny-ocr" in opd.text()
    assert opd.reasons("Evaluated")[-1] == "GateMissed"
    assert (opd.work / "summary.json").is_file()


def test_faults_and_interruptions_leave_no_trace_in_the_weights(start: Callable[..., Opd], undisturbed: Opd) -> None:
    # The runner is killed while tritonserver starts: everything goes with it.
    first = start("disturbed")
    first.until(lambda: first.descendants("tritonserver"))
    first.process.kill()
    first.process.wait()
    wait_for(lambda: not alive(sorted(first.seen)))

    second = start("disturbed")
    second.until(lambda: len(second.rounds()) >= 1)
    # The server, and the Python process behind its model, which Triton itself does not miss.
    for program in ("tritonserver/bin/tritonserver", "triton_python_backend_stub"):
        told, began = len(second.reasons("TeachersReady")), time.monotonic()
        (process,) = second.descendants(program)
        process.kill()
        second.until(lambda told=told: second.reasons("TeachersReady")[told:])
        assert time.monotonic() - began < 15
        second.until(lambda told=told: second.reasons("TeachersReady")[told:] == ["Restarting", "Completed"])
        reached = max(second.rounds())
        second.until(lambda reached=reached: max(second.rounds()) > reached)

    (rank,) = second.descendants("opd_trainer.train")
    rank.kill()
    second.until(lambda: second.reasons("Trained")[-2:] == ["Restarting", "Running"])
    second.process.send_signal(signal.SIGINT)
    assert second.wait() == ExitCode.INTERRUPTED, second.text()
    assert second.reasons("Trained")[-1] == "Interrupted"
    assert not alive(sorted(second.seen))
    assert len(second.rounds()) < ROUNDS
    reached = second.rounds()[-1]
    assert (second.work / "checkpoints" / "latest").read_text().strip() == f"round-{reached:06d}"
    assert f"stopped at the checkpoint of round {reached}; the same command continues there" in second.text()

    third = start("disturbed", "--until", "trained")
    assert third.wait() == 0, third.text()
    assert "Resumed" in third.reasons("Trained")
    assert third.rounds() == list(range(1, ROUNDS + 1))
    manifest = json.loads((third.work / "student" / "manifest.json").read_text())
    assert manifest["digest"] == student_digest(undisturbed)


def test_a_folder_may_have_any_name_and_a_proxy_is_not_for_here(
    start: Callable[..., Opd], tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton hands the path of its model to a shell, unquoted (python_backend#401); gRPC asks a proxy for the loopback
    (grpc#29718)."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    world = tmp_path / "a world [2] (b)"
    world.symlink_to(tiny_world)
    options = ["--set", "training.rounds=2", "--set", "training.optimizer.warmupRounds=0", "--until", "trained"]
    opd = start("mein Lauf [1] $(touch evil) 'ü", *options, world=world)
    assert opd.wait() == 0, opd.text()
    assert opd.reasons("TeachersReady") == ["Starting", "Completed", "Freed"]
    assert opd.reasons("Evaluated") == []
    assert (opd.work / "student" / "manifest.json").is_file()
    assert f"student: {opd.work / 'student'}" in opd.output.read_text()
    assert not [file for file in opd.work.parent.iterdir() if "evil" in file.name and "Lauf" not in file.name]
    assert not Path("evil").exists()


def test_teacher_that_answers_nan_fails_the_run_at_once(start: Callable[..., Opd], tiny_world: Path, tmp_path) -> None:
    """Its weights are finite and fit; what it computes with them is not, and its server says so when it starts."""
    world = tmp_path / "tiny-world"
    shutil.copytree(tiny_world, world, copy_function=os.symlink)
    file = world / "teachers" / "ocr" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    huge = {key: torch.full_like(tensor, 3e38, dtype=torch.float32) for key, tensor in load_file(file).items()}
    file.unlink()
    save_file(huge, file, metadata)
    opd = start("nan", world=world)
    assert opd.wait() == ExitCode.REFUSED, opd.text()
    message = "teacher ocr answered NaN or infinity; check its weights"
    assert message in opd.output.read_text()
    assert opd.reasons("TeachersReady") == ["Starting", "Failed"]
    assert opd.reasons("Trained") == []
    assert not alive(sorted(opd.seen))


def test_second_ctrl_c_kills_at_once(start: Callable[..., Opd]) -> None:
    opd = start("killed")
    opd.until(lambda: opd.descendants("tritonserver"))
    opd.process.send_signal(signal.SIGSTOP)  # so that both signals are there when it looks
    opd.process.send_signal(signal.SIGINT)
    opd.process.send_signal(signal.SIGTERM)
    opd.process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    assert opd.wait(30) == ExitCode.INTERRUPTED
    assert time.monotonic() - began < 10
    assert not alive(sorted(opd.seen))
    assert os.path.exists(opd.work / "spec.json")


def test_a_teacher_is_trained_first_and_again_only_if_it_changes(start: Callable[..., Opd]) -> None:
    """From the base to a student, with a Ctrl-C in the teacher's training."""
    settings = {
        "algorithm": "DiffusionNFT",
        "rounds": 6,
        "groupSize": 2,
        "promptsPerRound": 2,
        "sampler": {"steps": 2},
        "checkpoint": {"everyRounds": 1},
        "mustBeatBase": False,
    }
    first = start("from-base", "--until", "trained", train=settings)
    folder = first.work / "claims" / "students" / "opd-teachers"

    def rounds() -> int:
        return sum(len(log.read_text().splitlines()) for log in folder.glob("*/train/log.jsonl"))

    first.until(lambda: rounds() >= 1)
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == ExitCode.INTERRUPTED, first.text()
    second = start("from-base", "--until", "trained", train=settings)
    assert second.wait() == 0, second.text()
    assert "Resumed" in second.reasons("TeachersTrained")
    assert second.reasons("TeachersTrained")[-1] == "Completed"
    assert rounds() == 6
    (teacher,) = folder.iterdir()
    trained = json.loads((second.work / "student" / "manifest.json").read_text())["teachers"]
    assert trained[-1]["uri"] == f"pvc://students/opd-teachers/{teacher.name}/adapter"

    other = start("from-base-again", "--until", "trained", "--claim", f"students={folder.parent}", train=settings)
    other.until(lambda: other.reasons("TeachersReady"))
    assert other.reasons("TeachersTrained") == ["UpToDate"], "another run with outputs in this folder"
    other.process.kill()
