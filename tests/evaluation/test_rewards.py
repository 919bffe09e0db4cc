"""The registry, the scoring rules, and the paper's rewards on random weights of the real classes."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from opd_core.api.load import load_spec
from opd_core.errors import InvalidError, RefusedError
from opd_core.uris import resolve
from opd_trainer.preflight import data_problems
from opd_trainer.rewards import clip, hub
from opd_trainer.rewards.aesthetic import aesthetic_reward, predictor
from opd_trainer.rewards.hub import Hub
from opd_trainer.rewards.image_reward import blip_reward
from opd_trainer.rewards.ocr import edit_distance, ocr_reward, similarity, wanted_text
from opd_trainer.rewards.packages import need
from opd_trainer.rewards.preference import open_clip_reward, padded_pixels
from opd_trainer.rewards.registry import find_reward, load_reward
from PIL import Image, ImageDraw, ImageFont
from transformers import BertTokenizer, CLIPModel, CLIPTokenizerFast

CPU = torch.device("cpu")


# ---------------------------------------------------------------- the registry


def test_a_video_has_the_mean_score_of_its_frames(monkeypatch):
    """Of eight, from the first to the last."""
    seen = []

    def brightness(images, prompts, metadata):
        seen.append((list(images.shape), list(prompts), [each["of"] for each in metadata]))
        return images.mean((1, 2, 3))

    monkeypatch.setattr("opd_trainer.rewards.registry.find_reward", lambda name: lambda device: brightness)
    reward = load_reward("brightness", CPU)
    level = torch.arange(30.0).view(2, 15, 1, 1, 1) / 100  # of 15 frames every second one is looked at
    scores = reward(level.expand(2, 15, 3, 4, 4), ["a", "b"], [{"of": 1}, {"of": 2}])
    assert seen == [([16, 3, 4, 4], ["a"] * 8 + ["b"] * 8, [1] * 8 + [2] * 8)]
    assert torch.allclose(scores, torch.tensor([0.07, 0.22]))
    assert torch.allclose(
        reward(level[:, :3].expand(2, 3, 3, 4, 4), ["a", "b"], [{"of": 1}] * 2)[0], torch.tensor(0.01)
    )


def test_rewards_are_found_by_entry_point_and_by_module():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    by_name = load_reward("tiny-aesthetic", CPU)(images, ["a"] * 3, [{}] * 3)
    by_module = load_reward("opd_tiny.rewards:aesthetic", CPU)(images, ["a"] * 3, [{}] * 3)
    assert by_name.shape == (3,)
    assert torch.equal(by_name, by_module)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("beauty", r"there is no reward beauty; registered are .*clipscore.*pickscore.*tiny-ocr.*module:function"),
        ("no_such_package:reward", "cannot be imported"),
        ("opd_tiny.rewards:beauty", "cannot be imported"),
        ("hpsv2", "reward hpsv2 needs open_clip; run: pip install open_clip_torch"),
        ("ocr", "reward ocr needs rapidocr_onnxruntime; run: pip install rapidocr_onnxruntime"),
    ],
)
def test_rewards_that_cannot_be_had_say_what_to_do(name, words, monkeypatch):
    for module in ("open_clip", "rapidocr_onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    for ask in (find_reward, lambda name: load_reward(name, CPU)):  # the preflight, and who scores
        with pytest.raises(InvalidError, match=words):
            ask(name)


def test_a_missing_package_is_a_problem_of_the_spec_before_anything_starts(repository, tiny_claims, monkeypatch):
    """Of `opd run` and of the trainer, both of which ask `data_problems` first; it was found after the training."""
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    spec = load_spec(repository / "examples" / "tiny" / "distill.yaml").spec
    teachers = [spec.teachers[0], spec.teachers[1].model_copy(update={"rewards": ["tiny-ocr", "ocr"]})]
    wrong = spec.model_copy(update={"teachers": teachers})
    assert data_problems(wrong, tiny_claims, lambda uri: resolve(uri, tiny_claims)) == [
        "spec.teachers[1].rewards[1] is ocr: reward ocr needs rapidocr_onnxruntime; run: pip install rapidocr_onnxruntime"
    ]


def test_a_package_that_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InvalidError, match=r"reward ocr: broken_reward is installed and cannot be loaded: libGL\.so\.1"
    ):
        need("broken_reward", "broken-reward", "ocr")


def wrong_shape(device):
    return lambda images, prompts, metadata: torch.zeros(len(images), 2)


def not_finite(device):
    return lambda images, prompts, metadata: torch.tensor([1.0, float("nan")])


@pytest.mark.parametrize(
    ("name", "words"),
    [("wrong_shape", r"answered shape \(2, 2\) to 2 images"), ("not_finite", "answered nan for prompt 'b'")],
)
def test_wrong_answers_are_refused(name, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "some_rewards", sys.modules[__name__])
    with pytest.raises(RefusedError, match=words):
        load_reward(f"some_rewards:{name}", CPU)(torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}])


# ---------------------------------------------------------------- text


def test_text_is_taken_from_the_record_or_the_quotes():
    assert wanted_text('a sign that says "Open 24h"', {}) == "Open 24h"
    assert wanted_text("a “café” door", {}) == "café"
    assert wanted_text('a sign "x"', {"text": "y"}) == "y"
    for prompt, metadata in [("a sign", {}), ('a sign "x"', {"text": " "}), ("a baker's and a butcher's sign", {})]:
        with pytest.raises(InvalidError, match="no text in quotes"):
            wanted_text(prompt, metadata)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("A chef's apron that reads \"Today's Special\"", "Today's Special"),
        ("Frank in his 90's holding a poster that says \"I'M STILL ALIVE\"", "I'M STILL ALIVE"),
        ("a sign 'Don't Walk' at a crossing", "Don't Walk"),
        ('\'first\' and "second" and "third"', "second"),
        ("a shop\u2019s \u2018Fresh Bread\u2019", "Fresh Bread"),
    ],
)
def test_double_quotes_come_first_and_an_apostrophe_is_none(prompt, wanted):
    assert wanted_text(prompt, {}) == wanted


def test_similarity_is_one_minus_the_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert similarity("OPEN 24 H", "Open 24h") == 1.0
    assert similarity("Opem 24h", "Open 24h") == pytest.approx(6 / 7)
    assert similarity("xx Open 24h yy", "Open 24h") == 1.0
    assert similarity("", "Open") == 0.0
    assert similarity("a very long other text", "ab") == 0.0


def test_the_ocr_reward_reads_each_picture():
    def read(picture):
        assert picture.dtype == np.uint8
        return "47" if picture[0, 0, 0] > 127 else ""

    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    assert ocr_reward(read)(images, ['"47"', '"47"'], [{}, {}]).tolist() == [1.0, 0.0]


def test_ocr_reads_what_is_written():
    """The real models, which its package brings along: upright text, no text, text that is hardly there."""
    texts = ["Open 24h", "", "Fresh Bread"]
    pictures = []
    for text in texts:
        picture = Image.new("RGB", (256, 128), "white")
        ImageDraw.Draw(picture).text((20, 40), text, fill=(20, 40, 120), font=ImageFont.load_default(40))
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    prompts = [f'a sign that says "{text}"' for text in ("Open 24h", "Open 24h", "Fresh Breed")]
    scores = load_reward("ocr", CPU)(torch.stack(pictures), prompts, [{}] * 3)
    assert scores.tolist() == [1.0, 0.0, pytest.approx(0.9)]


# ---------------------------------------------------------------- the real classes, random weights


def test_clip_rewards_are_the_models_own_logits(clip_folder):
    weights = Hub(str(clip_folder), "")
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    prompts = ["a dog", "two cups", "a very long prompt " * 30]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    cosine = clip.clip_reward(weights, weights, CPU, lambda m: 1.0)(images, prompts, [{}] * 3)
    scaled = clip.clip_reward(weights, weights, CPU, lambda m: float(m.logit_scale.detach().exp()))(
        images, prompts, [{}] * 3
    )
    tokens = CLIPTokenizerFast.from_pretrained(clip_folder)(
        prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**tokens, pixel_values=clip.clip_pixels(images, 32)).logits_per_image.diagonal()
    torch.testing.assert_close(scaled, logits)
    torch.testing.assert_close(cosine, logits / model.logit_scale.exp().detach())
    assert (cosine.abs() <= 1).all()


def test_pixels_are_prepared_as_clips_processor_does():
    from transformers import CLIPImageProcessor

    picture = Image.new("RGB", (64, 48), (200, 30, 90))
    ImageDraw.Draw(picture).ellipse((10, 5, 50, 40), fill=(20, 240, 120))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"]
    ours = clip.clip_pixels(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255, 32)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.02


def test_the_aesthetic_head_reads_the_published_layout(clip_folder, tmp_path):
    head = predictor(12)
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, tmp_path / "head.pth")
    reward = aesthetic_reward(Hub(str(clip_folder), ""), tmp_path / "head.pth", CPU)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        expected = head.eval()(clip.image_embedding(model, clip.clip_pixels(images, 32))).squeeze(-1)
    torch.testing.assert_close(reward(images, ["", ""], [{}, {}]), expected)


def test_hpsv2_is_open_clips_cosine_on_open_clips_pixels(tmp_path):
    """The loader and scorer of hpsv2 on an OpenCLIP model of two layers; HPSv2 pads what is not square."""
    (tmp_path / "tiny-h.json").write_text(
        json.dumps(
            {
                "embed_dim": 8,
                "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
            }
        )
    )
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-h", image_resize_mode="longest")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
    reward = open_clip_reward(open_clip, "tiny-h", tmp_path / "weights.pt", CPU)
    prompts = ["a dog", "a very long prompt " * 30]
    for height, width in ((40, 40), (20, 48), (48, 20)):
        images = smooth(height, width)
        pixels = torch.stack([preprocess(Image.fromarray(i)) for i in to_bytes(images)])
        with torch.no_grad():
            pictures, texts, _ = model.eval()(pixels, open_clip.get_tokenizer("tiny-h")(prompts))
        torch.testing.assert_close(reward(images, prompts, [{}] * 2), (pictures * texts).sum(-1), atol=0.02, rtol=0)
        assert (padded_pixels(images, 32) - pixels).abs().mean() < 0.03


def test_image_reward_is_its_packages_score(tmp_path):
    """Prompts that are short, long and unknown; images that fit and that are resized and cut."""
    recorded = json.loads((Path(__file__).parent / "image_reward_reference.json").read_text())
    (tmp_path / "vocab.txt").write_text("\n".join(recorded["words"]) + "\n")
    state = {name: weights(name, shape) for name, shape in recorded["shapes"].items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(48)[None]  # which the published file has, too
    reward = blip_reward(state, BertTokenizer.from_pretrained(tmp_path), CPU)
    for (height, width), tolerance in (((32, 32), 1e-4), ((48, 64), 0.2)):  # theirs are resized in bytes
        images = torch.from_numpy(to_bytes(smooth(height, width))).permute(0, 3, 1, 2) / 255
        rows = [row for row in recorded["scores"] if row[1] == [height, width]]
        scores = reward(images[[row[2] for row in rows]], [row[0] for row in rows], [{}] * len(rows))
        torch.testing.assert_close(scores, torch.tensor([row[3] for row in rows]), atol=tolerance, rtol=0)


def weights(name, shape):
    """Values that only the name decides, the same everywhere and in every release."""
    count = math.prod(shape)
    places = torch.arange(count, dtype=torch.float64)
    scale = 0.1 if len(shape) < 2 else (2.0 if len(shape) == 2 else 0.2) / shape[-1] ** 0.5
    values = torch.sin(0.7 * places * places + sum(name.encode())) * scale
    return (values + ("norm" in name.lower() and name.endswith("weight"))).float().view(shape)


def smooth(height, width):
    """Two colourful images without detail, so that two ways to resize them agree."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([torch.stack([x, y, 1 - x]), torch.stack([1 - y, x * y, y])])


def to_bytes(images):
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def test_what_is_fetched_from_the_hub_is_named_by_a_commit():
    """One repository's commit is not known here; it is named, so that nobody takes it for pinned."""
    pinned = {
        value.repo: bool(re.fullmatch("[0-9a-f]{40}", value.revision))
        for value in vars(hub).values()
        if isinstance(value, Hub)
    }
    assert {repo for repo, known in pinned.items() if not known} == {"facebook/mask2former-swin-small-coco-instance"}
    for file in Path(hub.__file__).parent.glob("*.py"):
        asked = re.findall(r"(?:from_pretrained|hf_hub_download)\(([^)]*)\)", file.read_text())
        assert all("revision=" in arguments for arguments in asked), file
