"""Adapters, fingerprints and student directories on a small SD3 transformer; shapes of SD3.5-Medium on the meta device."""

import hashlib
import json
import logging
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel
from opd_core import artifacts
from opd_core.artifacts import (
    SamplingDefaults,
    Score,
    Source,
    StudentManifest,
    publish_student,
    read_student,
    update_scores,
    write_student,
)
from opd_core.conditioning import Conditioning, stack
from opd_core.errors import InvalidError, RefusedError, StorageError
from opd_core.models.adapter_file import read_adapter_file
from opd_core.models.adapters import (
    adapter_parameters,
    adapter_state,
    add_student_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    use_adapter,
)  # fmt: skip
from opd_core.models.fingerprint import fingerprint
from opd_core.models.outline import linear_layers
from opd_core.models.pipeline import load_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file

TARGETS = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
]


def transformer(seed: int = 0, width: int = 16) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=width // 2,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=width, pooled_projection_dim=10,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    ).requires_grad_(False).eval()  # fmt: skip


def forward(model) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(2, 4, 8, 8, generator=g), timestep=torch.tensor([900.0, 300.0]),
        encoder_hidden_states=torch.randn(2, 5, 12, generator=g), pooled_projections=torch.randn(2, 10, generator=g),
        return_dict=False,
    )[0]  # fmt: skip


@pytest.fixture
def trained(tmp_path):
    """A saved adapter with rank 4, alpha 16 and a B that is not zero."""
    model = transformer()
    add_student_adapter(model, rank=4, alpha=16, target_modules=TARGETS, seed=0)
    for parameter in adapter_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    save_adapter(model, tmp_path / "lora")
    return tmp_path / "lora", forward(model).detach()


# ---------------------------------------------------------------- adapters


def test_a_saved_adapter_loads_with_its_scale(trained):
    path, expected = trained
    model = transformer()
    base = forward(model)
    config = load_adapter(model, read_adapter_file(path), "ocr")
    assert (config.r, config.lora_alpha) == (4, 16)
    use_adapter(model, "ocr")
    torch.testing.assert_close(forward(model), expected, rtol=0, atol=0)
    use_adapter(model, None)
    torch.testing.assert_close(forward(model), base, rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.parameters())


def test_equal_adapters_are_equal_files(trained, tmp_path):
    model = transformer()
    load_adapter(model, read_adapter_file(trained[0]), "ocr")
    files = [save_adapter(model, tmp_path / str(i), "ocr") for i in range(12)]
    assert len({artifacts.file_digest(file) for file in files}) == 1
    again = transformer()
    assert load_adapter(again, read_adapter_file(files[0]), "ocr").lora_alpha == 16


def test_a_fresh_student_is_the_base_and_depends_on_its_seed():
    models = [transformer() for _ in range(3)]
    base = forward(models[0])
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(seed + 99)
        add_student_adapter(model, rank=4, alpha=8, target_modules=TARGETS, seed=seed)
    torch.testing.assert_close(forward(models[0]), base, rtol=0, atol=0)
    first, same, other = (list(adapter_state(model).values()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(parameter.requires_grad for parameter in adapter_parameters(models[0]))


def test_switching_adapters_keeps_what_is_trainable(trained):
    path, _ = trained
    model = transformer()
    load_adapter(model, read_adapter_file(path), "ocr")
    add_student_adapter(model, rank=4, alpha=8, target_modules=TARGETS, seed=0)
    for name in ("ocr", None, "student", "ocr"):
        use_adapter(model, name)
        assert all(p.requires_grad for p in adapter_parameters(model, "student"))
        assert not any(p.requires_grad for p in adapter_parameters(model, "ocr"))


def test_pefts_own_format_loads_too(trained, tmp_path):
    path, expected = trained
    adapter, folder = read_adapter_file(path), tmp_path / "peft"
    LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS).save_pretrained(folder)
    weights = {f"base_model.model.{key}": value for key, value in read_adapter(adapter).items()}
    save_file(weights, folder / "adapter_model.safetensors")
    model = transformer()
    load_adapter(model, read_adapter_file(folder), "ocr")
    use_adapter(model, "ocr")
    torch.testing.assert_close(forward(model), expected, rtol=0, atol=0)


def rewrite(path, change=lambda tensors: tensors, metadata=lambda m: m):
    file = path / artifacts.WEIGHTS
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        old = opened.metadata()
    save_file(change(load_file(file)), file, metadata(old))


def set_rank(metadata, **fields):
    stored = json.loads(metadata["lora_adapter_metadata"])
    stored.update({f"transformer.{key}": value for key, value in fields.items()})
    return {**metadata, "lora_adapter_metadata": json.dumps(stored)}


def test_adapters_that_do_not_fit_are_refused_before_the_model_changes(trained, tmp_path):
    path, _ = trained
    cases = {
        "another rank": (
            lambda p: rewrite(p, metadata=lambda m: set_rank(m, r=8)),
            r"has rank 4 in .*, and 8 by its configuration",
        ),
        "NaN": (lambda p: rewrite(p, lambda t: {k: v * float("nan") for k, v in t.items()}), "NaN or infinite"),
        "a tensor missing": (
            lambda p: rewrite(p, lambda t: dict(list(t.items())[1:])),
            "is not whole: .* has no lora_A",
        ),
        "another target": (
            lambda p: rewrite(p, lambda t: {k.replace("blocks.0.", "blocks.7."): v for k, v in t.items()}),
            "no such linear layer",
        ),
        "a layer missing": (
            lambda p: rewrite(p, lambda t: {k: v for k, v in t.items() if not k.startswith(next(iter(t))[:-14])}),
            "of the layers that target_modules names 1 are missing",
        ),
        "not a LoRA": (lambda p: rewrite(p, lambda t: {"weight": torch.ones(1)}), "not a LoRA of a transformer"),
        "cut short": (lambda p: (p / artifacts.WEIGHTS).write_bytes(b"\x10"), "not a readable safetensors file"),
        "nothing there": (lambda p: (p / artifacts.WEIGHTS).unlink(), "holds neither"),
    }
    for name, (damage, message) in cases.items():
        copy = tmp_path / name.replace(" ", "-")
        shutil.copytree(path, copy)
        damage(copy)
        model = transformer()
        with pytest.raises(InvalidError, match=message):
            load_adapter(model, read_adapter_file(copy), "ocr")
        assert not getattr(model, "peft_config", {}), name


def test_an_adapter_of_a_wider_base_is_refused(trained):
    with pytest.raises(InvalidError, match="is the adapter for another base"):
        load_adapter(transformer(width=32), read_adapter_file(trained[0]), "ocr")


def test_unknown_target_modules_are_named():
    with pytest.raises(InvalidError, match="names 'attn.to_z'"):
        add_student_adapter(transformer(), rank=4, alpha=8, target_modules=["attn.to_q", "attn.to_z"], seed=0)


# ---------------------------------------------------------------- fingerprints


def save_model(folder, model, **options):
    """A model of one component in diffusers' folder format."""
    model.save_pretrained(folder / "transformer", **options)
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "SD3Transformer2DModel"]}')
    return folder


def test_fingerprint_ignores_the_layout_of_files_but_no_number(tmp_path):
    model = transformer()
    one = save_model(tmp_path / "one", model)
    sharded = save_model(tmp_path / "sharded", model, max_shard_size="20KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    assert fingerprint(one) == fingerprint(sharded)
    next(model.parameters()).data.view(-1)[0] += 1e-3
    assert fingerprint(save_model(tmp_path / "changed", model)) != fingerprint(one)


def test_fingerprint_covers_what_is_loaded_and_nothing_beside_it(tiny_base, tmp_path):
    """A hub's repository has a single-file checkpoint and other people's text encoders beside the components."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    before = fingerprint(base)
    save_file({"x": torch.ones(3)}, base / "all_in_one.safetensors")
    save_file({"x": torch.ones(3)}, base / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    (base / "text_encoders").mkdir()
    (base / "text_encoders" / "t5.bin").write_bytes(b"x")
    (base / "README.json").write_text("[]")
    assert fingerprint(base) == before == fingerprint(tiny_base)


def swap_names(base):
    """Where the loader looks, there are other weights; the right ones lie beside them."""
    right, place = base / "vae" / "diffusion_pytorch_model.safetensors", base / "vae" / "model.safetensors"
    right.rename(place)
    torch.save({key: torch.zeros_like(value) for key, value in load_file(place).items()}, right.with_suffix(".bin"))


def adapter_of_a_component(base):
    (base / "text_encoder" / "adapter_config.json").write_text("{}")


def weights_of_another_name(base):
    file = base / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "transformers_weights": "other.safetensors"}))


def two_sets_of_weights(base):
    index = {"weight_map": {"a": "other.safetensors"}}
    (base / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def weights_outside(base):
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": "../../other.safetensors"}}
    (base / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_names, r"diffusion_pytorch_model\.bin is a pickle, which is never loaded"),
        (lambda base: (base / "vae" / "diffusion_pytorch_model.safetensors").rename(base / "vae" / "model.safetensors"),
         r"vae holds no diffusion_pytorch_model\.safetensors"),
        (adapter_of_a_component, r"text_encoder holds adapter_config\.json"),
        (weights_of_another_name, "names other weights in transformers_weights"),
        (two_sets_of_weights, "two sets of weights; remove one"),
        (weights_outside, "has no weight_map of file names"),
    ],
)  # fmt: skip
def test_nothing_is_loaded_in_the_place_of_what_the_fingerprint_covers(tiny_base, tmp_path, change, message):
    """Fingerprint, preflight and loading refuse alike."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    change(base)
    for use in (fingerprint, linear_layers, load_model):
        with pytest.raises(InvalidError, match=message):
            use(base)


def test_fingerprint_knows_tensors_of_every_kind_as_pytorch_does(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
              torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
              torch.bool]  # fmt: skip
    content = torch.arange(48, dtype=torch.uint8)
    tensors = {f"t{i}": content.clone().view(dtype).view(2, -1) for i, dtype in enumerate(dtypes[:-1])}
    tensors |= {"bool": content.bool(), "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3)}
    (tmp_path / "transformer").mkdir()
    save_file(tensors, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "X"], "_diffusers_version": "1"}')
    index = hashlib.sha256(b'{"transformer": ["diffusers", "X"]}').hexdigest()
    entries = [["config", "model_index.json", index]]
    for name, tensor in tensors.items():
        digest = hashlib.sha256(bytes(tensor.reshape(-1).view(torch.uint8).tolist())).hexdigest()
        entries.append(["tensor", f"transformer/{name}", f"{tensor.dtype} {tuple(tensor.shape)} {digest}"])
    expected = hashlib.sha256("".join(json.dumps(entry) for entry in sorted(entries)).encode()).hexdigest()
    assert fingerprint(tmp_path) == f"sha256:{expected}"


def test_fingerprint_of_a_damaged_file_is_refused(trained):
    weights = trained[0] / artifacts.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InvalidError, match="is not a readable safetensors file"):
        fingerprint(weights.parent)


def test_fingerprint_sees_the_configuration_and_the_scale_of_an_adapter(trained, tmp_path):
    path, _ = trained
    before = fingerprint(path)
    assert before == fingerprint(path / artifacts.WEIGHTS)
    rewrite(path, metadata=lambda m: set_rank(m, lora_dropout=0.5))
    assert fingerprint(path) == before
    rewrite(path, metadata=lambda m: set_rank(m, lora_alpha=4))
    assert fingerprint(path) != before
    model = save_model(tmp_path / "m", transformer())
    before = fingerprint(model)
    file = model / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_diffusers_version": "9.9"}))
    assert fingerprint(model) == before
    file.write_text(json.dumps({**config, "qk_norm": None}))
    assert fingerprint(model) != before


def test_fingerprint_of_nothing_is_refused(tmp_path):
    with pytest.raises(InvalidError, match="does not exist"):
        fingerprint(tmp_path / "absent")
    with pytest.raises(InvalidError, match="holds neither"):
        fingerprint(tmp_path)


# ---------------------------------------------------------------- conditioning


def test_conditioning_keys_name_the_content():
    a = Conditioning({"embeds": torch.ones(3, 4), "mask": torch.ones(3, dtype=torch.bool)})
    assert a.key == Conditioning({name: a.tensors[name].clone() for name in ("mask", "embeds")}).key
    others = [
        Conditioning({**a.tensors, "embeds": torch.ones(4, 3)}),
        Conditioning({**a.tensors, "mask": torch.zeros(3, dtype=torch.bool)}),
        Conditioning({"pooled": a.tensors["embeds"], "mask": a.tensors["mask"]}),
        a.cast(torch.float16),
    ]
    assert len({a.key, *(other.key for other in others)}) == 5
    assert len(a.key) == 16
    stacked = stack([a, a], "cpu", torch.bfloat16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stacked.items()} == {
        "embeds": ((2, 3, 4), torch.bfloat16),
        "mask": ((2, 3), torch.bool),
    }


# ---------------------------------------------------------------- student directories


def manifest(digest: str) -> StudentManifest:
    return StudentManifest(
        name="tiny", digest=digest, base=Source(uri="pvc://w/base", fingerprint="sha256:1"), teachers=[],
        spec_digest="sha256:2", round=3, license="apache-2.0",
        sampling=SamplingDefaults(width=32, height=32, steps=10, guidance_scale=4.5, max_sequence_length=10),
    )  # fmt: skip


def save(content: bytes):
    def write(folder):
        (folder / artifacts.WEIGHTS).write_bytes(content)
        return folder / artifacts.WEIGHTS

    return write


def test_a_student_is_written_replaced_and_read_as_a_whole(tmp_path):
    directory = tmp_path / "student"
    first = write_student(directory, save(b"one"), manifest)
    second = write_student(directory, save(b"two"), manifest)
    assert first.digest != second.digest
    read, weights = read_student(directory)
    assert (read, weights.read_bytes()) == (second, b"two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    scored = update_scores(directory, {"ocr": Score(mean=0.5, low=0.4, high=0.6, n=8)}, {})
    assert read_student(directory)[0] == scored
    assert scored.scores["ocr"].mean == 0.5


def test_a_failed_write_leaves_the_old_student(tmp_path):
    directory = tmp_path / "student"
    write_student(directory, save(b"one"), manifest)

    def full_disk(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device.*the old one is untouched"):
        write_student(directory, full_disk, manifest)
    assert read_student(directory)[1].read_bytes() == b"one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


def test_a_student_is_published_as_a_whole(tmp_path):
    directory, claims = tmp_path / "student", tmp_path / "claims"
    first = write_student(directory, save(b"one"), manifest)
    place = publish_student(directory, "pvc://models/students/tiny", claims)
    assert place == claims / "models" / "students" / "tiny"
    assert read_student(claims / "models" / "students" / "tiny")[0] == first
    second = write_student(directory, save(b"two"), manifest)
    publish_student(directory, "pvc://models/students/tiny", claims)
    assert read_student(claims / "models" / "students" / "tiny")[0] == second
    (claims / "a-file").touch()
    with pytest.raises(StorageError, match="cannot write the student"):
        publish_student(directory, "pvc://a-file/student", claims)


def test_damaged_students_are_refused(tmp_path):
    with pytest.raises(InvalidError, match=r"not a student directory: it has no manifest\.json"):
        read_student(tmp_path)
    directory = tmp_path / "student"
    write_student(directory, save(b"one"), manifest)
    (directory / artifacts.WEIGHTS).write_bytes(b"other")
    with pytest.raises(RefusedError, match="copy the student again"):
        read_student(directory)
    (directory / artifacts.WEIGHTS).unlink()
    with pytest.raises(InvalidError, match="has no pytorch_lora"):
        read_student(directory)
    (directory / "manifest.json").write_text("{}")
    with pytest.raises(InvalidError, match="not a student's manifest"):
        read_student(directory)


# ---------------------------------------------------------------- the real shapes


def test_sd35_medium_shapes_on_the_meta_device():
    """Transformer, LoRA targets and guidance of SD3.5-Medium at 512 px, without its 2.2 billion numbers."""
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
        ).to(torch.bfloat16)  # fmt: skip
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(2.24e9, rel=0.02)
        model.add_adapter(LoraConfig(r=32, lora_alpha=64, target_modules=[*TARGETS, "attn.to_add_out"]), "student")
        assert 15e6 < sum(p.numel() for p in adapter_parameters(model)) < 30e6
        velocity = model(
            hidden_states=torch.empty(2, 16, 64, 64, dtype=torch.bfloat16), timestep=torch.empty(2),
            encoder_hidden_states=torch.empty(2, 77 + 128, 4096, dtype=torch.bfloat16),
            pooled_projections=torch.empty(2, 2048, dtype=torch.bfloat16), return_dict=False,
        )[0]  # fmt: skip
    assert velocity.shape == (2, 16, 64, 64)


# ---------------------------------------------------------------- the whole model (examples/tiny)


def test_a_model_encodes_denoises_and_decodes(tiny_base):
    model = load_model(tiny_base)
    shape = model.latent_shape(32, 32)
    assert (shape, model.size_multiple) == ((16, 8, 8), 8)
    conditionings = model.encode(["a red 7", ""], max_sequence_length=10)
    prompts = stack(conditionings, "cpu", model.dtype)
    with torch.no_grad():
        velocity = model.forward(torch.randn(2, *shape), torch.tensor([1.0, 0.5]), prompts, torch.ones(2))
    assert velocity.shape == (2, *shape)
    assert torch.isfinite(velocity).all()
    images = model.decode(torch.randn(2, *shape))
    assert images.shape == (2, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert model.encode(["a red 7"], 10)[0].key == conditionings[0].key


def test_no_prompt_reaches_a_log_because_it_is_long(tiny_base, caplog, monkeypatch):
    """Both libraries warn of what they cut off, with its words; their loggers do not propagate by themselves."""
    for library in ("diffusers", "transformers"):
        caplog.set_level(logging.WARNING, library)
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    load_model(tiny_base, parts={"text"}).encode(
        ["the name of a customer, and where she lives"], max_sequence_length=10
    )
    assert not caplog.text


@pytest.mark.parametrize(
    ("width", "height", "field"), [(30, 32, "width"), (32, 33, "height"), (0, 32, "width"), (32, 4096, "height")]
)
def test_sizes_the_model_cannot_make_are_refused(tiny_base, width, height, field):
    with pytest.raises(InvalidError, match=rf"^{field} is .*multiple of 8 up to 64"):
        load_model(tiny_base, parts={"transformer"}).latent_shape(width, height)


def test_folders_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(InvalidError, match=r"model_index\.json is missing"):
        load_model(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    with pytest.raises(InvalidError, match="holds a PixArtSigmaPipeline; supported are .*StableDiffusion3Pipeline"):
        load_model(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InvalidError, match="not valid JSON"):
        load_model(tmp_path)
