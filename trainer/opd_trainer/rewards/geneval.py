"""GenEval (Ghosh et al. 2023): are the objects there, as many, in their colours, at their places?

A prompt's record holds GenEval's own metadata: `include`, a list of {class, count, color, position: [relation, index]},
and optionally `exclude`. Objects come from an instance segmentation on COCO, colours from CLIP on the object's crop.
The score is strict as in the paper: 1 if everything holds, else 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from opd_core.errors import InvalidError
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

from opd_trainer.rewards.clip import clip_pixels, image_embedding
from opd_trainer.rewards.registry import RewardFn

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLOUR_CLIP = "openai/clip-vit-large-patch14"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3  # GenEval's; counting uses the higher one, against doubles
COUNTING_THRESHOLD = 0.9
POSITION_MARGIN = 0.1  # of the mean object size, by which centres must differ


@dataclass(frozen=True)
class Found:
    """One object: class name, confidence, box (left, top, right, bottom) in pixels."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]


Detect = Callable[[Tensor], list[Found]]  # image [3, H, W] in 0..1 -> objects
NameColour = Callable[[Tensor, Found], str]


def geneval(device: torch.device) -> RewardFn:
    return geneval_reward(mask2former(DETECTOR, device), clip_colours(COLOUR_CLIP, device))


def geneval_reward(detect: Detect, colour_of: NameColour) -> RewardFn:
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        scores = []
        for image, prompt, record in zip(images, prompts, metadata, strict=True):
            if "include" not in record:
                raise InvalidError(
                    f'reward geneval: the record of prompt {prompt!r} has no GenEval metadata ("include")'
                )
            found = detect(image)
            scores.append(float(holds(record, found, partial(colour_of, image))))
        return torch.tensor(scores)

    return reward


def holds(record: Mapping[str, Any], found: Sequence[Found], colour_of: Callable[[Found], str]) -> bool:
    """Whether everything that the record asks for is among the objects found."""
    counting = record.get("tag") == "counting"
    kept = [f for f in found if f.confidence > (COUNTING_THRESHOLD if counting else THRESHOLD)]
    groups: list[list[Found]] = []
    for wanted in record["include"]:
        of_class = [f for f in kept if f.name == wanted["class"]]
        if "color" in wanted:
            of_class = [f for f in of_class if colour_of(f) == wanted["color"]]
        if len(of_class) < wanted["count"]:
            return False
        chosen = sorted(of_class, key=lambda f: -f.confidence)[: wanted["count"]]
        if "position" in wanted:
            relation, target = wanted["position"]
            if not all(relation in relations(f, other) for f in chosen for other in groups[target]):
                return False
        groups.append(chosen)
    return not any(
        sum(f.name == unwanted["class"] for f in kept) >= unwanted["count"] for unwanted in record.get("exclude", [])
    )


def relations(of: Found, to: Found) -> set[str]:
    """Where `of` lies as seen from `to`: among "left of", "right of", "above", "below"."""
    (ax, ay), (bx, by) = (((f.box[0] + f.box[2]) / 2, (f.box[1] + f.box[3]) / 2) for f in (of, to))
    wide, high = ((f.box[2] - f.box[0], f.box[3] - f.box[1]) for f in (of, to))
    margin_x = POSITION_MARGIN * (wide[0] + high[0])
    margin_y = POSITION_MARGIN * (wide[1] + high[1])
    dx, dy = ax - bx, ay - by
    names = set()
    if abs(dx) > margin_x:
        names.add("left of" if dx < 0 else "right of")
    if abs(dy) > margin_y:
        names.add("above" if dy < 0 else "below")
    return names


def mask2former(checkpoint: str, device: torch.device) -> Detect:
    """Instances of COCO's classes."""
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint).to(device).eval()

    @torch.no_grad()
    def detect(image: Tensor) -> list[Found]:
        inputs = processor(
            images=(image * 255).round().byte().cpu().numpy(), return_tensors="pt", input_data_format="channels_first"
        )
        outputs = model(**inputs.to(device))
        result = processor.post_process_instance_segmentation(
            outputs, target_sizes=[tuple(image.shape[-2:])], threshold=THRESHOLD
        )[0]
        found = []
        for segment in result["segments_info"]:
            ys, xs = torch.nonzero(result["segmentation"] == segment["id"], as_tuple=True)
            if len(xs):
                box = (float(xs.min()), float(ys.min()), float(xs.max()) + 1, float(ys.max()) + 1)
                found.append(Found(model.config.id2label[segment["label_id"]], float(segment["score"]), box))
        return found

    return detect


def clip_colours(checkpoint: str, device: torch.device) -> NameColour:
    """The colour whose sentence fits the object's crop best."""
    model = CLIPModel.from_pretrained(checkpoint).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def colour_of(image: Tensor, found: Found) -> str:
        sentences = [f"a photo of a {colour} {found.name}" for colour in COLOURS]
        tokens = tokenizer(sentences, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        texts = functional.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)
        left, top, right, bottom = (int(edge) for edge in found.box)
        crop = image[:, top:bottom, left:right].unsqueeze(0).to(device)
        picture = image_embedding(model, clip_pixels(crop, model.config.vision_config.image_size))
        return COLOURS[int((picture @ texts.T).argmax())]

    return colour_of
