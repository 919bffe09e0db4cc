"""LoRAs of diffusers' own script for Stable Diffusion 3, train_dreambooth_lora_sd3.py, which needs text encoders of 77
positions: it was run as it is on the base made here, and its two files were like those that are made here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from opd_core.conditioning import Conditioning
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import read_teacher
from opd_core.models.adapter_layers import fit
from opd_core.models.outline import linear_layers
from opd_core.models.pipeline import load_model
from opd_core.teachers.local import LocalTeachers
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextModelWithProjection

TOKENS = 77
# The script's own: of a transformer's layers all of the first attention, and of its blocks; of the encoders' theirs.
TARGETS = [
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
PROMPTS = ["a red 7", "two blue 3 above a green 0"]


@pytest.fixture(scope="module")
def long_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with as many positions as the real one's CLIPs have."""
    base = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("long") / "base"))
    for part in ("text_encoder", "text_encoder_2"):
        short = CLIPTextModelWithProjection.from_pretrained(base / part)
        state, config = short.state_dict(), short.config
        (key,) = (key for key in state if key.endswith("position_embedding.weight"))
        more = torch.randn(TOKENS - len(state[key]), config.hidden_size, generator=torch.Generator().manual_seed(0))
        state[key] = torch.cat([state[key], 0.7 * more.to(state[key])])
        config.max_position_embeddings = TOKENS
        encoder = CLIPTextModelWithProjection(config).to(short.dtype)
        encoder.load_state_dict(state)
        encoder.save_pretrained(base / part)
    for part in ("tokenizer", "tokenizer_2"):
        file = base / part / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": TOKENS}))
    return base


@pytest.fixture
def trained(long_base: Path, tmp_path: Path) -> Callable[[bool], Path]:
    """A function that trains as the script does, its text encoders too, and saves as it does."""

    def train(with_text: bool) -> Path:
        pipeline = StableDiffusion3Pipeline.from_pretrained(long_base, torch_dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian"}
        encoders = {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2") if with_text}
        torch.manual_seed(0)
        pipeline.transformer.add_adapter(LoraConfig(target_modules=TARGETS, **settings))
        for encoder in encoders.values():
            encoder.add_adapter(LoraConfig(target_modules=TEXT_TARGETS, **settings))
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=TOKENS)
        assert embeds.shape[:2] == (2, 2 * TOKENS)
        changed = [
            parameter for each in (pipeline.transformer, *encoders.values()) for parameter in lora_parameters(each)
        ]
        optimizer = torch.optim.AdamW(changed, 1e-2)
        answer = pipeline.transformer(torch.randn(2, 16, 8, 8), embeds, pooled, torch.tensor([900.0, 300.0]))
        answer.sample.square().mean().backward()
        optimizer.step()
        text = {f"{name}_lora_layers": get_peft_model_state_dict(encoder) for name, encoder in encoders.items()}
        layers = get_peft_model_state_dict(pipeline.transformer)
        StableDiffusion3Pipeline.save_lora_weights(tmp_path / "out", transformer_lora_layers=layers, **text)
        return tmp_path / "out"

    return train


def lora_parameters(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in network.named_parameters() if ".lora_" in name]


def test_what_it_saves_is_a_teacher_as_it_is(long_base: Path, trained: Callable[[bool], Path]) -> None:
    file = trained(False)
    teacher = read_teacher(file)
    assert (
        len(fit(teacher, linear_layers(long_base)).layers) == 5 * len(TARGETS) - 1
    )  # the last block has no to_add_out
    assert {(teacher.rank(layer), teacher.scale(layer)) for layer in teacher.layers} == {(4, 1.0)}
    (note,) = teacher.notes
    assert "does not state its scale" in note

    ours = LocalTeachers(long_base, {"dog": teacher}, precision="FP32", max_sequence_length=TOKENS)
    latents, sigmas = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.9, 0.3])
    told, nothing = encoded(long_base, PROMPTS), encoded(long_base, [""])[0]
    answer = ours.submit("dog", latents, sigmas, torch.ones(2, 2), told, nothing).result()

    pipeline = StableDiffusion3Pipeline.from_pretrained(long_base, torch_dtype=torch.float32)
    pipeline.load_lora_weights(file)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    with torch.no_grad():
        expected = pipeline.transformer(latents, embeds, pooled, 1000 * sigmas).sample
        pipeline.unload_lora_weights()
        base = pipeline.transformer(latents, embeds, pooled, 1000 * sigmas).sample
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    assert (answer - base).abs().max() > 1e-2


def encoded(base: Path, prompts: list[str]) -> list[Conditioning]:
    return load_model(base, parts={"text"}).encode(prompts, TOKENS)


def test_with_text_encoders_trained_it_is_refused_for_them(trained: Callable[[bool], Path]) -> None:
    with pytest.raises(
        InvalidError,
        match=r"changes the text encoders \(32 of 110 tensors, e.g. text_encoder.text_model.encoder.layers.0.self_attn.k_p"
        ".*; train one of the transformer alone",
    ):
        read_teacher(trained(True))
