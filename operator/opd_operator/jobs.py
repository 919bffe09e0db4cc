"""One Job per start of trainer or evaluator: the next one after a failure, a lost result or a changed pod. Pure."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from opd_core.api.digests import digest, said
from opd_core.api.pod import Pod
from opd_core.stages import Reason, Stage

from opd_operator.draft import Draft, timestamp
from opd_operator.observe import Failure, JobView, failure_of, parse_time

_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 360.0  # seconds


@dataclass(frozen=True)
class Start:
    """`number` of the Job that shall exist now, None for none; the Job, if it is there."""

    number: int | None
    job: JobView | None = None


def start(d: Draft, role: str, stage: Stage, pod: Pod, name: Callable[[int], str], *, begun: bool) -> Start:
    """Which Job of `role` shall exist. Where none shall, the stage's condition says why, or the run is stopping.

    Args:
        pod: settings of the role's pods: a Job that has not `begun` is made again when they change.
        name: of the Job with a number.
    """
    starts = d.starts(role)
    job = d.observed.jobs.get(name(starts["number"]))
    if job and job.over and not _speaking(d, job):
        if not _again(d, role, stage, failure_of(job, d.observed.pods)):
            return Start(None)
        job = None
    if job is None and (at := starts.get("nextStart")):
        if d.now < parse_time(at):
            d.wake.append(parse_time(at))
            failure = d.status.get("lastFailure", {})
            text = f"starts again at {at} after {failure.get('reason')}: {failure.get('message', '')}"
            d.mark(stage, False, Reason.RESTARTING, text)
            return Start(None)
        del starts["nextStart"]
    settings = digest(said(pod))[:8]
    if starts.setdefault("pod", settings) != settings and not begun:
        starts["number"] += 1
        job = None
    if job is None:
        starts["pod"] = settings
        # Two of them in one folder would overwrite each other's checkpoints.
        if left := d.observed.active(role):
            d.mark(stage, False, Reason.STOPPING, f"{left[0].name} of an earlier start is still ending")
            return Start(None)
    return Start(starts["number"], job)


def ended(d: Draft, job: JobView | None) -> bool:
    """Whether the Job is done and what its pods said is known: the watches of Jobs and pods are two streams."""
    return job is not None and job.complete and not _speaking(d, job)


def ask_again(d: Draft, role: str) -> None:
    """The result of a finished Job is gone with its pod; the next one finds the work done and says it again."""
    d.starts(role)["number"] += 1


def _speaking(d: Draft, job: JobView) -> bool:
    return any(pod.job == job.name and pod.active for pod in d.observed.pods)


def _again(d: Draft, role: str, stage: Stage, failure: Failure) -> bool:
    """Count a failed start and say whether there is another one."""
    d.status["lastFailure"] = {
        "stage": stage.value,
        "reason": failure.reason.value,
        "message": failure.message[:1024],
        "pod": failure.pod,
        "container": failure.container,
        "exitCode": failure.exit_code,
        "time": timestamp(d.now),
    }
    starts, limit = d.starts(role), d.spec.run_policy.backoff_limit
    said_ = f"{failure.pod or 'its pod'} ended with exit code {failure.exit_code}: {failure.message}"
    if failure.final:
        d.stop(failure.reason, said_, stage)
        return False
    if failure.counts and starts["failures"] >= limit:
        text = f"failed {limit + 1} times (backoffLimit {limit}); {said_}"
        d.stop(Reason.BACKOFF_LIMIT_EXCEEDED, text, stage)
        return False
    d.status["restarts" if failure.counts else "disruptions"] += 1
    starts["failures"] += failure.counts
    starts["number"] += 1
    starts["nextStart"] = timestamp(
        d.now + _pause(d, starts["failures"] if failure.counts else d.status["disruptions"])
    )
    return True


def _pause(d: Draft, count: int) -> float:
    """Seconds until the next start: doubling, capped, and spread by the object so that many do not start as one."""
    spread = int(hashlib.sha256(f"{d.namespace}/{d.name}/{count}".encode()).hexdigest(), 16) % 1000 / 1000
    return min(_FIRST_PAUSE * 2.0 ** max(0, count - 1), _LONGEST_PAUSE) * (1 + 0.2 * spread)
