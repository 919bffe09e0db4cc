"""README.md of a student's folder: the hub's own reader takes it, whatever a manifest says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from opd_core.artifacts import (
    CARD,
    MANIFEST,
    WEIGHTS,
    KeptShare,
    Score,
    StudentManifest,
    file_digest,
    read_student,
    update_scores,
    write_student,
)
from opd_core.errors import RefusedError
from opd_core.model_card import model_card
from opd_core.models.adapter_keys import Format
from opd_core.models.export import export

from tests.peft_loras import PEFT_WEIGHTS

HUB = "hf://stabilityai/stable-diffusion-3.5-medium@b940f670f0eda2d07fbb75229e779da1ad11eb80"
RECIPE = {
    "method": "OPD", "objective": "KL", "sampler": "Flow SDE", "steps": 10, "rank": 32, "alpha": 64, "initFrom": "",
    "learningRate": 3e-4, "seed": 42, "evaluationSeed": 7,
}  # fmt: skip


def manifest(text: str = "", **fields: Any) -> StudentManifest:
    """Of a student of two teachers; `text` is in everything that is text."""

    def teacher(name: str) -> dict[str, Any]:
        return {
            "name": name + text, "uri": f"pvc://loras/{name}{text}", "fingerprint": "sha256:2" + text, "guidanceScale": 4.5,
            "promptsUri": "pvc://prompts" + text, "promptsDigest": "sha256:3" + text,
        }  # fmt: skip

    known = {
        "name": "three-tasks" + text, "digest": "sha256:1" + text, "base": {"uri": HUB + text, "fingerprint": "sha256:0" + text},
        "teachers": [teacher("ocr"), teacher("geneval")], "specDigest": "sha256:4" + text, "round": 1000,
        "recipe": {**RECIPE, **{key: value + text for key, value in RECIPE.items() if isinstance(value, str)}},
        "sampling": {"width": 512, "height": 512, "steps": 40, "guidanceScale": 4.5, "maxSequenceLength": 256},
        "scores": {"ocr" + text: {"mean": 0.81234, "low": 0.79, "high": 0.83, "n": 64}},
        "kept": {"ocr" + text: {"share": 0.975, "low": 0.91, "high": 1.02}},
        "license": "that of the base model" + text, "versions": {"torch" + text: "2.9.0" + text},
    }  # fmt: skip
    return StudentManifest.model_validate(known | fields)


def test_a_card_says_where_a_student_comes_from() -> None:
    card = ModelCard(model_card(manifest()))
    assert card.data.to_dict() == {
        "base_model": "stabilityai/stable-diffusion-3.5-medium",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "other",
        "license_name": "that-of-the-base-model",
        "license_link": "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium",
        "tags": ["diffusion-opd", "distillation", "lora"],
    }
    for row in (
        "# `three-tasks`",
        "A LoRA, distilled from 2 teachers by Diffusion OPD",
        "Made for 512 x 512 pixels, 40 steps, guidance 4.5.",
        f"| `base` | `{HUB}` | `sha256:0` |",
        "| `teacher ocr, guidance 4.5` | `pvc://loras/ocr` | `sha256:2` |",
        "| `prompts of geneval` | `pvc://prompts` | `sha256:3` |",
        "| `method` | `OPD, KL` |",
        "| `sampler` | `Flow SDE, 10 steps` |",
        "| `adapter` | `rank 32, alpha 64, from zero` |",
        "| `seeds` | `42 (training), 7 (evaluation)` |",
        "| `student` | `sha256:1` |",
        "| `rounds` | `1000` |",
        "| `spec` | `sha256:4` |",
        "| `ocr` | `0.8123` | `0.7900 to 0.8300` | `64` |",
        "| `ocr` | `0.975` | `0.910 to 1.020` |",
        "| `licence` | `that of the base model` |",
        "| `torch` | `2.9.0` |",
    ):
        assert row in card.text


def test_what_a_manifest_does_not_know_is_left_out() -> None:
    """A student from before recipes, learned from rewards, not evaluated, of a base that is not on the hub; of videos."""
    base = {"uri": "pvc://models/base", "fingerprint": "sha256:0"}
    sampling = {"width": 32, "height": 32, "frames": 9, "steps": 4, "guidanceScale": 1, "maxSequenceLength": 10}
    card = ModelCard(model_card(manifest(base=base, recipe=None, teachers=[], scores={}, kept={}, sampling=sampling)))
    assert "base_model" not in card.data.to_dict()
    assert card.data.pipeline_tag == "text-to-video"
    assert "trained from rewards" in card.text
    assert "32 x 32 x 9 pixels" in card.text
    assert "## Scores" not in card.text


HOSTILE = {
    "the end of the front matter": "\n---\n",
    "a field of YAML": "\nlicense: mit\nextra_gated_prompt: x",
    "YAML's own": ": [}{] !!python/object/apply:os.system # & * %",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "Markdown": "](http://evil.example) ![](http://evil.example/pixel) # [x](javascript:alert(1))",
    "code and cells": "` | `` ``` ```\n\n| a | b |\n|---|---|\n\\` \\| \\",
    "unseen": "\x1b[31m\u202e\u2028\x00\x85",
    "a backslash": "\\",
    "other scripts": "ünïcode 学生 🎓",
    "very long": "x" * 100_000,
}


def structure(markdown: str) -> list[tuple[str, int]]:
    """Kinds of Markdown's elements, the cells' own ones included; what is in code spans is none."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    return [(token.type, len(token.children or [])) for token in tokens]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_text(text: str) -> None:
    plain, card = ModelCard(model_card(manifest())), ModelCard(model_card(manifest(text)))
    fields = card.data.to_dict()
    assert fields.items() <= plain.data.to_dict().items()  # its base is none of the hub's, in some
    assert fields["license"] == "other"
    assert structure(card.text) == structure(plain.text)
    assert card.text.isascii() or all(c.isprintable() or c == "\n" for c in card.text)
    assert len(card.content) < 20_000


@pytest.mark.parametrize("uri", ["hf://a/b", "hf://null/true@main", "hf://0x1/1e3/sub/folder", "hf://a-b.c/d_e@v1/f"])
def test_a_repository_is_text_to_yaml(uri: str) -> None:
    card = model_card(manifest(base={"uri": uri, "fingerprint": "x"}))
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "/".join(uri.removeprefix("hf://").split("@")[0].split("/")[:2])


# ---------------------------------------------------------------- on disk


@pytest.fixture
def student(trained: Any, tmp_path: Path) -> Path:
    """A student directory with a LoRA that diffusers loads."""
    _, folder = trained()

    def save(into: Path) -> Path:
        return export(folder, into, Format.DIFFUSERS)

    write_student(tmp_path / "student", save, lambda digest: manifest(digest=digest))
    return tmp_path / "student"


def test_a_student_has_a_card_and_scores_come_into_it(student: Path) -> None:
    card = (student / CARD).read_text()
    assert card == model_card(read_student(student)[0])
    assert f"`{file_digest(student / WEIGHTS)}`" in card
    scored = update_scores(
        student, {"ocr": Score(mean=0.5, low=0.4, high=0.6, n=8)}, {"ocr": KeptShare(share=0.25, low=0.125, high=0.375)}
    )
    assert read_student(student)[0] == scored
    assert "| `ocr` | `0.250` | `0.125 to 0.375` |" in (student / CARD).read_text()


def test_a_manifest_from_before_has_a_card_too(student: Path) -> None:
    told = json.loads((student / MANIFEST).read_text())
    (student / MANIFEST).write_text(json.dumps({key: told[key] for key in told if key not in ("recipe", "kept")}))
    update_scores(student, {}, {})
    assert "| `rounds` | `1000` |" in (student / CARD).read_text()


EXPORTS = {
    Format.DIFFUSERS: ("diffusers", "adapter", "pipeline.load_lora_weights"),
    Format.PEFT: ("peft", "adapter", "PeftModel"),
    Format.COMFYUI: ("diffusers", "adapter", "models/loras"),
    Format.MERGED: ("diffusers", "merge", "DiffusionPipeline"),
}


@pytest.mark.parametrize(("to", "expected"), EXPORTS.items(), ids=EXPORTS)
def test_a_students_export_has_its_card(
    tiny_base: Path, student: Path, tmp_path: Path, to: Format, expected: tuple[str, str, str]
) -> None:
    for number, path in enumerate((student, student / WEIGHTS)):
        export(path, tmp_path / f"{number}", to, base=tiny_base)
        card = ModelCard.load(tmp_path / f"{number}" / CARD)
        library, relation, use = expected
        assert (card.data.library_name, card.data.base_model_relation) == (library, relation)
        assert use in card.text
        assert f"| `student` | `{file_digest(student / WEIGHTS)}` |" in card.text


def test_other_loras_have_none_and_a_false_one_no_export(trained: Any, student: Path, tmp_path: Path) -> None:
    _, folder = trained()
    (folder / MANIFEST).write_text('{"name": "of another program"}')
    export(folder, tmp_path / "out", Format.DIFFUSERS)
    assert not (tmp_path / "out" / CARD).exists()
    (student / WEIGHTS).write_bytes((folder / PEFT_WEIGHTS).read_bytes())
    with pytest.raises(RefusedError, match="copy the student again"):
        export(student, tmp_path / "another", Format.DIFFUSERS)
    assert not (tmp_path / "another").exists()
