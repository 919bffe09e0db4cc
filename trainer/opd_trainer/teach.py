"""One rank of a teacher's training: `python -m opd_trainer.teach`, started by `opd_trainer.launch teach`.

All of a teacher is in one folder beside the student's, named by what the teacher depends on:

    checkpoints/  train/log.jsonl     as a student's
    adapter/                          the averaged weights, and teacher.json: where they come from, how good they are
    lock                              of the run that trains it; another one waits, and finds it done

Before it may teach it is compared with its base, on the held-out prompts of its task.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from opd_core.api.load import load_spec
from opd_core.api.teachers import ADAPTER, teacher_digest, teacher_path
from opd_core.api.types import Spec, Teacher
from opd_core.artifacts import (
    Score,
    Source,
    TeacherManifest,
    installed_versions,
    read_trained_teacher,
    write_teacher,
)
from opd_core.device import choose_device
from opd_core.errors import InvalidError, RefusedError, UnavailableError
from opd_core.exit_codes import ExitCode
from opd_core.models.adapters import save_adapter
from opd_core.models.fingerprint import fingerprint
from opd_core.models.preflight import adapter_problems, refuse
from opd_core.process import die_with_parent, leave
from opd_core.termination import last_words
from opd_core.uris import resolve
from torch import Tensor

from opd_trainer import arguments
from opd_trainer.alone import alone
from opd_trainer.checkpoint import Identity
from opd_trainer.engine import barrier, broadcast, init_distributed
from opd_trainer.evaluation.sampling import Candidate, student_scales
from opd_trainer.evaluation.statistics import mean_score
from opd_trainer.evaluation.tags import tags_for, tags_of
from opd_trainer.methods.reinforcement import Reinforcement
from opd_trainer.metrics import Metrics
from opd_trainer.preflight import data_notes, data_problems
from opd_trainer.prompts import prompts_digest
from opd_trainer.rank import run_rank
from opd_trainer.rounds import done, go_on, say
from opd_trainer.run import STUDENT, Run
from opd_trainer.server import serve
from opd_trainer.stopping import leave_at_once
from opd_trainer.student import averaged_state
from opd_trainer.teacher_setup import build_teacher_run, teacher_spec
from opd_trainer.validation import score

SMALLER = (
    "lower training.microBatchSize, set training.gradientCheckpointing to true, or lower training.resolution or the "
    "teacher's training.groupSize"
)


def main(argv: list[str] | None = None) -> int:
    """Exit code of the rank."""
    die_with_parent()
    args = arguments.teacher_trainer().parse_args(argv)
    return run_rank(partial(teach, args), smaller=SMALLER, debug=args.debug)


def teach(args: Namespace) -> int:
    leave_at_once()
    spec = load_spec(args.spec).spec
    teacher = find_teacher(spec, args.teacher)
    assert teacher.training is not None
    place = teacher_path(spec, teacher, args.claims)
    device = choose_device(args.device)
    world = init_distributed(device)
    metrics = Metrics([teacher.name], teacher.training.rounds, teacher.training.validate_every_rounds)
    if args.metrics_port and world.local_rank == 0:
        serve(metrics, args.metrics_host, args.metrics_port)
    with alone(place, world):
        manifest = read_trained_teacher(place / ADAPTER)
        # As rank 0 sees it: a shared file system may show the pods different folders for a while.
        if broadcast(int(manifest is None), world):
            metrics.stage("Loading")
            own = teacher_spec(spec, teacher)
            find = partial(resolve, claims=args.claims)
            problems = [*adapter_problems(spec, find), *data_problems(own, args.claims, find)]
            refuse(problems, f"teacher {teacher.name}")
            for note in data_notes(own, args.claims, find) if world.rank == 0 else []:
                say(world, note)
            run = build_teacher_run(own, args.claims, device, world)
            code, manifest = make(run, own, place, teacher_digest(spec, teacher), args.claims, metrics)
            if manifest is None:
                return code
    if manifest is None:
        raise UnavailableError(f"{place} does not show this rank the teacher that is there; start again")
    say(world, verdict(teacher, manifest))
    done(world, metrics)
    if teacher.training.must_beat_base and manifest.gain.mean <= 0:
        raise RefusedError(
            f"{verdict(teacher, manifest)}; it must not teach. Train it longer or otherwise, look at the rewards, or "
            "set the teacher's training.mustBeatBase to false"
        )
    if world.rank == 0:
        said = {"round": manifest.round, "digest": manifest.digest, "beatsBase": manifest.gain.mean > 0}
        last_words(ExitCode.OK, verdict(teacher, manifest), **said)
    return ExitCode.OK


def find_teacher(spec: Spec, name: str) -> Teacher:
    """The teacher `name`, which is one that the spec trains.

    Raises:
        InvalidError: it is not.
    """
    trained = [teacher.name for teacher in spec.teachers if teacher.training is not None]
    found = next((teacher for teacher in spec.teachers if teacher.name == name and teacher.training), None)
    if found is None:
        raise InvalidError(
            f"--teacher {name}: the spec trains no such teacher; it trains {', '.join(trained) or 'none'}"
        )
    return found


def make(
    run: Run, spec: Spec, place: Path, key: str, claims: Path, metrics: Metrics
) -> tuple[int, TeacherManifest | None]:
    """Train what is left, compare with the base, write the adapter. The exit code, and no manifest, where it was told
    to stop before the end."""
    (task,) = run.tasks
    identity = Identity(
        training_digest=key,
        base=fingerprint(resolve(spec.model.uri, claims)),
        teachers={},
        prompts={task.name: prompts_digest(task.prompts)},
        world_size=run.world.size,
        zero_stage=spec.training.deepspeed.zero_stage,
    )
    code = go_on(run, place, identity, metrics)
    if code != ExitCode.OK:
        return code, None
    leave_at_once()  # the last checkpoint holds all; nothing that follows has to be kept
    metrics.stage("Validating")
    scores = compare(run, spec)
    manifest: TeacherManifest | None = None
    if run.world.rank == 0:
        metrics.stage("Saving")
        manifest = write_teacher(
            place / ADAPTER,
            lambda folder: save_adapter(run.model.transformer, folder, STUDENT, averaged_state(run.model, run.ema)),
            lambda digest: describe(run, spec, identity, digest, scores),
        )
    barrier(run.world)
    return ExitCode.OK, manifest or read_trained_teacher(place / ADAPTER)


def compare(run: Run, spec: Spec) -> dict[str, dict[str, Tensor]]:
    """Rewards [N] of base and teacher by reward, equal on all ranks."""
    (teacher,) = spec.teachers
    assert run.validation is not None
    base = Candidate("base", None, student_scales(spec), "")
    own = Candidate("teacher", STUDENT, teacher.scales, "")
    scores = {"base": score(run.validation, run.model, base, run.world)[teacher.name]}
    with run.ema.applied():
        scores["teacher"] = score(run.validation, run.model, own, run.world)[teacher.name]
    return scores


def describe(
    run: Run, spec: Spec, identity: Identity, digest: str, scores: dict[str, dict[str, Tensor]]
) -> TeacherManifest:
    (teacher,) = spec.teachers
    assert teacher.training is not None
    assert run.validation is not None
    assert isinstance(run.method, Reinforcement)
    records, seed = run.validation.prompts[teacher.name], spec.evaluation.seed
    prompts, tags = [record.prompt for record in records], {teacher.name: tags_of(records)}
    weights = torch.tensor(run.method.weights(teacher.name), dtype=torch.float64)
    base, own = (torch.stack(list(scores[model].values()), 1) @ weights for model in ("base", "teacher"))

    def means(model: str) -> dict[str, Score]:
        return {
            name: mean_score(values.numpy(), prompts, seed, tags_for(name, teacher.name, tags))
            for name, values in scores[model].items()
        }

    return TeacherManifest(
        name=teacher.name,
        digest=digest,
        algorithm=teacher.training.algorithm.value,
        round=run.training.rounds,
        guidance_scale=teacher.guidance_scale,
        true_cfg_scale=teacher.true_cfg_scale,
        base=Source(uri=spec.model.uri, fingerprint=identity.base),
        prompts_uri=teacher.prompts.uri,
        prompts_digest=identity.prompts[teacher.name],
        scores={model: means(model) for model in ("base", "teacher")},
        gain=mean_score((own - base).numpy(), prompts, seed),
        license=f"that of the base model {spec.model.uri}",
        versions=installed_versions(),
    )


def verdict(teacher: Teacher, manifest: TeacherManifest) -> str:
    """One line on how good the teacher is."""
    gain, base, own = manifest.gain, manifest.scores["base"], manifest.scores["teacher"]
    rewards = ", ".join(f"{name} {base[name].mean:.3f} -> {own[name].mean:.3f}" for name in own)
    than = "better than" if gain.mean > 0 else "no better than"
    return (
        f"teacher {teacher.name} is {than} the base on its {gain.n} held-out images: gain {gain.mean:.3f} "
        f"({gain.low:.3f} to {gain.high:.3f}); {rewards}"
    )


if __name__ == "__main__":
    leave(main())
