"""What is wrong with a spec's files is told at once, all of it, before anything starts."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from opd_cli.runner.preflight import check_files, problems
from opd_core.api.load import check_spec
from opd_core.errors import InvalidError
from opd_core.exit_codes import ExitCode
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Change = Callable[[Path], None]
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def claims(tiny_world: Path, tmp_path: Path) -> Path:
    """The tiny world as links to its files, which a test may replace."""
    shutil.copytree(tiny_world, tmp_path / "claims" / "tiny-world", copy_function=os.symlink)
    return tmp_path / "claims"


@pytest.fixture(scope="module")
def content(repository: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((repository / "examples" / "tiny" / "distill.yaml").read_text())
    return loaded


def changed(content: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The spec with some values replaced, by path."""
    result = copy.deepcopy(content)
    for path, value in values.items():
        *parents, last = path.split(".")
        place = result["spec"]
        for parent in parents:
            place = place[int(parent)] if parent.isdigit() else place.setdefault(parent, {})
        place[int(last) if last.isdigit() else last] = value
    return result


def write(path: str, text: str) -> Change:
    def change(world: Path) -> None:
        (world / path).unlink()
        (world / path).write_text(text)

    return change


def remove(path: str) -> Change:
    return lambda world: (world / path).unlink()


def cut_short(path: str) -> Change:
    def change(world: Path) -> None:
        whole = (world / path).read_bytes()
        (world / path).unlink()
        (world / path).write_bytes(whole[:-100])

    return change


def configure(path: str, **fields: Any) -> Change:
    return lambda world: write(path, json.dumps({**json.loads((world / path).read_text()), **fields}))(world)


def shard(world: Path) -> None:
    """An index that names two files, of which one has been copied."""
    folder = world / "base" / "text_encoder_3"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def described(**changes: Any) -> Callable[[Path], None]:
    """The geneval teacher with other words in its metadata, beside tensors of rank 16."""

    def edit(world: Path) -> None:
        file = world / "teachers" / "geneval" / WEIGHTS
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        fields = json.loads(metadata["lora_adapter_metadata"]) | {f"transformer.{k}": v for k, v in changes.items()}
        tensors = load_file(file)
        file.unlink()
        save_file(tensors, file, {**metadata, "lora_adapter_metadata": json.dumps(fields)})

    return edit


def of_another_target(world: Path) -> None:
    file = world / "teachers" / "geneval" / WEIGHTS
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {key.replace("blocks.0.", "blocks.9."): value for key, value in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, metadata)


def own_model(change: Change | None = None) -> Change:
    """The base as teachers/whole, changed."""

    def make(world: Path) -> None:
        shutil.copytree(world / "base", world / "teachers" / "whole", symlinks=True)
        if change:
            change(world)

    return make


WHOLE = {"teachers.1.adapter": None, "teachers.1.model": {"uri": "pvc://tiny-world/teachers/whole"}}
OF_WHOLE = "spec.teachers[1].model.uri is pvc://tiny-world/teachers/whole: "
GENEVAL = "spec.teachers[0].adapter.uri is pvc://tiny-world/teachers/geneval: "
OCR = "spec.teachers[1].prompts"
CASES: dict[str, tuple[dict[str, Any], Change | None, list[str]]] = {
    "as it is": ({}, None, []),
    "a size beyond the model": (
        {"training.resolution.width": 72},
        None,
        ["spec.training.resolution.width is 72: this model needs a multiple of 8 up to 64"],
    ),
    "a size between two multiples": (  # SD3.5's VAE scales by 8, and its transformer takes patches of 2
        {"training.resolution.height": 40},
        configure("base/vae/config.json", block_out_channels=[1, 2, 3, 4]),
        ["spec.training.resolution.height is 40: this model needs a multiple of 16 up to 128"],
    ),
    "no model": ({"model.uri": "pvc://tiny-world/absent"}, None, ["spec.model.uri is pvc://tiny-world/absent: "]),
    "another family": (
        {},
        write("base/model_index.json", '{"_class_name": "PixArtSigmaPipeline"}'),
        ["holds a PixArtSigmaPipeline; supported are"],
    ),
    "a component without weights": ({}, remove("base/vae/diffusion_pytorch_model.safetensors"), ["base/vae holds no"]),
    "weights cut short": (
        {},
        cut_short("base/transformer/diffusion_pytorch_model.safetensors"),
        ["transformer/diffusion_pytorch_model.safetensors is not a readable safetensors file"],
    ),
    "a shard that is missing": ({}, shard, ["text_encoder_3/model-00002-of-00002.safetensors is not a readable"]),
    "no adapter": (
        {"teachers.0.adapter.uri": "pvc://tiny-world/prompts"},
        None,
        ["spec.teachers[0].adapter.uri is pvc://tiny-world/prompts: ", f"holds neither {WEIGHTS} nor"],
    ),
    "an adapter of another rank": ({}, described(r=8), [GENEVAL, "has rank 16 in ", "and 8 by its configuration"]),
    "an adapter of another target": ({}, of_another_target, [GENEVAL, "adapts transformer_blocks.9."]),
    "a teacher with a model of its own": (WHOLE, own_model(), []),
    "a model of its own that is the base": (
        {**WHOLE, "teachers.1.model": {"uri": "pvc://tiny-world/base"}},
        None,
        ["spec.teachers[1].model.uri is pvc://tiny-world/base: it is the base itself, which teaches nothing"],
    ),
    "a model of its own that is not there": (WHOLE, None, [OF_WHOLE, "nothing is there; check the claim"]),
    "a LoRA in the place of a model": (
        {**WHOLE, "teachers.1.model": {"uri": "pvc://tiny-world/teachers/ocr"}},
        None,
        ["spec.teachers[1].model.uri is pvc://tiny-world/teachers/ocr: ", "model_index.json"],
    ),
    "a teacher of other latents": (
        WHOLE,
        own_model(configure("teachers/whole/transformer/config.json", in_channels=8)),
        [OF_WHOLE + "its latent is 8 channels of 4 pixels a side, the base's is 16 channels of 4 pixels a side"],
    ),
    "a teacher that is told something else": (
        WHOLE,
        own_model(configure("teachers/whole/transformer/config.json", joint_attention_dim=8)),
        [OF_WHOLE + "its conditioning is {'embeds': (-1, 8), ", ", the base's is {'embeds': (-1, "],
    ),
    "a teacher that answers something else": (
        WHOLE,
        own_model(configure("teachers/whole/scheduler/scheduler_config.json", _class_name="DDIMScheduler")),
        [OF_WHOLE + "its scheduler's _class_name is DDIMScheduler, the base's is FlowMatchEulerDiscreteScheduler"],
    ),
    "a teacher for smaller images": (
        WHOLE,
        own_model(configure("teachers/whole/transformer/config.json", pos_embed_max_size=2)),
        [OF_WHOLE + "width is 32; this model needs a multiple of 8 up to 16"],
    ),
    "a teacher with another text encoder": (
        WHOLE,
        own_model(configure("teachers/whole/text_encoder_3/config.json", pad_token_id=3)),
        [OF_WHOLE + "its text_encoder_3 is sha256:", "put the base's folder text_encoder_3 in its place"],
    ),
    "a teacher without one of the text encoders": (
        WHOLE,
        own_model(configure("teachers/whole/model_index.json", text_encoder_3=[None, None])),
        [OF_WHOLE + "its text_encoder_3 is none, the base's is sha256:"],
    ),
    "a teacher with another tokenizer": (
        WHOLE,
        own_model(configure("teachers/whole/tokenizer/tokenizer_config.json", model_max_length=5)),
        [OF_WHOLE + "its tokenizer is sha256:"],
    ),
    "a teacher with another VAE": (
        WHOLE,
        own_model(configure("teachers/whole/vae/config.json", scaling_factor=2.0)),
        [OF_WHOLE + "its vae is sha256:"],
    ),
    "a teacher whose schedule is shifted otherwise": (
        WHOLE,
        own_model(configure("teachers/whole/scheduler/scheduler_config.json", shift=5.0)),
        [],
    ),
    "a layer that is not there": (
        {"student.adapter.targetModules": ["attn.to_q", "attn.to_z"]},
        None,
        ["spec.student.adapter.targetModules names attn.to_z: no linear layer of the model ends so"],
    ),
    "another rank than initFrom's": (
        {"student.initFrom": "pvc://tiny-world/teachers/ocr"},
        None,
        [
            "spec.student.adapter.rank is 32: the adapter of initFrom has 16; make them equal",
            "spec.student.adapter.alpha is 64: the adapter of initFrom has 32; make them equal",
        ],
    ),
    "another rank than the teachers' mean": (
        {"student.initFromTeachers": True},
        None,
        [
            "spec.student.adapter.rank is 32: the mean of the teachers has 48; write 48",
            "spec.student.adapter.alpha is 64: the mean of the teachers has 96; write 96",
        ],
    ),
    "another alpha than the mean of an rsLoRA and others": (
        {"student.initFromTeachers": True, "student.adapter": {"rank": 48, "alpha": 96}},
        described(use_rslora=True),  # alpha / sqrt(16)
        ["spec.student.adapter.alpha is 96: the mean of the teachers has 384; write 384"],
    ),
    "another rank than the mean of teachers of which one is trained": (
        {
            "student.initFromTeachers": True,
            "student.adapter": {"rank": 48, "alpha": 96},
            "teachers.2.adapter": None,
            "teachers.2.training": {"algorithm": "DiffusionNFT", "rounds": 1, "adapter": {"rank": 8, "alpha": 8}},
        },
        None,
        [
            "spec.student.adapter.rank is 48: the mean of the teachers has 40; write 40",
            "spec.student.adapter.alpha is 96: the mean of the teachers has 80; write 80",
        ],
    ),
    "fewer layers than initFrom's": (
        {
            "student.initFrom": "pvc://tiny-world/teachers/ocr",
            "student.adapter": {"rank": 16, "alpha": 32, "targetModules": ["attn.to_q", "attn.to_k"]},
        },
        None,
        ["spec.student.adapter.targetModules leaves out transformer_blocks.0.attn.add_k_proj, which the adapter of"],
    ),
    "a teacher that is trained from another rank, on a layer that is not there": (
        {
            "teachers.2.adapter": None,
            "teachers.2.training": {
                "algorithm": "DiffusionNFT",
                "rounds": 1,
                "initFrom": "pvc://tiny-world/teachers/ocr",
                "adapter": {"targetModules": ["attn.to_z"]},
            },
        },
        None,
        [
            "spec.teachers[2].training.adapter.targetModules names attn.to_z: no linear layer of the model ends so",
            "spec.teachers[2].training.adapter.rank is 32: the adapter of initFrom has 16; make them equal",
        ],
    ),
    "an empty prompt file": (
        {},
        write("prompts/ocr.train.jsonl", "\n"),
        [f"{OCR}.uri is pvc://tiny-world/prompts/ocr.train.jsonl: ", "holds no prompts"],
    ),
    "a bad line": (
        {},
        write("prompts/ocr.heldout.jsonl", '{"prompt": "a"}\n{}\n'),
        [f"{OCR}.heldOutUri is pvc://tiny-world/prompts/ocr.heldout.jsonl: ", "line 2"],
    ),
    "no prompts": ({}, remove("prompts/ocr.train.jsonl"), [f"{OCR}.uri is ", "nothing is there; check the claim"]),
    "too few held-out prompts": (
        {"evaluation.promptsPerTask": 300},
        None,
        [f"spec.evaluation.promptsPerTask is 300: task {task} " for task in ("geneval", "ocr", "aesthetic")],
    ),
    "no held-out prompts to take from training's": (
        {"teachers.2.prompts": {"uri": "pvc://tiny-world/prompts/aesthetic.train.jsonl"}},
        None,
        ["spec.evaluation.promptsPerTask is 96: 30 distinct prompts cannot give"],
    ),
    "a reward that nobody brings": (
        {"teachers.1.rewards": ["tiny-ocr", "nonsense"], "teachers.2.rewards": ["no_such:reward"]},
        None,
        [
            "spec.teachers[1].rewards[1] is nonsense: there is no reward nonsense; registered are ",
            "spec.teachers[2].rewards[0] is no_such:reward: reward no_such:reward cannot be imported",
        ],
    ),
    "what is not here is not fetched": (
        {
            "model.uri": "hf://nobody/no-model@main",
            "teachers.0.adapter.uri": "s3://nobody/adapter",
            "teachers.1.prompts": {"uri": "hf://nobody/no-prompts@main"},
        },
        None,
        [],
    ),
}


@pytest.mark.parametrize(("values", "change", "expected"), CASES.values(), ids=CASES)
def test_problem_has_field_value_and_remedy(
    values: dict[str, Any], change: Change | None, expected: list[str], content: dict[str, Any], claims: Path
) -> None:
    if "evaluation.promptsPerTask" in values or "teachers.2.rewards" in values:
        values = {**values, "evaluation.gate": []}
    if change:
        change(claims / "tiny-world")
    told = problems(check_spec(changed(content, values)).spec, claims)
    assert bool(told) == bool(expected), told
    for words in expected:
        assert sum(words in problem for problem in told) == 1, told


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", "--device gpu is not a device; write auto, cpu or cuda"),
        ("cuda", "this machine has no usable CUDA device"),
    ],
)
def test_a_device_that_is_not_there_is_told_with_the_rest(
    device: str, words: str, content: dict[str, Any], claims: Path
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        assert check_files("x", written(content, {}, claims), claims, device)
        return
    spec = written(content, {"training.resolution.width": 72}, claims)
    with pytest.raises(InvalidError, match=words) as caught:
        check_files("tiny", spec, claims, device)
    assert "tiny: 2 problems" in str(caught.value)
    assert "spec.training.resolution.width is 72" in str(caught.value)


def test_a_cpu_has_no_gpus_and_what_should_be_known_of_prompts_is_told(content: dict[str, Any], claims: Path) -> None:
    checked = check_files("tiny", written(content, {}, claims), claims, "cpu")
    assert checked.gpus == ()
    assert checked.notes == (
        "spec.teachers[0].prompts: 216 of 1536 training lines repeat a prompt, which is then trained on as often as it "
        "stands there",
        *(
            f"spec.teachers[{i}].prompts: {repeats} of 256 held-out lines repeat a prompt; its images count together, so "
            f"intervals and gate are those of {256 - repeats} prompts"
            for i, repeats in ((1, 216), (2, 236))
        ),
    )


def test_a_scale_that_nobody_states_is_told(content: dict[str, Any], claims: Path) -> None:
    silent = claims / "tiny-world" / "teachers" / "ocr" / WEIGHTS
    tensors = load_file(silent)
    silent.unlink()
    save_file(tensors, silent)
    uri, adapter = "pvc://tiny-world/teachers/ocr", {"rank": 16, "alpha": 16}
    starting = {"student.initFrom": uri, "student.adapter": adapter, "teachers.0.adapter": {"uri": uri, "alpha": 32}}
    checked = check_files("tiny", written(content, starting, claims), claims, "cpu")
    assert [note.partition(" does not state its scale")[0] for note in checked.notes if "its scale" in note] == [
        f"{field} is {uri}: {silent.resolve()}" for field in ("spec.teachers[1].adapter.uri", "spec.student.initFrom")
    ]


def written(content: dict[str, Any], values: dict[str, Any], claims: Path) -> Path:
    file = claims / "spec.yaml"
    file.write_text(yaml.safe_dump(changed(content, values)))
    return file


def test_opd_run_tells_all_of_them_and_starts_nothing(content: dict[str, Any], claims: Path, tmp_path: Path) -> None:
    """Then the corrected spec is taken in the same folder."""
    of_another_target(claims / "tiny-world")
    wrong = {"training.resolution.width": 72, "teachers.1.rewards": ["nonsense"], "evaluation.gate": []}
    spec, work = tmp_path / "distill.yaml", tmp_path / "work"
    spec.write_text(yaml.safe_dump(changed(content, wrong)))
    command = [sys.executable, "-m", "opd_cli.main", "run", str(spec), "--work", str(work)]
    command += ["--claim", f"tiny-world={claims / 'tiny-world'}"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert time.monotonic() - began < 60
    assert done.returncode == ExitCode.INVALID, done.stderr
    head, *told = done.stderr.splitlines()
    assert head == "error: tiny-three-tasks: 3 problems"
    assert [line.split()[0] for line in told] == [
        "spec.training.resolution.width",
        "spec.teachers[0].adapter.uri",
        "spec.teachers[1].rewards[0]",
    ]
    assert not (work / "logs").exists()
    assert [json.loads(line).get("stage") for line in (work / "events.jsonl").read_text().splitlines()] == [None]

    spec.write_text(yaml.safe_dump(changed(content, {**wrong, "training.resolution.width": 64})))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[0] == "error: tiny-three-tasks: 2 problems"
