"""The body of POST /v1/images/generations: from JSON to an ImageRequest, or to a ApiError that names the parameter."""

import json
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opd_core.artifacts import SamplingDefaults
from opd_core.errors import InvalidError
from opd_core.families.family import Outline
from opd_core.families.guidance import Guidance
from opd_core.scales import Scales
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opd_serving.endpoint.errors import ApiError, invalid
from opd_serving.endpoint.images import VIDEO_FORMATS, Format
from opd_serving.endpoint.request import ImageRequest

MAX_SEED = 2**53 - 1  # what JSON numbers hold exactly in every client
_OTHER_NAMES = {"num_inference_steps": "steps", "guidance_scale": "guidance", "true_cfg_scale": "true_cfg"}
_SHOWN = 100


class GenerationBody(BaseModel):
    """What a client may send. `null` is the same as absent; `extra_body` may be nested or merged."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, title="ImageGenerationRequest")

    prompt: str = Field(min_length=1, max_length=32_000, description="What the image shows.")
    model: str | None = Field(None, description="Name of the served model; absent: the one there is.")
    n: int = Field(1, ge=1, le=10, description="Number of images.")
    size: str = Field(
        "auto", pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT in pixels, or auto."
    )
    frames: int | None = Field(
        None,
        ge=1,
        le=1025,
        description="Frames of a video, of a model that makes some; 1: an image. Absent: the model's.",
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Image i is drawn from seed + i. Absent: random; the answer says which."
    )
    steps: int | None = Field(None, ge=1, le=100, description="Solver steps; also num_inference_steps.")
    guidance: float | None = Field(
        None,
        ge=0,
        le=50,
        description="Guidance as the model's family has it, mostly classifier-free, where 1 and less turn it off; also "
        "guidance_scale.",
    )
    true_cfg: float | None = Field(
        None,
        ge=0,
        le=50,
        description="Classifier-free guidance beside a guidance that is the network's own input, of FLUX.1; 1 and less "
        "turn it off; also true_cfg_scale.",
    )
    negative_prompt: str | None = Field(None, max_length=32_000, description="What the image does not show.")
    response_format: Literal["b64_json"] = Field("b64_json", description="Images come in the answer.")
    output_format: Format = Field("png", description="File format; of a video webp, which is animated, or mp4.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of all but png; 100 is best, and what png always is."
    )
    # Parameters of OpenAI's that many clients always send. These values ask for what is made anyhow; others, which
    # would ask for something else and get the same, are refused.
    quality: Literal["auto", "standard"] = Field("auto", description="Quality is chosen with steps.")
    background: Literal["auto", "opaque"] = Field("auto", description="Images are opaque.")
    stream: Literal[False] = Field(False, description="Answers come as a whole.")
    partial_images: Literal[0] = Field(0, description="Answers come as a whole.")
    style: str | None = Field(None, max_length=64, description="Taken, without any effect.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Taken, without any effect.")
    user: str | None = Field(None, max_length=512, description="Taken, without any effect.")
    safety_identifier: str | None = Field(None, max_length=512, description="Taken, without any effect.")


def body_schema() -> dict[str, Any]:
    """JSON Schema of a body as clients may write it: with the other names, and with `extra_body`."""
    schema = GenerationBody.model_json_schema()
    ours = schema["properties"]
    more = {other: ours[name] for other, name in _OTHER_NAMES.items()}
    ours |= more | {"extra_body": {"type": "object", "description": "Parameters that stand beside the others as well."}}
    return schema


_WITHOUT_EFFECT = ("style", "moderation", "user", "safety_identifier")


@dataclass(frozen=True)
class Order:
    """A checked request: what to draw, and into which kind of file. `ignored`: parameters without any effect."""

    request: ImageRequest
    format: Format
    compression: int
    ignored: tuple[str, ...] = ()


def parse_json(content: bytes) -> Mapping[str, Any]:
    """The JSON object in a body without its nulls, `extra_body` merged into it."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{_show(twice[0])} stands there twice")
        if half := [name for name in names if not name.isascii() and name.encode(errors="replace").decode() != name]:
            raise ValueError(f"{_show(half[0])} is not Unicode text")
        return dict(pairs)

    try:
        body = json.loads(content, parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise invalid(None, f"the body is not valid JSON: {error}", "invalid_json") from error
    if not isinstance(body, dict):
        raise invalid(None, 'the body is not a JSON object; send {"prompt": "..."}', "invalid_json")
    nested = body.pop("extra_body", None) or {}
    if not isinstance(nested, dict):
        raise invalid("extra_body", "extra_body is not an object; put its parameters beside prompt")
    given, more = ({name: value for name, value in part.items() if value is not None} for part in (body, nested))
    for name, value in more.items():
        if given.setdefault(name, value) != value:
            raise invalid(name, f"{name} stands in the body and in extra_body with different values; send one")
    return given


def parse(
    body: Mapping[str, Any], *, names: Sequence[str], defaults: SamplingDefaults, outline: Outline, max_pixels: int
) -> Order:
    """Check a request against the `outline` of the model in service, which has `names`, and fill in its defaults.

    Raises:
        ApiError: 400 with the parameter's name as the client wrote it, or 404 for another model.
    """
    fields = _validate(body)
    if fields.model and fields.model not in names:
        raise ApiError(
            404,
            f"model {fields.model[:_SHOWN]!r} is not served here; use {names[0]!r}",
            param="model",
            code="model_not_found",
        )
    if not fields.prompt.strip():
        raise invalid("prompt", "prompt is blank; say what the image shows")
    frames = defaults.frames if fields.frames is None else fields.frames
    if not outline.takes_frames(frames):
        raise invalid("frames", f"frames is {frames}; this model needs {outline.frame_counts}")
    width, height = _size(fields.size, frames, defaults, outline, max_pixels)
    output_format = fields.output_format if frames == 1 or "output_format" in fields.model_fields_set else "webp"
    if frames > 1 and output_format not in VIDEO_FORMATS:
        said = f"a video of {frames} frames comes as {' or '.join(VIDEO_FORMATS)}"
        raise invalid("output_format", f"output_format is {output_format}; {said}")
    if frames == 1 and output_format == "mp4":
        raise invalid("output_format", "output_format is mp4, and this is one image; ask for more frames, or for png")
    scales = Scales(
        defaults.guidance_scale if fields.guidance is None else fields.guidance,
        defaults.true_cfg_scale if fields.true_cfg is None else fields.true_cfg,
    )
    guided = outline.guidance.guides(scales)
    if not guided:
        scales = outline.guidance.without(scales)  # as it is computed, and told in the answer
    if fields.negative_prompt and not guided:
        raise invalid("negative_prompt", f"negative_prompt has no effect {_without(outline.guidance)}")
    if fields.output_compression not in (None, 100) and output_format == "png":
        raise invalid("output_compression", "png is lossless; use another output_format with output_compression")
    seed = secrets.randbelow(2**32) if fields.seed is None else fields.seed
    request = ImageRequest(
        prompt=fields.prompt,
        negative_prompt=fields.negative_prompt or "",
        seeds=tuple((seed + i) % (MAX_SEED + 1) for i in range(fields.n)),
        width=width,
        height=height,
        steps=fields.steps or defaults.steps,
        scales=scales,
        guided=guided,
        frames=frames,
    )
    effective = {"guidance": outline.guidance.effective, "true_cfg": outline.guidance.true_cfg}
    ignored = (*_WITHOUT_EFFECT, *(name for name, has in effective.items() if not has))
    return Order(
        request,
        output_format,
        100 if fields.output_compression is None else fields.output_compression,
        tuple(name for name in ignored if name in fields.model_fields_set),
    )


def _validate(body: Mapping[str, Any]) -> GenerationBody:
    given = {name: value for name, value in body.items() if value is not None}
    names = {_OTHER_NAMES.get(name, name): name for name in given}  # ours -> the client's
    if len(names) < len(given):
        twice = next(name for name in given if _OTHER_NAMES.get(name) in given)
        raise invalid(twice, f"{twice} and {_OTHER_NAMES[twice]} are the same parameter; send one")
    try:
        return GenerationBody.model_validate({ours: given[name] for ours, name in names.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    param = names.get(str(first["loc"][0]), str(first["loc"][0]))
    if first["type"] == "missing":
        raise invalid(param, f"{param} is missing; say what the image shows", "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        known = ", ".join([*GenerationBody.model_fields, *_OTHER_NAMES])
        raise invalid(
            param, f"{param[:_SHOWN]} is not a parameter of this server; known are {known}", "unknown_parameter"
        )
    if param == "response_format":
        raise invalid(param, f"response_format is {_show(first['input'])}; no image is stored here, use b64_json")
    raise invalid(param, f"{param} is {_show(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}")


def _without(guidance: Guidance) -> str:
    """Where a negative prompt has no effect, and what to do."""
    if guidance.off is None:
        return "on this model, which makes no pass without the prompt; leave it out"
    name = "true_cfg" if guidance.true_cfg else "guidance"
    return f"at {name} {guidance.off:g} and less; use {name} above {guidance.off:g}"


def _size(size: str, frames: int, defaults: SamplingDefaults, outline: Outline, max_pixels: int) -> tuple[int, int]:
    width, height = defaults.width, defaults.height
    if size != "auto":
        match = re.fullmatch("([0-9]+)x([0-9]+)", size)
        assert match is not None
        width, height = int(match[1]), int(match[2])
        try:
            outline.latent_shape(width, height)
        except InvalidError as error:
            raise invalid("size", f"size is {size}: {error}") from error
    elif frames <= defaults.frames:
        return width, height
    pixels = width * height * frames
    if pixels > max_pixels:
        of_all = f" in {frames} frames" if frames > 1 else ""
        raise invalid("size", f"size is {size}, {pixels} pixels{of_all}; this server makes at most {max_pixels}")
    return width, height


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
