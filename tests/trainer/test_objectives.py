"""Losses against oracles written from the formulas of the papers, and how a spec names and weights them."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opd_core.api.training import Objective as ObjectiveSpec
from opd_core.diffusion.guidance import combined
from opd_core.diffusion.schedule import Schedule, schedule_from_config
from opd_core.diffusion.transitions import Transition, transitions
from opd_core.errors import InvalidError
from opd_core.families.guidance import CLASSIFIER_FREE, EMBEDDED, NONE, Guidance
from opd_core.scales import Scales
from opd_core.uris import resolve
from opd_trainer.loop import play_round
from opd_trainer.methods import sft
from opd_trainer.objectives import policy, squared
from opd_trainer.objectives.match import Branches, Match, Objective
from opd_trainer.objectives.pdm import pdm
from opd_trainer.objectives.registry import branch_problems, find_objective, load_loss, round_weights, step_weights
from opd_trainer.preflight import data_problems
from torch import Tensor

from .test_published_defects import scripted

NOISY = Transition(sigma=0.8, sigma_next=0.6, a=0.9, b=-0.3, std=0.2)


def schedule(steps: int = 10) -> Schedule:
    return schedule_from_config({"shift": 3.0}, steps)


def match(step: Transition = NOISY, rows: int = 3, size: int = 8, seed: int = 0) -> Match:
    """A student's velocity with a graph, a target near it, and the noise of a sampled step."""
    generator = torch.Generator().manual_seed(seed)
    x, noise, student, target = (torch.randn(rows, size, generator=generator) for _ in range(4))
    return Match(0, step, x, noise, student.requires_grad_(), target)


# ---------------------------------------------------------------- squared distances


@pytest.mark.parametrize(("solver", "eta"), [("Flow", 0.7), ("Dance", 0.5), ("DDIM", 0.6), ("CPS", 0.6)])
def test_closed_form_kl_is_the_monte_carlo_kl_of_what_is_sampled(solver: str, eta: float) -> None:
    """E_student[log p_S(x') - log p_T(x')] over the transitions that the sampler really draws."""
    rng = np.random.default_rng(1)
    path = transitions(schedule(), solver, eta)
    for j in (2, 5, 8):
        step, x, vs, vt = path[j], 0.4, 0.9, 0.9 + 0.3 * path[j].std / abs(path[j].b)
        mean_s, mean_t = step.a * x + step.b * vs, step.a * x + step.b * vt
        drawn = mean_s + step.std * rng.standard_normal(400_000)
        log_ratio = ((drawn - mean_t) ** 2 - (drawn - mean_s) ** 2) / (2 * step.std**2)
        assert squared.kl_weight(step) * (vs - vt) ** 2 == pytest.approx(log_ratio.mean(), rel=0.03)


def test_kl_divides_by_the_variance_with_its_dt() -> None:
    """The published loop divides by std_dev_t^2 without -dt (its weights are -dt times ours)."""
    for step in transitions(schedule(), "Flow", 0.7)[1:]:
        s, dt, a = step.sigma, step.sigma_next - step.sigma, 0.7
        expected = (1 + a**2 / 2) ** 2 * (1 - s) * -dt / (2 * a**2 * s)
        assert squared.kl_weight(step) == pytest.approx(expected, rel=1e-9)


def test_step_shares_are_those_of_the_paper_on_ten_sd35_steps() -> None:
    ode = np.array([squared.mean_weight(step) for step in transitions(schedule(), "Flow", 0.0)])
    sde = np.array([squared.kl_weight(step) for step in transitions(schedule(), "Flow", 0.7)])
    np.testing.assert_allclose(100 * ode / ode.sum(), [1.0, 1.4, 2.0, 2.9, 4.4, 7.1, 12.1, 22.4, 46.5, 0.05], atol=0.06)
    np.testing.assert_allclose(
        100 * sde / sde.sum(), [0.05, 0.1, 0.25, 0.5, 1.1, 2.1, 4.4, 10.3, 33.6, 47.6], atol=0.06
    )


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("MeanMatching", lambda m, v: NOISY.mean(m.x, v) / math.sqrt(2)),
        ("KL", lambda m, v: NOISY.mean(m.x, v) / (math.sqrt(2) * NOISY.std)),
        ("Velocity", lambda m, v: v),
        ("X0", lambda m, v: NOISY.clean(m.x, v)),
    ],
)
def test_a_squared_distance_is_that_of_what_it_is_named_after(name: str, of: Any) -> None:
    """And its self-normalised form divides each image's by its mean absolute distance, without a gradient of that."""
    found, given = find_objective(name), match()
    away = of(given, given.student) - of(given, given.target)
    torch.testing.assert_close(found.loss(given), away.square().mean(1))
    assert found.normalized is not None
    expected = (away.square().mean(1) / away.detach().abs().mean(1)).sum()
    torch.testing.assert_close(found.normalized(given).sum(), expected)
    (ours,) = torch.autograd.grad(found.normalized(given).sum(), given.student)
    (theirs,) = torch.autograd.grad(expected, given.student)
    torch.testing.assert_close(ours, theirs)


def test_a_student_that_is_its_teacher_has_no_gradient() -> None:
    for name in ("MeanMatching", "KL", "Velocity", "X0"):
        found, given = find_objective(name), match()
        given = replace(given, target=given.student.detach())
        for loss in (found.loss, found.normalized):
            assert loss is not None
            (gradient,) = torch.autograd.grad(loss(given).sum(), given.student, retain_graph=True)
            assert not gradient.any()


# ---------------------------------------------------------------- policy gradients


def gradients(loss: Any, given: Match) -> Tensor:
    """Of every row alone, [B, size]."""
    (found,) = torch.autograd.grad(loss(given).sum(), given.student, retain_graph=True)
    return found


@pytest.mark.parametrize("loss", [policy.ppo, policy.policy_gradient])
def test_policy_gradients_are_the_kls_in_expectation_and_vary(loss: Any) -> None:
    """Over the actions of one state. Each of the 8 means is held to 6 standard errors: one false alarm in 10^7."""
    one, rows = match(rows=1), 200_000
    student = one.student.detach().expand(rows, -1).clone().requires_grad_()
    noise = torch.randn(rows, 8, generator=torch.Generator().manual_seed(5))
    given = Match(0, NOISY, one.x.expand(rows, -1), noise, student, one.target.expand(rows, -1))
    exact = gradients(squared.KL.loss, given)
    sampled = gradients(loss, given)
    assert float(exact.var(0).max()) == 0
    assert float(sampled.var(0).min()) > 0
    errors = (sampled.mean(0) - exact[0]).abs() / (sampled.std(0) / math.sqrt(rows))
    assert float(errors.max()) < 6
    assert float((sampled.std(0) / math.sqrt(rows) / exact[0].abs()).max()) < 0.1  # the test can see a gradient


def test_the_ratio_is_one_and_its_gradient_the_scores() -> None:
    """log p(a) = -(a - mu)^2 / (2 std^2), mean over elements, of the action a that was sampled."""
    given = match()
    assert given.noise is not None
    assert torch.equal(policy.ratio(given), torch.ones(3))
    mean = NOISY.mean(given.x, given.student)
    action = (mean + NOISY.std * given.noise).detach()
    log_probability = -(action - mean).square().mean(1) / (2 * NOISY.std**2)
    (theirs,) = torch.autograd.grad(log_probability.sum(), given.student)
    torch.testing.assert_close(gradients(policy.ratio, given), theirs)


def test_the_reported_policy_gradient_is_a_sampled_kl() -> None:
    rows = 100_000
    given = match(rows=rows)
    kl = squared.KL.loss(given).detach()
    sampled = policy.policy_gradient(given).detach()
    error = (sampled - kl).std() / math.sqrt(rows)
    assert abs(float((sampled - kl).mean())) < 6 * float(error)


# ---------------------------------------------------------------- both branches of guidance


def branched(student: Tensor, target: Tensor, guidance: float = 4.5) -> Match:
    """The match of so many branches [B, 2, size], with guidance `guidance` on both sides."""
    scales = torch.tensor([Scales(guidance)] * len(student))
    of_student, of_target = (combined(CLASSIFIER_FREE, both, scales) for both in (student, target))
    zero = torch.zeros_like(of_target)
    return Match(0, NOISY, zero, None, of_student, of_target, branches=Branches(student, target))


def branches(*seeds: int) -> list[Tensor]:
    return [torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_pdm_is_the_positive_error_and_the_direction_error(weight: float) -> None:
    """And so is its gradient, of the student's branches alone."""
    student, target = branches(1, 2)
    student.requires_grad_()
    target.requires_grad_()
    loss = load_loss(spec(type="PDM", directionWeight=weight), transitions(schedule(), "Flow", 0.0))
    found = loss(branched(student, target.detach()))
    direction = (student[:, 0] - student[:, 1]) - (target[:, 0] - target[:, 1])
    expected = ((student[:, 0] - target[:, 0]) ** 2).mean(1) + weight * (direction**2).mean(1)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(of.sum(), student)[0] for of in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_errors_that_cancel_at_one_guidance_are_seen() -> None:
    """e+ = (g - 1) / g e- leaves no guided error; PDM is zero only where both branches are matched."""
    (target,), g = branches(2), 4.5
    (error,) = branches(3)
    error[:, 0] = (g - 1) / g * error[:, 1]
    given = branched(target + error, target, g)
    assert float(given.error.max()) < 1e-10
    assert float(pdm(1.0)(given).min()) > 0.01
    assert not pdm(1.0)(branched(target, target)).any()


def test_pdm_is_the_guided_distance_where_the_negative_branches_agree() -> None:
    """|g e+|^2 = (1 + lambda) |e+|^2 at lambda = g^2 - 1, and so are the gradients by the positive prediction."""
    student, target = branches(1, 2)
    student[:, 1] = target[:, 1]
    student.requires_grad_()
    given = branched(student, target, guidance=4.5)
    losses = pdm(4.5**2 - 1)(given), squared.VELOCITY.loss(given)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(of.sum(), student, retain_graph=True)[0][:, 0] for of in losses))


PARTS = [r"spec\.training", *(rf"spec\.teachers\[{i}\]" for i in range(3))]
TRUE_CFG_SCALES = ["spec.training.trueCfgScale", *(f"spec.teachers.{i}.trueCfgScale" for i in range(3))]


@pytest.mark.parametrize(
    ("guidance", "changes", "words"),
    [
        (CLASSIFIER_FREE, {}, []),
        (
            CLASSIFIER_FREE,
            {"spec.training.guidanceScale": 1.0},
            [r"spec\.training\.guidanceScale is 1, .* more than 1"],
        ),
        (
            CLASSIFIER_FREE,
            {"spec.teachers.1.guidanceScale": 1.0},
            [r"spec\.teachers\[1\]\.guidanceScale is 1, .*Velocity"],
        ),
        (Guidance(off=0.0, combine=CLASSIFIER_FREE.combine), {"spec.training.guidanceScale": 1.0}, []),
        (EMBEDDED, {}, [rf"{part}\.trueCfgScale is 1, .* more than 1" for part in PARTS]),
        (EMBEDDED, dict.fromkeys(TRUE_CFG_SCALES, 2.0), []),
        (NONE, {}, ["this model has no second one; write objective.type: Velocity"]),
    ],
)
def test_branches_that_are_not_there_are_refused(
    make_spec: Any, guidance: Guidance, changes: dict[str, Any], words: list[str]
) -> None:
    found = list(branch_problems(make_spec({"spec.training.objective": {"type": "PDM"}, **changes}).spec, guidance))
    assert len(found) == len(words)
    for problem, expected in zip(found, words, strict=True):
        assert re.search(expected, problem), problem
    assert not list(branch_problems(make_spec(changes).spec, guidance))


def test_neither_preflight_nor_trainer_takes_a_student_without_a_second_branch(
    make_spec: Any, make_run: Any, tiny_claims: Path
) -> None:
    unguided = {"spec.training.objective": {"type": "PDM"}, "spec.training.guidanceScale": 1.0}
    (problem,) = data_problems(make_spec(unguided).spec, tiny_claims, partial(resolve, claims=tiny_claims))
    assert "spec.training.guidanceScale is 1" in problem
    with pytest.raises(InvalidError, match=r"spec\.training\.guidanceScale is 1"):
        make_run(unguided)


def test_the_plan_counts_the_graphs_of_both_branches(make_run: Any) -> None:
    """As much as a guided velocity, near twice as much as one without guidance."""
    both, guided, unguided = (
        make_run(changes).plan.needed
        for changes in (
            {"spec.training.objective": {"type": "PDM"}},
            {},
            {"spec.training.guidanceScale": 1.0},
        )
    )
    assert both == pytest.approx(guided, rel=0.02)
    assert both > 1.8 * unguided


# ---------------------------------------------------------------- of a spec


def spec(**fields: Any) -> ObjectiveSpec:
    return ObjectiveSpec.model_validate(fields)


PLUGIN = Objective(lambda match: match.error.sqrt())


def test_an_objective_of_another_package_is_a_function_of_a_match() -> None:
    loss = load_loss(spec(type=f"{__name__}:PLUGIN"), transitions(schedule(), "Flow", 0.0))
    given = match()
    assert torch.equal(loss(given), given.error.sqrt())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kl", "there is no objective kl; registered are KL, MeanMatching, PDM, PPO, PolicyGradient, Velocity, X0"),
        ("no_such_module:LOSS", "objective no_such_module:LOSS cannot be imported"),
        (f"{__name__}:NOISY", "is Transition; an objective is a"),
    ],
)
def test_what_is_no_objective_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        find_objective(name)


def test_what_has_no_self_normalised_form_is_refused() -> None:
    with pytest.raises(InvalidError, match=r"selfNormalized is true, and objective\.type PPO has no such form"):
        load_loss(spec(type="PPO", selfNormalized=True), transitions(schedule(), "Flow", 0.7))


@pytest.mark.parametrize("name", ["KL", "PPO", "PolicyGradient"])
@pytest.mark.parametrize(
    ("solver", "eta", "step"), [("Flow", 0.0, 0), ("DPM2", 0.0, 0), ("DDIM", 0.7, 9), ("CPS", 0.7, 9)]
)
def test_a_step_without_noise_is_refused_not_clamped(name: str, solver: str, eta: float, step: int) -> None:
    path = transitions(schedule(), solver, eta)
    with pytest.raises(InvalidError, match=f"no finite value at step {step} "):
        load_loss(spec(type=name), path)
    if step:
        assert load_loss(spec(type=name, stepWeights=[1.0] * step + [0.0]), path)


def test_every_step_is_trained_unless_told_otherwise() -> None:
    """The published loop drops the last step: 48 % of the KL's weight."""
    assert step_weights(spec(), 4) == (1.0, 1.0, 1.0, 1.0)
    assert step_weights(spec(trainedSteps=[0, 3]), 4) == (1.0, 0.0, 0.0, 1.0)
    assert step_weights(spec(stepWeights=[0, 0.5, 2]), 3) == (0.0, 0.5, 2.0)


@pytest.mark.parametrize("trained", [[10], [0, 11]])
def test_trained_steps_outside_the_path_are_refused(trained: list[int]) -> None:
    with pytest.raises(InvalidError, match="name steps from 0 to 9"):
        step_weights(spec(trainedSteps=trained), 10)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0, 0.0]])
def test_weights_that_fit_no_path_are_refused(weights: list[float]) -> None:
    with pytest.raises(InvalidError, match="write 3 numbers, one of them above 0"):
        step_weights(spec(stepWeights=weights), 3)


def test_drawn_steps_stand_for_all_of_them() -> None:
    """Each is drawn as often as another, and the weights of a step over all rounds average to its own."""
    weights = (1.0, 0.0, 2.0, 3.0)
    drawn = [round_weights(weights, 1, 7, round_) for round_ in range(3000)]
    assert all(sum(weight > 0 for weight in one) == 1 for one in drawn)
    assert np.mean(drawn, axis=0) == pytest.approx(weights, rel=0.15, abs=0)  # 5.7 standard errors
    assert drawn[:50] == [round_weights(weights, 1, 7, round_) for round_ in range(50)]
    assert drawn[:50] != [round_weights(weights, 1, 8, round_) for round_ in range(50)]
    assert round_weights(weights, None, 7, 0) == round_weights(weights, 3, 7, 0) == weights


# ---------------------------------------------------------------- supervised fine-tuning


def test_sft_learns_the_flow_to_the_images_that_the_teachers_make() -> None:
    """Teachers that answer zero leave the start as the image; every query comes before the first match."""
    path = transitions(schedule(3), "Flow", 0.0)
    batch = scripted(3, 2, 16, 8, 8)
    x0 = batch.noises[0]
    found = list(sft.matches(path, (1.0, 0.0, 1.0), batch))
    assert [one.step for one in found] == [0, 2]
    assert len(batch.states) == len(path)
    for one in found:
        noise, sigma = batch.noises[one.step], path[one.step].sigma
        torch.testing.assert_close(one.x, (1 - sigma) * x0 + sigma * noise)
        torch.testing.assert_close(one.target, noise - x0)
        torch.testing.assert_close(one.student, batch.student(one.x, one.step))


def test_a_perfect_student_of_straight_flows_has_no_error() -> None:
    """Where x0 is known, v = (x - x0) / sigma is the velocity at x: the target, whatever the noise."""
    path = transitions(schedule(4), "Flow", 0.0)
    batch = scripted(4, 2, 16, 8, 8)
    for one in sft.matches(path, [1.0] * 4, batch):
        torch.testing.assert_close(one.target, (one.x - batch.noises[0]) / one.transition.sigma, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- beyond the teacher


def test_the_target_lies_on_the_way_from_the_base_through_the_teacher(make_run: Any) -> None:
    """A new student is the base: v_S - target is then extrapolation (v_base - v_T), with one guidance for both."""
    changes = {f"spec.teachers.{i}.guidanceScale": 2.0 for i in range(3)} | {"spec.training.guidanceScale": 2.0}
    drawn = {"type": "Velocity", "trainedSteps": [0]}
    plain = play_round(make_run({**changes, "spec.training.objective": drawn}), 0)
    beyond = play_round(make_run({**changes, "spec.training.objective": {**drawn, "extrapolation": 1.5}}), 0)
    assert float(plain.errors[:, 0].min()) > 0
    torch.testing.assert_close(beyond.errors, 1.5**2 * plain.errors, rtol=1e-4, atol=0)


def test_both_branches_are_extrapolated(make_run: Any) -> None:
    """PDM's errors are linear in the branches', so its loss grows by the square, as the guided distance does."""
    changes = {f"spec.teachers.{i}.guidanceScale": 4.5 for i in range(3)} | {"spec.training.guidanceScale": 4.5}
    drawn = {"type": "PDM", "trainedSteps": [0]}
    plain = play_round(make_run({**changes, "spec.training.objective": drawn}), 0)
    beyond = play_round(make_run({**changes, "spec.training.objective": {**drawn, "extrapolation": 1.5}}), 0)
    assert float(plain.losses[:, 0].min()) > 0
    torch.testing.assert_close(beyond.losses, 1.5**2 * plain.losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(beyond.errors, 1.5**2 * plain.errors, rtol=1e-4, atol=0)
