"""GenEval's networks: objects from Mask2Former on COCO, colours from CLIP on the object, cut out.

Rewards: `geneval` is GenEval's own verdict, 0 or 1; `geneval-partial` counts what is right, as Flow-GRPO's reward does
for training; `geneval-flow-grpo` is that reward as published, with its defect (`geneval_rules.flow_grpo_score`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from opd_core.errors import InvalidError
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

from opd_trainer.rewards.clip import clip_pixels, image_embedding
from opd_trainer.rewards.geneval_rules import (
    COLOURS,
    OBJECT_NAMES,
    THRESHOLD,
    ColoursOf,
    Found,
    check_record,
    correct,
    flow_grpo_score,
)
from opd_trainer.rewards.hub import CLIP_L, MASK2FORMER, Hub
from opd_trainer.rewards.registry import RewardFn

GREY = 0x99 / 255  # what GenEval puts where the object is not
SENTENCES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")

Detect = Callable[[Tensor], list[Found]]  # image [3, H, W] in 0..1 -> objects
NameColours = Callable[[Tensor, Sequence[Found]], list[str]]  # of objects of one class
Score = Callable[[Mapping[str, Any], Sequence[Found], ColoursOf], float]


def geneval(device: torch.device) -> RewardFn:
    return geneval_reward(mask2former(MASK2FORMER, device), clip_colours(CLIP_L, device), correct)


def geneval_partial(device: torch.device) -> RewardFn:
    return geneval_reward(mask2former(MASK2FORMER, device), clip_colours(CLIP_L, device), flow_grpo_score)


def geneval_flow_grpo(device: torch.device) -> RewardFn:
    score = partial(flow_grpo_score, as_published=True)
    return geneval_reward(mask2former(MASK2FORMER, device), clip_colours(CLIP_L, device), score)


def geneval_reward(detect: Detect, colours_of: NameColours, score: Score) -> RewardFn:
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        for prompt, record in zip(prompts, metadata, strict=True):
            check_record(record, prompt)
        found = [detect(image) for image in images]
        return torch.tensor(
            [
                float(score(record, objects, partial(colours_of, image)))
                for image, objects, record in zip(images, found, metadata, strict=True)
            ]
        )

    return reward


def mask2former(weights: Hub, device: torch.device) -> Detect:
    """Instances of COCO's classes, which the checkpoint must have in COCO's order: its own names differ from file to
    file. Every instance keeps its own mask: in one map for all, one object would paint over another."""
    processor = AutoImageProcessor.from_pretrained(weights.repo, revision=weights.revision)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(weights.repo, revision=weights.revision)
    model = model.to(device).eval()
    if model.config.num_labels != len(OBJECT_NAMES):
        raise InvalidError(
            f"reward geneval: detector {weights.repo} has {model.config.num_labels} classes; use one of COCO's 80"
        )

    @torch.no_grad()
    def detect(image: Tensor) -> list[Found]:
        inputs = processor(
            images=(image * 255).round().byte().cpu().numpy(), return_tensors="pt", input_data_format="channels_first"
        )
        outputs = model(**inputs.to(device))
        (result,) = processor.post_process_instance_segmentation(
            outputs, target_sizes=[tuple(image.shape[-2:])], threshold=THRESHOLD, return_binary_maps=True
        )
        found = []
        for segment, mask in zip(result["segments_info"], result["segmentation"], strict=False):
            ys, xs = torch.nonzero(mask, as_tuple=True)
            box = (float(xs.min()), float(ys.min()), float(xs.max()) + 1, float(ys.max()) + 1)
            found.append(Found(OBJECT_NAMES[segment["label_id"]], float(segment["score"]), box, mask.bool().cpu()))
        return found

    return detect


def clip_colours(weights: Hub, device: torch.device) -> NameColours:
    """The colour whose sentences fit the object best, of GenEval's three; around the object all is grey."""
    model = CLIPModel.from_pretrained(weights.repo, revision=weights.revision).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(weights.repo, revision=weights.revision)
    length = model.config.text_config.max_position_embeddings
    known: dict[str, Tensor] = {}

    def colour_directions(name: str) -> Tensor:
        """One direction a colour [10, D]: the mean over its sentences."""
        if name not in known:
            sentences = [sentence.format(colour=colour, name=name) for colour in COLOURS for sentence in SENTENCES]
            tokens = tokenizer(sentences, padding=True, truncation=True, max_length=length, return_tensors="pt")
            texts = model.text_projection(model.text_model(**tokens.to(device)).pooler_output)
            each = functional.normalize(texts, dim=-1).view(len(COLOURS), len(SENTENCES), -1)
            known[name] = functional.normalize(each.mean(1), dim=-1)
        return known[name]

    def cut_out(image: Tensor, found: Found) -> Tensor:
        left, top, right, bottom = (int(edge) for edge in found.box)
        seen = image if found.mask is None else torch.where(found.mask.to(image.device), image, GREY)
        return clip_pixels(seen[None, :, top:bottom, left:right].to(device), model.config.vision_config.image_size)

    @torch.no_grad()
    def colours_of(image: Tensor, objects: Sequence[Found]) -> list[str]:
        pictures = image_embedding(model, torch.cat([cut_out(image, each) for each in objects]))
        return [COLOURS[i] for i in (pictures @ colour_directions(objects[0].name).T).argmax(1).tolist()]

    return colours_of
