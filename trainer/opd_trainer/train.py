"""One rank of the trainer: `python -m opd_trainer.train`, started by `opd_trainer.launch` or by torchrun."""

from argparse import Namespace
from functools import partial
from pathlib import Path

from opd_core.api.digests import digest, weights_fields
from opd_core.api.load import load_spec
from opd_core.api.training import Method
from opd_core.api.types import OPDDistillation
from opd_core.device import choose_device
from opd_core.exit_codes import ExitCode
from opd_core.models.fingerprint import fingerprint
from opd_core.models.preflight import refuse
from opd_core.process import die_with_parent, leave
from opd_core.teachers.client import TeacherClient
from opd_core.termination import last_words
from opd_core.uris import resolve

from opd_trainer import arguments
from opd_trainer.alone import alone
from opd_trainer.checkpoint import Identity
from opd_trainer.engine import init_distributed
from opd_trainer.methods.distillation import Distillation
from opd_trainer.metrics import Metrics
from opd_trainer.preflight import data_notes, data_problems
from opd_trainer.prompts import prompts_digest
from opd_trainer.rank import run_rank
from opd_trainer.reinforcement_setup import build_student_run
from opd_trainer.rounds import done, go_on, say
from opd_trainer.run import STUDENT, Run
from opd_trainer.server import serve
from opd_trainer.setup import agree, build_run
from opd_trainer.stopping import leave_at_once
from opd_trainer.student import save_student

SMALLER = "lower training.microBatchSize, set training.gradientCheckpointing to true, or lower training.resolution"


def main(argv: list[str] | None = None) -> int:
    """Exit code of the rank."""
    die_with_parent()
    args = arguments.trainer().parse_args(argv)
    return run_rank(partial(train, args), smaller=SMALLER, debug=args.debug)


def train(args: Namespace) -> int:
    leave_at_once()
    distillation = load_spec(args.spec)
    training = distillation.spec.training
    device = choose_device(args.device)
    world = init_distributed(device)

    tasks = [teacher.name for teacher in distillation.spec.teachers]
    metrics = Metrics(tasks, training.rounds, distillation.spec.evaluation.every_rounds)
    if args.metrics_port and world.local_rank == 0:
        serve(metrics, args.metrics_host, args.metrics_port)

    find = partial(resolve, claims=args.claims)
    refuse(data_problems(distillation.spec, args.claims, find), distillation.metadata.name)
    for note in data_notes(distillation.spec, args.claims, find) if world.rank == 0 else []:
        say(world, note)
    if training.method == Method.RL:
        run, teachers = build_student_run(distillation.spec, args.claims, device, world), None
    else:
        addresses = [address for address in args.teachers.split(",") if address]
        run = build_run(distillation.spec, args.claims, addresses, device, world)
        assert isinstance(run.method, Distillation)
        teachers = run.method.teachers
    try:
        if teachers is not None:
            metrics.stage("WaitingForTeachers")
            if world.rank == 0:
                agree(run, teachers, distillation.spec, args.claims)
        identity = identify(run, teachers, distillation, args.claims)
        hurry = [] if teachers is None else [teachers.stop_waiting]
        with alone(args.work / "train", world):
            code = go_on(run, args.work, identity, metrics, hurry, tensorboard=args.tensorboard)
            if code != ExitCode.OK:
                return code
            if world.rank == 0:  # before another run gets the folder
                metrics.stage("Saving")
                student = save_student(args.work / STUDENT, distillation, run.model, run.ema, identity)
                say(world, f"student {student.digest} written to {args.work / STUDENT}")
                last_words(ExitCode.OK, "trained", round=training.rounds, digest=student.digest)
    finally:
        run.method.close()
    done(world, metrics)
    return ExitCode.OK


def identify(run: Run, teachers: TeacherClient | None, distillation: OPDDistillation, claims: Path) -> Identity:
    """What a checkpoint of this run belongs to; the teachers' fingerprints have been compared with the spec's."""
    info = None if teachers is None else teachers.describe()
    return Identity(
        training_digest=digest(weights_fields(distillation)),
        base=fingerprint(resolve(distillation.spec.model.uri, claims)) if info is None else info.base,
        teachers={} if info is None else {task.name: info.teachers[task.name] for task in run.tasks},
        prompts={task.name: prompts_digest(task.prompts) for task in run.tasks},
        world_size=run.world.size,
        zero_stage=distillation.spec.training.deepspeed.zero_stage,
    )


if __name__ == "__main__":
    leave(main())
