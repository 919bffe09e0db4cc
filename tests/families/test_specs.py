"""What a family makes of a spec is told before anything starts."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from opd_core.api.load import check_spec
from opd_core.api.training import Resolution
from opd_core.api.types import Spec
from opd_core.artifacts import SamplingDefaults
from opd_core.errors import InvalidError
from opd_core.models.fingerprint import fingerprint
from opd_core.models.outline import read_outline
from opd_core.models.preflight import adapter_problems, model_notes, teacher_problems
from opd_core.models.teacher_files import check_teacher_model
from opd_core.scales import Scales
from opd_serving.endpoint.errors import ApiError
from opd_serving.endpoint.parameters import Order, parse


@pytest.fixture
def spec(repository: Path) -> Callable[..., Spec]:
    """The tiny example, with another guidance, number of steps and targets."""

    def make(guidance: float, steps: int, targets: list[str] | None = None, frames: int = 1) -> Spec:
        content: dict[str, Any] = yaml.safe_load((repository / "examples" / "tiny" / "distill.yaml").read_text())
        content["spec"]["training"] |= {"guidanceScale": guidance, "sampler": {"type": "ODE", "steps": steps}}
        content["spec"]["training"]["resolution"]["frames"] = frames
        content["spec"]["evaluation"]["sampler"] = {"type": "ODE", "steps": steps}
        for teacher in content["spec"]["teachers"]:
            teacher["guidanceScale"] = guidance
        if targets:
            content["spec"]["student"]["adapter"]["targetModules"] = targets
        return check_spec(content).spec

    return make


@pytest.mark.parametrize(
    ("teacher", "base", "words"),
    [
        ("flux2_klein", "flux2_klein_distilled", ""),
        ("flux2_klein_distilled", "flux2_klein", "it was distilled to 4 steps, the base to none"),
        ("flux2_klein", "flux", "its pipeline is Flux2KleinPipeline, the base's is FluxPipeline"),
    ],
)
def test_a_model_teaches_its_family_at_the_noise_levels_that_it_answers_at(
    folder_of: Callable[[str], Path], teacher: str, base: str, words: str
) -> None:
    with pytest.raises(InvalidError, match=words) if words else nullcontext():
        check_teacher_model(folder_of(teacher), folder_of(base), Resolution(width=64, height=64))


FIELDS = ["spec.training.guidanceScale", *(f"spec.teachers[{i}].guidanceScale" for i in range(3))]
NOT_OFF = [f"{field} is 1, which does not turn guidance off" for field in FIELDS]
OTHER_STEPS = [f"spec.{part}.sampler.steps is 10: this model was distilled to 4" for part in ("training", "evaluation")]
MISSED = "spec.student.adapter.targetModules names no layer of"


@pytest.mark.parametrize(
    ("name", "guidance", "steps", "expected"),
    [
        ("stable_diffusion_3", 4.5, 10, []),
        ("stable_diffusion_3", 1.0, 10, []),
        ("flux2_klein_distilled", 1.0, 4, []),
        ("flux2_klein_distilled", 4.0, 4, [f"{field} is 4 and has no effect" for field in FIELDS]),
        ("flux_schnell", 1.0, 10, OTHER_STEPS),
        ("flux", 1.0, 10, NOT_OFF),
        ("z_image", 1.0, 10, NOT_OFF),
        ("z_image", 0.0, 10, []),
    ],
)
def test_what_one_might_not_expect_of_a_family_is_noted(
    folder_of: Callable[[str], Path],
    spec: Callable[..., Spec],
    name: str,
    guidance: float,
    steps: int,
    expected: list[str],
) -> None:
    notes = list(model_notes(spec(guidance, steps), read_outline(folder_of(name))))
    assert [note[: len(start)] for note, start in zip(notes, expected, strict=True)] == expected


@pytest.mark.parametrize("name", ["flux", "flux_schnell", "qwen_image"])
def test_true_cfg_where_there_is_none_is_noted(
    folder_of: Callable[[str], Path], spec: Callable[..., Spec], name: str
) -> None:
    asked = spec(4.0, 4)
    asked = asked.model_copy(update={"training": asked.training.model_copy(update={"true_cfg_scale": 2.0})})
    notes = [note for note in model_notes(asked, read_outline(folder_of(name))) if "trueCfgScale" in note]
    none = "spec.training.trueCfgScale is 2 and has no effect: this model's family has guidanceScale alone"
    assert notes == ([none] if name == "qwen_image" else [])


def test_the_endpoint_takes_true_cfg_where_the_model_has_it(folder_of: Callable[[str], Path]) -> None:
    def asked(name: str, **body: Any) -> Order:
        return order(folder_of(name), {"guidance": 3.5, **body}, frames=1)

    both = asked("flux", true_cfg=2.0, negative_prompt="b")
    assert (both.request.scales, both.request.guided, both.ignored) == (Scales(3.5, 2.0), True, ())
    assert asked("flux", true_cfg_scale=0.5).request.scales == Scales(3.5, 1.0)  # as it is computed
    with pytest.raises(ApiError, match="negative_prompt has no effect at true_cfg 1 and less; use true_cfg above 1"):
        asked("flux", negative_prompt="b")
    assert asked("qwen_image", true_cfg=2.0).ignored == ("true_cfg",)
    assert asked("flux_schnell", true_cfg=2.0).ignored == ("guidance",)


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("flux", ["attn.to_q", "attn.to_k"], []),
        ("flux", ["attn.add_q_proj"], [f"{MISSED} single_transformer_blocks"]),
        ("flux2_klein", ["attn.to_q"], [f"{MISSED} single_transformer_blocks"]),
        ("flux2_klein", ["attn.to_q", "attn.to_qkv_mlp_proj"], []),
        ("z_image", ["layers.0.attention.to_q"], [f"{MISSED} context_refiner", f"{MISSED} noise_refiner"]),
        ("z_image", ["attn.to_q"], ["spec.student.adapter.targetModules names attn.to_q: no linear layer"]),
    ],
)
def test_targets_that_miss_a_kind_of_block_are_refused(
    folder_of: Callable[[str], Path], spec: Callable[..., Spec], name: str, targets: list[str], expected: list[str]
) -> None:
    found = sorted(adapter_problems(spec(1.0, 4, targets), lambda uri: folder_of(name)))
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_a_models_files_are_looked_at_without_pytorch(folder_of: Callable[[str], Path]) -> None:
    """It takes seconds, and a teacher server or `opd run` need none of it to say what is wrong."""
    program = (
        "import sys; from pathlib import Path; from opd_core.models.outline import read_outline\n"
        "for folder in sys.argv[1:]: read_outline(Path(folder)).latent_shape(32, 32)\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    names = ("stable_diffusion_3", "flux", "flux2_klein", "qwen_image", "wan", "z_image")
    subprocess.run([sys.executable, "-c", program, *(str(folder_of(name)) for name in names)], check=True)


def test_the_template_around_a_prompt_is_part_of_the_fingerprint(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder_of("z_image"), tmp_path / "base"))
    before = fingerprint(copied)
    assert before == fingerprint(folder_of("z_image"))
    template = copied / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "painter"))
    assert fingerprint(copied) != before


@pytest.mark.parametrize(
    ("name", "frames", "wanted"),
    [
        ("stable_diffusion_3", 1, None),
        ("stable_diffusion_3", 9, "1, for it makes images only"),
        ("wan", 1, None),
        ("wan", 9, None),
        ("wan", 8, "1 more than a multiple of 4, as 21, or 1 for an image"),
    ],
)
def test_a_number_of_frames_that_the_model_cannot_make_is_refused(
    folder_of: Callable[[str], Path], spec: Callable[..., Spec], name: str, frames: int, wanted: str | None
) -> None:
    asked = spec(1.0, 4, frames=frames)
    field = f"spec.training.resolution.frames is {frames}: this model needs"
    found = teacher_problems(asked, lambda uri: folder_of(name), [])
    assert found == ([] if wanted is None else [f"{field} {wanted}"])


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"frames": 8}, "frames", "frames is 8; this model needs 1 more than a multiple of 4"),
        ({"output_format": "png"}, "output_format", "a video of 9 frames comes as webp or mp4"),
        ({"output_format": "mp4", "frames": 1}, "output_format", "this is one image"),
        ({"frames": 21}, "size", "43008 pixels in 21 frames; this server makes at most 18432"),
    ],
)
def test_a_video_that_cannot_be_made_is_refused_by_the_endpoint(
    folder_of: Callable[[str], Path], body: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(ApiError) as caught:
        order(folder_of("wan"), body)
    assert (caught.value.param, message in caught.value.message) == (param, True)


def test_a_video_model_makes_images_as_well(folder_of: Callable[[str], Path]) -> None:
    video, image = order(folder_of("wan"), {}), order(folder_of("wan"), {"frames": 1})
    assert (video.request.frames, video.format) == (9, "webp")
    assert (image.request.frames, image.format) == (1, "png")


def order(base: Path, body: dict[str, Any], frames: int = 9) -> Order:
    """What an endpoint takes that makes videos of nine frames, or of so many."""
    defaults = SamplingDefaults(width=64, height=32, frames=frames, steps=3, guidance_scale=3.0, max_sequence_length=16)
    return parse(
        {"prompt": "a", **body}, names=["it"], defaults=defaults, outline=read_outline(base), max_pixels=64 * 32 * 9
    )
