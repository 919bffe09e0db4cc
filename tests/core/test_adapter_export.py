"""LoRA files written for other programs, merged into a base, and reported on."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from opd_core.artifacts import WEIGHTS
from opd_core.errors import InvalidError
from opd_core.models.adapter_keys import Format
from opd_core.models.export import export
from opd_core.models.inspect import inspect
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.peft_loras import PEFT_WEIGHTS, base, equal, ours, tensors, theirs, velocity

MIXED = {"lora_alpha": 6, "rank_pattern": {"attn.to_v": 8}, "alpha_pattern": {"attn.to_q": 2}}


@pytest.mark.parametrize("options", [MIXED, {**MIXED, "use_rslora": True}], ids=["alpha / r", "alpha / sqrt(r)"])
def test_an_export_computes_the_same_in_every_program(tiny_base, trained, tmp_path, options) -> None:
    model, folder = trained(**options)
    expected = velocity(model.eval())
    for to in (Format.DIFFUSERS, Format.PEFT, Format.COMFYUI):
        export(folder, tmp_path / "out" / to, to)
        torch.testing.assert_close(ours(tiny_base, tmp_path / "out" / to), expected, rtol=1e-5, atol=1e-5)
    assert equal(theirs(tiny_base, tmp_path / "out" / Format.DIFFUSERS), expected)
    assert equal(velocity(PeftModel.from_pretrained(base(tiny_base), tmp_path / "out" / Format.PEFT)), expected)
    # As ComfyUI computes: alpha / rank up down, with the rank of down, by keys that it knows.
    weights, changed = load_file(tmp_path / "out" / Format.COMFYUI / WEIGHTS), base(tiny_base)
    for layer in {key.partition(".lora_")[0] for key in weights if ".lora_" in key}:
        up, down = (weights.pop(f"{layer}.lora_{side}.weight") for side in ("up", "down"))
        change = weights.pop(f"{layer}.alpha") / len(down) * up @ down
        changed.get_submodule(layer.removeprefix("transformer.")).weight.data += change
    assert weights == {}
    torch.testing.assert_close(velocity(changed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_the_base_with_the_lora_in_it(tiny_base, trained, tmp_path, dtype) -> None:
    """Its weights in two files, as those of large models are."""
    model, folder = trained(**MIXED)
    before = base(tiny_base).to(dtype)
    split = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    shutil.rmtree(split / "transformer")
    before.save_pretrained(split / "transformer", max_shard_size="2MB")
    assert len(list((split / "transformer").glob("*.safetensors"))) > 1
    (split / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not merged, so not copied")
    merged = export(folder, tmp_path / "merged", Format.MERGED, base=split)
    files = (merged / "transformer").glob("*.safetensors")
    changed, plain = {name: value for file in files for name, value in load_file(file).items()}, before.state_dict()
    layers = {key.partition(".lora_")[0] for key in tensors(model)}
    whole, alone = model.merge_and_unload().state_dict(), base(tiny_base).state_dict()
    assert {name for name, value in changed.items() if not torch.equal(value, plain[name])} == {
        f"{layer}.weight" for layer in layers
    }
    for name in (f"{layer}.weight" for layer in layers):
        expected = plain[name].float() + whole[name] - alone[name]
        torch.testing.assert_close(changed[name], expected.to(dtype))  # of this dtype, too
    assert not list(merged.rglob("*fp16*"))
    assert StableDiffusion3Pipeline.from_pretrained(merged).text_encoder_3 is not None
    with pytest.raises(InvalidError, match="give it with --base"):
        export(folder, tmp_path / "another", Format.MERGED)


def test_an_export_overwrites_nothing_and_asks_for_the_base_where_names_may_be_others(trained, tmp_path) -> None:
    model, folder = trained()
    with pytest.raises(InvalidError, match="is not empty; name another folder"):
        export(folder, folder, Format.PEFT)
    save_file({f"diffusion_model.{key}": value for key, value in tensors(model).items()}, tmp_path / WEIGHTS)
    with pytest.raises(InvalidError, match=r"may name layers otherwise .*transformer_blocks.*--base"):
        export(tmp_path / WEIGHTS, tmp_path / "out", Format.PEFT, alpha=8)
    assert not (tmp_path / "out").exists()


def test_a_report_says_what_a_file_is(tiny_base, trained, tmp_path) -> None:
    _, folder = trained(rank_pattern={"attn.to_v": 8}, alpha_pattern={"attn.to_q": 2})
    report = inspect(folder, base=tiny_base)
    assert report.refusal is None
    facts = report.facts
    assert facts["file"].startswith(f"{folder / PEFT_WEIGHTS}, 0.")
    assert (facts["tensors"], facts["format"]) == ("F32", "PEFT (base_model.model.)")
    assert facts["rank"] == "4 (15 x), 8 (5 x)"
    assert facts["alpha"] == "8 (15 x), 2 (5 x), from adapter_config.json"
    assert "5 x transformer_blocks.*.attn.to_q" in facts["layers"]
    assert facts["base"] == "fits, 20 of its 82 linear layers"
    assert inspect(folder).facts["family"].startswith("not told by the names of layers")


def test_a_report_of_what_is_refused_says_why_and_what_it_is(tiny_base, trained, tmp_path) -> None:
    model, folder = trained(init_lora_weights="pissa")
    assert "init_lora_weights is pissa" in str(inspect(folder).refusal)
    assert inspect(folder).facts["format"] == "PEFT (base_model.model.)"
    note = {"ss_base_model_version": "sd3\n\tmedium" + "x" * 500}
    save_file({f"transformer.{key}": value.half() for key, value in tensors(model).items()}, tmp_path / WEIGHTS, note)
    report = inspect(tmp_path / WEIGHTS, base=tiny_base)
    assert report.refusal is None
    assert report.facts["alpha"] == "4, from the rank, as diffusers takes a file that states none"
    assert report.facts["tensors"] == "F16"
    assert report.facts["ss_base_model_version"] == ("sd3 medium" + "x" * 500)[:80]
    assert inspect(tmp_path / WEIGHTS, alpha=4, base=tiny_base).facts["alpha"] == "4, from what was stated"
