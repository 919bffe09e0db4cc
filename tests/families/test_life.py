"""What becomes of a model of every family: teachers behind Triton, a student in DeepSpeed, an export, an image."""

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import diffusers
import pytest
import torch
import yaml
from opd_core.api.load import load_spec
from opd_core.api.training import Training
from opd_core.artifacts import read_student
from opd_core.models.adapter_file import read_adapter_file
from opd_core.models.adapter_keys import Format
from opd_core.models.adapters import add_student_adapter, load_adapter, save_adapter, use_adapter
from opd_core.models.export import export
from opd_core.models.pipeline import load_model
from opd_serving.endpoint.server import Settings, make_service
from opd_trainer.evaluate import evaluate
from PIL import Image

from tests.endpoint.conftest import running
from tests.forks import Program
from tests.loras import as_kohya
from tests.teacher_server import TeacherServer

from .test_families import FRAMES, HEIGHT, LONGEST, PROMPTS, STEPS, WIDTH, FolderOf, sample

# One each of what can differ: an embedded guidance beside true CFG, an autoencoder's own normalisation, a guidance that is not linear,
# a mask and another encoding of negative prompts, lists of images and texts, videos, two networks. Stable Diffusion 3
# lives in all others.
NAMES = ["flux", "flux2_klein", "qwen_image", "sana", "z_image", "wan", "wan_pair"]
TASKS = ("first", "second")


def make_teacher(base: Path, folder: Path, seed: int) -> None:
    model = load_model(base, parts={"transformer"})
    add_student_adapter(model.transformer, rank=4, alpha=8, target_modules=model.family.targets, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    file = save_adapter(model.transformer, folder)
    if seed == 1:
        as_kohya(file, 8.0)


@pytest.fixture(scope="module", params=NAMES)
def world(request: pytest.FixtureRequest, folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Claims with a base, two teachers and their prompts, and spec.yaml beside them."""
    claims = tmp_path_factory.mktemp(request.param)
    (claims / "world").mkdir()
    (claims / "world" / "base").symlink_to(folder_of(request.param))
    for seed, task in enumerate(TASKS):
        make_teacher(claims / "world" / "base", claims / "world" / task, seed)
        for kind in ("train", "heldout"):
            lines = [json.dumps({"prompt": f"{prompt} {kind} {task}"}) for prompt in PROMPTS]
            (claims / "world" / f"{task}.{kind}.jsonl").write_text("\n".join(lines))
    (claims / "spec.yaml").write_text(yaml.safe_dump(spec(request.param)))
    return claims


def training_of(world: Path) -> Training:
    return load_spec(world / "spec.yaml").spec.training


def frames_of(world: Path) -> int:
    return training_of(world).resolution.frames


def spec(name: str) -> dict[str, Any]:
    true_cfg = {"trueCfgScale": 2.0} if name == "flux" else {}
    teachers = [
        {
            "name": task,
            "adapter": {"uri": f"pvc://world/{task}"},
            "guidanceScale": 3.0,
            **true_cfg,
            "prompts": {
                "uri": f"pvc://world/{task}.train.jsonl",
                "heldOutUri": f"pvc://world/{task}.heldout.jsonl",
            },
            "rewards": ["tiny-aesthetic"],
        }
        for task in TASKS
    ]
    return {
        "apiVersion": "opd.dev/v1alpha1",
        "kind": "OPDDistillation",
        "metadata": {"name": "a-family"},
        "spec": {
            "model": {"uri": "pvc://world/base", "maxSequenceLength": LONGEST},
            "student": {"adapter": {"rank": 4, "alpha": 8}, "output": {"uri": "pvc://students/a-family"}},
            "teachers": teachers,
            "teacherServing": {"placement": "Shared", "precision": "FP32"},
            "training": {
                "rounds": 2,
                "imagesPerTask": 2,
                "resolution": {"width": WIDTH, "height": HEIGHT, "frames": FRAMES.get(name, 1)},
                "guidanceScale": 3.0,
                **true_cfg,
                "sampler": {"type": "ODE", "steps": 2},
                "objective": {"type": "Velocity"},
                "optimizer": {"learningRate": 1.0e-2, "schedule": "Constant", "warmupRounds": 0},
                "precision": "FP32",
                "deepspeed": {"zeroStage": 0},
                "checkpoint": {"everyRounds": 1, "keep": 2},
            },
            "evaluation": {"promptsPerTask": 2, "sampler": {"steps": STEPS}, "gate": []},
        },
    }


def train(world: Path, work: Path, address: str) -> str:
    options = [f"--spec={world / 'spec.yaml'}", f"--claims={world}", f"--work={work}", f"--teachers={address}"]
    launcher = Program("opd_trainer.launch", [*options, "--device=cpu"], world / "trainer.log")
    output, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[TeacherServer]:
    folder = world / "teachers"
    folder.mkdir()
    running_server = TeacherServer(folder, world / "spec.yaml", world).start()
    yield running_server
    running_server.stop()


@pytest.fixture(scope="module")
def work(world: Path, server: TeacherServer) -> Path:
    """Of a run of two rounds that was not interrupted."""
    train(world, world / "work", server.address)
    return world / "work"


def student_of(work: Path) -> tuple[str, Path]:
    manifest, weights = read_student(work / "student")
    return manifest.digest, weights


def test_the_student_learns_and_a_run_that_goes_on_ends_with_the_same_one(
    world: Path, server: TeacherServer, work: Path
) -> None:
    log = [json.loads(line) for line in (work / "train" / "log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in log] == [1, 2]
    assert 0 < log[1]["loss"] < log[0]["loss"]
    digest, _ = student_of(work)
    again = Path(shutil.copytree(work, world / "again"))
    shutil.rmtree(again / "student")
    (pointer,) = again.rglob("latest")
    shutil.rmtree(pointer.parent / pointer.read_text().strip())
    pointer.write_text("round-000001\n")
    assert "continuing after round 1" in train(world, again, server.address)
    assert student_of(again)[0] == digest


def test_diffusers_loads_the_student_and_draws_what_the_family_draws(world: Path, work: Path) -> None:
    _, weights = student_of(work)
    model = load_model(world / "world" / "base")
    shape = model.latent_shape(WIDTH, HEIGHT, frames_of(world))
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    base = sample(model, PROMPTS[:1], noise, [3.0])
    load_adapter(model.transformer, read_adapter_file(weights), "student")
    use_adapter(model.transformer, "student")
    ours = sample(model, PROMPTS[:1], noise, [3.0])
    assert (ours - base).abs().mean() > 1e-4
    plain = load_model(world / "world" / "base")
    if plain.boundary is None:
        plain.pipeline.load_lora_weights(str(weights.parent), weight_name=weights.name)
    else:
        written = export(weights, world / "exported", Format.DIFFUSERS)
        plain.pipeline.load_lora_weights(str(written / "high_noise"))
        plain.pipeline.load_lora_weights(str(written / "low_noise"), load_into_transformer_2=True)
    assert isinstance(plain.pipeline, getattr(diffusers, plain.family.pipeline))
    torch.testing.assert_close(sample(plain, PROMPTS[:1], noise, [3.0]), ours, rtol=1e-4, atol=1e-4)


def test_the_endpoint_answers_with_the_students_image(world: Path, work: Path) -> None:
    service = make_service(Settings(claims=world, student=str(work / "student"), device="cpu"))
    with running(service) as endpoint, endpoint.client() as client:
        wanted: Callable[..., Any] = client.images.generate
        answers = [
            wanted(model="a-family", prompt=prompt, extra_body={"seed": 3, "guidance": 3.0}) for prompt in PROMPTS
        ]
        film = b""
        if frames_of(world) > 1:
            answer = wanted(model="a-family", prompt=PROMPTS[0], output_format="mp4", extra_body={"seed": 3})
            film = base64.b64decode(answer.data[0].b64_json)
    pictures = [base64.b64decode(answer.data[0].b64_json) for answer in answers]
    assert pictures[0] != pictures[1]
    frames = frames_of(world)
    for answer, picture in zip(answers, pictures, strict=True):
        with Image.open(io.BytesIO(picture)) as opened:
            assert (opened.format, opened.size) == ("PNG" if frames == 1 else "WEBP", (WIDTH, HEIGHT))
            assert (getattr(opened, "n_frames", 1), answer.frames) == (frames, frames)
        assert (answer.guidance, answer.true_cfg) == training_of(world).scales
    if film:
        with av.open(io.BytesIO(film)) as opened:
            assert sum(1 for _ in opened.decode(video=0)) == frames


def test_the_evaluator_scores_base_and_student_and_keeps_what_they_made(world: Path, work: Path) -> None:
    evaluate(
        load_spec(world / "spec.yaml").spec, claims=world, student=work / "student", kinds=["base", "student"],
        output=world / "evaluation", device="cpu", quiet=True,
    )  # fmt: skip
    base, student = (json.loads((world / "evaluation" / f"{name}.json").read_text()) for name in ("base", "student"))
    assert base["rewards"]["first"]["tiny-aesthetic"] != student["rewards"]["first"]["tiny-aesthetic"]
    kept = {file.name for file in (world / "evaluation" / "images" / "student" / "first").iterdir()}
    assert kept == ({"0.png", "1.png"} if frames_of(world) == 1 else {"0.webp", "1.webp"})
