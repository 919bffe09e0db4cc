"""Two networks that take turns by noise level (Wan 2.2 A14B): who answers which row, and LoRAs that are pairs."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.api.training import Resolution
from opd_core.artifacts import WEIGHTS
from opd_core.diffusion.guidance import Forward
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import AdapterFile, missed_blocks, read_adapter_file, read_teacher
from opd_core.models.adapter_keys import Format
from opd_core.models.adapter_layers import fit
from opd_core.models.adapters import add_student_adapter, load_adapter, read_adapter, save_adapter, use_adapter
from opd_core.models.export import export
from opd_core.models.fingerprint import adapter_fingerprint, fingerprint
from opd_core.models.inspect import inspect
from opd_core.models.merge import merge
from opd_core.models.networks import by_network
from opd_core.models.outline import linear_layers, read_outline
from opd_core.models.pairs import FOLDERS, NETWORKS, split
from opd_core.models.pipeline import Model, load_model
from opd_core.models.teacher_files import check_teacher_model, teacher_fingerprint
from opd_core.scales import Scales
from opd_serving.endpoint.sampling import in_buckets
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.loras import random_lora

from .test_families import LONGEST, PROMPTS, FolderOf, apart, sample, shape_of
from .test_lora_files import WAN, changes_of, comfy, kohya

BOUNDARY = 0.875
OFF = Scales(1.0)
SIGMAS = [0.9, 0.3, BOUNDARY, 0.874, 1.0]  # high noise: the first, the third and the last


@pytest.fixture
def base(folder_of: FolderOf) -> Path:
    return folder_of("wan_pair")


def noise_of(model: Model, rows: int) -> Tensor:
    return torch.randn(rows, *shape_of(model, "wan_pair"), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_each_row_is_answered_by_its_own_network_in_any_company(base: Path) -> None:
    model = load_model(base)
    noise, (prompt,) = noise_of(model, len(SIGMAS)), model.encode(PROMPTS[:1], LONGEST)
    together = model.velocity(noise, torch.tensor(SIGMAS), model.prompts([prompt] * 5, [prompt] * 5, [OFF] * 5))
    for i, sigma in enumerate(SIGMAS):
        row, told = noise[i : i + 1], {"embeds": prompt.tensors["embeds"][None]}
        alone = model.velocity(row, sigma, model.prompts([prompt], [prompt], [OFF]))
        high, low = (
            model.family.velocity(network, row, torch.tensor([sigma]), told, torch.ones(1))
            for network in (model.pipeline.transformer, model.pipeline.transformer_2)
        )
        own, other = (high, low) if sigma >= BOUNDARY else (low, high)
        assert apart(together[i : i + 1], alone) < 1e-5
        assert apart(alone, own) < 1e-5
        assert apart(alone, other) > 1e-2


def test_a_batch_costs_one_pass_of_each_network_that_it_needs(base: Path) -> None:
    seen: list[list[float]] = []

    def forward(latents: Tensor, sigmas: Tensor, prompts: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        seen.append(sigmas.tolist())
        return latents + sigmas.view(-1, 1) + guidance.view(-1, 1) + prompts["embeds"]

    outline, numbers = read_outline(base), torch.arange(5.0)
    sigmas, column = torch.tensor(SIGMAS), numbers.view(-1, 1)

    def ask(asked: Forward, rows: slice = slice(None)) -> Tensor:
        seen.clear()
        return asked(column[rows], sigmas[rows], {"embeds": 10 * column[rows]}, numbers[rows])

    answer = ask(by_network(outline, forward))
    torch.testing.assert_close(answer, 12 * column + sigmas.view(-1, 1))
    assert [len(rows) for rows in seen] == [3, 2]
    ask(by_network(outline, forward), slice(0, 1))
    assert [len(rows) for rows in seen] == [1]
    # Of the endpoint: whatever the company, a pass has as many rows as it was told.
    fixed = by_network(outline, in_buckets(forward, fixed_rows=4))
    assert torch.equal(ask(fixed), answer)
    assert [len(rows) for rows in seen] == [4, 4]
    assert all(len({sigma >= BOUNDARY for sigma in rows}) == 1 for rows in seen)


def test_both_networks_have_gradients_whichever_was_asked(base: Path) -> None:
    """Ranks that saw other noise levels average gradients parameter by parameter; of the adapter in use alone."""
    model = load_model(base, parts={"text", "transformer"})
    for name in ("other", "student"):
        add_student_adapter(model.transformer, rank=2, alpha=2, target_modules=model.family.targets, seed=0, name=name)
    (prompt,) = model.encode(PROMPTS[:1], LONGEST)
    use_adapter(model.transformer, "student")
    model.velocity(noise_of(model, 1), 0.9, model.prompts([prompt], [prompt], [OFF])).square().mean().backward()
    gradients = {name: p.grad for name, p in model.transformer.named_parameters() if p.requires_grad}
    own = {name: grad for name, grad in gradients.items() if ".student." in name}
    assert len(own) == 2 * 2 * 20
    for name, grad in own.items():
        assert grad is not None
        assert bool(grad.any()) is (name.startswith("transformer.") and "lora_B" in name)  # A: B is still zero
    assert all(grad is None for name, grad in gradients.items() if ".other." in name)


def test_gradient_checkpointing_changes_no_gradient_of_either_network(base: Path) -> None:
    found = []
    for checkpointed in (False, True):
        model = load_model(base, parts={"text", "transformer"})
        add_student_adapter(model.transformer, rank=2, alpha=2, target_modules=model.family.targets, seed=0)
        if checkpointed:
            model.transformer.enable_gradient_checkpointing()
        prompt = model.encode(PROMPTS[:1], LONGEST) * 2
        sigmas = torch.tensor([0.9, 0.3])
        model.velocity(noise_of(model, 2), sigmas, model.prompts(prompt, prompt, [OFF] * 2)).mean().backward()
        found.append({name: p.grad for name, p in model.transformer.named_parameters() if "lora_B" in name})
    for name, grad in found[0].items():
        assert grad is not None
        assert grad.any()
        torch.testing.assert_close(found[1][name], grad)


# ------------------------------------------------------------------------------------------------ the model's files


def changed(base: Path, folder: Path, part: str, **fields: Any) -> Path:
    """A copy in which a configuration says something else; None: nothing."""
    shutil.copytree(base, folder)
    file = folder / part
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("name", "part", "fields", "message"),
    [
        ("wan", "model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio is 0.9, and there is no transformer_2"),
        ("wan_pair", "model_index.json", {"boundary_ratio": None}, "names a transformer_2, and no boundary_ratio says"),
        ("wan_pair", "model_index.json", {"boundary_ratio": 875}, "boundary_ratio is 875; write a noise level between"),
        ("wan_pair", "model_index.json", {"boundary_ratio": "x"}, "boundary_ratio is x; write a noise level between"),
        (
            "wan_pair",
            "transformer_2/config.json",
            {"text_dim": 8},
            "transformer_2's text_dim is 8, transformer's is 16",
        ),
    ],
)
def test_networks_that_cannot_take_turns_are_refused(
    folder_of: FolderOf, tmp_path: Path, name: str, part: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidError, match=message):
        read_outline(changed(folder_of(name), tmp_path / "base", part, **fields))


def test_a_second_network_that_is_not_there_is_refused(base: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(base, tmp_path / "base"))
    shutil.rmtree(copied / "transformer_2")
    with pytest.raises(InvalidError, match=r"names a transformer_2, which has no config.json"):
        read_outline(copied)


def other_weights(folder: Path) -> Path:
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out.bias"] += 1
    save_file(state, file, {"format": "pt"})
    return folder


def test_fingerprints_cover_both_networks_and_the_boundary(base: Path, tmp_path: Path) -> None:
    """The base's, and that of a teacher with a model of its own."""
    copies = [
        Path(shutil.copytree(base, tmp_path / "same")),
        other_weights(Path(shutil.copytree(base, tmp_path / "weights"))),
        changed(base, tmp_path / "boundary", "model_index.json", boundary_ratio=0.9),
    ]
    for identity in (fingerprint, teacher_fingerprint):
        same, weights, boundary = map(identity, copies)
        assert same == identity(base)
        assert len({same, weights, boundary}) == 3
    for teacher in copies[1:]:
        check_teacher_model(teacher, base, Resolution(width=64, height=32, frames=9))


# ------------------------------------------------------------------------------------------------------------ LoRAs


def lora(base: Path, folder: Path, *, ranks: tuple[int, int] = (2, 3), scale: float = 2.0, **options: Any) -> Path:
    """One file of both networks, of these ranks."""
    linear = {layer: size for layer, size in linear_layers(base).items() if ".attn" in layer or ".ffn." in layer}
    of_layers = {layer: ranks[layer.startswith("transformer_2.")] for layer in linear}
    alphas = {layer: scale * rank for layer, rank in of_layers.items()}
    return random_lora(folder, linear, of_layers, alphas, **{"seed": 0, "std": 0.3, **options})


def as_authors(file: Path, spell: Callable[[str], str], alpha: float | None) -> None:
    """Two files in its place, named as people name them, with the authors' names of layers."""
    networks = split(load_file(file))
    file.unlink()
    for name, half in zip(("Some-HIGH-noise", "some_low_noise"), networks.values(), strict=True):
        renamed = {}
        for key, value in half.items():
            layer, _, side = key.partition(".lora_")
            (theirs,) = (theirs for theirs, (ours,) in WAN.items() if ours == layer)
            if alpha is None:
                renamed[f"{spell(theirs)}.lora_{side}"] = value
                continue
            renamed[f"{spell(theirs)}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = value
            renamed[f"{spell(theirs)}.alpha"] = torch.tensor(alpha)
        save_file(renamed, file.with_name(f"{name}.safetensors"))


def drawn(base: Path, adapter: AdapterFile | None = None, pair: Path | None = None) -> Tensor:
    """What the base makes with our adapter, or with a pair in a folder that plain diffusers loads."""
    model = load_model(base)
    if adapter is not None:
        load_adapter(model.transformer, adapter, "ours")
        use_adapter(model.transformer, "ours")
    if pair is not None:
        high, low = (next(each for each in pair.iterdir() if noise in each.name.lower()) for noise in ("high", "low"))
        model.pipeline.load_lora_weights(str(high))
        model.pipeline.load_lora_weights(str(low), load_into_transformer_2=True)
    return sample(model, PROMPTS, noise_of(model, 2), [3.0, 3.0])


@pytest.mark.parametrize("writer", ["kohya", "ai-toolkit", "diffusers"])
def test_two_files_change_the_model_as_diffusers_own_loading_does(base: Path, tmp_path: Path, writer: str) -> None:
    folder = tmp_path / "lora"
    if writer == "kohya":
        as_authors(lora(base, folder), kohya, 4.0)
    elif writer == "ai-toolkit":  # which says nothing of a scale where it is 1
        as_authors(lora(base, folder, ranks=(2, 2)), comfy, None)
    else:
        folder = export(lora(base, tmp_path / "one"), folder, Format.DIFFUSERS)
    ours = drawn(base, read_teacher(folder, 2 if writer == "ai-toolkit" else None))
    torch.testing.assert_close(ours, drawn(base, pair=folder), rtol=1e-4, atol=1e-4)
    assert (ours - drawn(base)).abs().mean() > 1e-2


def test_a_half_that_states_no_scale_is_told(base: Path, tmp_path: Path) -> None:
    written = export(lora(base, tmp_path / "one"), tmp_path / "two", Format.DIFFUSERS)
    assert read_teacher(written).notes == []
    file = written / "low_noise" / WEIGHTS
    save_file(load_file(file), file, {"format": "pt"})
    (note,) = read_teacher(written).notes
    assert f"{file} does not state its scale" in note
    assert "alpha = its rank, 3," in note


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("to", [Format.DIFFUSERS, Format.PEFT, Format.COMFYUI])
def test_a_pair_is_the_same_in_one_file_and_in_two(base: Path, tmp_path: Path, to: Format, rslora: bool) -> None:
    one = read_adapter_file(lora(base, tmp_path / "one", rslora=rslora, scale=1.0))
    written = export(one.file, tmp_path / "two", to)
    assert {entry.name for entry in written.iterdir()} == set(FOLDERS.values())
    two = read_adapter_file(written)
    assert {layer: two.scale(layer) for layer in two.layers} == pytest.approx(
        {layer: one.scale(layer) for layer in one.layers}
    )
    assert len({one.rank(layer) for layer in one.layers}) == 2
    before, after = read_adapter(one), read_adapter(two)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    if to != Format.COMFYUI or not rslora:  # whose scale is a number in float32
        assert adapter_fingerprint(two) == adapter_fingerprint(one)
    assert fit(two, linear_layers(base)) is two


def test_the_fingerprint_of_a_pair_tells_its_halves_apart(base: Path, tmp_path: Path) -> None:
    written = export(lora(base, tmp_path / "one", ranks=(2, 2)), tmp_path / "two", Format.DIFFUSERS)
    before = fingerprint(written)
    high, low = (written / FOLDERS[network] for network in NETWORKS)
    high.rename(tmp_path / "high")
    low.rename(high)
    (tmp_path / "high").rename(low)
    assert fingerprint(written) != before


def test_a_pair_merged_into_its_base_draws_the_same(base: Path, tmp_path: Path) -> None:
    file = lora(base, tmp_path / "one")
    merged = export(file, tmp_path / "merged", Format.MERGED, base=base)
    torch.testing.assert_close(drawn(merged), drawn(base, read_adapter_file(file)), rtol=1e-4, atol=1e-4)


def test_the_mean_of_pairs_is_a_pair(base: Path, tmp_path: Path) -> None:
    pairs = [read_adapter_file(lora(base, tmp_path / f"{seed}", seed=seed)) for seed in range(2)]
    merge(pairs, tmp_path / "mean")
    mean = read_adapter_file(tmp_path / "mean")
    assert list(mean.halves) == list(NETWORKS)
    found, *given = (changes_of(pair) for pair in (mean, *pairs))
    for layer, change in found.items():
        torch.testing.assert_close(change, sum(each[layer] for each in given) / 2)


def test_a_lora_for_one_noise_alone_leaves_the_other_network(base: Path, tmp_path: Path) -> None:
    written = export(lora(base, tmp_path / "one"), tmp_path / "two", Format.DIFFUSERS)
    shutil.rmtree(written / FOLDERS["transformer"])
    half = fit(read_teacher(written), linear_layers(base))
    assert {layer.partition(".")[0] for layer in half.layers} == {"transformer_2"}
    model = load_model(base)
    (prompt,), noise = model.encode(PROMPTS[:1], LONGEST), noise_of(model, 2)
    told, sigmas = model.prompts([prompt] * 2, [prompt] * 2, [OFF] * 2), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        before = model.velocity(noise, sigmas, told)
        load_adapter(model.transformer, half, "ours")
        after = model.velocity(noise, sigmas, told)
    assert torch.equal(after[0], before[0])
    assert apart(after[1], before[1]) > 1e-2


def test_a_fresh_adapter_is_on_the_usual_layers_of_both_and_reads_as_it_was_saved(base: Path, tmp_path: Path) -> None:
    model = load_model(base, parts={"transformer"})
    add_student_adapter(model.transformer, rank=2, alpha=4, target_modules=model.family.targets, seed=0)
    saved = fit(read_adapter_file(save_adapter(model.transformer, tmp_path)), linear_layers(base))
    assert {network: len(half.layers) for network, half in saved.halves.items()} == dict.fromkeys(NETWORKS, 20)
    assert {half.targets is not None for half in saved.halves.values()} == {True}  # its metadata is held against both
    assert missed_blocks(model.family.targets, linear_layers(base)) == {}
    assert missed_blocks(["transformer.blocks.0.attn1.to_q"], linear_layers(base)).keys() == {"transformer_2.blocks"}


def test_halves_that_do_not_belong_together_are_refused(folder_of: FolderOf, base: Path, tmp_path: Path) -> None:
    file = lora(base, tmp_path / "one")
    with pytest.raises(InvalidError, match="holds LoRAs for high and for low noise, and this model has one network"):
        fit(read_adapter_file(file), linear_layers(folder_of("wan")))
    written = export(file, tmp_path / "two", Format.DIFFUSERS)
    with pytest.raises(InvalidError, match="changes one network, and this model has two, .* high_noise and low_noise"):
        fit(read_adapter_file(written / "low_noise"), linear_layers(base))
    other = export(lora(base, tmp_path / "root", rslora=True), tmp_path / "roots", Format.DIFFUSERS)
    shutil.rmtree(written / "low_noise")
    (other / "low_noise").rename(written / "low_noise")
    with pytest.raises(InvalidError, match="only one of the LoRAs in .* has use_rslora"):
        read_adapter_file(written)
    (other / "high_noise").rename(written / "again-high-noise")
    with pytest.raises(InvalidError, match="several LoRAs for one network, again-high-noise and high_noise"):
        read_adapter_file(written)


def test_a_half_for_another_base_is_refused_by_its_file(base: Path, tmp_path: Path) -> None:
    written = export(lora(base, tmp_path / "one"), tmp_path / "two", Format.DIFFUSERS)
    file = written / "low_noise" / WEIGHTS
    random_lora(
        file.parent, {"blocks.7.attn1.to_q": (24, 24)}, {"blocks.7.attn1.to_q": 2}, {"blocks.7.attn1.to_q": 2}, seed=0
    )
    with pytest.raises(InvalidError, match=r"low_noise/.* adapts blocks.7.attn1.to_q, and this model has no such"):
        fit(read_adapter_file(written), linear_layers(base))


def test_a_report_tells_a_pair_in_one_file_and_in_two(base: Path, tmp_path: Path) -> None:
    file = lora(base, tmp_path / "one")
    as_authors(lora(base, tmp_path / "two"), kohya, 4.0)
    one, two = inspect(file, base=base), inspect(tmp_path / "two")
    assert (one.refusal, two.refusal) == (None, None)
    assert one.facts["format"].startswith("diffusers")
    assert one.facts["rank"] == "2 (20 x), 3 (20 x)"
    assert "   4 x transformer_2.blocks.*.attn*.to_q" in one.facts["layers"].splitlines()
    assert one.facts["base"] == f"fits, 40 of its {len(linear_layers(base))} linear layers"
    assert len(two.facts["file"].splitlines()) == 2
    assert two.facts["format"].startswith("kohya")
    assert two.facts["family"] == "WanPipeline by the names of layers"
