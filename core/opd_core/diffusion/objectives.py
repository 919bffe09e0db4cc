"""What a student is trained on: per step, a weight on the squared distance of two velocities.

With shared coefficients the means differ by b (v_S - v_T), so every objective is a weight w_j on
mean over elements of (v_S - v_T)^2 at step j:

    KL            w = b^2 / (2 std^2)   closed-form KL of two Gaussians with the same variance (paper Eq. 10-14)
    MeanMatching  w = b^2 / 2           the deterministic limit's surrogate (paper Eq. 12)
    Velocity      w = 1                 every step counts the same; not in the paper

`std` is the standard deviation that is really sampled, its sqrt(-dt) included: the published code leaves that factor
out, which multiplies each step's KL by -dt.
"""

from collections.abc import Callable, Sequence

from opd_core.diffusion.transitions import Transition
from opd_core.errors import InvalidError


def step_weights(
    objective: str, path: Sequence[Transition], trained_steps: Sequence[int] | None = None
) -> tuple[float, ...]:
    """One weight per transition; 0 for a step that is not in `trained_steps` (None: every step is trained).

    Raises:
        InvalidError: unknown objective, a step outside the path, or KL on a step without noise.
    """
    if objective not in OBJECTIVES:
        raise InvalidError(f"objective.type is {objective!r}; use one of {', '.join(OBJECTIVES)}")
    chosen = range(len(path)) if trained_steps is None else trained_steps
    if not chosen or any(j not in range(len(path)) for j in chosen):
        raise InvalidError(f"objective.trainedSteps is {list(chosen)}; name steps from 0 to {len(path) - 1}")
    weights = [0.0] * len(path)
    for j in chosen:
        weights[j] = OBJECTIVES[objective](j, path[j])
    return tuple(weights)


def _kl(j: int, step: Transition) -> float:
    if step.std == 0:
        raise InvalidError(
            f"objective.type KL has no finite value at step {j} (sigma {step.sigma:.4f}), which this sampler takes "
            "without noise; use objective.type MeanMatching, a solver with noise at that step, or leave the step out "
            "of objective.trainedSteps"
        )
    return step.b**2 / (2 * step.std**2)


def _mean_matching(j: int, step: Transition) -> float:
    return step.b**2 / 2


def _velocity(j: int, step: Transition) -> float:
    return 1.0


OBJECTIVES: dict[str, Callable[[int, Transition], float]] = {
    "KL": _kl,
    "MeanMatching": _mean_matching,
    "Velocity": _velocity,
}
