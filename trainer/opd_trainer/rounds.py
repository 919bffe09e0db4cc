"""All rounds of a run, with what is around them: the checkpoint that they continue from, validations, log, metrics,
checkpoints."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from opd_core.errors import UnavailableError
from opd_core.exit_codes import ExitCode
from opd_core.termination import last_words

from opd_trainer import checkpoint, loop
from opd_trainer.checkpoint import Identity
from opd_trainer.engine import World, barrier, shutdown
from opd_trainer.evaluation import looks_of
from opd_trainer.log import RoundLog
from opd_trainer.metrics import Metrics
from opd_trainer.record import RoundRecord
from opd_trainer.run import STUDENT, Run
from opd_trainer.stopping import StopSignal
from opd_trainer.validation import look

CHECKPOINTS = "checkpoints"


def resume(run: Run, work: Path, identity: Identity, metrics: Metrics) -> int:
    """Rounds that are already finished, of which the run is what it was after the last."""
    found = checkpoint.latest(work / CHECKPOINTS, run.world)
    if found is None:
        return 0
    folder, manifest = found
    checkpoint.load(folder, manifest, engines_of(run), state_of(run), identity, run.world)
    run.steps = manifest.round * run.method.updates_per_round
    if run.scale is not None:
        run.scale.halvings = manifest.halvings
    metrics.resumed(manifest.round)
    say(run.world, f"continuing after round {manifest.round} from {folder}")
    return manifest.round


def state_of(run: Run) -> checkpoint.State:
    """What a checkpoint holds beside the trained parameters and their optimisers."""
    return {"ema": run.ema.tensors, **run.method.state}


def engines_of(run: Run) -> checkpoint.Engines:
    """All that is trained."""
    return {STUDENT: run.engine, **run.method.engines}


def go_on(
    run: Run,
    work: Path,
    identity: Identity,
    metrics: Metrics,
    hurry: Sequence[Callable[[], None]] = (),
    *,
    tensorboard: bool = False,
) -> int:
    """Every round that is left, from the newest checkpoint on. ExitCode.OK, or the code of who was told to stop before
    the last one, as its last words say.

    Args:
        hurry: to be called by a stop signal: what waits for others gives up.
    """
    start = resume(run, work, identity, metrics)
    barrier(run.world)
    stop = StopSignal()
    for call in (run.hurry.set, *hurry):
        stop.then(call)
    metrics.stage("Training")
    try:
        finished = play(run, work, start, identity, metrics, stop, tensorboard=tensorboard)
    except UnavailableError as error:
        if not stop.requested():
            raise
        message = f"told to stop while others were away; a new start continues at the last checkpoint: {error}"
        say(run.world, message)
        last_words(stop.exit_code, message)
        return stop.exit_code
    if finished == run.training.rounds:
        return ExitCode.OK
    last_words(stop.exit_code, f"stopped after round {finished}; a new start continues there")
    done(run.world, metrics)
    return stop.exit_code


def done(world: World, metrics: Metrics) -> None:
    """All ranks have come to the end."""
    metrics.stage("Done")
    barrier(world)
    shutdown()


def play(
    run: Run,
    work: Path,
    start: int,
    identity: Identity,
    metrics: Metrics,
    stop: StopSignal,
    *,
    tensorboard: bool = False,
) -> int:
    """All rounds that are left. Returns the rounds finished."""
    training, world = run.training, run.world
    log = RoundLog(work / "train", start, tensorboard) if world.rank == 0 else None
    finished = start

    def finish_round(record: RoundRecord, stopping: bool) -> None:
        nonlocal finished
        if run.validation is not None and run.validation.due(record.round) and not stopping:
            metrics.stage("Validating")
            began = time.monotonic()
            folder = looks_of(work) / str(record.round)
            record = replace(record, rewards=look(run.validation, run.model, STUDENT, run.ema, world, folder))
            metrics.validated(began)
            metrics.stage("Training")
        if record.skipped:
            say(world, f"round {record.round}: a float16 gradient overflowed; no step, and half the scale from now on")
        metrics.finish_round(record)
        if log is not None:
            log.write(record, datetime.now(UTC).isoformat(timespec="seconds"))
        if stopping or record.round == training.rounds or record.round % training.checkpoint.every_rounds == 0:
            began = time.monotonic()
            halvings = run.scale.halvings if run.scale else 0
            folder = checkpoint.save(
                work / CHECKPOINTS, record.round, engines_of(run), state_of(run), identity, world,
                training.checkpoint.keep, halvings=halvings,
            )  # fmt: skip
            metrics.saved(record.round, folder, began)
            say(world, describe(record, training.rounds))
        finished = record.round

    try:
        loop.train(run, start, finish_round, stop.requested)
    finally:
        if log is not None:
            log.close()
    return finished


def say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


def describe(record: RoundRecord, rounds: int) -> str:
    tasks = ", ".join(f"{name} {task.velocity_mse:.4g}" for name, task in record.tasks.items())
    told = f"velocity error {tasks}"
    if "reward" in record.figures:
        told = f"reward {record.figures['reward']:.4g}, distance to the base {tasks}"
    return f"round {record.round}/{rounds}: loss {record.loss:.4g}, {told}, {record.seconds:.2f} s"
