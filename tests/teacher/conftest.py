"""Real tritonservers on the tiny world."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from opd_core.conditioning import Conditioning
from opd_core.models.pipeline import Model, load_model
from opd_core.teachers.grpc_client import Patience, connect

from tests.teacher_server import TeacherServer

TEACHERS = ("geneval", "ocr", "aesthetic")
QUICK = Patience(attempt_seconds=20, total_seconds=40, longest_pause=0.5)


def spec_text(change: dict[str, str]) -> str:
    """The example's spec with `change` made to its text."""
    text = (Path(__file__).parents[2] / "examples" / "tiny" / "distill.yaml").read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    assert yaml.safe_load(text)
    return text


@pytest.fixture
def make_server(tmp_path, tiny_claims):
    """A function that makes a server of this test, of the example's spec with `change` made to its text."""
    made: list[TeacherServer] = []

    def make(
        *teachers: str,
        claims: Path = tiny_claims,
        change: dict[str, str] | None = None,
        name: str = "",
        options: Sequence[str] = (),
    ) -> TeacherServer:
        folder = tmp_path / (name or f"server-{len(made)}")
        folder.mkdir()
        spec = folder / "spec.yaml"
        spec.write_text(spec_text(change or {}))
        made.append(TeacherServer(folder, spec, claims, teachers, options))
        return made[-1]

    yield make
    for server in made:
        server.kill()
        for region in Path("/dev/shm").glob(f"opd_teacher_{server.ports['grpc']}_*"):
            region.unlink()


@pytest.fixture(scope="session")
def server(tmp_path_factory, tiny_claims) -> Iterator[TeacherServer]:
    """A server that tests share and do not hurt."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "spec.yaml").write_text(spec_text({}))
    shared = TeacherServer(folder, folder / "spec.yaml", tiny_claims).start()
    yield shared
    shared.stop()
    assert shared.wait(1) == 0
    assert not list(Path("/dev/shm").glob(f"opd_teacher_{shared.ports['grpc']}_*"))


@pytest.fixture
def client(server):
    client = connect([server.address], QUICK)
    yield client
    client.close()


@pytest.fixture(scope="session")
def model(tiny_base) -> Model:
    return load_model(tiny_base, parts={"text"})


def scales_of(guidance: torch.Tensor) -> torch.Tensor:
    """[B, 2] of guidance [B], without true CFG."""
    return torch.stack([guidance, torch.ones_like(guidance)], 1)


@dataclass(frozen=True)
class Rows:
    """B states with their prompts."""

    latents: torch.Tensor
    sigmas: torch.Tensor
    scales: torch.Tensor
    conditioning: list[Conditioning]
    negative: Conditioning

    def __getitem__(self, span: slice) -> "Rows":
        return Rows(self.latents[span], self.sigmas[span], self.scales[span], self.conditioning[span], self.negative)

    def ask(self, client, teacher: str, **more):
        return client.submit(teacher, self.latents, self.sigmas, self.scales, self.conditioning, self.negative, **more)


@pytest.fixture(scope="session")
def rows(model, tiny_world) -> Rows:
    """32 rows: 32 prompts, 32 noise levels, some without guidance."""
    lines = (tiny_world / "prompts" / "geneval.heldout.jsonl").read_text().splitlines()[:32]
    conditioning = model.encode([json.loads(line)["prompt"] for line in lines], 10)
    guidance = torch.full((32,), 4.5)
    guidance[::5] = 1.0
    g = torch.Generator().manual_seed(3)
    return Rows(
        torch.randn(32, 16, 8, 8, generator=g), torch.linspace(1.0, 0.02, 32), scales_of(guidance), conditioning,
        model.encode([""], 10)[0],
    )  # fmt: skip
