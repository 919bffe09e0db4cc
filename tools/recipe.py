"""What makes the difference: the example distilled with one thing changed at a time, at equal work.

    python tools/recipe.py [--images 800] [NAME ...]      all variants, or those named

Every variant sees about as many latents per task (images times solver steps) as the first one. What is measured is the
objective itself on prompts nobody trained on: the student follows its own trajectory over the evaluation's solver steps,
and the squared difference to its task's teacher is averaged over elements, steps and prompts. That tells variants apart
with a tenth of the images that rewards need. Results are added to runs/recipe.jsonl; the table of all is printed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from opd_core.api.load import load_spec
from opd_core.api.types import OPDDistillation
from opd_core.diffusion.transitions import transitions
from opd_core.ports import free_ports
from opd_trainer.engine import World, init_distributed, learning_rate, shutdown
from opd_trainer.loop import play_round
from opd_trainer.prompts import held_out_prompts
from opd_trainer.run import Run
from opd_trainer.setup import build_run
from opd_trainer.trajectories import student_prompts

REPOSITORY = Path(__file__).resolve().parents[1]
SPEC = REPOSITORY / "examples" / "tiny" / "distill.yaml"

RESULTS = REPOSITORY / "runs" / "recipe.jsonl"
PROMPTS = 24
FAST = {"optimizer.learningRate": 6e-3}
SIX = {**FAST, "sampler.steps": 6}
LARGE = {"sampler.steps": 6, "imagesPerTask": 4, "optimizer.learningRate": 4e-3}
MEAN = {"student.initFromTeachers": True, "student.adapter.rank": 48, "student.adapter.alpha": 96}
HALF = {**MEAN, "optimizer.learningRate": 1.5e-3}
QUICKSTART = load_spec(SPEC.with_name("quickstart.yaml")).spec
WIDE = {**HALF, "student.adapter.targetModules": QUICKSTART.student.adapter.target_modules}
VARIANTS: dict[str, dict[str, Any]] = {
    "as in the example": {},
    "learning rate 6e-3": FAST,
    "learning rate 6e-3, 3 steps": {**FAST, "sampler.steps": 3},
    "learning rate 6e-3, 6 steps": SIX,
    "learning rate 6e-3, 6 steps, geneval with weight 3": {**SIX, "teachers[0].weight": 3.0},
    "learning rate 1e-2, 6 steps": {**SIX, "optimizer.learningRate": 1e-2},
    "learning rate 8e-3, 6 steps, 1 image a task": {**SIX, "imagesPerTask": 1, "optimizer.learningRate": 8e-3},
    "learning rate 8e-3, 6 steps, 4 images a task": {**LARGE, "optimizer.learningRate": 8e-3},
    "learning rate 4e-3, 6 steps, 4 images a task": LARGE,
    "learning rate 4e-3, 10 steps, 4 images a task": {**LARGE, "sampler.steps": 10},
    "learning rate 3e-4": {"optimizer.learningRate": 3e-4},
    "MeanMatching": {"objective.type": "MeanMatching"},
    "rank 8": {"student.adapter.rank": 8, "student.adapter.alpha": 16},
    "rank 64": {"student.adapter.rank": 64, "student.adapter.alpha": 128},
    "from the teachers' mean": MEAN,
    "from the teachers' mean, learning rate 1.5e-3": HALF,
    "the same, more layers": WIDE,
    "the same, more layers, student without guidance": {**WIDE, "guidanceScale": 1.0},
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=800, help="per task, at six solver steps")
    options.add_argument("names", nargs="*", metavar="NAME", help=", ".join(VARIANTS))
    arguments = options.parse_args()
    if unknown := [name for name in arguments.names if name not in VARIANTS]:
        options.error(f"unknown variant {unknown[0]!r}")
    (port,) = free_ports(1)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    world = init_distributed("cpu")
    RESULTS.parent.mkdir(exist_ok=True)
    for name in arguments.names or VARIANTS:
        result = measure(name, variant(VARIANTS[name], arguments.images), world)
        with RESULTS.open("a") as lines:
            print(json.dumps(result), file=lines)
        print(json.dumps(result), file=sys.stderr, flush=True)
    shutdown()
    print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))
    return 0


def variant(changes: Mapping[str, Any], images: int) -> OPDDistillation:
    def told(of: Mapping[str, Any]) -> list[str]:
        whole = {path if path.startswith(("teachers", "student")) else f"training.{path}": of[path] for path in of}
        return [f"{path}={json.dumps(value)}" for path, value in whole.items()]

    inside = ['teacherServing={"placement": "InProcess", "precision": "FP32"}']
    training = load_spec(SPEC, told(changes)).spec.training
    rounds = round(images * 6 / training.sampler.steps / training.images_per_task)
    return load_spec(SPEC, [*inside, *told({**changes, "rounds": rounds})])


def measure(name: str, distillation: OPDDistillation, world: World) -> dict[str, Any]:
    run = build_run(distillation.spec, SPEC.parent, [], "cpu", world)
    began = time.monotonic()
    for round_ in range(run.training.rounds):
        play_round(run, round_)
        run.engine.step(learning_rate(run.training.optimizer, run.training.rounds, round_))
    minutes = (time.monotonic() - began) / 60
    errors = held_out_errors(run, distillation)
    run.method.teachers.close()
    run.engine.close()
    return {"variant": name, "rounds": run.training.rounds, "minutes": minutes, "errors": errors}


@torch.no_grad()
def held_out_errors(run: Run, distillation: OPDDistillation) -> dict[str, float]:
    """By task: mean of (v_S - v_T)^2 over elements, solver steps and prompts, at states the student visits."""
    spec = distillation.spec
    resolution = spec.training.resolution
    schedule = run.model.schedule(spec.evaluation.sampler.steps, resolution.width, resolution.height)
    path = transitions(schedule, spec.training.sampler.solver, 0.0)
    records, errors = held_out_prompts(spec, SPEC.parent), {}
    for i, task in enumerate(run.tasks):
        conditioning = run.encode([record.prompt for record in records[task.name][:PROMPTS]])
        prompts = student_prompts(run.model, spec.training, conditioning, run.negative)
        shape = run.model.latent_shape(resolution.width, resolution.height)
        x = torch.randn((PROMPTS, *shape), generator=torch.Generator().manual_seed(7 + i))
        theirs, total = torch.tensor([task.scales] * PROMPTS), 0.0
        before: torch.Tensor | None = None
        for step in path:
            sigmas = torch.full((PROMPTS,), step.sigma)
            student = run.model.velocity(x, sigmas, prompts)
            teacher = run.method.teachers.submit(task.name, x, sigmas, theirs, conditioning, run.negative).result()
            total += (student - teacher).square().mean().item()
            x, before = step.mean(x, student, before), step.clean(x, student)
        errors[task.name] = total / len(path)
    return errors


def table(results: list[dict[str, Any]]) -> str:
    """The last result of every variant, as Markdown."""
    last = {result["variant"]: result for result in results}
    tasks = list(results[0]["errors"])
    lines = [f"| variant | rounds | {' | '.join(tasks)} | mean |", "|---|" + "---:|" * (len(tasks) + 2)]
    for name in VARIANTS:
        if name in last:
            values = [last[name]["errors"][task] for task in tasks]
            cells = [f"{value:.3f}" for value in (*values, sum(values) / len(values))]
            lines.append(f"| {name} | {last[name]['rounds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
