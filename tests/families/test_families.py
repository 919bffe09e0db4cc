"""Every family against diffusers' own pipeline: prompts in, latents and images out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.diffusion.guidance import combined
from opd_core.diffusion.transitions import transitions
from opd_core.families.packing import pack, unpack
from opd_core.models.pipeline import Model, load_model
from opd_core.scales import Scales
from torch import Tensor

from .pipelines import PIPELINES

NAMES = [pipeline.__name__ for pipeline in PIPELINES]
FolderOf = Callable[[str], Path]
# SANA takes multiples of 32; Qwen-Image puts a prompt behind a text of its own, of which each byte is a token here.
WIDTH, HEIGHT, STEPS, LONGEST = 64, 32, 3, 256
FRAMES = {"wan": 9, "wan_dense": 5, "wan_pair": 9}  # of the families that make videos
SCALES = [Scales(3.0, 2.0), Scales(4.5, 3.0)]
PROMPTS = ["a red 3", "two blue 7 above the number"]  # of different lengths


def asked(name: str, guidance: float, noise: Tensor) -> dict[str, Any]:
    """How the pipeline wants its guidance and its noise."""
    if name.startswith("flux2"):  # whose negative prompt is always empty
        return {"guidance_scale": guidance, "latents": noise}
    if name.startswith("flux"):
        return {"guidance_scale": guidance, "latents": pack(noise)}
    if name == "qwen_image":
        return {"true_cfg_scale": guidance, "negative_prompt": "", "latents": pack(noise)}
    more: dict[str, Any] = {"use_resolution_binning": False} if name == "sana" else {}
    if name in FRAMES:
        more = {"num_frames": FRAMES[name]}
    return {"guidance_scale": guidance, "negative_prompt": "", "latents": noise, **more}


def drawn(answer: Any) -> Tensor:
    """The images or videos in a pipeline's answer."""
    images: Tensor = answer.frames if hasattr(answer, "frames") else answer.images
    return images


def shape_of(model: Model, name: str) -> tuple[int, ...]:
    return model.latent_shape(WIDTH, HEIGHT, FRAMES.get(name, 1))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference, relative to what is compared; float32 and three guided steps leave 1e-5."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def latents_of(name: str, answered: Tensor, model: Model) -> Tensor:
    """What the pipeline answers as latents, as the family has them."""
    *_, height, width = model.latent_shape(WIDTH, HEIGHT)
    return unpack(answered, height, width) if answered.ndim == 3 else answered


@torch.no_grad()
def sample(model: Model, prompts: list[str], noise: Tensor, guidance: list[float], true_cfg: float = 1.0) -> Tensor:
    """Euler over the family's velocity, all prompts in one batch."""
    count = len(prompts)
    positive, (negative,) = model.encode(prompts, LONGEST), model.encode([""], LONGEST, negative=True)
    assert len({each.key for each in (*positive, negative)}) == count + 1
    told = model.prompts(positive, [negative] * count, [Scales(each, true_cfg) for each in guidance])
    x = noise
    for step in transitions(model.schedule(STEPS, WIDTH, HEIGHT), "Flow", 0.0):
        x = step.mean(x, model.velocity(x, step.sigma, told), None)
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", [3.0, 1.0, 0.0])
def test_euler_gives_the_latents_and_images_of_diffusers_pipeline(
    folder_of: FolderOf, name: str, guidance: float
) -> None:
    """Also where prompts of different lengths share a batch."""
    model = load_model(folder_of(name))
    noise = torch.randn(2, *shape_of(model, name), generator=torch.Generator().manual_seed(1))
    ours = sample(model, PROMPTS, noise, [guidance, guidance])
    model.pipeline.set_progress_bar_config(disable=True)
    assert (ours[0] - ours[1]).abs().mean() > 1e-3
    for i, prompt in enumerate(PROMPTS):
        images = drawn(
            model.pipeline(
                prompt=prompt, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, max_sequence_length=LONGEST,
                output_type="pt", **asked(name, guidance, noise[i : i + 1].clone()),
            )
        )  # fmt: skip
        if not name.startswith("flux2"):  # which answers latents that are denormalised already
            latents = drawn(
                model.pipeline(
                    prompt=prompt, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, max_sequence_length=LONGEST,
                    output_type="latent", **asked(name, guidance, noise[i : i + 1].clone()),
                )
            )  # fmt: skip
            assert apart(ours[i : i + 1], latents_of(name, latents, model)) < 1e-4
        assert apart(model.decode(ours[i : i + 1]), images) < 1e-4


@pytest.mark.parametrize("name", ["flux", "flux_schnell"])
@pytest.mark.parametrize("true_cfg", [4.0, 1.0, 0.5])
def test_true_cfg_beside_embedded_guidance_is_that_of_diffusers(
    folder_of: FolderOf, name: str, true_cfg: float
) -> None:
    model = load_model(folder_of(name))
    noise = torch.randn(2, *shape_of(model, name), generator=torch.Generator().manual_seed(1))
    ours = sample(model, PROMPTS, noise, [2.0, 3.5], true_cfg)
    model.pipeline.set_progress_bar_config(disable=True)
    for i, (prompt, guidance) in enumerate(zip(PROMPTS, [2.0, 3.5], strict=True)):
        answered = model.pipeline(
            prompt=prompt, negative_prompt="", true_cfg_scale=true_cfg, guidance_scale=guidance, width=WIDTH,
            height=HEIGHT, num_inference_steps=STEPS, max_sequence_length=LONGEST, output_type="latent",
            latents=pack(noise[i : i + 1].clone()),
        )  # fmt: skip
        assert apart(ours[i : i + 1], latents_of(name, answered.images, model)) < 1e-4
    without = sample(model, PROMPTS, noise, [2.0, 3.5])
    assert torch.equal(ours, without) is (true_cfg <= 1)


@pytest.mark.parametrize("name", NAMES)
def test_guidance_has_the_effect_that_the_family_says(folder_of: FolderOf, name: str) -> None:
    model = load_model(folder_of(name))
    noise = torch.randn(1, *shape_of(model, name), generator=torch.Generator().manual_seed(1))
    one, three, nothing = (sample(model, PROMPTS[:1], noise, [scale]) for scale in (1.0, 3.0, 0.0))
    assert torch.equal(one, three) is not model.guidance.effective
    assert torch.equal(one, nothing) is (
        not model.guidance.effective or (model.guidance.off == 1.0 and not model.guidance.embedded)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_familys_own_guidance_makes_its_velocity_of_both_branches(folder_of: FolderOf, name: str) -> None:
    model = load_model(folder_of(name))
    if model.guidance.off is None:
        pytest.skip("has no second branch")
    noise = torch.randn(2, *shape_of(model, name), generator=torch.Generator().manual_seed(1))
    negative = model.encode([""], LONGEST, negative=True) * 2
    prompts = model.prompts(model.encode(PROMPTS[:2], LONGEST), negative, SCALES)
    with torch.no_grad():
        both, velocity = (answer(noise, 0.7, prompts) for answer in (model.branches, model.velocity))
    assert torch.equal(combined(model.guidance, both, torch.tensor(SCALES)), velocity)
