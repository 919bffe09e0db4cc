"""The objective of a spec: its loss by name, and how much every solver step counts."""

from collections.abc import Iterator, Sequence

import torch
from opd_core.api import training
from opd_core.api.types import Spec
from opd_core.diffusion.noise import keyed_seed
from opd_core.diffusion.transitions import Transition
from opd_core.errors import InvalidError
from opd_core.families.guidance import Guidance
from opd_core.plugins import find_plugin

from opd_trainer.objectives.match import Loss, Objective


def find_objective(name: str) -> Objective:
    """
    Raises:
        InvalidError: unknown, no objective, or a package of it cannot be imported.
    """
    found = find_plugin("objective", name)
    if not isinstance(found, Objective):
        raise InvalidError(f"{name} is {type(found).__name__}; an objective is a {Objective.__module__}.Objective")
    return found


def load_loss(spec: training.Objective, path: Sequence[Transition]) -> Loss:
    """The loss that a spec asks for.

    Raises:
        InvalidError: as `find_objective`; no self-normalised form; a step without noise where noise is needed.
    """
    objective = find_objective(spec.type)
    for j, (step, weight) in enumerate(zip(path, step_weights(spec, len(path)), strict=True)):
        if objective.needs_noise and weight > 0 and step.std == 0:
            raise InvalidError(
                f"objective.type {spec.type} has no finite value at step {j} (sigma {step.sigma:.4f}), which this "
                "sampler takes without noise; use objective.type MeanMatching, a solver with noise at that step, or "
                "leave the step out of objective.trainedSteps"
            )
    if not spec.self_normalized:
        return objective.of_branches(spec.direction_weight) if objective.of_branches else objective.loss
    if objective.normalized is None:
        raise InvalidError(
            f"objective.selfNormalized is true, and objective.type {spec.type} has no such form; write false"
        )
    return objective.normalized


def branch_problems(spec: Spec, guidance: Guidance) -> Iterator[str]:
    """Why both branches of guidance cannot be compared, where the objective does that: one line each.

    Args:
        guidance: of the base's family.
    """
    settings = spec.training.objective
    if spec.training.method == training.Method.RL or find_objective(settings.type).of_branches is None:
        return
    path = f"spec.training.objective.type is {settings.type}"
    if spec.training.method != training.Method.OPD:
        yield (
            f"{path}, which compares both branches of guidance, and method {spec.training.method} has one target; "
            "write method: OPD, or objective.type: Velocity"
        )
    if guidance.off is None:
        yield (
            f"{path}, which compares both branches of guidance, and this model has no second one; write "
            "objective.type: Velocity"
        )
        return
    of_all = {"spec.training": spec.training.scales}
    of_all |= {f"spec.teachers[{i}]": each.scales for i, each in enumerate(spec.teachers)}
    for part, scales in of_all.items():
        if not guidance.guides(scales):
            yield (
                f"{part}.{guidance.field} is {scales[guidance.column]:g}, which turns guidance off, and objective.type "
                f"{settings.type} compares both of its branches; write more than {guidance.off:g}, or objective.type: "
                "Velocity"
            )


def step_weights(spec: training.Objective, steps: int) -> tuple[float, ...]:
    """What every one of N solver steps counts in the loss, [N]; 0 for a step that is not trained.

    Raises:
        InvalidError: a step outside the path, another number of weights, or no step that counts.
    """
    if spec.step_weights is not None:
        if len(spec.step_weights) != steps or not any(spec.step_weights):
            raise InvalidError(
                f"objective.stepWeights is {spec.step_weights}; write {steps} numbers, one of them above 0"
            )
        return tuple(spec.step_weights)
    chosen = range(steps) if spec.trained_steps is None else spec.trained_steps
    if not chosen or any(j not in range(steps) for j in chosen):
        raise InvalidError(f"objective.trainedSteps is {list(chosen)}; name steps from 0 to {steps - 1}")
    return tuple(float(j in chosen) for j in range(steps))


def round_weights(weights: Sequence[float], steps_per_round: int | None, seed: int, round_: int) -> tuple[float, ...]:
    """The weights [N] of one round that trains some of the steps, drawn for it; None: all of them.

    What is drawn counts for what is not, so that the expected loss stays the same.
    """
    trained = [j for j, weight in enumerate(weights) if weight > 0]
    if steps_per_round is None or steps_per_round >= len(trained):
        return tuple(weights)
    generator = torch.Generator().manual_seed(keyed_seed(seed, "trained steps", round_))
    drawn = {trained[i] for i in torch.randperm(len(trained), generator=generator)[:steps_per_round].tolist()}
    share = len(trained) / steps_per_round
    return tuple(weight * share if j in drawn else 0.0 for j, weight in enumerate(weights))
