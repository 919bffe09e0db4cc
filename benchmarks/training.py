"""Seconds per round of distillation: this project's loop, the published one, and what the networks alone cost.

    python benchmarks/training.py [--rounds 5] [--images 4] [--steps 6] [--spec FILE --claims DIR]

All variants do the same work, on the same spec, in one process, taking turns:

    remote      this project's loop in one pass, teachers in a Triton server beside it
    in process  this project's loop in one pass, teachers in the same process
    two passes  this project's loop with `passes: Two`, teachers in the same process
    published   the order of the paper's code: roll out without a graph, task by task; one teacher forward per step by
                switching the adapter of the same network; then one forward and backward per step
    floor       the transformer calls that a round cannot do without, on random inputs: student forward and backward,
                teacher forward; no sampler, no loss, no optimiser, no waiting

Every variant has all the cores that this process may use: `remote` gives half of them to its server, as `opd run` does,
the others keep all for themselves. Networks of a few million parameters gain little from a second thread, so in process and
published are played with half the cores as well: "x published" compares with the published loop at the number of threads
that is best for it, "x alike" with the published loop on as many threads. `--write` keeps the figures in docs/figures.

Memory is the growth of the process over a round at its peak. A share of waiting is time in which the loop does nothing
but wait for a teacher's answer; in process there is none, for the answer is computed where it is asked for.
"""

import argparse
import ctypes
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# As in the project's own programs: threads that spin while they wait take the cores from whoever they wait for.
os.environ.update(OMP_NUM_THREADS=str(len(os.sched_getaffinity(0))), OMP_WAIT_POLICY="PASSIVE")

import torch
import yaml
from figures import write
from opd_core.api.load import check_spec, dump_spec
from opd_core.api.training import Passes
from opd_core.api.types import OPDDistillation, Spec
from opd_core.conditioning import Conditioning, Prompts, stack
from opd_core.diffusion.noise import draw
from opd_core.models.adapters import adapter_parameters, load_adapter, use_adapter
from opd_core.models.pipeline import load_model
from opd_core.precision import TORCH_DTYPES, arithmetic
from opd_core.scales import Scales
from opd_core.uris import resolve
from opd_trainer.engine import World, init_distributed
from opd_trainer.loop import train
from opd_trainer.prompts import training_prompt
from opd_trainer.record import RoundRecord
from opd_trainer.run import STUDENT, Run
from opd_trainer.setup import (
    add_student,
    all_teachers,
    build_run,
    cached_encoder,
    load_tasks,
    sampler_path,
)
from torch import Tensor, nn

REPOSITORY = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0))
HALF = max(1, CORES // 2)


@dataclass
class Variant:
    """`play` does one round and returns the share of it that was spent waiting for teachers, or None."""

    name: str
    play: Callable[[int], float | None]
    threads: int = CORES
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)


def ours(name: str, run: Run, threads: int = CORES) -> Variant:
    def play(round_: int) -> float:
        records: list[RoundRecord] = []
        run.training = run.training.model_copy(update={"rounds": round_ + 1})
        train(run, round_, lambda record, stop: records.append(record), lambda: False)
        return records[0].phases["teacher_wait"] / records[0].seconds

    return Variant(name, play, threads)


def on_half(variant: Variant) -> Variant:
    """The same with half of the cores."""
    return replace(variant, threads=HALF, seconds=[], memory=[], waiting=[])


def published(spec: Spec, claims: Path, device: str) -> Variant:
    """As the paper's code does it: teachers are adapters of the student's own network, one task after the other."""
    training = spec.training
    tasks = load_tasks(spec, claims)
    base = resolve(spec.model.uri, claims)
    model = load_model(base, device=device, dtype=TORCH_DTYPES[training.precision], parts={"text", "transformer"})
    for name, adapter in all_teachers(spec, claims).items():
        load_adapter(model.transformer, adapter, name)
    add_student(spec, model, claims)
    encode = cached_encoder(model, spec.model.max_sequence_length)
    negative = encode([""])[0]
    path = sampler_path(spec, model)
    parameters = adapter_parameters(model.transformer, STUDENT)
    optimizer = torch.optim.AdamW(parameters, lr=training.optimizer.learning_rate, weight_decay=1e-4)
    shape = model.latent_shape(training.resolution.width, training.resolution.height)
    count = training.images_per_task

    def velocity(x: Tensor, step: int, prompts: Prompts) -> Tensor:
        return model.velocity(x, path[step].sigma, prompts)

    def told(prompts: Sequence[Conditioning], scales: Scales) -> Prompts:
        return model.prompts(prompts, [negative] * len(prompts), [scales] * len(prompts))

    def mean(x: Tensor, v: Tensor, step: int) -> Tensor:
        return path[step].a * x + path[step].b * v

    def play(round_: int) -> None:
        collected = []
        for task in tasks:
            prompts = [
                training_prompt(task.prompts, training.seed, task.name, round_ * count + i).prompt for i in range(count)
            ]
            conditioning = encode(prompts)
            ours, theirs = told(conditioning, training.scales), told(conditioning, task.scales)
            x = torch.stack([draw(shape, training.seed, "start", task.name, round_, i) for i in range(count)]).to(
                device
            )
            states, targets = [x], []
            with torch.no_grad():
                use_adapter(model.transformer, STUDENT)
                for j in range(len(path)):
                    states.append(mean(states[-1], velocity(states[-1], j, ours), j))
                use_adapter(model.transformer, task.name)
                for j in range(len(path)):
                    targets.append(mean(states[j], velocity(states[j], j, theirs), j))
            collected.append((states, targets, ours))
        use_adapter(model.transformer, STUDENT)
        for states, targets, ours in collected:
            for j in range(len(path)):
                loss = 0.5 * (mean(states[j], velocity(states[j], j, ours), j) - targets[j]).square().mean()
                (loss / (len(tasks) * len(path))).backward()
        nn.utils.clip_grad_norm_(parameters, training.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return Variant("published", play)


def floor(spec: Spec, run: Run) -> tuple[Variant, Variant]:
    """Student and teacher calls of one round with nothing around them; on `run`'s network, as its batches are cut."""
    model, training = run.model, spec.training
    shape = model.latent_shape(training.resolution.width, training.resolution.height)

    def inputs(rows: int, guided: bool) -> tuple[Tensor, Tensor, Mapping[str, Tensor], Tensor]:
        rows *= 2 if guided else 1
        half = torch.full((rows,), 0.5).to(model.device)
        prompts = stack([run.negative] * rows, model.device, model.dtype)
        return draw((rows, *shape), "floor").to(model.device), half, prompts, half

    students = [inputs(len(rows), model.guidance.guides(training.scales)) for rows in run.batches]
    teachers = [inputs(training.images_per_task, model.guidance.guides(task.scales)) for task in run.tasks]

    def student(round_: int) -> None:
        for arguments in students * len(run.path):
            with arithmetic(model.device, model.dtype):
                velocity = model.forward(*arguments)
            velocity.float().sum().backward()
        for parameter in run.engine.parameters:
            parameter.grad = None

    @torch.no_grad()
    def teacher(round_: int) -> None:
        for arguments in teachers * len(run.path):
            model.forward(*arguments)

    return Variant("floor: student", student), Variant("floor: teachers", teacher)


# ---------------------------------------------------------------------------------------------------- measuring


def measure(variant: Variant, round_: int, device: str) -> None:
    torch.set_num_threads(variant.threads)
    before = reset_peak(device)
    began = time.perf_counter()
    waiting = variant.play(round_)
    if device == "cuda":
        torch.cuda.synchronize()
    variant.seconds.append(time.perf_counter() - began)
    variant.memory.append(peak(device) - before)
    if waiting is not None:
        variant.waiting.append(waiting)


def reset_peak(device: str) -> int:
    """Bytes in use now; the peak is counted from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier rounds freed would hide what this one needs
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


COLUMNS = ("", "threads", "s per round", "x published", "x alike", "peak MB", "waiting for teachers")


def report(variants: list[Variant], *, keep: bool) -> None:
    published = {v.threads: statistics.median(v.seconds) for v in variants if v.name == "published"}
    best, rows = min(published.values()), []
    for variant in sorted(variants, key=lambda v: (v.name != "remote", -v.threads)):
        median = statistics.median(variant.seconds)
        threads = f"{HALF} + {HALF}" if variant.name == "remote" else str(variant.threads)
        ratios = f"{best / median:.2f}", f"{published[variant.threads] / median:.2f}"
        waiting = f"{statistics.median(variant.waiting):.1%}".replace("%", " %") if variant.waiting else ""
        rows.append((variant.name, threads, f"{median:.3f}", *ratios, f"{max(variant.memory) / 1e6:.0f}", waiting))
    for row in (COLUMNS, *rows):
        print(
            f"{row[0]:17s}"
            + "".join(f"{cell:>{len(title) + 2}s}" for cell, title in zip(row[1:], COLUMNS[1:], strict=True))
        )
    if keep:
        lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, *rows)]
        lines.insert(1, "|---" + "|---:" * (len(COLUMNS) - 1) + "|")
        write("training", {"ratio": rows[0][3], "waiting": rows[0][6]}, lines)


# ---------------------------------------------------------------------------------------------------- teachers


@contextmanager
def triton(distillation: OPDDistillation, claims: Path, folder: Path, device: str) -> Iterator[str]:
    """The address of a teacher server that lives as long as the context."""
    ports = [free_port() for _ in range(3)]
    file = folder / "spec.json"
    file.write_text(json.dumps(dump_spec(distillation)))
    names = ("--grpc-port", "--http-port", "--metrics-port")
    command = [
        sys.executable, "-m", "opd_serving.teacher", "--spec", str(file), "--claims", str(claims),
        "--repository", str(folder / "repository"), "--device", device,
        *[word for name, port in zip(names, ports, strict=True) for word in (name, str(port))],
    ]  # fmt: skip
    with (folder / "teacher.log").open("w") as log:
        env = {**os.environ, "OMP_NUM_THREADS": str(HALF)}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    address = f"127.0.0.1:{ports[0]}"
    health = f"127.0.0.1:{ports[1]}"
    probe = [sys.executable, "-m", "opd_serving.teacher.probe", "--address", health, "--timeout", "5"]
    try:
        deadline = time.monotonic() + 300
        while subprocess.run(probe, capture_output=True).returncode:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the teacher server did not start:\n{(folder / 'teacher.log').read_text()[-4000:]}")
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


# ---------------------------------------------------------------------------------------------------- program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, default=REPOSITORY / "examples" / "tiny" / "distill.yaml")
    parser.add_argument("--claims", type=Path, default=REPOSITORY / "examples" / "tiny")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each variant, after one that is not counted")
    parser.add_argument("--images", type=int, default=4, help="images per task and round")
    parser.add_argument("--steps", type=int, default=6, help="solver steps")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--write", action="store_true", help="keep the figures in docs/figures")
    parser.add_argument("--local-only", action="store_true", help="without a teacher server")
    arguments = parser.parse_args()

    content = yaml.safe_load(arguments.spec.read_text())
    content["spec"]["training"] |= {"imagesPerTask": arguments.images, "rounds": arguments.rounds + 1}
    content["spec"]["training"]["sampler"] = {"type": "ODE", "steps": arguments.steps}
    content["spec"]["training"]["objective"] = {"type": "MeanMatching"}
    content["spec"]["training"]["optimizer"] = {"learningRate": 3e-4}
    world = join_alone(arguments.device)

    def build(placement: str, passes: str, addresses: list[str]) -> Run:
        content["spec"].setdefault("teacherServing", {})["placement"] = placement
        content["spec"]["training"]["passes"] = passes
        return build_run(check_spec(content).spec, arguments.claims, addresses, arguments.device, world)

    with tempfile.TemporaryDirectory() as folder:
        here = build("InProcess", Passes.ONE, [])
        spec = check_spec(content).spec
        one_pass, theirs = ours("in process", here), published(spec, arguments.claims, arguments.device)
        variants = [one_pass, ours("two passes", build("InProcess", Passes.TWO, [])), theirs, *floor(spec, here)]
        if HALF < CORES:
            variants += [on_half(one_pass), on_half(theirs)]
        if arguments.local_only:
            play(variants, arguments)
            return
        content["spec"]["teacherServing"]["placement"] = "Shared"
        with triton(check_spec(content), arguments.claims, Path(folder), arguments.device) as address:
            remote = build("Shared", Passes.ONE, [address])
            play([ours("remote", remote, HALF), *variants], arguments)
            remote.method.close()


def play(variants: list[Variant], arguments: Any) -> None:
    for round_ in range(arguments.rounds + 1):
        # Turns in changing order: what one leaves in the caches is not always the same one's gain.
        for variant in variants if round_ % 2 else variants[::-1]:
            measure(variant, round_, arguments.device)
    for variant in variants:
        for figures in (variant.seconds, variant.memory, variant.waiting):
            del figures[:1]
    report(variants, keep=arguments.write)


def join_alone(device: str) -> World:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    return init_distributed(device)


if __name__ == "__main__":
    main()
