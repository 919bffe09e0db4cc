"""A small spec on the tiny world, the trainer as a program, and one DeepSpeed world for tests that need no program."""

import copy
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from opd_core.api.load import check_spec
from opd_core.api.types import OPDDistillation
from opd_core.ports import free_ports
from opd_trainer.engine import World, init_distributed, shutdown
from opd_trainer.run import Run
from opd_trainer.setup import build_run

from tests.forks import Program

SMALL = {
    "spec.student.adapter": {"rank": 8, "alpha": 16},
    "spec.teacherServing.placement": "InProcess",
    "spec.training.rounds": 4,
    "spec.training.imagesPerTask": 2,
    "spec.training.sampler": {"type": "ODE", "steps": 3},
    "spec.training.optimizer": {"learningRate": 4.0e-3, "schedule": "Cosine", "warmupRounds": 1},
    "spec.training.checkpoint": {"everyRounds": 2, "keep": 2},
    "spec.training.objective": {"type": "Velocity"},
    # Without ZeRO the gradient stays where torch puts it, and DeepSpeed starts seconds earlier.
    "spec.training.deepspeed.zeroStage": 0,
}
SDE = {
    "spec.training.sampler": {"type": "SDE", "steps": 3, "noiseLevel": 0.7},
    "spec.training.objective": {"type": "KL"},
}
DPM2 = {"spec.training.sampler": {"type": "ODE", "solver": "DPM2", "steps": 5}}

MakeSpec = Callable[..., OPDDistillation]


@pytest.fixture(scope="session")
def content(repository: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The tiny world's spec, small, with changes by dotted path."""
    base = yaml.safe_load((repository / "examples" / "tiny" / "distill.yaml").read_text())

    def make(changes: dict[str, Any]) -> dict[str, Any]:
        result = copy.deepcopy(base)
        for path, value in {**SMALL, **changes}.items():
            *parents, last = path.split(".")
            place: Any = result
            for name in parents:
                place = place[int(name)] if name.isdigit() else place.setdefault(name, {})
            place[int(last) if last.isdigit() else last] = copy.deepcopy(value)
        return result

    return make


@pytest.fixture(scope="session")
def make_spec(content: Callable[[dict[str, Any]], dict[str, Any]]) -> MakeSpec:
    def make(changes: dict[str, Any] | None = None) -> OPDDistillation:
        return check_spec(content(changes or {}))

    return make


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process as the only rank of a real DeepSpeed process group."""
    (port,) = free_ports(1)
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    yield init_distributed("cpu")
    shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def make_run(make_spec: MakeSpec, world: World, tiny_claims: Path) -> Iterator[Callable[..., Run]]:
    """A run on the tiny world in this process, with the teachers in it too."""
    runs: list[Run] = []

    def make(changes: dict[str, Any] | None = None) -> Run:
        run = build_run(make_spec(changes).spec, tiny_claims, [], "cpu", world)
        runs.append(run)
        return run

    yield make
    for run in runs:
        run.method.teachers.close()
        run.engine.close()


class Trainer:
    """Starts the launcher and ends what a test leaves behind."""

    def __init__(self, folder: Path, claims: Path, content: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.folder, self.claims, self.content = folder, claims, content
        self.processes: list[subprocess.Popen[str] | Program] = []

    def spec(self, changes: dict[str, Any]) -> Path:
        file = self.folder / f"spec-{len(list(self.folder.glob('spec-*')))}.json"
        file.write_text(json.dumps(self.content(changes)))
        return file

    def start(
        self,
        work: str,
        changes: dict[str, Any] | None = None,
        *options: str,
        program: list[str] | None = None,
        env: dict[str, str] | None = None,
        claims: Path | None = None,
    ) -> "subprocess.Popen[str] | Program":
        """`python -m opd_trainer.launch`, forked, or `program`."""
        arguments = [
            "--spec", str(self.spec(changes or {})), "--claims", str(claims or self.claims),
            "--work", str(self.folder / work), *options,
        ]  # fmt: skip
        environment = {**os.environ, **(env or {})}
        process: subprocess.Popen[str] | Program
        if program:
            process = subprocess.Popen(
                [*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
        else:
            log = self.folder / f"output-{len(self.processes)}.txt"
            process = Program("opd_trainer.launch", arguments, log, environment)
        self.processes.append(process)
        return process

    def run(self, *arguments: Any, **named: Any) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(*arguments, **named)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def log(self, work: str) -> list[dict[str, Any]]:
        file = self.folder / work / "train" / "log.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if isinstance(process, subprocess.Popen) and process.stdout:
                process.stdout.close()


@pytest.fixture(scope="module")
def trainer(
    tmp_path_factory: pytest.TempPathFactory, tiny_claims: Path, content: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[Trainer]:
    program = Trainer(tmp_path_factory.mktemp("trainer"), tiny_claims, content)
    yield program
    program.close()
