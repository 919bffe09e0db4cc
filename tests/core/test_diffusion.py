"""The affine transitions and their objectives against oracles written from the formulas of the papers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st
from opd_core.conditioning import Conditioning, Prompts, stack
from opd_core.diffusion.guidance import combined, guidance_branches, guided_velocity
from opd_core.diffusion.noise import draw, keyed_seed
from opd_core.diffusion.schedule import Schedule, linear_mu, schedule_from_config
from opd_core.diffusion.transitions import Coefficients, Interval, transitions
from opd_core.errors import InvalidError
from opd_core.families.guidance import CLASSIFIER_FREE, EMBEDDED, NONE, TRUE_CFG, Guidance
from opd_core.scales import Scales

SD35 = {"shift": 3.0}


def schedule(steps: int = 10) -> Schedule:
    return schedule_from_config(SD35, steps)


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("steps", [1, 2, 10, 28, 40])
def test_schedule_is_the_one_diffusers_pipelines_use(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    ours = schedule(steps)
    assert ours.steps == steps
    np.testing.assert_allclose(ours.sigmas, scheduler.sigmas.numpy(), rtol=0, atol=0)
    np.testing.assert_allclose(ours.sigmas[:-1] * 1000, scheduler.timesteps.numpy(), rtol=1e-6)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_dynamic_shift_is_the_one_of_diffusers_pipelines(tokens):
    config = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(10, mu=mu)
    assert linear_mu(config, tokens) == pytest.approx(mu, rel=1e-12)
    ours = schedule_from_config(config, 10, mu=linear_mu(config, tokens))
    np.testing.assert_allclose(ours.sigmas, scheduler.sigmas.numpy(), rtol=0, atol=0)


def test_schedule_without_steps_is_refused():
    with pytest.raises(InvalidError, match=r"sampler\.steps is 0"):
        schedule(0)


# ---------------------------------------------------------------- transitions


def oracle_step(solver: str, s: float, t: float, eta: float, s1: float, x: float, v: float) -> tuple[float, float]:
    """(mean, std) as the papers write them, with x0 and the score spelled out; float64."""
    dt, x0 = t - s, x - s * v
    if solver == "Flow":
        sigma = eta * math.sqrt(s / (1 - (s1 if s == 1 else s)))
        mean = x + (v + sigma**2 / (2 * s) * (x + (1 - s) * v)) * dt
        return mean, sigma * math.sqrt(-dt)
    if solver == "Dance":
        score = -(x - (1 - s) * x0) / s**2
        return x + dt * v - eta**2 / 2 * score * dt, eta * math.sqrt(-dt)
    e = (x - (1 - s) * x0) / s
    if solver == "DDIM":
        r = 0.0 if t == 0 else eta * t * math.sqrt(1 - t**2 * (1 - s) ** 2 / (s**2 * (1 - t) ** 2))
        return (1 - t) * x0 + math.sqrt(t**2 - r**2) * e, r
    std = t * math.sin(eta * math.pi / 2)
    return (1 - t) * x0 + math.sqrt(t**2 - std**2) * e, std


@settings(max_examples=60, deadline=None)
@given(
    solver=st.sampled_from(["Flow", "Dance", "DDIM", "CPS"]),
    eta=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    steps=st.integers(2, 40),
    x=st.floats(-4, 4),
    v=st.floats(-6, 6),
)
def test_every_step_is_the_papers_formula(solver, eta, steps, x, v):
    path = transitions(schedule(steps), solver, eta)
    sigma1 = path[0].sigma_next
    for step in path:
        mean, std = oracle_step(solver, step.sigma, step.sigma_next, eta, sigma1, x, v)
        assert step.a * x + step.b * v == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert step.std == pytest.approx(std, rel=1e-9, abs=1e-12)
        assert step.c == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 28])
def test_dpm2_is_the_multistep_solver_of_diffusers(steps):
    """DPM-Solver++(2M) on the same sigmas, from the same noise, with a velocity that is anything but linear in time."""
    path = transitions(schedule(steps), "DPM2", 0.0)
    theirs = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_order=2,
        lower_order_final=True, euler_at_final=False, final_sigmas_type="zero",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    theirs.sigmas = torch.from_numpy(schedule(steps).sigmas)
    theirs.timesteps = torch.arange(steps)
    x = reference = torch.linspace(-2, 2, 9, dtype=torch.float64)
    before = None
    for j, step in enumerate(path):
        v = torch.sin(3 * x) + step.sigma**2
        x, before = step.mean(x, v, before), step.clean(x, v)
        v = torch.sin(3 * reference) + step.sigma**2
        reference = theirs.step(v, theirs.timesteps[j], reference, return_dict=False)[0]
        torch.testing.assert_close(x, reference, rtol=0, atol=1e-5, check_dtype=False)  # they step in float32


@pytest.mark.parametrize("solver", ["Flow", "Dance", "DDIM", "CPS"])
def test_without_noise_every_first_order_solver_is_euler(solver):
    for step in transitions(schedule(), solver, 0.0):
        assert (step.a, step.b, step.std) == pytest.approx((1.0, step.sigma_next - step.sigma, 0.0), abs=1e-12)


def gaussian_velocity(x: np.ndarray, s: float, mean: float, std: float) -> np.ndarray:
    """E[e - x0 | x] for x0 ~ N(mean, std^2): the exact velocity of a Gaussian target."""
    variance = (1 - s) ** 2 * std**2 + s**2
    residual = x - (1 - s) * mean
    return s * residual / variance - (mean + (1 - s) * std**2 * residual / variance)


@pytest.mark.parametrize(
    ("solver", "eta"), [("Flow", 0.0), ("Flow", 0.7), ("Dance", 0.3), ("DDIM", 0.7), ("DPM2", 0.0)]
)
def test_samplers_reach_an_analytic_gaussian(solver, eta):
    """With the exact velocity, every sampler ends in the target distribution."""
    rng = np.random.default_rng(0)
    x, before = rng.standard_normal(60_000), None
    for step in transitions(schedule(200), solver, eta):
        v = gaussian_velocity(x, step.sigma, mean=0.8, std=0.5)
        x, before = step.mean(x, v, before) + step.std * rng.standard_normal(x.shape), step.clean(x, v)
    assert x.mean() == pytest.approx(0.8, abs=0.02)
    assert x.std() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_cps_keeps_the_coefficients_of_the_path(level):
    """However much of the noise is fresh, x stays (1 - s) x0 + s e; for one image x0, whose velocity is known, exactly.

    With more than one image it is no sampler of the data at any number of steps: its noise does not shrink with them.
    """
    rng = np.random.default_rng(0)
    x, x0 = rng.standard_normal(60_000), 0.8
    for step in transitions(schedule(20), "CPS", level):
        v = gaussian_velocity(x, step.sigma, mean=x0, std=0.0)
        x = step.mean(x, v) + step.std * rng.standard_normal(x.shape)
        assert x.mean() == pytest.approx((1 - step.sigma_next) * x0, abs=0.02)
        assert x.std() == pytest.approx(step.sigma_next, abs=0.01)


def mixture_velocity(x: np.ndarray, s: float) -> np.ndarray:
    """Of two Gaussians, 0.3 N(-1, 0.4^2) + 0.7 N(1.2, 0.6^2): each one's velocity, by how likely x is its own."""
    parts = [(0.3, -1.0, 0.4), (0.7, 1.2, 0.6)]
    variances = [(1 - s) ** 2 * std**2 + s**2 for _, _, std in parts]
    likely = [
        share / math.sqrt(variance) * np.exp(-((x - (1 - s) * mean) ** 2) / (2 * variance))
        for (share, mean, _), variance in zip(parts, variances, strict=True)
    ]
    velocities = [gaussian_velocity(x, s, mean, std) for _, mean, std in parts]
    return sum(p * v for p, v in zip(likely, velocities, strict=True)) / sum(likely)


@pytest.mark.parametrize(("solver", "order"), [("Flow", 1), ("DDIM", 1), ("DPM2", 2)])
def test_order_of_convergence_on_a_mixture_with_a_known_flow(solver, order):
    """Twice the steps, 2^order less error, against the same flow in 8,000 steps of second order."""

    def images(solver: str, steps: int) -> np.ndarray:
        x, before = np.linspace(-2.5, 2.5, 41), None
        for step in transitions(Schedule(np.linspace(1, 0, steps + 1)), solver, 0.0):
            v = mixture_velocity(x, step.sigma)
            x, before = step.mean(x, v, before), step.clean(x, v)
        return x

    exact = images("DPM2", 8000)
    errors = [np.sqrt(np.mean((images(solver, steps) - exact) ** 2)) for steps in (500, 1000)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def half(step: Interval, level: float) -> Coefficients:
    """A solver of a package of its own: Euler that goes half of the way."""
    return Coefficients(1.0, (step.t - step.s) / 2, level)


def test_a_solver_may_come_from_another_package():
    path = transitions(schedule(), f"{__name__}:half", 0.25)
    euler = transitions(schedule(), "Flow", 0.0)
    assert [step.b for step in path] == [step.b / 2 for step in euler]
    assert {step.std for step in path} == {0.25}


def test_bad_samplers_are_refused():
    with pytest.raises(InvalidError, match=r"no solver Heun; .*own are Flow, Dance, DDIM, CPS, DPM2"):
        transitions(schedule(), "Heun", 0.0)
    with pytest.raises(InvalidError, match="DPM2 is deterministic"):
        transitions(schedule(), "DPM2", 0.5)
    for solver in ("DDIM", "CPS"):
        with pytest.raises(InvalidError, match="at most 1"):
            transitions(schedule(), solver, 1.5)
    with pytest.raises(InvalidError, match="noiseLevel is -1"):
        transitions(schedule(), "Flow", -1)


# ---------------------------------------------------------------- guidance


def network(latents, sigmas, prompts, guidance):
    """Anything that mixes all inputs, row by row."""
    scale = prompts["embeds"].mean((1, 2)) + prompts["pooled"].mean(1) + sigmas
    return latents * scale.view(-1, 1, 1, 1) + torch.tanh(latents) * guidance.view(-1, 1, 1, 1)


def conditioning(tokens, seed):
    g = torch.Generator().manual_seed(seed)
    return Conditioning({"embeds": torch.randn(tokens, 5, generator=g), "pooled": torch.randn(6, generator=g)})


def states(n):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 4, 4, generator=g), torch.rand(n, generator=g)


def prompts(kind, positive, negative, scales):
    return Prompts.of(kind, positive, negative, scales, "cpu", torch.float32)


PRODUCT = Guidance(off=0.0, combine=lambda conditional, unconditional, g: conditional * (1 + g * unconditional))


@pytest.mark.parametrize("kind", [CLASSIFIER_FREE, PRODUCT, NONE, EMBEDDED, TRUE_CFG])
@pytest.mark.parametrize(
    "scales",
    [
        [Scales(4.5)] * 4,
        [Scales(1.0)] * 4,
        [Scales(3.5, 4.5)] * 4,
        [Scales(1.0, 2.0), Scales(4.5), Scales(0.0, 0.5), Scales(2.0, 3.0)],
    ],
)
@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [3, 2, 3, 2]])
def test_guidance_is_row_by_row(kind, scales, lengths):
    """As the kind says, whatever the rows beside one are told, how long that is and how they are guided."""
    x, s = states(4)
    positive = [conditioning(length, i) for i, length in enumerate(lengths)]
    negative = [conditioning(3, 10 + i) for i in range(4)]
    got = guided_velocity(network, x, s, prompts(kind, positive, negative, scales))
    assert got.dtype == torch.float32
    for i, scale in enumerate(scales):
        row = slice(i, i + 1)

        def velocity(of, row=row, scale=scale):
            return network(x[row], s[row], stack([of], "cpu", torch.float32), torch.tensor([scale.guidance]))

        expected = velocity(positive[i])
        weight = scale.true_cfg if kind in (EMBEDDED, TRUE_CFG) else scale.guidance
        if kind.off is not None and weight > kind.off:
            expected = kind.combine(expected, velocity(negative[i]), weight)
        torch.testing.assert_close(got[row], expected)
        alone = prompts(kind, positive[row], negative[row], [scale])
        assert torch.equal(got[row], guided_velocity(network, x[row], s[row], alone))


@pytest.mark.parametrize("kind", [CLASSIFIER_FREE, PRODUCT, EMBEDDED, TRUE_CFG])
@pytest.mark.parametrize("lengths", [[3, 3, 3], [3, 2, 3]])
def test_guidance_is_made_of_its_branches(kind, lengths):
    """To the bit, whatever the rows beside one are told and how long that is."""
    x, s = states(3)
    positive = [conditioning(length, i) for i, length in enumerate(lengths)]
    negative, scales = [conditioning(3, 9)] * 3, [Scales(4.5, 2.0), Scales(1.5, 4.5), Scales(2.0, 3.0)]
    told = prompts(kind, positive, negative, scales)
    both = guidance_branches(network, x, s, told)
    assert (both.shape, both.dtype) == ((3, 2, 2, 4, 4), torch.float32)
    assert torch.equal(combined(kind, both, torch.tensor(scales)), guided_velocity(network, x, s, told))
    for i in range(3):
        for branch, of in enumerate((positive[i], negative[i])):
            alone = network(
                x[i : i + 1], s[i : i + 1], stack([of], "cpu", torch.float32), torch.tensor([scales[i].guidance])
            )
            torch.testing.assert_close(both[i, branch], alone[0])


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        (CLASSIFIER_FREE, Scales(1.0, 4.5)),
        (PRODUCT, Scales(0.0)),
        (NONE, Scales(4.5, 4.5)),
        (EMBEDDED, Scales(4.5, 1.0)),
        (TRUE_CFG, Scales(4.5, 1.0)),
    ],
)
def test_a_row_without_guidance_has_no_second_branch(kind, scale):
    x, s = states(2)
    told = prompts(kind, [conditioning(3, 1)] * 2, [conditioning(3, 2)] * 2, [Scales(4.5, 4.5), scale])
    with pytest.raises(InvalidError, match=r"guidance (0|1|4\.5) has one in this model's family"):
        guidance_branches(network, x, s, told)


def test_unguided_rows_cost_one_forward():
    seen = []

    def counting(latents, *others):
        seen.append(len(latents))
        return network(latents, *others)

    same = [conditioning(3, 0)] * 3
    for kind in (CLASSIFIER_FREE, NONE, EMBEDDED):
        for scales in ([1.0, 1.0, 1.0], [1.0, 4.5, 1.0], [4.5, 4.5, 4.5]):
            guided_velocity(counting, *states(3), prompts(kind, same, same, [Scales(scale) for scale in scales]))
    assert seen == [3, 2, 2, 6, 3, 3, 3, 3, 3, 3]


def test_guidance_carries_gradients_through_both_branches():
    tensors = [conditioning(3, i).tensors for i in range(4)]
    for of_prompt in tensors:
        of_prompt["embeds"].requires_grad_(True)
    told = [Conditioning(of_prompt) for of_prompt in tensors]
    guided_velocity(
        network, *states(2), prompts(CLASSIFIER_FREE, told[:2], told[2:], [Scales(4.5), Scales(1.0)])
    ).sum().backward()
    for of_prompt in tensors[:3]:
        assert of_prompt["embeds"].grad.abs().sum() > 0
    assert tensors[3]["embeds"].grad is None


# ---------------------------------------------------------------- noise


def test_noise_is_a_function_of_its_key():
    a = draw((4, 8, 8), 42, "rollout", 3, "ocr", 0)
    assert torch.equal(a, draw((4, 8, 8), 42, "rollout", 3, "ocr", 0))
    others = [draw((4, 8, 8), 42, "rollout", 3, "ocr", 1), draw((4, 8, 8), 43, "rollout", 3, "ocr", 0)]
    assert all(not torch.equal(a, other) for other in others)
    assert keyed_seed(1, "23") != keyed_seed(12, "3")


def test_drawing_noise_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw((8,), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_of_many_samples_is_standard_normal():
    many = torch.stack([draw((64,), 7, "x", i) for i in range(400)])
    assert many.mean().item() == pytest.approx(0, abs=0.02)
    assert many.std().item() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(many)
    assert (correlation - torch.eye(400)).abs().mean() < 0.12
