"""Solver steps as affine maps: x_next = a x + b v + std e, with e standard normal.

Every solver of the paper's code has this form, with coefficients that follow from the schedule alone. Student and
teacher share them, so the difference of their means is b (v_student - v_teacher), and no objective needs to rebuild a
mean. All coefficients are computed in float64: a bf16 mean inflates the KL by up to an order of magnitude.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log, sqrt

from opd_core.diffusion.schedule import Schedule
from opd_core.errors import InvalidError


@dataclass(frozen=True)
class Transition:
    """One step from `sigma` to `sigma_next`: mean = a x + b v, standard deviation `std` (0: deterministic)."""

    sigma: float
    sigma_next: float
    a: float
    b: float
    std: float


def transitions(schedule: Schedule, solver: str, noise_level: float) -> tuple[Transition, ...]:
    """The N transitions of a schedule.

    Args:
        schedule: N + 1 decreasing sigmas.
        solver: "Flow", "Dance", "CPS" or "DPM1" (`SOLVERS`).
        noise_level: the paper's a; 0 makes every solver deterministic.
    """
    if solver not in SOLVERS:
        raise InvalidError(f"sampler.solver is {solver!r}; use one of {', '.join(SOLVERS)}")
    if noise_level < 0:
        raise InvalidError(f"sampler.noiseLevel is {noise_level}; use 0 (ODE) or more (SDE)")
    if solver == "DPM1" and noise_level > 0:
        raise InvalidError("sampler.solver DPM1 is deterministic; use Flow, Dance or CPS for an SDE, or noiseLevel 0")
    sigmas = [float(sigma) for sigma in schedule.sigmas]
    # sigma = 1 has no finite diffusion coefficient; like Flow-GRPO, the first step borrows the second sigma for it.
    step = SOLVERS[solver]
    return tuple(Transition(s, t, *step(s, t, noise_level, sigmas[1] if s == 1.0 else s)) for s, t in pairwise(sigmas))


def _flow(s: float, t: float, level: float, finite_s: float) -> tuple[float, float, float]:
    """Flow-SDE (paper Eq. 5-9), sigma_t = a sqrt(t / (1 - t)); Euler where a = 0."""
    dt = t - s
    if level == 0:
        return 1.0, dt, 0.0
    variance_rate = level**2 * s / (1 - finite_s)
    a = 1 + variance_rate / (2 * s) * dt
    b = (1 + variance_rate * (1 - s) / (2 * s)) * dt
    return a, b, sqrt(variance_rate * -dt)


def _dance(s: float, t: float, level: float, finite_s: float) -> tuple[float, float, float]:
    """DanceGRPO's SDE: constant diffusion `level`, score -(x + (1 - s) v) / s."""
    dt = t - s
    drift = level**2 / (2 * s) * dt
    return 1 + drift, dt + drift * (1 - s), level * sqrt(-dt)


def _cps(s: float, t: float, level: float, finite_s: float) -> tuple[float, float, float]:
    """Coefficient-preserving sampling (ddim in the paper's code): fresh noise of size r replaces part of the old."""
    keep = 0.0 if t == 0 else 1 - (t * (1 - s) / (s * (1 - t))) ** 2
    r = level * t * sqrt(max(keep, 0.0))
    if r > t:
        raise InvalidError(
            f"sampler.noiseLevel {level} adds more noise than sigma {t:.4f} holds under CPS; use at most 1"
        )
    direction = sqrt(t**2 - r**2)
    # x0 = x - s v and e = x + (1 - s) v
    return (1 - t) + direction, -(1 - t) * s + direction * (1 - s), r


def _dpm1(s: float, t: float, level: float, finite_s: float) -> tuple[float, float, float]:
    """First-order DPM-Solver++ in log-SNR: mean = (t/s) x - (1 - t)(exp(-h) - 1) x0."""
    decay = 0.0 if s == 1 or t == 0 else exp(log((1 - s) / s) - log((1 - t) / t))
    x0_weight = (1 - t) * (1 - decay)
    return t / s + x0_weight, -s * x0_weight, 0.0


SOLVERS: dict[str, Callable[[float, float, float, float], tuple[float, float, float]]] = {
    "Flow": _flow,
    "Dance": _dance,
    "CPS": _cps,
    "DPM1": _dpm1,
}
