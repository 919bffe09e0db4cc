"""What holds on this card: python tools/gpu_check.py [--write docs/gpu.md]

Random weights at Stable Diffusion 3.5 Medium's size, so nothing is downloaded: PyTorch, diffusers and PEFT are enough, and
DeepSpeed is checked where it is installed. Takes some minutes on one GPU. Prints one line of JSON and ends with 1 if a
check fails. `--size tiny --device cpu` is the same program in seconds, without a card.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from opd_core.api.training import LoRA, Optimizer, Passes, Precision, Resolution, Training
from opd_core.conditioning import Conditioning
from opd_core.diffusion.noise import draw
from opd_core.diffusion.transitions import transitions
from opd_core.families.sd3 import SD3
from opd_core.models.adapters import adapter_parameters, add_student_adapter
from opd_core.models.pipeline import Model
from opd_core.ports import free_ports
from opd_core.precision import TORCH_DTYPES
from opd_core.scales import Scales
from opd_core.teachers.engine import Engine as TeacherEngine
from opd_core.teachers.engine import Query
from opd_trainer.engine import Engine, init_distributed, shutdown
from opd_trainer.memory import free_bytes, measure, plan
from opd_trainer.methods.opd import one_pass, two_passes
from opd_trainer.methods.rollouts import Rollouts
from opd_trainer.objectives.squared import MEAN_MATCHING
from opd_trainer.precision import GradientScale
from opd_trainer.run import STUDENT
from opd_trainer.setup import student_graph
from opd_trainer.trajectories import student_prompts
from torch import Tensor

TEACHER = "teacher"
SIZES: dict[str, dict[str, Any]] = {
    "medium": {
        "config": {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        "tokens": 205, "side": 512, "images": 9, "batches": (1, 2, 4, 8, 16), "steps": 4,
    },
    "tiny": {
        "config": {
            "sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2,
            "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 32,
            "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 16,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        "tokens": 12, "side": 64, "images": 3, "batches": (1, 4), "steps": 3,
    },
}  # fmt: skip
VAE = {"block_out_channels": [128, 256, 512, 512]}
# A difference relative to the largest element, and a cosine, that half precision keeps.
LIMITS = {"passes": 1e-2, "batch": 5e-2, "velocity": 5e-2, "cosine": 0.97}


@dataclass
class Bench:
    """Student and teacher of one size and precision on one device, and the settings of a round."""

    model: Model
    teacher: TeacherEngine
    training: Training
    size: dict[str, Any]

    @property
    def prompt(self) -> Conditioning:
        config, dtype = self.size["config"], self.model.dtype
        embeds = draw((self.size["tokens"], config["joint_attention_dim"]), "embeds")
        pooled = draw((config["pooled_projection_dim"],), "pooled")
        return Conditioning({"embeds": embeds, "pooled": pooled}).cast(dtype)

    @property
    def parameters(self) -> list[Tensor]:
        return list(adapter_parameters(self.model.transformer, STUDENT))

    def states(self, images: int) -> Tensor:
        shape = self.model.latent_shape(self.size["side"], self.size["side"])
        return torch.stack([draw(shape, "state", i) for i in range(images)]).to(self.model.device)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        prompts = student_prompts(self.model, self.training, [self.prompt] * len(x), self.prompt)
        return self.model.velocity(x, sigma, prompts)

    def ask(self, x: Tensor, sigma: float) -> Tensor:
        count = len(x)
        return self.teacher.answer(
            Query(
                teachers=torch.zeros(count, dtype=torch.int64), latents=x, sigmas=torch.full((count,), sigma),
                scales=torch.tensor([Scales(4.5)] * count), conditioning=[self.prompt] * count, negative=[self.prompt] * count,
            ),
        )  # fmt: skip


@cache
def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """Drawn once, by key: every device and precision gets the same, and billions of draws take half a minute."""
    return draw(shape, "weight", key)


def bench(size: dict[str, Any], device: torch.device, precision: Precision) -> Bench:
    width = size["config"]["caption_projection_dim"]

    def network(name: str, dtype: torch.dtype) -> Model:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            torch.set_default_dtype(dtype)
            try:
                transformer = SD3Transformer2DModel(**size["config"]).eval()
            finally:
                torch.set_default_dtype(torch.float32)
        for key, parameter in transformer.named_parameters():
            parameter.data.copy_(weight(key, tuple(parameter.shape)) * width**-0.5)
            parameter.requires_grad_(False)
        lora = LoRA()
        add_student_adapter(
            transformer, rank=lora.rank, alpha=lora.alpha, target_modules=SD3.targets, seed=0, name=name
        )
        for i, parameter in enumerate(adapter_parameters(transformer, name)):
            # Half as large as the layers that they change: student and teacher differ by more than rounding.
            parameter.data = draw(parameter.shape, name, i).mul_(0.21 * width**-0.25).to(device, torch.float32)
            parameter.requires_grad_(name == STUDENT)
            if name == TEACHER:
                parameter.data = parameter.data.to(dtype)
        return Model(
            pipeline=SimpleNamespace(transformer=transformer), device=device, dtype=dtype,
            **vars(SD3.outline({"transformer": size["config"], "vae": VAE, "scheduler": {"shift": 3.0}})),
        )  # fmt: skip

    dtype = TORCH_DTYPES[precision]
    resolution = Resolution(width=size["side"], height=size["side"])
    training = Training(rounds=1, precision=precision, resolution=resolution)
    teacher = TeacherEngine(network(TEACHER, dtype), [TEACHER])
    return Bench(network(STUDENT, dtype), teacher, training, size)


@dataclass
class Images:
    """Trajectories of so many images, with a teacher that answers at once."""

    bench: Bench
    count: int
    path: Any
    scale: GradientScale | None

    def start(self) -> Tensor:
        return self.bench.states(self.count)

    def noise(self, step: int) -> Tensor:
        raise AssertionError("the sampler is deterministic")

    def student(self, x: Tensor, step: int) -> Tensor:
        velocity = self.bench.velocity(x, self.path[step].sigma)
        if self.scale is not None and velocity.requires_grad:
            self.scale.attach(velocity)
        return velocity

    def teachers(self, x: Tensor, step: int) -> "Future[Tensor]":
        future: Future[Tensor] = Future()
        future.set_result(self.bench.ask(x, self.path[step].sigma))
        return future


def play(b: Bench, order: Any, images: int, scale: GradientScale | None = None) -> list[Tensor]:
    """The gradient of one round."""
    path = transitions(b.model.schedule(b.size["steps"], b.size["side"], b.size["side"]), "Flow", 0.0)
    batch: Rollouts = Images(b, images, path, scale)
    for match in order(path, [1.0] * len(path), batch):
        MEAN_MATCHING.loss(match).mean().backward()
    gradients = [parameter.grad.clone() for parameter in b.parameters if parameter.grad is not None]
    for parameter in b.parameters:
        parameter.grad = None
    return gradients


# ---------------------------------------------------------------------------------------------------- checks


def passes(b: Bench) -> dict[str, Any]:
    """One pass and two have one gradient."""
    one, two = (play(b, order, 1) for order in (partial(one_pass, in_flight=2), two_passes))
    worst = difference(one, two)
    return {"difference": worst, "to_the_bit": worst == 0, "ok": worst <= LIMITS["passes"]}


def independence(b: Bench) -> dict[str, Any]:
    """A teacher's answer does not depend on who else asks."""
    x = b.states(max(b.size["batches"]))
    alone = b.ask(x[:1], 0.7)
    worst = max(difference([b.ask(x[:count], 0.7)[:1]], [alone]) for count in b.size["batches"])
    return {"difference": worst, "to_the_bit": worst == 0, "ok": worst <= LIMITS["batch"]}


def precisions(exact: Bench, device: torch.device) -> dict[str, Any]:
    """Velocity and gradient of half precision against float32."""
    found: dict[str, Any] = {}
    x, order = exact.states(1), partial(one_pass, in_flight=2)
    with torch.no_grad():
        velocity = exact.velocity(x, 0.7)
    gradient = flat(play(exact, order, 1))
    for precision in (Precision.BF16, Precision.FP16):
        half = bench(exact.size, device, precision)
        scale = GradientScale(half.parameters) if precision == Precision.FP16 else None  # type: ignore[arg-type]
        with torch.no_grad():
            off = difference([half.velocity(x, 0.7)], [velocity])
        theirs = flat(play(half, order, 1, scale))
        cosine = float(torch.nn.functional.cosine_similarity(theirs, gradient, dim=0))
        ok = off <= LIMITS["velocity"] and cosine >= LIMITS["cosine"]
        found[precision.value] = {"velocity": off, "gradient_cosine": cosine, "ok": ok}
    return {**found, "ok": all(row["ok"] for row in found.values())}


def memory(b: Bench) -> dict[str, Any]:
    """The peak of a round against the plan that was made for it."""
    room, device = free_bytes(b.model.device), b.model.device
    images = b.size["images"]
    chosen = plan(measure(b.model, partial(student_graph, b.model, b.training, b.prompt)), images, room, Passes.ONE)
    if chosen.gradient_checkpointing:
        b.model.transformer.enable_gradient_checkpointing()
    found: dict[str, Any] = {"plan": str(chosen), "planned_gib": chosen.needed / 2**30, "ok": chosen.fits}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        play(b, partial(one_pass, in_flight=chosen.in_flight), chosen.micro_batch_size)
        peak = torch.cuda.max_memory_allocated() - before
        found |= {"peak_gib": peak / 2**30, "ok": chosen.fits and peak <= 1.1 * chosen.needed}
    b.model.transformer.disable_gradient_checkpointing()
    return found


def speed(b: Bench) -> dict[str, Any]:
    """Images a second of a round, over the bare forwards and backwards, and over the published order of three at once."""
    images = min(3, b.size["images"])
    x, sigma = b.states(images), 0.7

    def bare() -> None:
        for _ in range(b.size["steps"]):
            b.ask(x, sigma)
            b.velocity(x, sigma).sum().backward()
        for parameter in b.parameters:
            parameter.grad = None

    ours = seconds(b, lambda: play(b, partial(one_pass, in_flight=2), images))
    floor, published = seconds(b, bare), seconds(b, lambda: play(b, two_passes, images))
    return {
        "images_per_second": images / ours, "of_bare": floor / ours, "over_published": published / ours, "ok": True,
    }  # fmt: skip


def endpoint(b: Bench) -> dict[str, Any]:
    """Images a second of forty guided solver steps, without decoding, by how many are computed at once."""
    found = {}
    with torch.no_grad():
        for count in b.size["batches"]:
            x = b.states(count)
            found[str(count)] = count / (40 * seconds(b, partial(b.velocity, x, 0.7)))
    return {"images_per_second": found, "ok": True}


def deepspeed(b: Bench) -> dict[str, Any]:
    """A step of the engine with ZeRO 1, of one rank."""
    if find_spec("deepspeed") is None:
        return {"installed": False, "ok": True}
    (port,) = free_ports(1)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    init_distributed(str(b.model.device))
    parameters = adapter_parameters(b.model.transformer, STUDENT)
    before = [parameter.detach().clone() for parameter in parameters]
    engine = Engine(parameters, Optimizer(), 1)
    engine.backward(b.velocity(b.states(1), 0.7).square().mean(), last=True)
    norm = engine.step(1e-3)
    moved = difference([p.detach() for p in engine.parameters], before)
    engine.close()
    shutdown()
    return {"installed": True, "grad_norm": norm, "ok": norm > 0 and moved > 0}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in tensors])


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest, relative to the largest element."""
    a, b = flat(ours), flat(theirs)
    return float((a - b).abs().max() / b.abs().max())


def seconds(b: Bench, work: Callable[[], object]) -> float:
    """The least of three, after one that is not counted."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        if b.model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def check(size: str, device: torch.device) -> dict[str, Any]:
    began, shape = time.perf_counter(), SIZES[size]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {"card": card, "size": size, "torch": torch.__version__}
    exact = bench(shape, device, Precision.FP32)
    found["precision"] = precisions(exact, device)
    del exact
    b = bench(shape, device, Precision.BF16)
    for part in (passes, independence, memory, speed, endpoint, deepspeed):
        found[part.__name__] = part(b)
    found["seconds"] = time.perf_counter() - began
    return {**found, "ok": all(part["ok"] for part in found.values() if isinstance(part, dict))}


# ---------------------------------------------------------------------------------------------------- the page

_HEAD = """# On a GPU

<!-- python tools/gpu_check.py --write docs/gpu.md -->

"""


def page(found: dict[str, Any] | None) -> str:
    """docs/gpu.md from what a run found, or from none."""
    if found is None:
        return _HEAD + (
            "Status: **not run yet**. No card was at hand. `python tools/gpu_check.py --write docs/gpu.md` checks on one "
            "GPU, in minutes\nand without a download, what is claimed about GPUs, and writes this page; the same program "
            "runs at tiny size on a CPU with\nthe tests.\n"
        )
    memory, speed, precision = found["memory"], found["speed"], found["precision"]
    rows = {
        "one pass equals two, largest difference": f"{found['passes']['difference']:.1e}",
        "a teacher's row in batches, largest difference": f"{found['independence']['difference']:.1e}",
        **{
            f"{name} against float32": f"velocity {precision[name]['velocity']:.1e}, gradient's cosine "
            f"{precision[name]['gradient_cosine']:.4f}"
            for name in ("BF16", "FP16")
        },
        "memory, planned and peak": f"{memory['planned_gib']:.1f} and {memory.get('peak_gib', 0):.1f} GiB",
        "training images a second": f"{speed['images_per_second']:.2f}",
        "of the bare forwards and backwards": f"{speed['of_bare']:.2f}",
        "over the published order": f"{speed['over_published']:.2f} x",
        **{
            f"endpoint, {count} at once": f"{rate:.2f} images a second"
            for count, rate in found["endpoint"]["images_per_second"].items()
        },
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return (
        f"{_HEAD}Status: **{'all checks passed' if found['ok'] else 'a check failed'}** on {found['card']}, random weights "
        f"of size {found['size']}, PyTorch {found['torch']}.\n\n| what | found |\n|---|---|\n{table}\n"
        f"    {json.dumps(found)}\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="medium")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--write", type=Path, help="also write the page")
    arguments = parser.parse_args(argv)
    found = check(arguments.size, torch.device(arguments.device))
    print(json.dumps(found), flush=True)
    if arguments.write:
        arguments.write.write_text(page(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
