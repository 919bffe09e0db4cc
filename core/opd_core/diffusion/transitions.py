"""Solver steps as affine maps: x_next = a x + b v + c x0_before + std e, with e standard normal.

Every solver of the paper's code has this form, with coefficients that follow from the schedule alone; x0_before is the
image that the step before pointed at, which only multistep solvers look at. Student and teacher share all of it but v,
so the difference of their means is b (v_student - v_teacher), and no objective needs to rebuild a mean. All
coefficients are computed in float64: a bf16 mean inflates the KL by up to an order of magnitude.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf, log, pi, sin, sqrt
from typing import NamedTuple

from torch import Tensor

from opd_core.diffusion.schedule import Schedule
from opd_core.errors import InvalidError
from opd_core.plugins import find_plugin


class Coefficients(NamedTuple):
    """mean = a x + b v + c x0_before, standard deviation `std` (0: deterministic)."""

    a: float
    b: float
    std: float = 0.0
    c: float = 0.0


@dataclass(frozen=True)
class Transition:
    """One step from `sigma` to `sigma_next`: mean = a x + b v + c x0_before, standard deviation `std`."""

    sigma: float
    sigma_next: float
    a: float
    b: float
    std: float
    c: float = 0.0

    def clean(self, x: Tensor, velocity: Tensor) -> Tensor:
        """x0 = x - sigma v: the image that `velocity` at `x` points at."""
        return x - self.sigma * velocity

    def mean(self, x: Tensor, velocity: Tensor, before: Tensor | None = None) -> Tensor:
        """a x + b v + c x0_before; `before` is `clean` of the step before, None at the first step."""
        mean = self.a * x + self.b * velocity
        return mean if before is None or self.c == 0 else mean + self.c * before


@dataclass(frozen=True)
class Interval:
    """From sigma `s` to `t`. `before`: the sigma that the step before came from, None at the first step.

    `finite_s` is s, or the schedule's second sigma where s is 1: like Flow-GRPO, the first step borrows it for a
    diffusion coefficient that has no finite value at 1.
    """

    s: float
    t: float
    before: float | None
    finite_s: float


def transitions(schedule: Schedule, solver: str, noise_level: float) -> tuple[Transition, ...]:
    """The N transitions of a schedule.

    Args:
        schedule: N + 1 decreasing sigmas.
        solver: a name that `find_solver` knows.
        noise_level: the paper's a; 0 makes every solver deterministic.
    """
    if noise_level < 0:
        raise InvalidError(f"sampler.noiseLevel is {noise_level}; use 0 (ODE) or more (SDE)")
    coefficients = find_solver(solver)
    sigmas = [float(sigma) for sigma in schedule.sigmas]
    path = []
    for j, (s, t) in enumerate(pairwise(sigmas)):
        interval = Interval(s, t, sigmas[j - 1] if j else None, sigmas[1] if s == 1.0 else s)
        a, b, std, c = coefficients(interval, noise_level)
        path.append(Transition(s, t, a, b, std, c))
    return tuple(path)


def _flow(step: Interval, level: float) -> Coefficients:
    """Flow-SDE (paper Eq. 5-9), sigma_t = a sqrt(t / (1 - t)); Euler where a = 0."""
    s, dt = step.s, step.t - step.s
    if level == 0:
        return Coefficients(1.0, dt)
    variance_rate = level**2 * s / (1 - step.finite_s)
    a = 1 + variance_rate / (2 * s) * dt
    b = (1 + variance_rate * (1 - s) / (2 * s)) * dt
    return Coefficients(a, b, sqrt(variance_rate * -dt))


def _dance(step: Interval, level: float) -> Coefficients:
    """DanceGRPO's SDE: constant diffusion `level`, score -(x + (1 - s) v) / s."""
    s, dt = step.s, step.t - step.s
    drift = level**2 / (2 * s) * dt
    return Coefficients(1 + drift, dt + drift * (1 - s), level * sqrt(-dt))


def _renoised(s: float, t: float, std: float) -> Coefficients:
    """(1 - t) x0 + sqrt(t^2 - std^2) e: fresh noise of size `std` replaces part of the old."""
    direction = sqrt(t**2 - std**2)
    # x0 = x - s v and e = x + (1 - s) v
    return Coefficients((1 - t) + direction, -(1 - t) * s + direction * (1 - s), std)


def _ddim(step: Interval, level: float) -> Coefficients:
    """DDIM with eta = `level` on the linear path (ddim of the paper's code)."""
    s, t = step.s, step.t
    _at_most_one("DDIM", level)
    keep = 0.0 if t == 0 else 1 - (t * (1 - s) / (s * (1 - t))) ** 2
    return _renoised(s, t, level * t * sqrt(max(keep, 0.0)))


def _cps(step: Interval, level: float) -> Coefficients:
    """Coefficient-preserving sampling (Flow-CPS, arXiv 2509.05952): the share sin(a pi / 2) of the noise is fresh."""
    _at_most_one("CPS", level)
    return _renoised(step.s, step.t, step.t * sin(level * pi / 2))


def _dpm2(step: Interval, level: float) -> Coefficients:
    """DPM-Solver++(2M), midpoint, in lambda = log((1 - s) / s), as dpm2 of the paper's code.

    mean = (t/s) x - (1 - t)(exp(-h) - 1) D with D = x0 + (x0 - x0_before) / (2 r), r = h_before / h; first order at
    the first step, at the last one, and after a step from sigma 1, where h_before is infinite. Its first-order form,
    DPM-Solver++(1), is no solver of its own here: on this path it is Euler, exactly.
    """
    if level > 0:
        raise InvalidError("sampler.solver DPM2 is deterministic; use Flow, Dance, DDIM or CPS, or noiseLevel 0 (ODE)")
    s, t = step.s, step.t
    h = _log_snr(t) - _log_snr(s)
    weight = (1 - t) * (1 - exp(-h))
    first_order = step.before is None or t == 0
    more = 0.0 if first_order or step.before is None else h / (2 * (_log_snr(s) - _log_snr(step.before)))
    return Coefficients(t / s + weight * (1 + more), -s * weight * (1 + more), c=-weight * more)


def _log_snr(s: float) -> float:
    return -inf if s == 1 else inf if s == 0 else log((1 - s) / s)


def _at_most_one(solver: str, level: float) -> None:
    if level > 1:
        raise InvalidError(
            f"sampler.noiseLevel is {level}: {solver} cannot add more noise than there is; use at most 1"
        )


Solver = Callable[[Interval, float], Coefficients]
"""(a step, the noise level, 0 for none) -> its coefficients; an InvalidError for a level that it cannot have."""

SOLVERS: dict[str, Solver] = {"Flow": _flow, "Dance": _dance, "DDIM": _ddim, "CPS": _cps, "DPM2": _dpm2}


def find_solver(name: str) -> Solver:
    """One of `SOLVERS`, or one that a package brings: an entry point of the group diffusion_opd.solvers, or
    module:function.

    Raises:
        InvalidError: unknown, or a package of it cannot be imported.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    try:
        found: Solver = find_plugin("solver", name)
    except InvalidError as error:
        raise InvalidError(f"{error}; this project's own are {', '.join(SOLVERS)}") from error
    return found
