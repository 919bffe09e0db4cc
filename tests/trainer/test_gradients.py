"""The gradient of a round: against an implementation of its own, in both orders, in any cut of the batch."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from opd_core.diffusion.noise import draw
from opd_core.models.adapters import load_adapter, use_adapter
from opd_core.models.pipeline import load_model
from opd_core.uris import resolve
from opd_trainer.loop import Sums, play_round
from opd_trainer.prompts import training_prompt
from opd_trainer.run import STUDENT, Run
from opd_trainer.setup import all_teachers
from torch import Tensor

from .conftest import SDE

MakeRun = Callable[..., Run]


def started(make_run: MakeRun, changes: dict[str, Any]) -> Run:
    """A run whose student has left the base: at the start B is zero and so is A's gradient."""
    run = make_run(changes)
    with torch.no_grad():
        for i, parameter in enumerate(run.engine.parameters):
            parameter.add_(draw(parameter.shape, "start", i), alpha=0.02)
    return run


def gradient(run: Run, round_: int = 0) -> tuple[Sums, list[Tensor]]:
    """Losses and errors per task and step, and the gradient of one round."""
    sums = play_round(run, round_)
    gradients = [parameter.grad.clone() for parameter in run.engine.parameters]
    for parameter in run.engine.parameters:
        parameter.grad = None
    return sums, gradients


def largest(gradients: list[Tensor]) -> float:
    return max(float(g.abs().max()) for g in gradients)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest(theirs)


PDM = {"spec.training.objective": {"type": "PDM", "directionWeight": 0.5}}


@pytest.mark.parametrize("sampler", [{}, SDE, PDM], ids=["ODE", "SDE", "PDM"])
def test_one_pass_and_two_passes_have_equal_gradients(make_run: MakeRun, sampler: dict[str, Any]) -> None:
    one = gradient(started(make_run, {**sampler, "spec.training.passes": "One"}))
    two = gradient(started(make_run, {**sampler, "spec.training.passes": "Two"}))
    assert largest(one[1]) > 0
    assert torch.equal(one[0].losses, two[0].losses)
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


@pytest.mark.parametrize("trained", [{}, {"spec.training.method": "SFT"}, PDM], ids=["OPD", "SFT", "PDM"])
def test_micro_batches_and_gradient_checkpointing_do_not_change_the_gradient(
    make_run: MakeRun, trained: dict[str, Any]
) -> None:
    whole = gradient(started(make_run, trained))
    cut = gradient(started(make_run, {**trained, "spec.training.microBatchSize": 1}))
    recomputed = gradient(started(make_run, {**trained, "spec.training.gradientCheckpointing": True}))
    assert difference(cut[1], whole[1]) < 1e-4
    assert difference(recomputed[1], whole[1]) < 1e-5


DRAWN = {"spec.training.objective": {"type": "PolicyGradient", "stepsPerRound": 2}}


@pytest.mark.parametrize(
    "changes",
    [{}, {"spec.training.method": "SFT"}, {**SDE, **DRAWN}, PDM],
    ids=["OPD", "SFT", "policy gradient, 2 of 3 steps", "PDM"],
)
def test_two_ranks_average_to_what_one_rank_computes(make_run: MakeRun, changes: dict[str, Any]) -> None:
    """The slices of two ranks, computed one after the other here; DeepSpeed's average is tested with real ranks."""
    from opd_trainer.batches import rank_rows
    from opd_trainer.engine import World

    run = started(make_run, {**changes, "spec.training.processesPerNode": 2})
    run.batches = rank_rows(3, 2, 0, 1, None)
    whole = gradient(run)
    slices = []
    for rank in range(2):
        run.world, run.batches = World(rank, 2, rank), rank_rows(3, 2, rank, 2, None)
        slices.append(gradient(run))
    mean = [(a + b) / 2 for a, b in zip(slices[0][1], slices[1][1], strict=True)]
    assert difference(mean, whole[1]) < 1e-4
    assert torch.allclose(slices[0][0].losses + slices[1][0].losses, whole[0].losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"spec.training.objective": {"type": "Velocity"}, "spec.teachers.0.weight": 3.0}, 0.0),
        ({"spec.training.objective": {"type": "MeanMatching"}, "spec.teachers.1.guidanceScale": 1.0}, 0.0),
        ({**SDE, "spec.training.guidanceScale": 1.0}, 0.7),
        ({**PDM, "spec.teachers.1.guidanceScale": 2.0}, 0.0),
    ],
    ids=["velocity, weighted tasks", "mean matching, an unguided teacher", "KL, an unguided student", "PDM"],
)
def test_gradient_is_that_of_the_papers_objective(
    make_run: MakeRun, make_spec, tiny_claims, changes: dict[str, Any], level: float
) -> None:
    """Eq. 11 and 12, and PDM's, written down again: one image at a time, means instead of velocities, no shared code but the model."""
    run = started(make_run, changes)
    spec = make_spec(changes).spec
    training = spec.training
    model = load_model(resolve(spec.model.uri, tiny_claims), parts={"text", "transformer"})
    transformer = run.model.transformer
    for name, adapter in all_teachers(spec, tiny_claims).items():
        load_adapter(model.transformer, adapter, name)

    def branches(network: Any, x: Tensor, sigma: float, prompt: str, guidance: float) -> tuple[Tensor, Tensor]:
        def plain(text: str) -> Tensor:
            c = model.encode([text], spec.model.max_sequence_length)[0]
            return network(
                hidden_states=x[None], timestep=torch.tensor([1000 * sigma]),
                encoder_hidden_states=c.tensors["embeds"][None], pooled_projections=c.tensors["pooled"][None], return_dict=False,
            )[0][0]  # fmt: skip

        positive = plain(prompt)
        return positive, positive if guidance == 1 else plain("")

    def guided(both: tuple[Tensor, Tensor], guidance: float) -> Tensor:
        return both[1] + guidance * (both[0] - both[1])

    shift = model.scheduler_config["shift"]

    def shifted(time: Any) -> Any:
        return shift * time / (1 + (shift - 1) * time)

    # As in diffusers, the smallest of the training sigmas is shifted once more.
    sigmas = [*shifted(torch.linspace(1, shifted(1 / 1000), training.sampler.steps, dtype=torch.float64)).tolist(), 0.0]
    total = torch.zeros(())
    weights = sum(teacher.weight for teacher in spec.teachers)
    for index, teacher in enumerate(spec.teachers):
        for sample in range(training.images_per_task):
            prompt = training_prompt(run.tasks[index].prompts, training.seed, teacher.name, sample).prompt
            x = draw((16, 8, 8), training.seed, "start", teacher.name, 0, sample)
            for j, (s, t) in enumerate(pairwise(sigmas)):
                d, spread = t - s, level * (s / (1 - (sigmas[1] if s == 1 else s))) ** 0.5

                def mean(x: Tensor, v: Tensor, s: float = s, d: float = d, spread: float = spread) -> Tensor:
                    return x + (v + spread**2 / (2 * s) * (x + (1 - s) * v)) * d

                student = branches(transformer, x, s, prompt, training.guidance_scale)
                use_adapter(model.transformer, teacher.name)
                with torch.no_grad():
                    taught = branches(model.transformer, x, s, prompt, teacher.guidance_scale)
                ours, theirs = guided(student, training.guidance_scale), guided(taught, teacher.guidance_scale)
                if training.objective.type == "PDM":
                    positive, negative = (a - b for a, b in zip(student, taught, strict=True))
                    term = positive.square().mean() + 0.5 * (positive - negative).square().mean()
                elif training.objective.type == "Velocity":
                    term = (ours - theirs).square().mean()
                else:
                    variance = spread**2 * -d if level else 1.0
                    term = ((mean(x, ours) - mean(x, theirs)).square() / (2 * variance)).mean()
                total = total + teacher.weight / weights / training.images_per_task * term
                x = mean(x, ours).detach()
                if level:
                    noise = draw((16, 8, 8), training.seed, "step", j, teacher.name, 0, sample)
                    x = x + spread * (-d) ** 0.5 * noise
    expected = torch.autograd.grad(total, run.engine.parameters)
    sums, found = gradient(run)
    assert difference(found, list(expected)) < 2e-4
    shares = torch.tensor([task.share for task in run.tasks])
    means = sums.losses / training.images_per_task
    assert float(means.sum(1) @ shares.double()) == pytest.approx(float(total.detach()), rel=1e-4)


def test_the_student_is_the_only_thing_that_learns(make_run: MakeRun) -> None:
    run = started(make_run, {})
    play_round(run, 0)
    trained = {name for name, p in run.model.transformer.named_parameters() if p.grad is not None}
    assert trained
    assert all(f".{STUDENT}." in name for name in trained)


@pytest.mark.parametrize("precision", ["BF16", "FP16"])
def test_half_precision_follows_float32(make_run: MakeRun, precision: str) -> None:
    """Also with losses so small that float16 gradients would vanish without their scale."""
    exact = gradient(started(make_run, {}))[1]
    run = started(make_run, {"spec.training.precision": precision})
    run.method.weights = tuple(weight * 2.0**-30 for weight in run.method.weights)
    half = [g * 2.0**30 for g in gradient(run)[1]]
    ours, theirs = (torch.cat([g.flatten() for g in gradients]) for gradients in (half, exact))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.98
    assert float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.1)
    assert run.engine.parameters[0].dtype == torch.float32
