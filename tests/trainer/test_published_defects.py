"""Defects found by reading the published code of DiffusionOPD, each with a test that this code does not have it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from opd_core.api.base import Model
from opd_core.api.load import SpecError
from opd_core.api.training import Objective
from opd_core.diffusion.schedule import Schedule
from opd_core.diffusion.transitions import transitions
from opd_core.errors import InvalidError, RefusedError
from opd_core.teachers.client import ClientStats, TeacherClient
from opd_trainer import rounds
from opd_trainer.checkpoint import Identity
from opd_trainer.engine import World
from opd_trainer.launch import rank_environments
from opd_trainer.loop import play_round
from opd_trainer.methods.opd import one_pass, two_passes
from opd_trainer.methods.rollouts import advance
from opd_trainer.metrics import Metrics
from opd_trainer.objectives.registry import load_loss
from opd_trainer.run import Run
from opd_trainer.setup import build_run
from pydantic import BaseModel
from torch import Tensor

from .conftest import DPM2, SDE

MakeRun = Callable[..., Run]


@dataclass
class Listening:
    """Passes everything on to real teachers and remembers what they were asked."""

    teachers: TeacherClient
    asked: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    failing_request: int | None = None

    @property
    def stats(self) -> ClientStats:
        return self.teachers.stats

    def submit(self, teacher: str, latents: Tensor, sigmas: Tensor, *rest: Any) -> "Future[Tensor]":
        self.asked.append((teacher, latents.clone(), sigmas.clone()))
        if self.failing_request == len(self.asked):
            failed: Future[Tensor] = Future()
            failed.set_exception(RefusedError("teacher answered NaN"))
            return failed
        return self.teachers.submit(teacher, latents, sigmas, *rest)

    def close(self) -> None:
        self.teachers.close()


def listen(run: Run) -> Listening:
    listening = Listening(run.method.teachers)
    run.method.teachers = listening  # type: ignore[assignment]
    return listening


@dataclass
class Scripted:
    """Trajectories with answers that are known: a linear student, teachers that answer zero at once."""

    noises: list[Tensor]
    states: list[Tensor] = field(default_factory=list)

    def start(self) -> Tensor:
        return self.noises[0]

    def noise(self, step: int) -> Tensor:
        return self.noises[step]

    def student(self, x: Tensor, step: int) -> Tensor:
        return 0.3 * x + step

    def teachers(self, x: Tensor, step: int) -> "Future[Tensor]":
        self.states.append(x)
        answer: Future[Tensor] = Future()
        answer.set_result(torch.zeros_like(x))
        return answer


def scripted(steps: int, *shape: int) -> Scripted:
    generator = torch.Generator().manual_seed(0)
    return Scripted([torch.randn(shape, generator=generator) for _ in range(steps)])


def test_a_the_kl_divides_by_the_variance_that_is_sampled(make_run: MakeRun) -> None:
    """The published SDE loss leaves out the factor sqrt(-dt) of the standard deviation."""
    run = make_run(SDE)
    zero, batch = torch.zeros(64, 16, 8, 8), scripted(len(run.path), 64, 16, 8, 8)
    for match in one_pass(run.path, run.method.weights, batch, in_flight=0):
        transition = match.transition
        sampled = float(advance(transition, zero, zero, None, match.noise)[0].std())
        weight = float((run.method.loss(match) / match.error).mean())
        assert weight == pytest.approx(transition.b**2 / (2 * sampled**2), rel=0.02)


def test_b_a_step_without_noise_under_the_kl_is_refused_not_clamped(make_spec) -> None:
    """The published code divides by 1e-8 there, which multiplies the loss by 1e8."""
    for sampler in ({"type": "ODE", "steps": 3}, {"type": "SDE", "steps": 3, "noiseLevel": 0.7, "solver": "DPM2"}):
        with pytest.raises(SpecError, match=r"spec\.training"):
            make_spec({"spec.training.sampler": sampler, "spec.training.objective": {"type": "KL"}})
    path = transitions(Schedule(torch.tensor([1.0, 0.5, 0.0]).double().numpy()), "Flow", 0.0)
    with pytest.raises(InvalidError, match="no finite value at step 0"):
        load_loss(Objective(type="KL"), path)


@pytest.mark.parametrize("sampler", [SDE, DPM2], ids=["SDE", "DPM2"])
@pytest.mark.parametrize("order", [partial(one_pass, in_flight=2), two_passes])
def test_c_the_transition_that_is_trained_is_the_one_that_was_sampled(
    make_run: MakeRun, order: Any, sampler: dict[str, Any]
) -> None:
    """The published dpm2 rolls out with a second-order step and trains a first-order one."""
    run = make_run(sampler)
    batch = scripted(len(run.path), 2, 16, 8, 8)
    matches = list(order(run.path, run.method.weights, batch))
    assert [match.step for match in matches] == list(range(len(run.path)))
    for j, match in enumerate(matches):
        x = batch.states[j]
        assert torch.equal(match.student, batch.student(x, j))
        if j + 1 < len(batch.states):
            t = run.path[j]
            mean = t.a * x + t.b * match.student
            if j > 0:
                mean += t.c * (batch.states[j - 1] - run.path[j - 1].sigma * matches[j - 1].student)
            assert torch.allclose(batch.states[j + 1], mean + t.std * batch.noises[j], atol=1e-6)
    if sampler is DPM2:  # of a step of second order, b is larger than Euler's dt
        assert any(t.c != 0 for t in run.path)
        assert all(t.b < t.sigma_next - t.sigma for t in run.path if t.c != 0)


def test_d_every_step_is_trained_and_no_teacher_is_asked_in_vain(make_run: MakeRun) -> None:
    """The published timestep_fraction 0.99 drops the last step and still asks the teacher about it."""
    run = make_run(SDE)
    listening = listen(run)
    play_round(run, 0)
    assert all(weight > 0 for weight in run.method.weights)
    assert len(listening.asked) == len(run.tasks) * len(run.path)

    chosen = make_run({"spec.training.objective": {"type": "Velocity", "trainedSteps": [1]}})
    listening = listen(chosen)
    play_round(chosen, 0)
    sigmas = torch.cat([sigmas for _, _, sigmas in listening.asked])
    assert torch.allclose(sigmas, torch.tensor(chosen.path[1].sigma))
    assert len(listening.asked) == len(chosen.tasks)


EVALUATED = {
    "spec.evaluation.everyRounds": 1,
    "spec.evaluation.promptsPerTask": 1,
    "spec.evaluation.sampler": {"steps": 1},
    "spec.evaluation.gate": [],
    "spec.training.rounds": 2,
}
NOT_OF_THE_TRAINER = {
    ("Training", "pod"): "of who makes pods",
    ("TeacherServing", "pod"): "of who makes pods",
    ("TeacherServing", "replicas"): "of who starts servers",
    ("Student", "output"): "of the evaluator, which publishes what passes the gate",
    ("Teacher", "training"): "of the program that trains a teacher",
    ("Training", "reinforcement"): "of another method, which test_reinforcement is about",
    ("Evaluation", "gate"): "of the evaluator",
    ("Evaluation", "pod"): "of who makes pods",
    ("LoRA", "type"): "has one value",
    ("Sampler", "type"): "is held to noiseLevel before anything starts",
    ("EvaluationSampler", "type"): "is held to noiseLevel before anything starts",
}


def options(part: BaseModel) -> Iterator[tuple[str, str]]:
    """(class, field) of a part of the spec and of all parts below it."""
    for name in type(part).model_fields:
        option, value = (type(part).__name__, name), getattr(part, name)
        yield option
        for below in value if isinstance(value, list) else [value]:
            if isinstance(below, BaseModel) and option not in NOT_OF_THE_TRAINER:
                yield from options(below)


def test_e_no_option_is_offered_that_nobody_reads(
    make_spec, world: World, tiny_claims: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published configuration has beta, clip_range, resume_from, save_freq and more that its script never reads."""
    spec = make_spec({**SDE, **EVALUATED}).spec
    with_fake = {"spec.training.fakeScore": {"updatesPerRound": 1, "optimizer": {"learningRate": 1e-4}}}
    other = make_spec({"spec.training.method": "DMD2", "spec.training.objective": {"type": "X0"}, **with_fake}).spec
    of_branches = make_spec({"spec.training.objective": {"type": "PDM"}}).spec.training.objective
    parts = (spec.model, spec.student, *spec.teachers, spec.teacher_serving, spec.training, spec.evaluation)
    parts = (*parts, other.training.fake_score)
    offered = {option for part in parts for option in options(part)}
    read: set[tuple[str, str]] = set()

    def spy(self: BaseModel, name: str) -> Any:
        if name in type(self).model_fields:
            read.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "__getattribute__", spy)
        rank_environments(spec.training, {})
        run = build_run(spec, tiny_claims, [], "cpu", world)
        play(run, tmp_path, until=2)
        run.engine.close()
        matching = build_run(other, tiny_claims, [], "cpu", world)
        play_round(matching, 0)
        matching.engine.close()
        load_loss(of_branches, matching.path)
    assert offered - read == set(NOT_OF_THE_TRAINER)
    with pytest.raises(SpecError, match=r"spec\.training\.beta"):
        make_spec({"spec.training.beta": 0.1})


def play(run: Run, work: Path, until: int) -> Metrics:
    """As the program does: continue at the newest checkpoint in `work`, stop after round `until`."""
    identity = Identity(training_digest="", base="", teachers={}, prompts={}, world_size=1, zero_stage=0)
    metrics = Metrics([task.name for task in run.tasks], run.training.rounds)
    start = rounds.resume(run, work, identity, metrics)
    left = iter(range(until - start))
    stop = SimpleNamespace(requested=lambda: next(left) == until - start - 1 and until < run.training.rounds)
    assert rounds.play(run, work, start, identity, metrics, stop) == until  # type: ignore[arg-type]
    return metrics


def test_f_what_is_learnt_is_saved_and_a_new_start_continues_there(make_run: MakeRun, tmp_path: Path) -> None:
    """The published script never calls its save function, keeps no optimiser state, cannot resume and never ends."""
    whole = make_run()
    play(whole, tmp_path / "whole", until=whole.training.rounds)
    assert len((tmp_path / "whole" / "train" / "log.jsonl").read_text().splitlines()) == whole.training.rounds

    stopped = make_run()
    play(stopped, tmp_path / "halves", until=3)
    resumed = make_run()
    assert play(resumed, tmp_path / "halves", until=4).progress["round"] == 4
    for ours, theirs in (
        (resumed.engine.parameters, whole.engine.parameters),  # Adam's moments show in the step after them
        (resumed.ema.tensors, whole.ema.tensors),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_g_a_missing_answer_never_becomes_a_target(make_run: MakeRun) -> None:
    """The published code pads missing teachers with zeros, which pulls the student towards zero."""
    run = make_run()
    listen(run).failing_request = 5
    with pytest.raises(RefusedError, match="answered NaN"):
        play_round(run, 0)


def test_every_task_has_its_own_teacher_and_all_share_one_step(make_run: MakeRun) -> None:
    run = make_run()
    listening = listen(run)
    steps: Sequence[bool] = []
    backward = run.engine.backward
    run.engine.backward = lambda loss, last: (steps.append(last), backward(loss, last))  # type: ignore
    play_round(run, 0)
    assert {name for name, _, _ in listening.asked} == {task.name for task in run.tasks}
    assert steps == [False] * (len(run.path) - 1) + [True]
