"""GenEval: verdicts of the reference implementation on the same detections, and the networks on random weights."""

import json
from pathlib import Path

import pytest
import torch
from opd_core.errors import InvalidError
from opd_trainer.evaluation.statistics import mean
from opd_trainer.rewards.geneval import clip_colours, geneval_reward, mask2former
from opd_trainer.rewards.geneval_rules import COLOURS, OBJECT_NAMES, Found, correct, flow_grpo_score, relations
from opd_trainer.rewards.hub import Hub
from PIL import Image
from transformers import (
    CLIPModel,
    CLIPTokenizerFast,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

CPU = torch.device("cpu")
# Made with `evaluate` and `evaluate_reward` of yifan123/reward-server (71314782), whose `evaluate` is djghosh13/geneval's.
REFERENCE = json.loads((Path(__file__).parent / "geneval_reference.json").read_text())


def obj(name, left, top, confidence=0.95, size=20):
    return Found(name, confidence, (left, top, left + size, top + size))


def no_colours(objects):
    raise AssertionError("asked for colours")


# ---------------------------------------------------------------- the rules


@pytest.mark.parametrize("case", REFERENCE, ids=range(len(REFERENCE)))
def test_the_verdict_is_the_reference_implementations(case):
    found = {Found(o["name"], o["confidence"], tuple(o["box"])): o["colour"] for o in case["found"]}

    def colours_of(objects):
        return [found[each] for each in objects]

    assert correct(case["record"], list(found), colours_of) is case["correct"]
    score = flow_grpo_score(case["record"], list(found), colours_of, as_published=True)
    assert score == pytest.approx(case["score"], abs=1e-9)


def test_of_the_reference_verdicts_every_kind_is_there():
    kinds = {(case["record"]["tag"], case["correct"]) for case in REFERENCE}
    tags = {"counting", "colors", "color_attr", "position", "two_object"}
    assert kinds == {(tag, verdict) for tag in tags for verdict in (True, False)}


def test_the_official_score_of_the_reference_detections_is_the_mean_of_its_tasks_means():
    verdicts, tags = [case["correct"] for case in REFERENCE], [case["record"]["tag"] for case in REFERENCE]
    tasks = {tag: [each for each, own in zip(verdicts, tags, strict=True) if own == tag] for tag in tags}
    official = sum(sum(task) / len(task) for task in tasks.values()) / len(tasks)
    assert official != pytest.approx(sum(verdicts) / len(verdicts), abs=1e-3)
    assert mean(verdicts, tags) == pytest.approx(official)


def test_colour_is_that_of_the_most_confident_object():
    """A blue car in front and a weaker red one is no red car."""
    record = {"include": [{"class": "car", "count": 1, "color": "red"}]}
    blue, red = obj("car", 0, 0, 0.9), obj("car", 50, 0, 0.6)
    assert not correct(record, [red, blue], lambda objects: ["blue" if o is blue else "red" for o in objects])


def test_a_relation_is_the_main_direction():
    assert relations(obj("a", 60, 0), obj("b", 0, 0)) == {"right of"}
    assert relations(obj("a", 60, 60), obj("b", 0, 0)) == {"right of", "below"}
    assert relations(obj("a", 15, 90), obj("b", 0, 0)) == {"below"}
    assert relations(obj("a", 2, 0), obj("b", 0, 0)) == set()


def test_a_wrong_place_earns_nothing_but_in_the_published_reward():
    record = {"include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 1, "position": ["above", 0]}]}
    found = [obj("dog", 0, 0), obj("cup", 60, 0)]
    assert flow_grpo_score(record, found, no_colours) == pytest.approx(2 / 3)
    assert flow_grpo_score(record, found, no_colours, as_published=True) == pytest.approx(3 / 4)


def test_the_names_are_genevals_at_cocos_indices():
    assert len(set(OBJECT_NAMES)) == 80
    known = {
        0: "person",
        3: "motorcycle",
        24: "backpack",
        57: "couch",
        62: "tv",
        64: "computer mouse",
        79: "toothbrush",
    }
    assert {i: OBJECT_NAMES[i] for i in known} == known
    assert (OBJECT_NAMES[65], OBJECT_NAMES[66]) == ("tv remote", "computer keyboard")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "no GenEval metadata"),
        ({"include": []}, "no GenEval metadata"),
        ({"include": [{"class": "mouse", "count": 1}]}, r"include\[0\]: class 'mouse' is none of GenEval's 80"),
        ({"include": [{"class": "cup", "count": 1, "color": "teal"}]}, "color 'teal'; GenEval knows red, orange"),
        ({"include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}, "no earlier one"),
    ],
)
def test_a_record_that_no_image_can_meet_is_refused(record, words):
    reward = geneval_reward(lambda image: [obj("cup", 0, 0)], lambda image, found: ["red"], correct)
    good = {"include": [{"class": "cup", "count": 1, "color": "red"}]}
    assert reward(torch.rand(1, 3, 64, 64), ["a cup"], [good]).tolist() == [1.0]
    with pytest.raises(InvalidError, match=words):
        reward(torch.rand(2, 3, 64, 64), ["a cup", "another"], [good, record])


# ---------------------------------------------------------------- the networks


def detector(folder, labels):
    """Mask2Former with random weights that is sure of one class for each of its five queries."""
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=5, decoder_layers=2, encoder_layers=1,
        num_attention_heads=2, encoder_feedforward_dim=32, dim_feedforward=32, num_labels=labels,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    torch.nn.init.constant_(model.class_predictor.bias, -20)
    model.class_predictor.bias.data[2] = 20  # car
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def test_objects_that_cover_one_another_are_all_found(tmp_path):
    """One map for all instances would lose whatever another one is painted over."""
    found = mask2former(Hub(detector(tmp_path, 80), ""), CPU)(
        torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    )
    assert len(found) >= 2
    assert {each.name for each in found} == {"car"}
    for each in found:
        left, top, right, bottom = (int(edge) for edge in each.box)
        assert 0 <= left < right <= 64
        assert 0 <= top < bottom <= 48
        inside = torch.zeros(48, 64, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert each.mask.any()
        assert not (each.mask & ~inside).any()
    assert any((a.mask & b.mask).any() for a in found for b in found if a is not b)


def test_a_detector_of_other_classes_is_refused(tmp_path):
    with pytest.raises(InvalidError, match="has 3 classes; use one of COCO's 80"):
        mask2former(Hub(detector(tmp_path, 3), ""), CPU)


def test_colours_are_clips_with_three_sentences_on_a_grey_ground(clip_folder):
    image = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[4:40, 4:40] = torch.rand(36, 36, generator=torch.Generator().manual_seed(1)) > 0.3
    cut = torch.where(mask, image, 0x99 / 255)[:, 4:40, 4:40]

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizerFast.from_pretrained(clip_folder)
    with torch.no_grad():
        directions = []
        for colour in COLOURS:
            sentences = [
                f"a photo of a {colour} dog",
                f"a photo of a {colour}-colored dog",
                f"a photo of a {colour} object",
            ]
            tokens = tokenizer(sentences, padding=True, truncation=True, max_length=77, return_tensors="pt")
            each = model.text_projection(model.text_model(**tokens).pooler_output)
            mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
            directions.append(mean / mean.norm())
        picture = Image.fromarray((cut * 255).round().byte().permute(1, 2, 0).numpy()).resize((32, 32), Image.BICUBIC)
        pixels = torch.tensor(list(picture.getdata())).view(32, 32, 3).permute(2, 0, 1) / 255
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        seen = model.visual_projection(model.vision_model(pixel_values=pixels[None]).pooler_output)[0]
        ranking = (torch.stack(directions) @ seen).sort(descending=True)
    assert ranking.values[0] - ranking.values[1] > 1e-3  # else rounding decides
    objects = [Found("dog", 0.9, (4, 4, 40, 40), mask)]
    assert clip_colours(Hub(str(clip_folder), ""), CPU)(image, objects) == [COLOURS[int(ranking.indices[0])]]
