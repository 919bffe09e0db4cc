"""The engine's arithmetic against diffusers' own pipeline, and its independence of company."""

import numpy as np
import pytest
import torch
from opd_core.models.pipeline import load_model
from opd_serving.endpoint import sampling
from opd_serving.endpoint.sampling import Row


@pytest.fixture(scope="module")
def model(tiny_base):
    return load_model(tiny_base)


def make_row(model, seed: int, prompt: str, steps: int, guidance: float, width: int = 32, height: int = 32) -> Row:
    conditioning, negative = model.encode([prompt, ""], 10)
    noise = sampling.initial_noise(seed, model.latent_shape(width, height), model.device)
    return Row(noise, sampling.euler_path(model, steps, width, height), conditioning, negative, guidance)


def advance_to_the_end(model, rows: list[Row], fixed_rows: int) -> None:
    forward = sampling.fixed_rows(model.forward, fixed_rows) if fixed_rows else model.forward
    with torch.inference_mode():
        while left := [row for row in rows if row.step < len(row.path)]:
            sampling.advance(forward, left, model.device, model.dtype)


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


def test_a_row_ends_in_the_same_bits_alone_and_in_any_company(model):
    """Mixed prompts, step counts and guidance, joined by others half way."""

    def row() -> Row:
        return make_row(model, 7, "a red 3", 5, 4.5)

    alone = row()
    advance_to_the_end(model, [alone], 8)
    among = row()
    company = [make_row(model, i, f"two blue {i}", 3 + i, 1.0 + i % 3) for i in range(7)]
    advance_to_the_end(model, [*company[:4], among, *company[4:]], 8)
    assert torch.equal(alone.latents, among.latents)


def test_fixed_rows_change_no_more_than_rounding(model):
    rows = [[make_row(model, i, "a red 3", 4, 4.5) for i in range(5)] for _ in range(2)]
    advance_to_the_end(model, rows[0], 0)
    advance_to_the_end(model, rows[1], 4)
    for free, fixed in zip(*rows, strict=True):
        torch.testing.assert_close(free.latents, fixed.latents, atol=1e-4, rtol=1e-4)


def test_every_forward_has_exactly_the_fixed_number_of_rows(model):
    seen = []

    def forward(latents, sigmas, embeds, pooled):
        seen.append({len(latents), len(sigmas), len(embeds), len(pooled)})
        return latents * 2

    x = torch.arange(5.0).view(5, 1, 1, 1)
    y = sampling.fixed_rows(forward, 2)(x, torch.zeros(5), torch.zeros(5, 3, 4), torch.zeros(5, 4))
    assert seen == [{2}, {2}, {2}]
    assert torch.equal(y, 2 * x)


def test_noise_depends_on_the_seed_alone():
    shape = (16, 4, 4)
    assert torch.equal(
        sampling.initial_noise(3, shape, torch.device("cpu")), sampling.initial_noise(3, shape, torch.device("cpu"))
    )
    assert not torch.equal(
        sampling.initial_noise(3, shape, torch.device("cpu")), sampling.initial_noise(4, shape, torch.device("cpu"))
    )
