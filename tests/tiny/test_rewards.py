"""Rewards tell pictures that show their scene from pictures that do not."""

import random
from importlib.metadata import entry_points

import pytest
import torch
from opd_tiny import rewards
from opd_tiny.render import render
from opd_tiny.scenes import TASKS, Digit, Scene, sample_scene

CPU = torch.device("cpu")


def scenes(task: str, count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(task, rng) for _ in range(count)]


def pictures(of: list[Scene], style: str = "neat", seed: int = 1) -> torch.Tensor:
    """Drawn with test glyphs: handwriting that neither the reader nor the teachers were trained on."""
    rng = random.Random(seed)
    return torch.stack([torch.from_numpy(render(s, rng, style, "test")).permute(2, 0, 1) for s in of])


def score(task: str, images: torch.Tensor, wanted: list[Scene]) -> torch.Tensor:
    reward = getattr(rewards, task)(CPU)
    return reward(images, [s.prompt for s in wanted], [{"scene": s.to_json()} for s in wanted])


@pytest.mark.parametrize("task", TASKS)
def test_a_reward_is_registered_and_answers_one_number_per_picture(task: str) -> None:
    (entry,) = entry_points(group="diffusion_opd.rewards", name=f"tiny-{task}")
    wanted = scenes(task, 6)
    answer = entry.load()(CPU)(pictures(wanted), [s.prompt for s in wanted], [{"scene": s.to_json()} for s in wanted])
    assert answer.shape == (6,)
    assert answer.dtype == torch.float32
    assert ((answer >= 0) & (answer <= 1)).all()


@pytest.mark.parametrize("task", ["geneval", "ocr"])
def test_pictures_of_the_scene_score_high_and_of_other_scenes_low(task: str) -> None:
    wanted = scenes(task, 150)
    right = score(task, pictures(wanted), wanted).mean()
    wrong = score(task, pictures(scenes(task, 150, seed=2)), wanted).mean()
    assert right > 0.9
    assert wrong < 0.55
    assert right - wrong > 0.4


RELATION = Scene("relation", (Digit(7, "red"), Digit(3, "blue")), "above")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (RELATION, 1.0),
        (Scene("relation", RELATION.objects, "below"), 0.75),  # in the wrong place
        (Scene("relation", (Digit(7, "red"), Digit(3, "green")), "above"), 0.5),  # and so not in place either
        (Scene("single", (Digit(7, "red"),)), 0.25),  # one digit of two
    ],
)
def test_geneval_counts_the_conditions_that_hold(shown: Scene, expected: float) -> None:
    means = score("geneval", pictures([shown] * 40), [RELATION] * 40)
    assert means.median() == pytest.approx(expected)


def test_geneval_wants_the_right_number_of_digits() -> None:
    wanted = Scene("count", (Digit(4, "green"),) * 2)
    shown = [Scene("count", (Digit(4, "green"),) * 3), Scene("single", (Digit(4, "green"),))]
    three, one = score("geneval", pictures(shown), [wanted] * 2).tolist()
    assert three == pytest.approx(2 / 3)
    assert one == pytest.approx(1 / 3)


def test_two_equal_digits_stand_in_any_relation_to_each_other() -> None:
    twins = (Digit(1, "red"), Digit(1, "red"))
    wanted = [Scene("relation", twins, r) for r in ("above", "below", "left of", "right of")]
    assert score("geneval", pictures(wanted), wanted).min() == 1.0


def test_ocr_grades_by_edit_distance_in_reading_order() -> None:
    wanted = Scene("number", (Digit(4), Digit(7)))
    shown = [wanted, Scene("number", (Digit(4), Digit(1))), Scene("number", (Digit(1), Digit(0)))]
    means = [score("ocr", pictures([s] * 40), [wanted] * 40).median().item() for s in shown]
    assert means == [1.0, 0.5, 0.0]


def test_aesthetic_likes_sunsets_better_than_grey_noise_and_blank_paper() -> None:
    sunset = pictures(scenes("aesthetic", 20))
    noise = torch.rand(20, 1, 32, 32, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    blank = torch.full((20, 3, 32, 32), 0.5)
    likes, dislikes, ignores = (score("aesthetic", x, scenes("aesthetic", 20)).mean() for x in (sunset, noise, blank))
    assert likes > 0.4
    assert dislikes < 0.1
    assert ignores < 0.01


@pytest.mark.parametrize("task", ["geneval", "ocr"])
def test_an_empty_picture_earns_nothing(task: str) -> None:
    wanted = scenes(task, 5)
    assert score(task, torch.zeros(5, 3, 32, 32), wanted).tolist() == [0.0] * 5
