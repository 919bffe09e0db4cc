"""The committed weights are an ordinary Stable Diffusion 3 pipeline with LoRA teachers, small, and worth a repository."""

from pathlib import Path

import opd_tiny.build.flow as flow
import pytest
import torch
from opd_tiny.build.models import LORA_TARGETS, load_pipeline
from opd_tiny.build.reader import accuracy
from opd_tiny.build.tokenizers import TOKENS
from opd_tiny.reader import WEIGHTS
from opd_tiny.scenes import TASKS
from safetensors import safe_open


def test_the_pipeline_draws_what_the_build_s_own_sampler_draws(tiny_world: Path) -> None:
    pipeline = load_pipeline(tiny_world / "base")
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    drawn = pipeline(
        ["a red 7"],
        height=32,
        width=32,
        num_inference_steps=flow.SAMPLING_STEPS,
        guidance_scale=flow.GUIDANCE,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    assert drawn.std() > 0.1
    torch.testing.assert_close(drawn, flow.sample(pipeline, ["a red 7"], seed=7), atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_a_teacher_loads_with_its_rank_and_alpha_and_changes_the_picture(tiny_world: Path, task: str) -> None:
    pipeline = load_pipeline(tiny_world / "base")
    before = flow.sample(pipeline, ["a red 7"], seed=7)
    pipeline.load_lora_weights(tiny_world / "teachers" / task, adapter_name=task)
    config = pipeline.transformer.peft_config[task]
    assert (config.r, config.lora_alpha) == (16, 32)
    assert set(config.target_modules) == set(LORA_TARGETS)
    assert (flow.sample(pipeline, ["a red 7"], seed=7) - before).abs().mean() > 0.01


def test_all_weights_are_fp16_and_fit_the_budget(tiny_world: Path) -> None:
    files = [WEIGHTS, *tiny_world.rglob("*.safetensors")]
    assert len(files) == 1 + 5 + 3
    assert sum(f.stat().st_size for f in files) < 18_000_000
    kinds = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            kinds |= {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118 (not a mapping)
    assert kinds - {torch.int64} == {torch.float16}


def test_no_two_prompts_of_a_task_are_encoded_alike(tiny_world: Path) -> None:
    pipeline = load_pipeline(tiny_world / "base")
    prompts = ["a red 7 above a blue 3", "a blue 3 above a red 7", "a red 7 below a blue 3", "two red 7", "three red 7"]
    prompts += [f'the number " {a} {b} "' for a in range(10) for b in range(10)]
    tokens, _ = flow.Captions(pipeline, prompts).of(torch.arange(len(prompts)))
    distance = torch.cdist(tokens.flatten(1), tokens.flatten(1)) + 1e6 * torch.eye(len(prompts))
    assert distance.min() > 0.5


def test_the_reader_reads_handwriting_it_never_saw() -> None:
    assert accuracy(600) > 0.95
