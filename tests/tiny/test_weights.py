"""The committed weights are ordinary pipelines with LoRA teachers, small, and worth a repository."""

from pathlib import Path

import opd_tiny.build.flow as flow
import pytest
import torch
from opd_core.models.pipeline import Model, load_model
from opd_core.models.tokens import longer_prompts
from opd_tiny.build.reader import accuracy
from opd_tiny.build.world import World
from opd_tiny.build.worlds import WORLDS
from opd_tiny.reader import WEIGHTS
from opd_tiny.scenes import TASKS, scenes_of
from safetensors import safe_open


@pytest.fixture(params=WORLDS, ids=lambda world: world.name)
def world(request: pytest.FixtureRequest) -> World:
    return request.param


@pytest.fixture
def folder(world: World, tiny_world: Path) -> Path:
    return tiny_world.parent / world.folder


@pytest.fixture
def model(folder: Path) -> Model:
    return load_model(folder / "base")


def test_the_pipeline_draws_what_the_build_s_own_sampler_draws(world: World, model: Model) -> None:
    drawn = model.pipeline(
        ["a red 7"],
        height=32,
        width=32,
        num_inference_steps=flow.SAMPLING_STEPS,
        guidance_scale=flow.GUIDANCE,
        max_sequence_length=world.tokens,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    assert drawn.std() > 0.1
    torch.testing.assert_close(drawn, flow.sample(model, ["a red 7"], world.tokens, seed=7), atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_a_teacher_loads_with_its_rank_and_alpha_and_changes_the_picture(
    world: World, model: Model, folder: Path, task: str
) -> None:
    before = flow.sample(model, ["a red 7"], world.tokens, seed=7)
    model.pipeline.load_lora_weights(folder / "teachers" / task, adapter_name=task)
    config = model.transformer.peft_config[task]
    assert (config.r, config.lora_alpha) == (16, 32)
    assert (flow.sample(model, ["a red 7"], world.tokens, seed=7) - before).abs().mean() > 0.01


def test_all_weights_are_fp16_and_fit_the_budget(tiny_world: Path) -> None:
    files = [WEIGHTS, *tiny_world.rglob("*.safetensors")]
    assert sum(f.stat().st_size for f in files) < 18_000_000
    kinds = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            kinds |= {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118 (not a mapping)
    assert kinds - {torch.int64} == {torch.float16}


def test_no_two_prompts_of_a_task_are_encoded_alike(world: World, model: Model) -> None:
    prompts = ["a red 7 above a blue 3", "a blue 3 above a red 7", "a red 7 below a blue 3", "two red 7", "three red 7"]
    prompts += [f'the number " {a} {b} "' for a in range(10) for b in range(10)]
    told = flow.Captions(model, prompts, world.tokens).of(torch.arange(len(prompts)))["embeds"]
    distance = torch.cdist(told.flatten(1), told.flatten(1)) + 1e6 * torch.eye(len(prompts))
    assert distance.min() > 0.5


def test_every_prompt_is_seen_whole(world: World, folder: Path) -> None:
    prompts = {scene.prompt for task in TASKS for group in scenes_of(task) for scene in group}
    assert longer_prompts(folder / "base", sorted(prompts), world.tokens) == []


def test_the_reader_reads_handwriting_it_never_saw() -> None:
    assert accuracy(600) > 0.95
