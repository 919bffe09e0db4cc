"""The program that trains a teacher: its artefact, killed and continued, on two ranks, beside another run."""

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from opd_core.api.load import check_spec
from opd_core.api.teachers import teacher_folder
from opd_core.artifacts import read_trained_teacher
from opd_core.exit_codes import ExitCode
from opd_core.models.adapter_file import read_teacher
from opd_core.uris import claim_path
from safetensors.torch import load_file

from tests.forks import Program

from .test_program import SMOOTH
from .test_reinforcement import ALGORITHMS, changes_of

SETTINGS = {
    **ALGORITHMS["GRPOGuard"],
    "groupSize": 4,
    "rounds": 3,
    "checkpoint": {"everyRounds": 1},
    "optimizer": SMOOTH,
    "validateEveryRounds": 2,
    "mustBeatBase": False,
}
TEACH = {**changes_of(SETTINGS), "spec.training.deepspeed.zeroStage": 1}


class Teach:
    """Starts the program in claims of its own, and ends what a test leaves behind."""

    def __init__(self, folder: Path, world: Path, content: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.folder, self.world, self.content = folder, world, content
        self.programs: list[Program] = []

    def start(self, place: str, changes: dict[str, Any] | None = None) -> Program:
        """With claims in the folder `place`; its last words go there, too."""
        claims = self.folder / place
        (claims / "students").mkdir(parents=True, exist_ok=True)
        if not (claims / "tiny-world").exists():
            (claims / "tiny-world").symlink_to(self.world)
        spec = claims / f"spec-{len(self.programs)}.json"
        spec.write_text(json.dumps(self.content({**TEACH, **(changes or {})})))
        arguments = ["teach", "--spec", str(spec), "--claims", str(claims), "--teacher=aesthetic", "--device=cpu"]
        environment = {**os.environ, "OPD_TERMINATION_LOG": str(claims / f"words-{len(self.programs)}")}
        self.programs.append(
            Program("opd_trainer.launch", arguments, claims / f"output-{len(self.programs)}", environment)
        )
        return self.programs[-1]

    def run(self, place: str, changes: dict[str, Any] | None = None) -> tuple[int, str, dict[str, Any]]:
        """Exit code, output and last words."""
        program = self.start(place, changes)
        output, _ = program.communicate(timeout=300)
        words = self.folder / place / f"words-{len(self.programs) - 1}"
        assert program.returncode is not None
        return program.returncode, output, json.loads(words.read_text())

    def of(self, place: str) -> Path:
        """The teacher's own folder."""
        spec = check_spec(self.content(TEACH)).spec
        found = claim_path(teacher_folder(spec, spec.teachers[2]), self.folder / place)
        assert found is not None
        return found

    def log(self, place: str) -> list[dict[str, Any]]:
        file = self.of(place) / "train" / "log.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def teach(tmp_path_factory: pytest.TempPathFactory, tiny_claims: Path, content: Any) -> Iterator[Teach]:
    program = Teach(tmp_path_factory.mktemp("teach"), (tiny_claims / "tiny-world").resolve(), content)
    yield program
    for each in program.programs:
        if each.poll() is None:
            each.kill()
        each.wait()


@pytest.fixture(scope="module")
def reference(teach: Teach) -> Path:
    """The folder of a teacher whose training nobody disturbed."""
    code, output, words = teach.run("reference")
    assert code == 0, output
    assert words["round"] == 3
    return teach.of("reference")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(read_teacher(folder / "adapter", None).file)


def test_a_teacher_is_an_adapter_with_its_origin_and_its_scores(teach: Teach, reference: Path) -> None:
    manifest = read_trained_teacher(reference / "adapter")
    assert manifest is not None
    assert (manifest.name, manifest.algorithm, manifest.round, manifest.guidance_scale) == (
        "aesthetic",
        "GRPOGuard",
        3,
        1.0,
    )
    assert [set(line.get("rewards", {})) for line in teach.log("reference")] == [set(), {"aesthetic"}, set()]
    looked = teach.log("reference")[1]["rewards"]["aesthetic"]["tiny-aesthetic"]
    assert 0 < looked < 1
    assert len(list((reference / "train" / "looks" / "2" / "aesthetic").glob("*.png"))) == 2
    base, own = (manifest.scores[model]["tiny-aesthetic"] for model in ("base", "teacher"))
    assert manifest.gain.mean == pytest.approx(own.mean - base.mean)
    assert base.n == 2
    adapter = read_teacher(reference / "adapter", None)
    assert {adapter.rank(layer) for layer in adapter.layers} == {4}
    lines = teach.log("reference")
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert {"reward", "reward_error", "group_std", "flat_groups", "ratio", "clipped", "norm_ratio"} == set(
        lines[0]["figures"]
    )


def test_one_that_is_there_is_not_trained_again_unless_it_depends_on_the_change(teach: Teach, reference: Path) -> None:
    before = (reference / "train" / "log.jsonl").stat().st_mtime_ns
    code, output, words = teach.run("reference", {"spec.training.rounds": 7, "spec.teachers.2.weight": 3.0})
    assert (code, words["digest"]) == (0, read_trained_teacher(reference / "adapter").digest)  # type: ignore[union-attr]
    assert "held-out images: gain" in output
    assert (reference / "train" / "log.jsonl").stat().st_mtime_ns == before
    assert [folder.name for folder in reference.parent.iterdir()] == [reference.name]


def test_one_that_is_no_better_than_its_base_is_refused_with_the_figures(teach: Teach, reference: Path) -> None:
    file = reference / "adapter" / "teacher.json"
    kept = file.read_text()
    manifest = json.loads(kept)
    manifest["gain"].update(mean=-0.125, low=-0.25, high=0.0)
    file.write_text(json.dumps(manifest))
    try:
        code, _, words = teach.run("reference", {"spec.teachers.2.training.mustBeatBase": True})
    finally:
        file.write_text(kept)
    assert code == ExitCode.REFUSED
    assert "no better than the base on its 2 held-out images: gain -0.125 (-0.250 to 0.000)" in words["message"]
    assert "training.mustBeatBase to false" in words["message"]


def test_killed_and_continued_equals_uninterrupted_while_another_run_waits(teach: Teach, reference: Path) -> None:
    first = teach.start("killed")
    deadline = time.monotonic() + 200
    while len(teach.log("killed")) < 2:
        assert first.poll() is None, first.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    with (teach.of("killed") / "lock").open("a+") as lock:  # of another run
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = teach.start("killed")
        while not second.log.exists() or "another run is at work" not in second.log.read_text():
            assert second.poll() is None, second.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert "continuing after round" in output
    assert [line["round"] for line in teach.log("killed")] == [1, 2, 3]
    ours, theirs = weights(teach.of("killed")), weights(reference)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_two_ranks_make_the_same_teacher(teach: Teach, reference: Path) -> None:
    """Groups are split between them; rewards are compared in whole groups all the same."""
    code, output, _ = teach.run("ranks", {"spec.training.processesPerNode": 2})
    assert code == 0, output
    first, reward = teach.log("ranks")[0]["figures"], teach.log("reference")[0]["figures"]["reward"]
    assert first["reward"] == pytest.approx(reward, abs=1e-6)
    ours, theirs = weights(teach.of("ranks")), weights(reference)
    moved = {key: float((theirs[key] - ours[key]).abs().max()) for key in theirs if "lora_B" in key}
    size = max(float(theirs[key].abs().max()) for key in moved)
    assert size > 0
    assert max(moved.values()) < 1e-3 * size


def test_told_to_stop_while_a_reward_server_is_away_it_does_not_wait_for_it(teach: Teach) -> None:
    asked: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(len(question["images"]))
            here = len(asked) <= 4  # for the preflight, and for a round
            content = json.dumps({"scores": [i / 10 for i in range(asked[-1])]} if here else {"error": "away"}).encode()
            self.send_response(200 if here else 503)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    servers = [{"reward": "tiny-aesthetic", "urls": [f"http://127.0.0.1:{server.server_port}"]}]
    changes = {"spec.rewardServers": servers, "spec.teachers.2.training.validateEveryRounds": 1000}
    try:
        program = teach.start("left", changes)
        deadline = time.monotonic() + 200
        while len(asked) < 6:
            assert program.poll() is None, program.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program.send_signal(signal.SIGTERM)
        output, _ = program.communicate(timeout=60)
    finally:
        server.shutdown()
        server.server_close()
    assert program.returncode == ExitCode.TERMINATED, output
    words = json.loads((teach.folder / "left" / f"words-{len(teach.programs) - 1}").read_text())
    assert "told to stop while others were away; a new start continues" in words["message"]


def test_a_name_that_the_spec_does_not_train_is_refused(teach: Teach) -> None:
    code, _, words = teach.run("unknown", {"spec.teachers.2.name": "beauty"})
    assert code == ExitCode.INVALID
    assert "--teacher aesthetic: the spec trains no such teacher; it trains beauty" in words["message"]
