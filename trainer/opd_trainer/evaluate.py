"""`python -m opd_trainer.evaluate`: scores base, teachers and student into OUTPUT/<model>.json, images, summary.

One rank of the evaluator; `python -m opd_trainer.launch evaluate` starts one for every GPU of the spec. Whole batches
are dealt out, so that an image is computed beside the same others however many ranks there are.
"""

import hashlib
import json
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from opd_core.api.load import load_spec
from opd_core.api.types import Spec
from opd_core.artifacts import KeptShare, publish_student, read_student, update_scores
from opd_core.brief import lost, worst
from opd_core.device import choose_device
from opd_core.errors import InvalidError, StorageError
from opd_core.exit_codes import ExitCode
from opd_core.models.adapter_file import AdapterFile, read_adapter_file
from opd_core.models.adapter_layers import fit
from opd_core.models.adapters import model_layers
from opd_core.models.fingerprint import fingerprint
from opd_core.models.pipeline import Model, load_model
from opd_core.models.teacher_files import teacher_files, teacher_fingerprint
from opd_core.precision import TORCH_DTYPES
from opd_core.process import die_with_parent, leave
from opd_core.termination import last_words
from opd_core.uris import resolve
from torch import Tensor

from opd_trainer import arguments
from opd_trainer.encoders import encoders_on_device
from opd_trainer.engine import ALONE, World, all_reduce, join, shutdown, total
from opd_trainer.evaluation.checks import failures
from opd_trainer.evaluation.pictures import save_image
from opd_trainer.evaluation.sampling import Candidate, model_of, sample_images, student_scales
from opd_trainer.evaluation.summary import scores_of, summarise, task_means
from opd_trainer.evaluation.tags import tags_of
from opd_trainer.prompt_files import PromptRecord
from opd_trainer.prompts import held_out_prompts
from opd_trainer.rank import run_rank
from opd_trainer.rewards.registry import RewardFn, load_rewards

GRID_IMAGES = 8  # per task and model, for the report
SMALLER = "lower evaluation.batchSize or training.resolution"


def main(argv: list[str] | None = None) -> int:
    die_with_parent()
    args = arguments.evaluator().parse_args(argv)
    return run_rank(partial(run, args), smaller=SMALLER)


def run(args: Namespace) -> int:
    spec = load_spec(args.spec).spec
    device = choose_device(args.device)
    world = join(device)
    summary = evaluate(
        spec,
        claims=args.claims,
        student=args.student,
        kinds=args.models.split(","),
        output=args.output,
        device=device,
        world=world,
    )
    if args.student is not None and "gate" in summary and world.rank == 0:
        conclude(spec, summary, args.student, args.claims)
    if world.size > 1:  # alone it has joined no group, and ends none of somebody else's
        shutdown()
    return ExitCode.OK


def conclude(spec: Spec, summary: dict[str, Any], student: Path, claims: Path) -> None:
    """A student that passes its gate goes to `spec.student.output`; the pod's last words carry the scores."""
    missed = failures(summary["gate"])
    if not missed:
        publish_student(student, spec.student.output.uri, claims)
    shown, rest = worst(task_means(spec, summary), lambda row: lost(row.get("kept")))
    last_words(
        ExitCode.OK,
        "; ".join(missed) or "the gate is passed",
        digest=read_student(student)[0].digest,
        gatePassed=not missed,
        scores=[*shown, *rest],  # the worst of many first: what does not fit is cut off behind
    )


def evaluate(
    spec: Spec,
    *,
    claims: Path,
    student: Path | None,
    kinds: Sequence[str],
    output: Path,
    device: str,
    quiet: bool = False,
    world: World = ALONE,
) -> dict[str, Any]:
    """Score the models and write `OUTPUT/summary.json`; what was scored before under the same key is read back.

    All ranks of `world` call it and get the same; rank 0 writes. Without the models that a rule of the gate compares
    with there is no "gate" in the summary, and `gateNeeds` names them.

    Raises:
        InvalidError: prompts, adapters or rewards that cannot be used. StorageError: OUTPUT cannot be written.
    """
    unknown = sorted(set(kinds) - {"base", "teachers", "student"})
    if unknown:
        raise InvalidError(f"--models names {unknown[0]!r}; write some of base, teachers, student")
    if "student" in kinds and student is None:
        raise InvalidError("--models names student; give its directory with --student")
    rewards = load_rewards(spec, device)
    records = held_out_prompts(spec, claims)
    base = resolve(spec.model.uri, claims)
    model = load_model(base, device=device, dtype=TORCH_DTYPES[spec.training.precision.value])
    prompts = {task: [record.prompt for record in of_task] for task, of_task in records.items()}
    tags = {task: tags_of(of_task) for task, of_task in records.items()}
    length = spec.model.max_sequence_length
    with encoders_on_device(model):
        (negative,) = model.encode([""], length, negative=True)
        conditioning = {task: model.encode(of_task, length) for task, of_task in prompts.items()}
    base_fingerprint = fingerprint(base)  # reads every weight: once
    mine = shares({task: len(of_task) for task, of_task in prompts.items()}, spec.evaluation.batch_size, world)
    results = {}
    for candidate in _candidates(spec, model, base_fingerprint, claims, student, kinds):
        file = output / f"{candidate.name.replace(':', '-')}.json"
        key = _key(spec, candidate, base_fingerprint, records)
        known = _read_back(file, key)
        if total(float(known is None), world):
            began, parts = time.perf_counter(), {}
            with model_of(candidate, model) as computing:
                for task, of_task in records.items():
                    own = [conditioning[task][number] for number in mine[task]]
                    batches = sample_images(computing, candidate, spec, task, mine[task], own, negative)
                    folder = output / "images" / file.stem / task
                    parts[task] = _score(batches, of_task, rewards[task], folder, model.frames_per_second)
            known = {
                "key": key,
                "model": candidate.name,
                "seconds": time.perf_counter() - began,
                "prompts": prompts,
                "rewards": _of_all_ranks(parts, world),
            }
            if world.rank == 0:
                _write(file, known)
        assert known is not None
        results[candidate.name] = known["rewards"]
        if not quiet and world.rank == 0:
            scores = scores_of(spec, known["rewards"], prompts, tags)
            means = "  ".join(f"{name} {score.mean:.3f}" for name, score in scores.items())
            print(f"evaluator: {candidate.name:20s} {means}", flush=True)
    summary = summarise(spec, results, prompts, tags)
    if world.rank == 0:
        _write(output / "summary.json", summary)
        if student is not None and "student" in results:
            kept = {task: KeptShare(**share) for task, share in summary["kept"].items() if share["share"] is not None}
            update_scores(student, scores_of(spec, results["student"], prompts, tags), kept)
        if not quiet and "gateNeeds" in summary:
            print(f"evaluator: the gate is not judged, it needs {', '.join(summary['gateNeeds'])} as well", flush=True)
    return summary


def shares(prompts: Mapping[str, int], batch_size: int, world: World) -> dict[str, list[int]]:
    """Numbers of this rank's prompts by task: every `world.size`-th batch of all tasks' batches in a row."""
    batches = [
        (task, range(first, min(first + batch_size, count)))
        for task, count in prompts.items()
        for first in range(0, count, batch_size)
    ]
    chosen = batches[world.rank :: world.size]
    return {task: [number for owner, batch in chosen if owner == task for number in batch] for task in prompts}


def _candidates(
    spec: Spec, model: Model, base_fingerprint: str, claims: Path, student: Path | None, kinds: Sequence[str]
) -> list[Candidate]:
    own = student_scales(spec)
    candidates = [Candidate("base", None, own, base_fingerprint)] if "base" in kinds else []
    if "teachers" in kinds:
        for teacher in filter(lambda each: each.teaches, spec.teachers):
            files = teacher_files(spec, teacher, partial(resolve, claims=claims))
            name, scales, key = f"teacher:{teacher.name}", teacher.scales, teacher_fingerprint(files)
            if isinstance(files, AdapterFile):
                lora = fit(files, model_layers(model.transformer))
                candidates.append(Candidate(name, f"teacher-{teacher.name}", scales, key, lora=lora))
            else:
                candidates.append(Candidate(name, None, scales, key, files))
    if "student" in kinds and student is not None:
        manifest, weights = read_student(student)
        lora = fit(read_adapter_file(weights), model_layers(model.transformer))
        candidates.append(Candidate("student", "student", own, manifest.digest, lora=lora))
    return candidates


def _score(
    batches: Iterator[tuple[list[int], Tensor]],
    records: Sequence[PromptRecord],
    rewards: Mapping[str, RewardFn],
    folder: Path,
    frames_per_second: int,
) -> dict[str, Tensor]:
    """Scores [N] of all records by reward, float64, zero where the image is another rank's."""
    scores = {name: torch.zeros(len(records), dtype=torch.float64) for name in rewards}
    for numbers, images in batches:
        part = [records[number] for number in numbers]
        for name, reward in rewards.items():
            scores[name][numbers] = reward(images, [r.prompt for r in part], [r.metadata for r in part]).double()
        for number, image in zip(numbers, images, strict=True):
            if number < GRID_IMAGES:
                save_image(image, folder / f"{number}", frames_per_second)
    return scores


def _of_all_ranks(scores: Mapping[str, Mapping[str, Tensor]], world: World) -> dict[str, dict[str, list[float]]]:
    flat = [values for by_reward in scores.values() for values in by_reward.values()]
    summed = iter(torch.split(all_reduce(torch.cat(flat).to(world.device), world).cpu(), [len(v) for v in flat]))
    return {task: {name: next(summed).tolist() for name in by_reward} for task, by_reward in scores.items()}


def _key(spec: Spec, candidate: Candidate, base_fingerprint: str, records: dict[str, list[PromptRecord]]) -> str:
    """Names everything that the rewards depend on."""
    content = {
        "base": base_fingerprint,
        "model": [candidate.name, candidate.fingerprint, *candidate.scales],
        "evaluation": spec.evaluation.model_dump(mode="json", include={"seed", "batch_size", "sampler"}),
        "resolution": spec.training.resolution.model_dump(exclude_defaults=True),
        "precision": spec.training.precision.value,
        "length": spec.model.max_sequence_length,
        "rewards": {teacher.name: teacher.rewards for teacher in spec.teachers},
        "prompts": {task: [(r.prompt, dict(r.metadata)) for r in of_task] for task, of_task in records.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_back(file: Path, key: str) -> dict[str, Any] | None:
    """What is in `file`, if that is what is wanted."""
    if not file.exists():
        return None
    try:
        known = json.loads(file.read_text())
        return known if known["key"] == key else None
    except (ValueError, KeyError, TypeError):  # damaged, or nothing of ours
        print(f"evaluator: {file} cannot be read; scoring again", flush=True)
        return None


def _write(file: Path, content: dict[str, Any]) -> None:
    scratch = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(content, indent=1))
        scratch.replace(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}") from error


if __name__ == "__main__":
    leave(main())
