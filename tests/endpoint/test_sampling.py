"""The engine's arithmetic against diffusers' own pipeline, and its independence of company."""

import numpy as np
import pytest
import torch
from opd_core.models.pipeline import load_model
from opd_core.scales import Scales
from opd_serving.endpoint import sampling
from opd_serving.endpoint.sampling import Row


@pytest.fixture(scope="module")
def model(tiny_base):
    return load_model(tiny_base)


def make_row(model, seed: int, prompt: str, steps: int, guidance: float, width: int = 32, height: int = 32) -> Row:
    conditioning, negative = model.encode([prompt, ""], 10)
    noise = sampling.initial_noise(seed, model.latent_shape(width, height), model.device)
    return Row(noise, sampling.euler_path(model, steps, width, height), conditioning, negative, Scales(guidance))


def advance_to_the_end(model, rows: list[Row], fixed_rows: int) -> None:
    forward = sampling.in_buckets(model.forward, fixed_rows)
    with torch.inference_mode():
        while left := [row for row in rows if row.step < len(row.path)]:
            sampling.advance(model, forward, left)


@pytest.mark.parametrize(("guidance", "width", "height"), [(4.5, 32, 32), (1.0, 48, 24)])
def test_images_are_those_of_the_diffusers_pipeline(model, guidance, width, height):
    row = make_row(model, 7, "a red 3", 6, guidance, width, height)
    expected = model.pipeline(
        "a red 3",
        negative_prompt="",
        width=width,
        height=height,
        num_inference_steps=6,
        guidance_scale=guidance,
        latents=row.latents[None].clone(),
        max_sequence_length=10,
        output_type="np",
    ).images[0]
    advance_to_the_end(model, [row], 8)
    actual = model.decode(row.latents[None])[0].permute(1, 2, 0).numpy()
    assert actual.shape == (height, width, 3)
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def company_of(model, row: Row) -> list[Row]:
    """Mixed prompts, step counts and guidance around `row`, which leave before and after it."""
    others = [make_row(model, i, f"two blue {i}", 3 + i, 1.0 + i % 3) for i in range(7)]
    return [*others[:4], row, *others[4:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_fixed_rows_an_image_has_the_same_bits_alone_and_in_any_company(tiny_base, dtype):
    model = load_model(tiny_base, dtype=dtype)
    alone, among = (make_row(model, 7, "a red 3", 5, 4.5) for _ in range(2))
    advance_to_the_end(model, [alone], 8)
    advance_to_the_end(model, company_of(model, among), 8)
    assert torch.equal(alone.latents, among.latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_that_is_made_alone_has_the_same_bits_every_time(tiny_base, dtype):
    model = load_model(tiny_base, dtype=dtype)
    first, second = (make_row(model, 7, "a red 3", 5, 4.5) for _ in range(2))
    advance_to_the_end(model, [first], 0)
    advance_to_the_end(model, [second], 0)
    assert torch.equal(first.latents, second.latents)


def test_in_company_an_image_differs_by_no_more_than_one_level_of_a_channel(model):
    """The promise of docs/endpoint.md, for float32."""
    alone = [make_row(model, i, f"two blue {i}", 3 + i, 1.0 + i % 3) for i in range(7)]
    among = [make_row(model, i, f"two blue {i}", 3 + i, 1.0 + i % 3) for i in range(7)]
    for row in alone:
        advance_to_the_end(model, [row], 0)
    advance_to_the_end(model, among, 0)
    for one, other in zip(alone, among, strict=True):
        levels = [(model.decode(row.latents[None]) * 255).round() for row in (one, other)]
        assert (levels[0] - levels[1]).abs().max() <= 1


@pytest.mark.parametrize(
    ("present", "fixed", "rows"),
    [
        (1, 0, [2]),
        (2, 0, [2]),
        (3, 0, [4]),
        (8, 0, [8]),
        (9, 0, [16]),
        (18, 0, [16, 2]),
        (5, 2, [2, 2, 2]),
        (1, 8, [8]),
    ],
)
def test_forwards_have_few_numbers_of_rows(present, fixed, rows):
    seen = []

    def forward(latents, sigmas, prompts, guidance):
        assert len(latents) == len(sigmas) == len(prompts["embeds"]) == len(prompts["pooled"]) == len(guidance)
        seen.append(len(latents))
        return latents * 2

    x = torch.arange(float(present)).view(present, 1, 1, 1)
    run = sampling.in_buckets(forward, fixed)
    prompts = {"embeds": torch.zeros(present, 3, 4), "pooled": torch.zeros(present, 4)}
    assert torch.equal(run(x, torch.zeros(present), prompts, torch.ones(present)), 2 * x)
    assert seen == rows


def test_a_step_that_fails_half_way_is_made_for_nobody(model, monkeypatch):
    """It is repeated with fewer rows, and must not be made twice for the first of them."""
    rows = [make_row(model, i, "a red 3", 4, 4.5) for i in range(3)]
    before = [row.latents.clone() for row in rows]

    def velocities(*arguments):
        yield torch.zeros_like(rows[0].latents)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "guided_velocity", velocities)
    with pytest.raises(torch.OutOfMemoryError):
        sampling.advance(model, model.forward, rows)
    for row, latents in zip(rows, before, strict=True):
        assert row.step == 0
        assert torch.equal(row.latents, latents)


def test_noise_depends_on_the_seed_alone():
    shape = (16, 4, 4)
    assert torch.equal(
        sampling.initial_noise(3, shape, torch.device("cpu")), sampling.initial_noise(3, shape, torch.device("cpu"))
    )
    assert not torch.equal(
        sampling.initial_noise(3, shape, torch.device("cpu")), sampling.initial_noise(4, shape, torch.device("cpu"))
    )
