"""A student's model card: README.md in its folder, with where it comes from, as the Hugging Face hub reads one.

All of it is from the student's manifest, and a manifest's text is anybody's: names, URIs and versions stand in code
spans without a character that could end one, and the YAML in front has words of ours and a repository's checked name.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import yaml

from opd_core.models.adapter_keys import Format

if TYPE_CHECKING:
    from opd_core.artifacts import Recipe, StudentManifest

_LONGEST = 300  # of a text in a table
_REPOSITORY = re.compile(r"hf://(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:[@/].*)?", re.ASCII)
_LIBRARIES = {Format.PEFT: "peft"}
_USE = {
    Format.DIFFUSERS: "Load it with `pipeline.load_lora_weights` of diffusers.",
    Format.PEFT: "Load it with `PeftModel.from_pretrained`.",
    Format.COMFYUI: "Its .safetensors files belong into `models/loras` of ComfyUI.",
    Format.MERGED: "Load it with `DiffusionPipeline.from_pretrained`.",
}


def model_card(manifest: "StudentManifest", to: Format = Format.DIFFUSERS) -> str:
    """README.md of the student in the format `to`."""
    front = yaml.safe_dump(dict(_front_matter(manifest, to)), sort_keys=False)
    return f"---\n{front}---\n\n" + "\n".join(_body(manifest, to))


def _front_matter(manifest: "StudentManifest", to: Format) -> Iterator[tuple[str, Any]]:
    """Fields of https://huggingface.co/docs/hub/model-cards; the hub links a base that it has itself."""
    repository = _REPOSITORY.fullmatch(manifest.base.uri)
    if repository:
        yield "base_model", repository["repo"]
        yield "base_model_relation", "merge" if to == Format.MERGED else "adapter"
    yield "library_name", _LIBRARIES.get(to, "diffusers")
    yield "pipeline_tag", "text-to-image" if manifest.sampling.frames == 1 else "text-to-video"
    yield "license", "other"
    yield "license_name", "that-of-the-base-model"
    if repository:
        yield "license_link", f"https://huggingface.co/{repository['repo']}"
    yield "tags", ["diffusion-opd", "distillation", *([] if to == Format.MERGED else ["lora"])]


def _body(manifest: "StudentManifest", to: Format) -> Iterator[str]:
    count, what = len(manifest.teachers), "model with a LoRA merged into it" if to == Format.MERGED else "LoRA"
    made = f"distilled from {count} teacher{'s'[: count != 1]}" if count else "trained from rewards"
    yield f"# `{_text(manifest.name)}`\n"
    yield f"A {what}, {made} by Diffusion OPD ([arXiv 2605.15055](https://arxiv.org/abs/2605.15055)).\n"
    sampling = manifest.sampling
    size = f"{sampling.width} x {sampling.height}" + (f" x {sampling.frames}" if sampling.frames > 1 else "")
    yield f"Made for {size} pixels, {sampling.steps} steps, {sampling.scales.words}. {_USE[to]}\n"
    yield "## Made from\n"
    sources = [("base", manifest.base.uri, manifest.base.fingerprint)]
    for teacher in manifest.teachers:
        sources.append((f"teacher {teacher.name}, {teacher.scales.words}", teacher.uri, teacher.fingerprint))
        sources.append((f"prompts of {teacher.name}", teacher.prompts_uri, teacher.prompts_digest))
    yield from _table(("", "URI", "digest"), sources)
    yield "## How\n"
    rows = [("student", manifest.digest), ("rounds", f"{manifest.round}"), ("spec", manifest.spec_digest)]
    yield from _table(("", ""), [*_of_recipe(manifest.recipe), *rows])
    if manifest.scores:
        yield "## Scores\n\nMeans over held-out prompts, with 95 % bootstrap intervals.\n"
        yield from _table(
            ("reward", "mean", "interval", "images"),
            [(name, f"{s.mean:.4f}", f"{s.low:.4f} to {s.high:.4f}", f"{s.n}") for name, s in manifest.scores.items()],
        )
    if manifest.kept:
        yield "Of each teacher's gain over the base the student keeps:\n"
        shares = [(task, f"{s.share:.3f}", f"{s.low:.3f} to {s.high:.3f}") for task, s in manifest.kept.items()]
        yield from _table(("task", "share", "interval"), shares)
    yield "## Licence and versions\n"
    yield from _table(("", ""), [("licence", manifest.license), *manifest.versions.items()])


def _of_recipe(recipe: "Recipe | None") -> Iterator[tuple[str, str]]:
    if recipe is None:  # a student from before it was noted
        return
    yield "method", f"{recipe.method}, {recipe.objective}"
    yield "sampler", f"{recipe.sampler}, {recipe.steps} steps"
    yield "adapter", f"rank {recipe.rank}, alpha {recipe.alpha}, from {recipe.init_from or 'zero'}"
    yield "learning rate", f"{recipe.learning_rate:g}"
    yield "seeds", f"{recipe.seed} (training), {recipe.evaluation_seed} (evaluation)"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(f'`{_text(cell)}`' if cell else '' for cell in row)} |"
    yield ""


def _text(text: str) -> str:
    """On one line, without what would end a code span or a cell."""
    cut = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    return "".join(c if c.isprintable() and c not in "`|" else "\ufffd" for c in cut)
