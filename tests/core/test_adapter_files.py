"""LoRA files as people have them: taken as diffusers and PEFT take them, or refused for what they are."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from opd_core.artifacts import WEIGHTS
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import read_adapter_file, read_teacher
from opd_core.models.adapter_keys import Format
from opd_core.models.adapter_layers import fit
from opd_core.models.export import export
from opd_core.models.fingerprint import adapter_fingerprint
from opd_core.models.inspect import inspect
from opd_core.models.outline import linear_layers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.peft_loras import ATTENTION, PEFT_CONFIG, PEFT_WEIGHTS, base, equal, ours, tensors, theirs, velocity

# ---------------------------------------------------------------- taken


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*attn\.to_[qkv]"},
        {"exclude_modules": r".*transformer_blocks\.1\..*"},
        {"exclude_modules": ["transformer_blocks.0.attn.to_q"]},
        {"layers_to_transform": [0, 2], "layers_pattern": "transformer_blocks"},
        {"rank_pattern": {"attn.to_q": 16, "transformer_blocks.1.attn.to_k": 2}},
        {"rank_pattern": {"attn.to_q": 4}},
        {"alpha_pattern": {"attn.to_q": 16, "^transformer_blocks.1.attn.to_k": 2}, "use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal", "lora_dropout": 0.1},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_pefts_own_files_are_taken_as_peft_takes_them(tiny_base, trained, options) -> None:
    model, folder = trained(**options)
    reloaded = PeftModel.from_pretrained(base(tiny_base), folder)
    assert equal(ours(tiny_base, folder), velocity(reloaded))
    torch.testing.assert_close(velocity(reloaded), velocity(model.eval()), rtol=1e-4, atol=1e-5)
    assert not equal(velocity(reloaded), velocity(base(tiny_base)))


def test_what_diffusers_saves_with_metadata_is_taken_as_diffusers_takes_it(tiny_base, trained, tmp_path) -> None:
    model, _ = trained(lora_alpha=16, alpha_pattern={"attn.to_q": 2}, rank_pattern={"attn.to_v": 8})
    metadata = model.peft_config["default"].to_dict()
    StableDiffusion3Pipeline.save_lora_weights(
        str(tmp_path / "out"), transformer_lora_layers=tensors(model), transformer_lora_adapter_metadata=metadata
    )
    assert equal(ours(tiny_base, tmp_path / "out"), theirs(tiny_base, tmp_path / "out"))
    assert equal(ours(tiny_base, tmp_path / "out"), velocity(model.eval()))


@pytest.mark.parametrize("ranks", [{}, {"attn.to_v": 8}], ids=["one rank", "two ranks"])
def test_a_file_that_states_no_scale_is_taken_as_diffusers_takes_it_and_that_is_told(
    tiny_base, trained, tmp_path, ranks
) -> None:
    """diffusers' script for SD3 saves without metadata and trains with alpha = rank."""
    model, folder = trained(lora_alpha=4, rank_pattern=ranks, alpha_pattern=ranks)
    StableDiffusion3Pipeline.save_lora_weights(str(tmp_path / "out"), transformer_lora_layers=tensors(model))
    assert equal(ours(tiny_base, tmp_path / "out"), theirs(tiny_base, tmp_path / "out"))
    assert equal(ours(tiny_base, tmp_path / "out"), velocity(model.eval()))
    assert not equal(ours(tiny_base, tmp_path / "out", alpha=16), velocity(model))
    (note,) = read_teacher(tmp_path / "out").notes
    assert "does not state its scale" in note
    assert f"alpha = its rank, {'4 and 8' if ranks else '4'}, as diffusers" in note
    assert read_teacher(tmp_path / "out", 4).notes == read_teacher(folder).notes == []


Rename = Callable[[str], str]
SPELLINGS: dict[str, Rename] = {
    "bare": lambda key: key,
    "PEFT": lambda key: f"base_model.model.{key}",
    "ComfyUI": lambda key: f"diffusion_model.{key}",
    "state of an adapter": lambda key: f"base_model.model.{key.replace('.weight', '.default.weight')}",
    "down and up": lambda key: f"transformer.{key.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}",
    "old diffusers": lambda key: f"transformer.{key.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')}",
}


@pytest.mark.parametrize("rename", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("scale", ["configuration", "alpha tensors", "stated"])
def test_every_spelling_of_the_keys_is_the_same_adapter(tiny_base, trained, tmp_path, rename: Rename, scale) -> None:
    model, folder = trained(lora_alpha=6)
    stored = {rename(key): value for key, value in tensors(model).items()}
    if scale == "alpha tensors":
        layers = {key.partition(".lora_")[0] for key in tensors(model)}
        ends = {rename(f"{layer}.lora_A.weight").partition(".lora")[0] for layer in layers}
        stored |= {f"{layer}.alpha": torch.tensor(6.0, dtype=torch.bfloat16) for layer in ends}
    if scale != "configuration":
        (folder / PEFT_CONFIG).unlink()
    (folder / PEFT_WEIGHTS).unlink()
    save_file(stored, folder / "my_style.safetensors")
    stated = 6 if scale == "stated" else None
    assert equal(ours(tiny_base, folder / "my_style.safetensors", stated), velocity(model.eval()))


def test_what_an_adapter_computes_has_one_fingerprint_whoever_saved_it(trained, tmp_path) -> None:
    model, folder = trained(lora_alpha=4)
    StableDiffusion3Pipeline.save_lora_weights(str(tmp_path / "plain"), transformer_lora_layers=tensors(model))
    digests = {
        adapter_fingerprint(read_teacher(path, alpha)) for path, alpha in ((folder, None), (tmp_path / "plain", 4))
    }
    assert len(digests) == 1
    assert adapter_fingerprint(read_teacher(tmp_path / "plain", 8)) not in digests


def test_a_configuration_with_a_byte_order_mark_is_read(tiny_base, trained) -> None:
    model, folder = trained()
    text = (folder / PEFT_CONFIG).read_text()
    (folder / PEFT_CONFIG).write_text(text, encoding="utf-8-sig")
    assert equal(ours(tiny_base, folder), velocity(model.eval()))


# ---------------------------------------------------------------- refused


def configured(folder: Path, **fields: Any) -> None:
    file = folder / PEFT_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_its_base_is_refused_and_taken_once_converted(
    tiny_base, trained, tmp_path, start
) -> None:
    model, folder = trained(init_lora_weights=start)
    with pytest.raises(InvalidError, match=f"init_lora_weights is {start}, .*path_initial_model_for_weight_conversion"):
        read_teacher(folder)
    torch.manual_seed(3)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, init_lora_weights=start)
    fresh = get_peft_model(base(tiny_base), settings)
    fresh.peft_config["default"].init_lora_weights = True
    fresh.save_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(ours(tiny_base, tmp_path / "converted"), velocity(model.eval()), rtol=1e-4, atol=1e-4)


ODD = {
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights is corda"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is lora_ga"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights is loftq"),
    "DoRA": ({"use_dora": True}, "uses use_dora True"),
    "QA-LoRA": ({"use_qalora": True}, "uses use_qalora True"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "uses kasa_config"),
    "VeLoRA": ({"velora_config": {"x": 1}}, "uses velora_config"),
    "BD-LoRA": ({"use_bdlora": {"x": 1}}, "uses use_bdlora"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens"),
    "layers repeated": ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
    "parameters": ({"target_parameters": ["x"]}, "uses target_parameters"),
    "modules saved": ({"modules_to_save": ["proj_out"]}, "uses modules_to_save"),
    "biases": ({"bias": "all"}, "uses bias all"),
    "bias of a LoRA": ({"lora_bias": True}, "uses lora_bias True"),
    "another kind": ({"peft_type": "LOKR"}, "uses peft_type LOKR"),
    "a field of tomorrow": ({"use_hyperlora": True}, "uses use_hyperlora True"),
    "rank 0": ({"r": 0}, "r is 0: Input should be greater than or equal to 1"),
    "rank as a word": ({"r": "4"}, "r is 4: Input should be a valid integer"),
    "alpha as a word": ({"lora_alpha": "8"}, "lora_alpha is 8: Input should be a valid number"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha is None"),
    "alpha not finite": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "targets a number": ({"target_modules": 7}, "target_modules"),
    "no targets": ({"target_modules": []}, "0 are missing, and 20 others are there"),
    "a pattern of expressions": ({"alpha_pattern": {"(a+)+b": 3}}, "alpha_pattern names .*, a regular expression"),
    "a pattern of words": ({"rank_pattern": {"attn.to_q": "x"}}, "rank_pattern.attn.to_q is x"),
    "another rank": ({"r": 8}, "has rank 4 in .* and 8 by its configuration"),
}


@pytest.mark.parametrize(("fields", "message"), ODD.values(), ids=ODD)
def test_odd_configurations_are_refused_by_the_name_of_the_field(tiny_base, trained, fields, message) -> None:
    _, folder = trained()
    configured(folder, **fields)
    with pytest.raises(InvalidError, match=message):
        fit(read_adapter_file(folder), linear_layers(tiny_base))


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "7", "{", '{"r": 4}', '{"transformer.r": 4}', '{"transformer.r": null}', "[" * 100_000]
)
def test_odd_metadata_is_a_message_and_no_stack_trace(trained, tmp_path, text) -> None:
    model, folder = trained()
    state = {f"transformer.{key}": value for key, value in tensors(model).items()}
    save_file(state, tmp_path / WEIGHTS, {"format": "pt", "lora_adapter_metadata": text})
    (folder / PEFT_CONFIG).write_text(text)
    for path in (tmp_path / WEIGHTS, folder):
        with pytest.raises(InvalidError) as refusal:
            read_teacher(path)
        assert str(path.parent) in str(refusal.value)


@pytest.mark.parametrize("targets", ["*attn", "(", "([a-z_0-9.]+)+!"])
def test_a_regular_expression_for_targets_is_never_run(tiny_base, trained, targets) -> None:
    """It may take for ever, or be none; the tensors say which layers there are."""
    _, folder = trained()
    configured(folder, target_modules=targets, exclude_modules=targets)
    began = time.process_time()
    fit(read_adapter_file(folder), linear_layers(tiny_base))
    assert time.process_time() - began < 5  # ([a-z_0-9.]+)+! took minutes


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {f"transformer.{key}".replace(old, new): value for key, value in state.items()}


FOREIGN = {
    "LoKr": (renamed(".lora_A.weight", ".lokr_w1"), "is a LoKr adapter"),
    "LoHa": (renamed(".lora_A.weight", ".hada_w1_a"), "is a LoHa adapter"),
    "DoRA": (renamed(".lora_A.weight", ".lora_magnitude_vector"), "is a DoRA"),
    "whole differences": (
        lambda state: {**renamed("a", "a")(state), "transformer.x.diff_b": torch.ones(4)}, "with whole differences",
    ),
    "XLabs": (renamed(".attn.", ".processor."), "is a LoRA in XLabs' format"),
    "biases": (renamed(".lora_B.weight", ".lora_B.bias"), "is a LoRA with biases"),
    "two adapters": (renamed("0.attn.to_q.lora_A.weight", "0.attn.to_q.lora_A.x.weight"), "holds adapters None, x"),
    "a whole model": (renamed(".lora_A.weight", ".weight"), "is not a LoRA of a transformer: it holds transformer"),
    "half of it": (lambda state: dict(list(renamed("a", "a")(state).items())[1:]), "is not whole: .* has no lora_A"),
    "nothing": (lambda _: {}, "holds no tensor at all"),
    "a convolution": (
        lambda _: {"transformer.x.lora_A.weight": torch.ones(4, 8, 1, 1), "transformer.x.lora_B.weight": torch.ones(8, 4)},
        "supported are LoRAs of linear layers",
    ),
    "no common rank": (
        lambda _: {"transformer.x.lora_A.weight": torch.ones(4, 8), "transformer.x.lora_B.weight": torch.ones(8, 5)},
        "are of no common rank",
    ),
    "alpha of some layers": (
        lambda state: {**renamed("a", "a")(state), "transformer.x.alpha": torch.tensor(1.0)},
        "has A, B and alpha not of the same layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_files_of_another_kind_are_refused_as_what_they_are(trained, tmp_path, change, message) -> None:
    model, _ = trained()
    save_file(change(tensors(model)), tmp_path / WEIGHTS)
    with pytest.raises(InvalidError, match=message):
        read_teacher(tmp_path / WEIGHTS)


TEXT_PARTS = {
    "diffusers": ("transformer.", "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"),
    "diffusers, its third": ("transformer.", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"),
    "ComfyUI": ("diffusion_model.", "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.lora_A.weight"),
    "sd-scripts": ("lora_unet_", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
    "sd-scripts, one encoder": ("lora_unet_", "lora_te_model_layers_0_mlp_up_proj.alpha"),
    "OneTrainer, a new word": ("transformer.", "bundle_emb.castle.t5"),
    "nothing else": (None, "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"),
}


@pytest.mark.parametrize(("prefix", "text"), TEXT_PARTS.values(), ids=TEXT_PARTS)
def test_what_changes_the_text_encoders_is_refused_by_whoever_reads_it(
    tiny_base, trained, tmp_path, prefix: str | None, text: str
) -> None:
    """Never taken without them: it would be another teacher, and nobody would know."""
    model, _ = trained()
    state = {} if prefix is None else {f"{prefix}{key}": value for key, value in tensors(model).items()}
    file = tmp_path / WEIGHTS
    save_file({**state, text: torch.ones(4, 8)}, file)
    message = rf"changes the text encoders \(1 of {len(state) + 1} tensors, e.g. {re.escape(text)}\).*transformer alone"
    readers: list[Callable[[], object]] = [
        lambda: read_teacher(file),
        lambda: read_adapter_file(file),  # of a start, a mean, the endpoint
        lambda: export(file, tmp_path / "out", Format.PEFT, base=tiny_base),
    ]
    for reader in readers:
        with pytest.raises(InvalidError, match=message):
            reader()
    assert not (tmp_path / "out").exists()
    assert re.search(message, str(inspect(file, base=tiny_base).refusal))


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf"), -1.0])
def test_an_alpha_tensor_is_a_positive_number(trained, tmp_path, alpha) -> None:
    model, _ = trained()
    layers = {key.partition(".lora_")[0] for key in tensors(model)}
    save_file({**tensors(model), **{f"{layer}.alpha": torch.tensor(alpha) for layer in layers}}, tmp_path / WEIGHTS)
    with pytest.raises(InvalidError, match="is no positive number"):
        read_teacher(tmp_path / WEIGHTS)


def test_a_scale_that_the_file_states_is_not_overruled(trained) -> None:
    _, folder = trained()
    assert read_teacher(folder, 8).alphas == read_teacher(folder).alphas
    with pytest.raises(InvalidError, match=r"alpha is stated as 4, and .* itself says 8; leave adapter\.alpha out"):
        read_teacher(folder, 4)


def test_a_teacher_that_was_never_trained_is_refused(tiny_base, tmp_path) -> None:
    model = get_peft_model(base(tiny_base), LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    model.save_pretrained(tmp_path / "fresh")
    with pytest.raises(InvalidError, match="changes nothing: all its B matrices are zero"):
        read_teacher(tmp_path / "fresh")
    assert read_adapter_file(tmp_path / "fresh").layers  # a student may start from it


def test_the_files_of_this_project_still_say_their_scale(tiny_world) -> None:
    with safe_open(tiny_world / "teachers" / "ocr" / WEIGHTS, "pt") as opened:
        assert "lora_adapter_metadata" in opened.metadata()
    adapter = read_teacher(tiny_world / "teachers" / "ocr")
    assert {(adapter.rank(layer), adapter.scale(layer)) for layer in adapter.layers} == {(16, 2.0)}
    assert len(load_file(adapter.file)) == 2 * len(adapter.layers)
