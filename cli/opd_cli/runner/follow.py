"""A training that is at work: watched until its end."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_core.stages import Reason

from opd_cli.runner.context import POLL_SECONDS, Run
from opd_cli.runner.supervise import Job, Server
from opd_cli.runner.workfolder import newest_checkpoint
from opd_cli.web import open_url

_PROGRESS_SECONDS = 1.0


def follow(run: Run, trainer: Job, checkpoints: Path, servers: Sequence[Server] = ()) -> None:
    """Until a training is done: restart what fails and may be retried, show progress, drain on Ctrl-C.

    Args:
        checkpoints: of the training. servers: what it asks.

    Raises:
        InterruptedRunError: by the user, after a checkpoint. UnavailableError: it took too long.
        ProgramError, RefusedError: it failed for good.
    """
    check_deadline = run.deadline(trainer.stage)
    draining, running, asked_at = False, False, 0.0
    while True:
        if draining and (code := trainer.program.exit_code):
            if code <= 128:
                raise trainer.failure()
            reached = newest_checkpoint(checkpoints)
            if reached is None:
                raise run.stop.error("stopped before its first checkpoint; the same command begins again")
            raise run.stop.error(f"stopped at the checkpoint of round {reached}; the same command continues there")
        if trainer.finished():
            return
        if run.stop.asked and not draining:
            run.display.note("stopping: the trainer finishes its round and saves a checkpoint; Ctrl-C again to kill")
            trainer.program.terminate()
            draining = True
        for server in servers:
            server.keep_alive()
        if time.monotonic() - asked_at > _PROGRESS_SECONDS:
            asked_at = time.monotonic()
            progress = _progress(trainer)
            if progress and progress["metrics"]:
                if not running:
                    run.display.stage(
                        trainer.stage, Reason.RUNNING, f"{trainer.recipe.name}: {progress['totalRounds']} rounds"
                    )
                run.display.progress(progress)
            running = bool(progress and progress["metrics"])
        check_deadline()
        time.sleep(POLL_SECONDS)


def _progress(trainer: Job) -> Mapping[str, Any] | None:
    try:
        with open_url(f"http://127.0.0.1:{trainer.recipe.ports['metrics']}/progress", timeout=2) as answer:
            content: Mapping[str, Any] = json.load(answer)
            return content
    except (OSError, ValueError):
        return None  # not up yet, or busy; the next poll asks again
