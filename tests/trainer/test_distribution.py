"""Distribution matching: the scores, what they move, and the fake score that follows the student."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.errors import DivergedError, InvalidError
from opd_core.models.adapters import adapter_parameters
from opd_trainer import checkpoint
from opd_trainer.loop import play_round
from opd_trainer.methods.distillation import FAKE_UPDATES, Distillation
from opd_trainer.methods.distribution import Sample, fake_loss, matches, renoised
from opd_trainer.methods.fake_score import FAKE
from opd_trainer.rounds import engines_of, state_of
from opd_trainer.run import Run
from safetensors.torch import load_file
from torch import Tensor

from .conftest import Trainer
from .test_checkpoint import IDENTITY
from .test_gradients import difference, gradient, started

MakeRun = Callable[..., Run]
DMD2 = {"spec.training.method": "DMD2", "spec.training.objective": {"type": "X0"}}
TDM = {"spec.training.method": "TDM", "spec.training.objective": {"type": "X0"}}
BOTH = pytest.mark.parametrize("method", [DMD2, TDM], ids=["DMD2", "TDM"])


def wide(count: int, value: float) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("least", [0.0, 0.4])
def test_noising_twice_is_noising_once(least: float) -> None:
    """An image at level `least` that is noised to t has the flow's marginal: mean (1 - t) x0, standard deviation t."""
    generator = torch.Generator().manual_seed(0)
    e, more = torch.randn(2, 1, 400_000, generator=generator, dtype=torch.float64)
    x0 = 3.0
    found = renoised((1 - least) * x0 + least * e, wide(1, least), wide(1, 0.9), wide(1, 0.5), more)
    t = float(found.t)
    assert least < t < 0.9
    assert float(found.x.mean()) == pytest.approx((1 - t) * x0, abs=6 * t / 400_000**0.5)
    assert float(found.x.std()) == pytest.approx(t, rel=6 / 800_000**0.5)


@pytest.mark.parametrize("least", [0.0, 0.4])
def test_the_fake_loss_is_least_at_the_score_of_what_the_student_makes(least: float) -> None:
    """Outputs at level s ~ N(m, v): x_t is a Gaussian, too, whose score is known. There the loss has no slope."""
    generator = torch.Generator().manual_seed(1)
    count, m, v = 400_000, 0.7, 0.3
    x = m + v**0.5 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    noised = renoised(
        x, wide(count, least), wide(count, 0.95), uniform, torch.randn(x.shape, generator=generator).double()
    )
    t, c = noised.t[:, None], noised.c[:, None]
    a = (1 - t) / (1 - least)
    score = -(noised.x - a * m) / (a**2 * v + c**2)
    velocity = -(t * score + noised.x) / (1 - t)  # eps = -t score = x_t + (1 - t) v
    slopes = []
    for direction in (torch.ones_like(t), noised.x, t, noised.x * t):
        moved = velocity.clone().requires_grad_(True)
        fake_loss(moved, noised).sum().backward()
        assert moved.grad is not None
        slopes.append((moved.grad * direction).flatten())
    for slope in slopes:
        error = float(slope.std()) / count**0.5
        assert abs(float(slope.mean())) < 6 * error
    wrong = velocity + 0.3
    assert float(fake_loss(wrong, noised).mean()) > float(fake_loss(velocity, noised).mean())


class Gaussians:
    """Trajectories of one step whose student makes N(mean, spread^2) images, and a teacher whose images are N(0, 1)."""

    def __init__(self, mean: float, spread: float, count: int) -> None:
        self.generator = torch.Generator().manual_seed(2)
        self.mean, self.spread, self.shape = mean, spread, (count, 1)

    def start(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)

    def noise(self, step: int) -> Tensor:
        raise AssertionError("the sampler is deterministic")

    noise_for = lambda self, *purpose: torch.randn(self.shape, generator=self.generator, dtype=torch.float64)  # noqa: E731

    def uniform(self, *purpose: str | int) -> Tensor:
        return torch.full((self.shape[0],), 0.5, dtype=torch.float64)

    def student(self, x: Tensor, step: int) -> Tensor:
        image = self.mean + self.spread * x  # at sigma 1, x is noise
        return (x - image).requires_grad_(True)

    teachers = None

    def teachers_at(self, x: Tensor, sigmas: Tensor) -> Any:
        answer: torch.futures.Future[Tensor] = torch.futures.Future()
        answer.set_result(gaussian_velocity(x, sigmas[:, None], 0.0, 1.0))
        answer.result = answer.wait  # type: ignore[attr-defined]
        return answer


def gaussian_velocity(x: Tensor, t: Tensor, mean: float, variance: float) -> Tensor:
    """The flow of images N(mean, variance)."""
    spread = (1 - t) ** 2 * variance + t**2
    eps = t * (x - (1 - t) * mean) / spread
    return (eps - x) / (1 - t)


def one_match(run: Run, world: Gaussians, fake: Callable[[Tensor, Tensor], Tensor]) -> Any:
    seen: list[Sample] = []
    (match,) = matches(run.path[-1:], [1.0], world, fake, lambda step, clean, next_: (clean, 0.0, 1.0), 0, seen)  # type: ignore[arg-type]
    assert len(seen) == 1
    return match


def single_step(make_run: MakeRun) -> Run:
    run = make_run({**DMD2, "spec.training.sampler": {"type": "ODE", "steps": 1}})
    assert run.path[0].sigma == 1.0
    return run


def test_a_perfect_fake_score_of_a_perfect_student_moves_nothing(make_run: MakeRun) -> None:
    run = single_step(make_run)
    match = one_match(run, Gaussians(0.0, 1.0, 64), lambda x, t: gaussian_velocity(x, t[:, None], 0.0, 1.0))
    run.method.loss(match).sum().backward()  # type: ignore[attr-defined]
    assert float(match.distance.abs().max()) == 0
    assert torch.equal(match.student, match.target)


def test_images_move_along_the_difference_of_the_scores(make_run: MakeRun) -> None:
    """The gradient of KL(p_S || p_T) by an image of the student, in closed form of two Gaussians."""
    run = single_step(make_run)
    world, (mean, spread) = Gaussians(1.5, 0.5, 512), (1.5, 0.5)
    asked: list[tuple[Tensor, Tensor]] = []

    def fake(x: Tensor, t: Tensor) -> Tensor:
        asked.append((x, t[:, None]))
        return gaussian_velocity(x, t[:, None], mean, spread**2)

    match = one_match(run, world, fake)
    ((x, t),) = asked
    ours = -(x - (1 - t) * mean) / ((1 - t) ** 2 * spread**2 + t**2)  # score of p_S(x_t)
    theirs = -x / ((1 - t) ** 2 + t**2)
    clean = match.x - match.student.detach()  # sigma is 1
    teacher = x - t * gaussian_velocity(x, t, 0.0, 1.0)
    # x0_fake - x0_real = (t^2 / (1 - t)) (s_S - s_T), over |x0 - x0_real|: descent on the KL
    g = t**2 / (1 - t) * (ours - theirs) / (clean - teacher).abs()
    torch.testing.assert_close(clean - (match.x - match.target), g, rtol=1e-9, atol=1e-9)
    assert float(g.mean()) > 0  # the student's images are too large: they go down
    run.method.loss(match).sum().backward()  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------- rounds


def step(run: Run, round_: int) -> None:
    play_round(run, round_, lambda: run.engine.step(1e-3))
    run.ema.update(round_)


def snapshot(run: Run) -> dict[str, list[Tensor]]:
    roles = {role: engine.parameters for role, engine in engines_of(run).items()}
    return {name: [t.detach().clone() for t in tensors] for name, tensors in {**roles, **state_of(run)}.items()}


@BOTH
def test_a_round_moves_the_student_and_its_fake_score_and_nothing_else(
    make_run: MakeRun, method: dict[str, Any]
) -> None:
    run = make_run(method)
    assert isinstance(run.method, Distillation)
    assert run.method.fake is not None
    assert run.method.fake.updates == FAKE_UPDATES[run.training.method]
    parameters = dict(run.model.transformer.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    fake, student = adapter_parameters(run.model.transformer, FAKE), run.engine.parameters
    assert all(torch.equal(a, b) for a, b in zip(fake, student, strict=True))
    for round_ in range(2):
        step(run, round_)
    moved = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[-2] for name in moved} == {"student", "fake"}
    assert not all(torch.equal(a, b) for a, b in zip(fake, student, strict=True))
    figures = run.method.figures(run)
    assert 0 < figures["fake_loss"] < 4


@BOTH
def test_micro_batches_and_gradient_checkpointing_do_not_change_the_gradient(
    make_run: MakeRun, method: dict[str, Any]
) -> None:
    whole = gradient(started(make_run, method))
    cut = gradient(started(make_run, {**method, "spec.training.microBatchSize": 1}))
    recomputed = gradient(started(make_run, {**method, "spec.training.gradientCheckpointing": True}))
    assert difference(cut[1], whole[1]) < 1e-4
    assert difference(recomputed[1], whole[1]) < 1e-5


@BOTH
@pytest.mark.parametrize("stage", [0, 1])
def test_both_roles_come_back_exactly(make_run: MakeRun, tmp_path: Path, method: dict[str, Any], stage: int) -> None:
    changes = {**method, "spec.training.deepspeed.zeroStage": stage}
    run = make_run(changes)
    step(run, 0)
    checkpoint.save(tmp_path, 1, engines_of(run), state_of(run), IDENTITY, run.world, 2)
    step(run, 1)
    expected = snapshot(run)

    resumed = make_run(changes)
    found = checkpoint.latest(tmp_path, run.world)
    assert found is not None
    checkpoint.load(*found, engines_of(resumed), state_of(resumed), IDENTITY, run.world)
    step(resumed, 1)
    ours = snapshot(resumed)
    assert set(ours) == {"student", "fake", "ema"}
    assert all(torch.equal(a, b) for name in ours for a, b in zip(ours[name], expected[name], strict=True))


def test_a_checkpoint_without_its_fake_score_is_damaged(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(DMD2)
    before = snapshot(run)
    folder = checkpoint.save(tmp_path, 1, engines_of(run), state_of(run), IDENTITY, run.world, 2)
    (folder / "fake.safetensors").unlink()
    step(run, 0)
    moved = snapshot(run)
    found = checkpoint.latest(tmp_path, run.world)
    assert found is not None
    with pytest.raises(InvalidError, match="damaged"):
        checkpoint.load(*found, engines_of(run), state_of(run), IDENTITY, run.world)
    after = snapshot(run)
    assert all(torch.equal(a, b) for a, b in zip(after["student"], moved["student"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after["student"], before["student"], strict=True))


def test_a_fake_score_that_diverges_ends_the_run(make_run: MakeRun) -> None:
    run = make_run({**TDM, "spec.training.fakeScore": {"updatesPerRound": 2}})
    with torch.no_grad():
        adapter_parameters(run.model.transformer, FAKE)[0].fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"round 1: .* lower training\.fakeScore\.optimizer\.learningRate"):
        step(run, 0)


def test_two_ranks_train_the_same_student_and_fake_score_as_one(trainer: Trainer) -> None:
    changes = {**DMD2, "spec.training.rounds": 2, "spec.training.precision": "FP32"}
    code, output = trainer.run("one-dmd", changes)
    assert code == 0, output
    two = {**changes, "spec.training.processesPerNode": 2, "spec.training.deepspeed.zeroStage": 2}
    code, output = trainer.run("two-dmd", two)
    assert code == 0, output
    for name in ("student", "fake"):
        one, both = (
            load_file(trainer.folder / work / "checkpoints" / "round-000002" / f"{name}.safetensors")
            for work in ("one-dmd", "two-dmd")
        )
        largest = max(float(tensor.abs().max()) for tensor in one.values())
        assert max(float((one[key] - both[key]).abs().max()) for key in one) < 1e-3 * largest
    for line, other in zip(trainer.log("one-dmd"), trainer.log("two-dmd"), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)
        assert other["figures"]["fake_loss"] == pytest.approx(line["figures"]["fake_loss"], rel=1e-3)
