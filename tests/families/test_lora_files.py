"""LoRA files with their writers' own names of layers: each family takes them as diffusers does."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from opd_core.api.load import load_spec
from opd_core.api.types import Spec
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import AdapterFile, read_teacher
from opd_core.models.adapter_keys import Format
from opd_core.models.adapter_layers import fit
from opd_core.models.adapters import load_adapter, read_adapter, use_adapter
from opd_core.models.export import export
from opd_core.models.inspect import inspect
from opd_core.models.outline import linear_layers
from opd_core.models.pipeline import load_model
from opd_core.models.preflight import adapter_problems
from opd_core.uris import resolve
from opd_trainer.setup import add_student
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import test_life as life
from .test_families import HEIGHT, PROMPTS, WIDTH, FolderOf, sample

RANK = 2
Layers = Mapping[str, Sequence[str]]  # diffusers' by the writer's, in the order of the rows

DOUBLE, JOINT = "double_blocks.0", "transformer_blocks.0"
JOINT_ATTENTION: Layers = {
    f"{DOUBLE}.img_attn.qkv": [f"{JOINT}.attn.to_q", f"{JOINT}.attn.to_k", f"{JOINT}.attn.to_v"],
    f"{DOUBLE}.txt_attn.qkv": [f"{JOINT}.attn.add_q_proj", f"{JOINT}.attn.add_k_proj", f"{JOINT}.attn.add_v_proj"],
    f"{DOUBLE}.img_attn.proj": [f"{JOINT}.attn.to_out.0"],
    f"{DOUBLE}.txt_attn.proj": [f"{JOINT}.attn.to_add_out"],
}
FLUX: Layers = {
    **JOINT_ATTENTION,
    f"{DOUBLE}.img_mlp.0": [f"{JOINT}.ff.net.0.proj"],
    f"{DOUBLE}.txt_mlp.2": [f"{JOINT}.ff_context.net.2"],
    f"{DOUBLE}.img_mod.lin": [f"{JOINT}.norm1.linear"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
}
FLUX_2: Layers = {
    **JOINT_ATTENTION,
    f"{DOUBLE}.img_mlp.0": [f"{JOINT}.ff.linear_in"],
    f"{DOUBLE}.txt_mlp.2": [f"{JOINT}.ff_context.linear_out"],
    "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"],
}
Z_IMAGE: Layers = {
    "layers.1.attention.qkv": [f"layers.1.attention.to_{part}" for part in "qkv"],
    "layers.1.attention.out": ["layers.1.attention.to_out.0"],
    "layers.0.feed_forward.w2": ["layers.0.feed_forward.w2"],
    "context_refiner.0.feed_forward.w1": ["context_refiner.0.feed_forward.w1"],
}
Z_IMAGE_SPLIT: Layers = {
    layer: [layer] for layer in ("layers.0.attention.to_q", "layers.0.attention.to_out.0", "layers.1.feed_forward.w3")
}
QWEN: Layers = {
    layer: [layer]
    for layer in (
        "transformer_blocks.1.attn.to_q", "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.to_add_out",
        "transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.1.txt_mlp.net.2",
    )
}  # fmt: skip

WAN: Layers = {
    f"blocks.{i}.{theirs}": [f"blocks.{i}.{ours}"]
    for i in range(2)
    for theirs, ours in {
        **{f"self_attn.{part}": f"attn1.to_{part}" for part in "qkv"},
        **{f"cross_attn.{part}": f"attn2.to_{part}" for part in "qkv"},
        "self_attn.o": "attn1.to_out.0", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    }.items()
}  # fmt: skip


def kohya(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


def comfy(layer: str) -> str:
    return f"diffusion_model.{layer}"


def bare(layer: str) -> str:
    return layer


def write(
    file: Path,
    sizes: Mapping[str, tuple[int, int]],
    spell: Callable[[str], str],
    *,
    ab: bool = False,
    alpha: int | None = None,
    alphas: bool = True,
) -> dict[str, Tensor]:
    """A LoRA of layers with (outputs, inputs) `sizes`; the change of each layer in float32.

    Args:
        alpha: of all layers; None: from 1 to 3.
        alphas: they stand in the file; else they are the rank.
    """
    generator = torch.Generator().manual_seed(5)
    down, up = ("lora_A", "lora_B") if ab else ("lora_down", "lora_up")
    state, changes = {}, {}
    for number, (layer, (outputs, inputs)) in enumerate(sizes.items()):
        a = torch.randn(RANK, inputs, generator=generator) * 0.3
        b = torch.randn(outputs, RANK, generator=generator) * 0.3
        state |= {f"{spell(layer)}.{down}.weight": a, f"{spell(layer)}.{up}.weight": b}
        own = (alpha or 1 + number % 3) if alphas else RANK
        if alphas:
            state[f"{spell(layer)}.alpha"] = torch.tensor(float(own))
        changes[layer] = own / RANK * b @ a
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return changes


def sizes_of(base: Path, layers: Layers) -> dict[str, tuple[int, int]]:
    linear = linear_layers(base)
    return {name: (sum(linear[part][0] for part in parts), linear[parts[0]][1]) for name, parts in layers.items()}


def changes_of(adapter: AdapterFile) -> dict[str, Tensor]:
    state = read_adapter(adapter)
    return {
        layer: adapter.scale(layer) * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
        for layer in adapter.layers
    }


CASES = {
    "FLUX.1, kohya": ("flux", FLUX, kohya, {}),
    "FLUX.1, ComfyUI": ("flux", FLUX, comfy, {}),
    "FLUX.2, kohya": ("flux2_klein", FLUX_2, kohya, {}),
    "FLUX.2, ai-toolkit": ("flux2_klein", FLUX_2, comfy, {"ab": True, "alphas": False}),
    "Qwen-Image, Musubi": ("qwen_image", QWEN, kohya, {}),
    "Qwen-Image, ComfyUI": ("qwen_image", QWEN, comfy, {}),
    "Wan, Musubi": ("wan", WAN, kohya, {}),
    "Wan, ComfyUI": ("wan", WAN, comfy, {}),
    "Wan, ai-toolkit": ("wan", WAN, comfy, {"ab": True, "alphas": False}),
    "Z-Image, kohya": ("z_image", Z_IMAGE, kohya, {}),
    "Z-Image, Musubi": ("z_image", Z_IMAGE_SPLIT, kohya, {}),
    "Z-Image, ai-toolkit": ("z_image", Z_IMAGE_SPLIT, comfy, {"ab": True}),
}


@pytest.mark.parametrize(("name", "layers", "spell", "options"), CASES.values(), ids=CASES)
def test_a_file_changes_the_model_as_diffusers_own_loading_does(
    folder_of: FolderOf,
    tmp_path: Path,
    name: str,
    layers: Layers,
    spell: Callable[[str], str],
    options: dict[str, bool],
) -> None:
    base, file = folder_of(name), tmp_path / "lora.safetensors"
    write(file, sizes_of(base, layers), spell, **options)
    plain, mine, theirs = (load_model(base) for _ in range(3))
    load_adapter(mine.transformer, read_teacher(file), "ours")
    use_adapter(mine.transformer, "ours")
    theirs.pipeline.load_lora_weights(str(file))
    noise = torch.randn(2, *mine.latent_shape(WIDTH, HEIGHT), generator=torch.Generator().manual_seed(1))
    expected = sample(theirs, PROMPTS, noise, [3.0, 3.0])
    torch.testing.assert_close(sample(mine, PROMPTS, noise, [3.0, 3.0]), expected, rtol=1e-4, atol=1e-4)
    assert (sample(plain, PROMPTS, noise, [3.0, 3.0]) - expected).abs().mean() > 1e-2


@pytest.mark.parametrize("spell", [kohya, comfy, bare])
@pytest.mark.parametrize("ab", [False, True])
def test_stabilitys_names_are_taken_as_diffusers_takes_whole_checkpoints(
    folder_of: FolderOf, tmp_path: Path, spell: Callable[[str], str], ab: bool
) -> None:
    """diffusers does not load these LoRAs; what it makes of a checkpoint says where each of a LoRA's changes belongs."""
    base = folder_of("stable_diffusion_3")
    width, count, dual = 128, 5, (0, 1)
    sizes = {"context_embedder": (width, 64), "final_layer.linear": (64, width)}
    sizes |= {f"{part}_embedder.mlp.2": (width, width) for part in "ty"}
    sizes |= {"t_embedder.mlp.0": (width, 256), "y_embedder.mlp.0": (width, 64)}
    sizes["final_layer.adaLN_modulation.1"] = (2 * width, width)
    for i in range(count):
        for block, attentions in (
            ("x_block", ("attn", "attn2") if i in dual else ("attn",)),
            ("context_block", ("attn",)),
        ):
            at = f"joint_blocks.{i}.{block}"
            last = block == "context_block" and i == count - 1
            modulations = 2 if last else 9 if len(attentions) == 2 else 6
            sizes[f"{at}.adaLN_modulation.1"] = (modulations * width, width)
            for attention in attentions:
                sizes[f"{at}.{attention}.qkv"] = (3 * width, width)
                sizes |= {} if last else {f"{at}.{attention}.proj": (width, width)}
            sizes |= {} if last else {f"{at}.mlp.fc1": (4 * width, width), f"{at}.mlp.fc2": (width, 4 * width)}
    changes = write(tmp_path / "lora.safetensors", sizes, spell, ab=ab)
    checkpoint = {f"{layer}.weight": change for layer, change in changes.items()}
    checkpoint |= {f"{layer}.bias": torch.zeros(size[0]) for layer, size in sizes.items()}
    checkpoint |= {
        "pos_embed": torch.zeros(1),
        "x_embedder.proj.weight": torch.zeros(1),
        "x_embedder.proj.bias": torch.zeros(1),
    }
    expected = {
        name.removesuffix(".weight"): value
        for name, value in convert_sd3_transformer_checkpoint_to_diffusers(checkpoint).items()
        if name.endswith(".weight") and value.ndim == 2
    }
    found = changes_of(fit(read_teacher(tmp_path / "lora.safetensors"), linear_layers(base)))
    assert found.keys() == expected.keys()
    for layer, change in found.items():
        torch.testing.assert_close(change, expected[layer])


@pytest.mark.parametrize(("spell", "ab"), [(kohya, False), (comfy, False), (comfy, True)])
def test_the_fused_layer_of_fluxs_blocks_with_one_stream_is_taken_apart(
    tmp_path: Path, spell: Callable[[str], str], ab: bool
) -> None:
    """At its real width, the only one that diffusers' converter knows; keys that end in lora_A it does not know at all."""
    width, block = 3072, "single_transformer_blocks.37"
    parts = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    linear = dict.fromkeys(parts[:3], (width, width)) | {parts[3]: (4 * width, width)}
    changes = write(tmp_path / "lora.safetensors", {"single_blocks.37.linear1": (7 * width, width)}, spell, ab=ab)
    found = changes_of(fit(read_teacher(tmp_path / "lora.safetensors"), linear))
    torch.testing.assert_close(torch.cat([found[part] for part in parts]), changes["single_blocks.37.linear1"])


@pytest.mark.parametrize(
    "name", ["stable_diffusion_3", "flux", "flux2_klein", "qwen_image", "z_image", "sana", "wan", "aura_flow"]
)
@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "lycoris_"])
def test_diffusers_names_with_underscores_are_those_with_dots(
    folder_of: FolderOf, tmp_path: Path, name: str, prefix: str
) -> None:
    linear = linear_layers(folder_of(name))
    changes = write(tmp_path / "lora.safetensors", linear, lambda layer: prefix + layer.replace(".", "_"))
    found = changes_of(fit(read_teacher(tmp_path / "lora.safetensors"), linear))
    assert found.keys() == changes.keys()
    assert all(torch.equal(change, changes[layer]) for layer, change in found.items())


@pytest.mark.parametrize("spell", [kohya, comfy])
def test_a_file_of_a_single_layer_needs_no_other(
    folder_of: FolderOf, tmp_path: Path, spell: Callable[[str], str]
) -> None:
    """diffusers' conversion for videos refuses a file that leaves out a layer of a block."""
    base, file = folder_of("wan"), tmp_path / "lora.safetensors"
    (change,) = write(file, sizes_of(base, {"blocks.1.cross_attn.o": WAN["blocks.1.cross_attn.o"]}), spell).values()
    found = changes_of(fit(read_teacher(file), linear_layers(base)))
    assert found.keys() == {"blocks.1.attn2.to_out.0"}
    assert torch.equal(found["blocks.1.attn2.to_out.0"], change)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_a_file_of_small_numbers_is_taken_with_the_numbers_it_has(
    folder_of: FolderOf, tmp_path: Path, dtype: torch.dtype
) -> None:
    base, file = folder_of("flux2_klein"), tmp_path / "lora.safetensors"
    write(file, sizes_of(base, FLUX_2), kohya)
    small = {key: value if key.endswith("alpha") else value.to(dtype) for key, value in load_file(file).items()}
    save_file(small, file)
    save_file({key: value.float() for key, value in small.items()}, tmp_path / "wide.safetensors")
    answers = []
    for path in (file, tmp_path / "wide.safetensors"):
        model = load_model(base)
        load_adapter(model.transformer, read_teacher(path), "ours")
        use_adapter(model.transformer, "ours")
        noise = torch.randn(2, *model.latent_shape(WIDTH, HEIGHT), generator=torch.Generator().manual_seed(1))
        answers.append(sample(model, PROMPTS, noise, [1.0, 1.0]))
    assert torch.equal(*answers)


def test_a_layer_without_a_place_is_named_and_not_dropped(folder_of: FolderOf, tmp_path: Path) -> None:
    """diffusers writes a warning and leaves it out."""
    base, file = folder_of("flux2_klein"), tmp_path / "lora.safetensors"
    write(file, {**sizes_of(base, FLUX_2), "double_stream_modulation_img.lin": (192, 32)}, kohya)
    with pytest.raises(
        InvalidError, match="Flux2KleinPipeline has no place for 1 of its 9 layers, e.g. lora_unet_double_s"
    ):
        fit(read_teacher(file), linear_layers(base))


@pytest.mark.parametrize(
    ("made_for", "layers", "base", "message"),
    [
        (
            "flux",
            FLUX,
            "flux2_klein",
            "for Flux2KleinPipeline has no place for 1 of its 8 layers, e.g. .*_0_img_mod_lin",
        ),
        ("flux2_klein", FLUX_2, "flux", "adapts single_transformer_blocks.0.attn.to_out, and this model has no such"),
        ("z_image", Z_IMAGE, "sana", "adapts lora_unet_.*; is it for another base"),
    ],
)
def test_a_file_of_another_family_is_refused_as_one(
    folder_of: FolderOf, tmp_path: Path, made_for: str, layers: Layers, base: str, message: str
) -> None:
    write(tmp_path / "lora.safetensors", sizes_of(folder_of(made_for), layers), kohya)
    with pytest.raises(InvalidError, match=message):
        fit(read_teacher(tmp_path / "lora.safetensors"), linear_layers(folder_of(base)))


def test_no_name_in_a_file_reaches_the_log(
    folder_of: FolderOf, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, file = folder_of("flux2_klein"), tmp_path / "lora.safetensors"
    write(file, {**sizes_of(base, FLUX_2), "somewhere": (8, 8)}, kohya)
    with pytest.raises(InvalidError):
        fit(read_teacher(file), linear_layers(base))
    assert "somewhere" not in "".join(capfd.readouterr())
    write(file, {"to_q\x1b]0;title\x07": (8, 8)}, bare)
    with pytest.raises(InvalidError, match="is not a LoRA of a transformer"):
        read_teacher(file)


def test_a_file_in_diffusers_names_is_held_against_a_base_without_pytorch(folder_of: FolderOf, tmp_path: Path) -> None:
    base, file = folder_of("flux2_klein"), tmp_path / "lora.safetensors"
    layers = dict(list(linear_layers(base).items())[:3])
    write(file, layers, lambda layer: f"base_model.model.{layer}", ab=True, alphas=False)
    program = (
        "import sys; from pathlib import Path; from opd_core.models.adapter_file import read_teacher\n"
        "from opd_core.models.adapter_layers import fit; from opd_core.models.outline import linear_layers\n"
        "fit(read_teacher(Path(sys.argv[1]), 2), linear_layers(Path(sys.argv[2])))\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(file), str(base)], check=True)


def starting_from(file: Path, claims: Path, **adapter: object) -> Spec:
    """The spec of a student that starts from the LoRA `file` in the claim `world`."""
    told = life.spec("z_image")
    told["spec"]["student"] |= {"initFrom": f"pvc://world/{file.name}", "adapter": adapter}
    (claims / "spec.yaml").write_text(yaml.safe_dump(told))
    return load_spec(claims / "spec.yaml").spec


@pytest.mark.parametrize(("name", "layers", "spell", "options"), CASES.values(), ids=CASES)
def test_a_student_starts_as_the_teacher_of_the_same_file(
    folder_of: FolderOf,
    tmp_path: Path,
    name: str,
    layers: Layers,
    spell: Callable[[str], str],
    options: dict[str, bool],
) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "base").symlink_to(folder_of(name))
    file, model = tmp_path / "world" / "start.safetensors", load_model(folder_of(name))
    write(file, sizes_of(folder_of(name), layers), spell, alpha=3, **options)
    alpha = 3 if options.get("alphas", True) else RANK
    targets = [part for parts in layers.values() for part in parts]
    spec = starting_from(file, tmp_path, rank=RANK, alpha=alpha, targetModules=targets)
    starts = adapter_problems(spec, partial(resolve, claims=tmp_path))
    assert [problem for problem in starts if "initFrom" in problem] == []
    add_student(spec, model, tmp_path)
    load_adapter(model.transformer, read_teacher(file), "teacher")
    changed = [layer for layer in model.transformer.modules() if isinstance(layer, BaseTunerLayer)]
    assert len(changed) == len(targets)
    for layer in changed:
        assert torch.equal(layer.get_delta_weight("student"), layer.get_delta_weight("teacher"))
        assert layer.get_delta_weight("student").abs().sum() > 0


REFUSED_STARTS: dict[str, tuple[Mapping[str, object], Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "another rank": ({"rank": 8}, dict, "student.adapter.rank is 8: the adapter of initFrom has 2; make them equal"),
    "another alpha": ({"alpha": 8}, dict, "student.adapter.alpha is 8: the adapter of initFrom has 3; make them equal"),
    "an alpha that no spec can have": (
        {},
        lambda state: {key: value / 2 if key.endswith("alpha") else value for key, value in state.items()},
        "student.adapter.alpha is 3: the adapter of initFrom has 1.5; start from one that has a single whole one",
    ),
    "fewer layers": (
        {"targetModules": ["attn.to_q", "to_out"]},
        dict,
        "student.adapter.targetModules leaves out single_transformer_blocks.0.attn.to_qkv_mlp_proj, which",
    ),
    "a DoRA": (
        {},
        lambda state: state | {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(4)},
        "spec.student.initFrom is pvc://world/start.safetensors: .* is a DoRA; train a plain LoRA",
    ),
    "text encoders": (
        {},
        lambda state: state | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)},
        "spec.student.initFrom is pvc://world/start.safetensors: .* changes the text encoders",
    ),
    "a layer of another base": (
        {},
        lambda state: {key.replace("img_attn_proj", "img_attn_prof"): value for key, value in state.items()},
        "spec.student.initFrom is pvc://world/start.safetensors: .* cannot be taken as a whole: .*img_attn_prof",
    ),
}


@pytest.mark.parametrize(("adapter", "change", "message"), REFUSED_STARTS.values(), ids=REFUSED_STARTS)
def test_what_a_student_cannot_start_from_is_refused_by_name(
    folder_of: FolderOf,
    tmp_path: Path,
    adapter: Mapping[str, object],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    base, file = folder_of("flux2_klein"), tmp_path / "start.safetensors"
    write(file, sizes_of(base, FLUX_2), kohya, alpha=3)
    save_file(change(load_file(file)), file)
    settings = {"rank": RANK, "alpha": 3, "targetModules": [part for parts in FLUX_2.values() for part in parts]}
    spec = starting_from(file, tmp_path, **{**settings, **adapter})
    problems = adapter_problems(spec, lambda uri: base if "base" in uri else file)
    assert re.search(message, "\n".join(problem for problem in problems if "initFrom" in problem)), problems


@pytest.mark.parametrize(("name", "layers"), [("flux2_klein", FLUX_2), ("z_image", Z_IMAGE)])
def test_an_export_of_it_is_loaded_by_diffusers_as_the_file_itself(
    folder_of: FolderOf, tmp_path: Path, name: str, layers: Layers
) -> None:
    base, file = folder_of(name), tmp_path / "lora.safetensors"
    write(file, sizes_of(base, layers), kohya)
    written = export(file, tmp_path / "out", Format.DIFFUSERS, base=base)
    answers = []
    for each in (file, written):
        model = load_model(base)
        model.pipeline.load_lora_weights(str(each))
        noise = torch.randn(2, *model.latent_shape(WIDTH, HEIGHT), generator=torch.Generator().manual_seed(1))
        answers.append(sample(model, PROMPTS, noise, [3.0, 3.0]))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layers", "spell", "expected"),
    [
        ("flux2_klein", FLUX_2, kohya, "Flux2KleinPipeline by the names of layers"),
        ("z_image", Z_IMAGE, kohya, "ZImagePipeline by the names of layers"),
        ("qwen_image", QWEN, comfy, "not told by the names of layers; --base tells whether it fits"),
    ],
)
def test_a_report_says_whose_layers_they_are_where_names_tell(
    folder_of: FolderOf, tmp_path: Path, name: str, layers: Layers, spell: Callable[[str], str], expected: str
) -> None:
    base, file = folder_of(name), tmp_path / "lora.safetensors"
    write(file, sizes_of(base, layers), spell)
    assert inspect(file).facts["family"] == expected
    assert inspect(file, base=base).facts["base"].startswith("fits, ")
    linear = linear_layers(base)
    assert len(fit(read_teacher(file), linear).layers) == sum(map(len, layers.values()))
