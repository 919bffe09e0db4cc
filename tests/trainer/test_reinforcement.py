"""Teachers made by reinforcement learning: what the losses are, and that rounds are what their papers say."""

import copy
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from opd_core.api.training import AdvantageScale, OldPolicy, StudentReinforcement, TeacherTraining
from opd_core.diffusion.transitions import Transition
from opd_core.errors import InvalidError, RefusedError
from opd_core.models.adapters import adapter_parameters
from opd_trainer import rounds
from opd_trainer.checkpoint import Identity
from opd_trainer.engine import World
from opd_trainer.loop import play_round, take_step
from opd_trainer.methods import reinforcement
from opd_trainer.methods.advantages import advantages
from opd_trainer.methods.grpo import kl_rate, log_ratio, surrogate
from opd_trainer.methods.nft import OLD, nft_loss, old_decay, optimality
from opd_trainer.methods.reinforcement import Reinforcement
from opd_trainer.methods.samples import Turn, rank_images, turn_of
from opd_trainer.metrics import Metrics
from opd_trainer.reinforcement_setup import build_student_run
from opd_trainer.run import STUDENT, Run
from opd_trainer.teacher_setup import build_teacher_run, teacher_spec
from torch import Tensor
from torch.distributions import Normal

from tests.trainer.conftest import MakeSpec

STEPS = {"steps": 3}
NOISY = {"type": "SDE", "steps": 3, "noiseLevel": 0.7}
SMALL = {
    "rounds": 4,
    "groupSize": 3,
    "promptsPerRound": 2,
    "adapter": {"rank": 4, "alpha": 8},
    "optimizer": {"learningRate": 1.0e-3},
    "checkpoint": {"everyRounds": 2},
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "DiffusionNFT": {**SMALL, "algorithm": "DiffusionNFT", "sampler": STEPS},
    "FlowGRPO": {**SMALL, "algorithm": "FlowGRPO", "sampler": NOISY, "updatesPerRound": 2},
    "GRPOGuard": {**SMALL, "algorithm": "GRPOGuard", "sampler": NOISY},
}
LEARNING = {
    "DiffusionNFT": ("DiffusionNFT", {"steps": 3}),
    "GRPOGuard": ("GRPOGuard", NOISY),
}  # of a student
Make = Callable[..., Run]


def changes_of(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Of the tiny spec: its last teacher, whose reward is cheapest, is trained; two images are looked at."""
    return {
        "spec.teachers.2.adapter": None,
        "spec.teachers.2.training": copy.deepcopy({**settings, **more}),
        "spec.teachers.2.guidanceScale": 1.0,
        "spec.evaluation.promptsPerTask": 2,
        "spec.evaluation.sampler": {"steps": 2},
        "spec.evaluation.gate": [],
    }


@pytest.fixture
def make(make_spec: MakeSpec, world: World, tiny_claims: Path) -> Iterator[Make]:
    """A teacher's run in this process."""
    runs: list[Run] = []

    def build(settings: dict[str, Any], spec: dict[str, Any] | None = None, **more: Any) -> Run:
        whole = make_spec({**changes_of(settings, **more), **(spec or {})}).spec
        run = build_teacher_run(teacher_spec(whole, whole.teachers[2]), tiny_claims, "cpu", world)
        runs.append(run)
        return run

    yield build
    for run in runs:
        run.engine.close()


@pytest.fixture
def make_student(make_spec: MakeSpec, world: World, tiny_claims: Path) -> Iterator[Make]:
    """A student's run in this process, over the tiny spec's three tasks."""
    runs: list[Run] = []

    def build(algorithm: str, *, spec: dict[str, Any] | None = None, **more: Any) -> Run:
        name, sampler = LEARNING[algorithm]
        settings = {"algorithm": name, "groupSize": 3, "promptsPerRound": 2, **more}
        training = {"method": "RL", "reinforcement": settings, "sampler": sampler, "checkpoint": {"everyRounds": 2}}
        changes = {f"spec.training.{field}": value for field, value in training.items()}
        whole = make_spec({**changes, "spec.training.rounds": 4, **(spec or {})}).spec
        run = build_student_run(whole, tiny_claims, "cpu", world)
        runs.append(run)
        return run

    yield build
    for run in runs:
        run.engine.close()


def gradient(run: Run, round_: int = 0) -> list[Tensor]:
    """Of all updates of a round together, without a step."""
    play_round(run, round_)
    found = [parameter.grad.clone() for parameter in run.engine.parameters if parameter.grad is not None]
    for parameter in run.engine.parameters:
        parameter.grad = None
    return found


# ---------------------------------------------------------------------------------------------------- advantages


def test_an_advantage_is_relative_to_the_images_of_the_same_prompt() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.8, 0.8, 0.8]], dtype=torch.float64).unsqueeze(-1)
    by_round, by_group = (advantages(scores, [1.0], scale=scale) for scale in AdvantageScale)
    for found in (by_round, by_group):
        assert found.sum(1).abs().max() < 1e-9
        assert found[1].abs().max() < 1e-9, "a prompt whose images are all alike teaches nothing"
        assert found[0].argsort().tolist() == [0, 2, 1]
    everything = scores.flatten().std(correction=0) + 1e-4
    assert by_round[0, 0] == pytest.approx(float(-0.1 / everything))
    assert by_group[0, 0] == pytest.approx(float(-0.1 / (scores[0].std(correction=0) + 1e-4)))


def test_a_reward_in_small_numbers_counts_when_each_is_normalised() -> None:
    """Two rewards that disagree: by raw sums the one with larger numbers decides alone."""
    large, small = torch.tensor([0.0, 1.0]), torch.tensor([0.03, 0.01])
    scores = torch.stack([large, small], -1).unsqueeze(0).double()
    assert advantages(scores, [1.0, 1.0])[0].tolist() == pytest.approx([-1.0, 1.0], abs=1e-3)
    assert advantages(scores, [1.0, 1.0], normalize=True).abs().max() < 1.0
    assert (advantages(scores, [1.0, 2.0], normalize=True)[0, 0] > 0).item()


def test_an_advantage_stays_in_its_clip_and_becomes_a_share() -> None:
    scores = torch.zeros(1, 100, 1, dtype=torch.float64)
    scores[0, 0] = 1.0
    found = advantages(scores, [1.0], clip=5.0)
    assert found.max() == 5.0
    share = optimality(found, 5.0)
    assert (share[0, 0], share.min() >= 0, optimality(torch.zeros(1), 5.0).item()) == (1.0, True, 0.5)


# ---------------------------------------------------------------------------------------------------- losses


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_nft_at_the_old_policy_is_advantage_weighted_flow_matching(beta: float) -> None:
    """Whatever beta is; and a c times this loss does not depend on the clip c either."""
    x0, noise, velocity = (draw(4, 2, 3, seed=i) for i in range(3))
    t, advantage, clip = torch.tensor([0.3, 0.5, 0.9, 1.0]).double(), torch.tensor([-2.0, 0.0, 1.0, 4.0]).double(), 5.0
    wide = t.view(-1, 1, 1)
    x, student = torch.lerp(x0, noise, wide), velocity.clone().requires_grad_()
    (clip * nft_loss(x0, x, t, student, velocity, optimality(advantage, clip), beta)).sum().backward()  # type: ignore[no-untyped-call]
    away = x - wide * velocity - x0
    distance = away.abs().flatten(1).mean(1).view(-1, 1, 1)
    expected = -2 * wide * advantage.view(-1, 1, 1) * away / distance / away[0].numel()
    assert student.grad is not None
    assert torch.allclose(student.grad, expected, rtol=1e-6, atol=1e-9)


def test_nft_is_finite_where_an_image_is_matched_exactly() -> None:
    x0, noise = draw(1, 2, 2), draw(1, 2, 2, seed=1)
    t = torch.tensor([0.5]).double()
    exact = (noise - x0).requires_grad_()
    loss = nft_loss(x0, torch.lerp(x0, noise, 0.5), t, exact, exact.detach(), torch.tensor([1.0]).double(), 1.0)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(0.0, abs=1e-9)
    assert exact.grad is not None
    assert exact.grad.isfinite().all()


def test_the_old_policy_follows_as_the_authors_say() -> None:
    assert [old_decay(OldPolicy.COPY, s) for s in (0, 1000)] == [0.0, 0.0]
    assert [old_decay(OldPolicy.LINEAR, s) for s in (0, 100, 1000)] == [0.0, 0.1, 0.5]
    assert [old_decay(OldPolicy.DELAYED, s) for s in (75, 85, 1000)] == pytest.approx([0.0, 0.075, 0.999])


STEP = Transition(sigma=0.7, sigma_next=0.5, a=0.9, b=-0.23, std=0.3)


def test_the_ratio_is_that_of_two_gaussians() -> None:
    """In logarithms and per element, as in Flow-GRPO's code; GRPO-Guard's RatioNorm is its Eq. 8 to rounding."""
    x, old, new, noise = (draw(3, 4, 2, seed=i) for i in range(4))
    before, after = STEP.mean(x, old), STEP.mean(x, new)
    action = before + STEP.std * noise
    density = (Normal(after, STEP.std).log_prob(action) - Normal(before, STEP.std).log_prob(action)).flatten(1).mean(1)
    assert torch.allclose(log_ratio(STEP, noise, new - old, guard=False), density)
    bias = (after - before).square().flatten(1).mean(1) / (2 * STEP.std**2)
    assert torch.allclose(log_ratio(STEP, noise, new - old, guard=True), STEP.std * (density + bias))


def test_guards_ratio_has_mean_one_where_flow_grpos_falls_below() -> None:
    """Over many noises; 6 standard errors."""
    noise, moved = draw(40_000, 8), draw(1, 8, seed=1)
    guard, plain = (log_ratio(STEP, noise, moved, guard=each) for each in (True, False))
    assert abs(guard.mean()) < 6 * guard.std() / 200
    assert plain.mean() < -6 * plain.std() / 200


def test_a_ratio_outside_the_clip_pulls_only_back() -> None:
    ratio = torch.tensor([0.5, 1.0, 1.5] * 2).double().requires_grad_()
    advantage = torch.tensor([1.0] * 3 + [-1.0] * 3).double()
    surrogate(ratio, advantage, 0.2).sum().backward()  # type: ignore[no-untyped-call]
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]


def test_the_kl_to_the_base_is_per_unit_of_time() -> None:
    """Flow-GRPO's: with the diffusion's sigma_t in the place of the step's standard deviation."""
    step = Transition(sigma=0.7, sigma_next=0.5, a=0.9, b=-0.23, std=0.3 * 0.2**0.5)
    assert kl_rate(step) == pytest.approx(0.23**2 / (2 * 0.3**2))


@pytest.mark.parametrize(("updates", "size", "world"), [(1, 5, 1), (2, 4, 3), (4, 100, 2)])
def test_every_image_is_made_by_one_rank_and_groups_are_whole(updates: int, size: int, world: int) -> None:
    """24 prompts of 2 images: an update has whole groups over all its ranks."""
    parts = [rank_images(48, updates, size, rank, world) for rank in range(world)]
    for update in range(updates):
        numbers = [number for rank in parts for batch in rank[update] for number in batch]
        assert sorted(numbers) == list(range(update * 48 // updates, (update + 1) * 48 // updates))
        assert all(0 < len(batch) <= size for rank in parts for batch in rank[update])
        groups = [number // 2 for number in numbers]
        assert all(groups.count(group) == 2 for group in set(groups))


# ---------------------------------------------------------------------------------------------------- rounds


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_round_has_its_figures_and_touches_nothing_but_the_student(make: Make, name: str) -> None:
    run = make(ALGORITHMS[name])
    student = {id(parameter) for parameter in run.engine.parameters}
    others = {n: p.detach().clone() for n, p in run.model.transformer.named_parameters() if id(p) not in student}
    before = [parameter.detach().clone() for parameter in run.engine.parameters]

    def step() -> float:
        if run.steps == 0 and name != "DiffusionNFT":
            assert run.method.figures(run)["ratio"] == pytest.approx(1.0, abs=1e-6), "before the first update"
        return take_step(run, 1e-3)

    sums = play_round(run, 0, step)
    figures = run.method.figures(run)
    assert all(torch.isfinite(torch.tensor(list(figures.values()))))
    assert 0 <= figures["reward"] <= 1
    assert figures["group_std"] > 0
    assert run.steps == run.method.updates_per_round
    assert torch.isfinite(sums.losses).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.engine.parameters, strict=True))
    now = {n: p for n, p in run.model.transformer.named_parameters() if n in others}
    assert [n for n, p in now.items() if not torch.equal(p, others[n]) and f".{OLD}." not in n] == []
    if name == "DiffusionNFT":  # the first decay is 0.001: the old policy is the new one almost at once
        pairs = zip(adapter_parameters(run.model.transformer, OLD), run.engine.parameters, strict=True)
        assert all(torch.allclose(old, new, atol=1e-5) for old, new in pairs)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_how_many_images_are_computed_at_once_changes_nothing(make: Make, name: str) -> None:
    whole = make({**ALGORITHMS[name], "updatesPerRound": 1})
    alone = make({**ALGORITHMS[name], "updatesPerRound": 1}, {"spec.training.microBatchSize": 1})
    assert (whole.plan.micro_batch_size, alone.plan.micro_batch_size) == (3, 1)
    for ours, theirs in zip(gradient(whole), gradient(alone), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-7)


def test_noise_is_only_in_the_window_that_all_images_share(make: Make) -> None:
    sampler = {**NOISY, "steps": 8}
    run = make(ALGORITHMS["GRPOGuard"], sampler=sampler, stepsPerImage=2)
    assert isinstance(run.method, Reinforcement)
    windows = [run.method.algorithm.window(run, round_) for round_ in range(40)]
    assert {len(window) for window in windows} == {2}
    assert {window.start for window in windows} == {0, 1, 2}, "in the first half of eight steps"
    whole = make(ALGORITHMS["GRPOGuard"], sampler=sampler)
    assert isinstance(whole.method, Reinforcement)
    assert whole.method.algorithm.window(whole, 0) == range(7), "all but the last"
    assert run.method.trained(run, 0) == [float(j in windows[0]) for j in range(8)]


def test_a_cascade_starts_as_the_teacher_of_the_task_before(make: Make) -> None:
    """Old policy and student alike; the base stays what the distance is to."""
    ocr = {"adapter": {"rank": 16, "alpha": 32}, "initFrom": "pvc://tiny-world/teachers/ocr"}
    run = make(ALGORITHMS["DiffusionNFT"], **ocr)
    pairs = zip(adapter_parameters(run.model.transformer, OLD), run.engine.parameters, strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)
    assert any(parameter.abs().max() > 0 for parameter in run.engine.parameters[1::2]), "B is no longer zero"
    assert play_round(run, 0).errors.sum() > 0, "it is not the base any more"


IDENTITY = Identity(training_digest="", base="", teachers={}, prompts={}, world_size=1, zero_stage=0)


def play(run: Run, work: Path, until: int) -> None:
    """As the program does, told to stop after round `until`."""
    metrics = Metrics([task.name for task in run.tasks], run.training.rounds)
    start = rounds.resume(run, work, IDENTITY, metrics)
    left = iter(range(until - start))
    stop = SimpleNamespace(requested=lambda: next(left) == until - start - 1 and until < run.training.rounds)
    assert rounds.play(run, work, start, IDENTITY, metrics, stop) == until  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_stopped_and_continued_equals_uninterrupted(make: Make, tmp_path: Path, name: str) -> None:
    """Weights, average and old policy, to the bit."""
    whole = make(ALGORITHMS[name])
    play(whole, tmp_path / "whole", until=4)
    play(make(ALGORITHMS[name]), tmp_path / "halves", until=3)
    resumed = make(ALGORITHMS[name])
    play(resumed, tmp_path / "halves", until=4)
    assert resumed.steps == whole.steps == 4 * whole.method.updates_per_round
    ours, theirs = ({STUDENT: run.engine.parameters, **rounds.state_of(run)} for run in (resumed, whole))
    assert set(ours) == {STUDENT, "ema", *([OLD] if name == "DiffusionNFT" else [])}
    for kind, tensors in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, theirs[kind], strict=True)), kind


# ---------------------------------------------------------------------------------------------------- of a student


def test_tasks_take_turns_and_each_goes_on_with_its_own_prompts() -> None:
    joint = [turn_of(round_, 1, 3) for round_ in range(7)]
    assert [turn.task for turn in joint] == [0, 1, 2, 0, 1, 2, 0]
    assert [turn.before for turn in joint] == [0, 0, 0, 1, 1, 1, 2]
    cascade = [turn_of(round_, 4, 2) for round_ in range(10)]
    assert [turn.task for turn in cascade] == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert [turn.before for turn in cascade] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert [turn_of(round_, 1, 1) for round_ in range(3)] == [(0, 0), (0, 1), (0, 2)], "a teacher has one task"


@pytest.mark.parametrize("algorithm", LEARNING)
def test_a_student_learns_its_tasks_in_turn_from_their_rewards(
    make_student: Make, tmp_path: Path, algorithm: str
) -> None:
    run = make_student(algorithm, roundsPerTurn=2)
    before = [parameter.detach().clone() for parameter in run.engine.parameters]
    play(run, tmp_path, until=4)
    lines = [json.loads(line) for line in (tmp_path / "train" / "log.jsonl").read_text().splitlines()]
    assert [list(line["tasks"]) for line in lines] == [["geneval"], ["geneval"], ["ocr"], ["ocr"]]
    for line in lines:
        (task,) = line["tasks"].values()
        assert line["loss"] == pytest.approx(task["loss"]), "of the task that was played, whatever its share"
        assert math.isfinite(line["figures"]["reward"])
    assert any(not torch.equal(old, new) for old, new in zip(before, run.engine.parameters, strict=True))


@pytest.mark.parametrize("algorithm", LEARNING)
def test_a_student_that_is_stopped_goes_on_in_the_middle_of_a_turn(
    make_student: Make, tmp_path: Path, algorithm: str
) -> None:
    whole = make_student(algorithm, roundsPerTurn=2)
    play(whole, tmp_path / "whole", until=4)
    play(make_student(algorithm, roundsPerTurn=2), tmp_path / "halves", until=3)
    resumed = make_student(algorithm, roundsPerTurn=2)
    play(resumed, tmp_path / "halves", until=4)
    ours, theirs = ({STUDENT: run.engine.parameters, **rounds.state_of(run)} for run in (resumed, whole))
    for kind, tensors in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, theirs[kind], strict=True)), kind


def test_weights_of_rewards_count_in_every_task_that_has_them(make_student: Make) -> None:
    weights = [{"reward": "tiny-geneval", "weight": 2.0}]
    rewards = {"spec.teachers.2.rewards": ["tiny-aesthetic", "tiny-geneval"]}
    run = make_student("DiffusionNFT", spec=rewards, rewardWeights=weights)
    assert isinstance(run.method, Reinforcement)
    assert run.method.weights("geneval") == [2.0]
    assert run.method.weights("aesthetic") == [1.0, 2.0]
    assert run.method.weights("ocr") == [1.0]


def test_every_option_of_a_students_reinforcement_is_read(make_student: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()

    def spy(self: StudentReinforcement, name: str) -> Any:
        if name in StudentReinforcement.model_fields:
            read.add(name)
        return object.__getattribute__(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(StudentReinforcement, "__getattribute__", spy)
        for algorithm in LEARNING:
            play_round(make_student(algorithm), 0)
    assert set(StudentReinforcement.model_fields) == read


# ---------------------------------------------------------------------------------------------------- bad rewards


def rewarded(run: Run, answer: Callable[[int], Tensor]) -> Run:
    assert isinstance(run.method, Reinforcement)
    made_up = {"made-up": lambda images, prompts, metadata: answer(len(images))}
    run.method.rewards = {task.name: made_up for task in run.tasks}
    return run


def test_a_reward_that_tells_no_images_apart_ends_training_with_its_figures(make: Make) -> None:
    run = rewarded(make(ALGORITHMS["GRPOGuard"]), lambda n: torch.full((n,), 0.75))
    assert all((grad == 0).all() for grad in gradient(run)), "nothing is learnt from it"
    for round_ in range(1, 9):
        play_round(run, round_)
    with pytest.raises(InvalidError, match=r"round 10: for 10 rounds .* task aesthetic, 0.75 on average"):
        play_round(run, 9)


def test_a_reward_without_a_number_ends_training(
    make: Make, make_spec: MakeSpec, tiny_claims: Path, world: World
) -> None:
    named = {"spec.teachers.2.rewards": ["tests.trainer.test_reinforcement:no_number"]}
    with pytest.raises(RefusedError, match="no_number answered nan for prompt"):
        play_round(make(ALGORITHMS["DiffusionNFT"], named), 0)


def no_number(device: torch.device) -> Callable[..., Tensor]:
    return lambda images, prompts, metadata: torch.full((len(images),), float("nan"))


def test_an_image_that_has_left_the_numbers_is_the_students_fault(make: Make) -> None:
    run = make(ALGORITHMS["DiffusionNFT"])
    with torch.no_grad():
        for parameter in adapter_parameters(run.model.transformer, OLD):
            parameter.fill_(float("inf"))
    with pytest.raises(Exception, match="images of task aesthetic have left the finite numbers"):
        play_round(run, 0)


def test_rewards_are_computed_while_the_next_images_are_sampled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reward waits for the second batch, which only then has been sampled."""
    run = make(ALGORITHMS["GRPOGuard"])
    sampled, scored, real = threading.Event(), [], reinforcement.sample

    def sample(run: Run, turn: Turn, numbers: Any, *more: Any) -> Any:
        found = real(run, turn, numbers, *more)
        if numbers[0] > 0:
            sampled.set()
        return found

    def answer(count: int) -> Tensor:
        assert sampled.wait(60), "the second batch is not sampled before the first is scored"
        scored.append(count)
        return torch.arange(count, dtype=torch.float32)

    monkeypatch.setattr(reinforcement, "sample", sample)
    play_round(rewarded(run, answer), 0)
    assert scored == [3, 3]
    assert run.method.figures(run)["reward"] == 1.0


def test_every_option_of_a_teachers_training_is_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()

    def spy(self: TeacherTraining, name: str) -> Any:
        if name in TeacherTraining.model_fields:
            read.add(name)
        return object.__getattribute__(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherTraining, "__getattribute__", spy)
        for name in ("DiffusionNFT", "GRPOGuard"):
            play_round(make(ALGORITHMS[name]), 0)
    assert set(TeacherTraining.model_fields) - read == {"must_beat_base"}, "which test_teach is about"
