"""One Job per start of trainer or evaluator: the next one after a failure, a lost result or a changed pod. Pure."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from opd_core.api.digests import digest, said
from opd_core.api.pod import Pod
from opd_core.stages import Reason, Stage

from opd_operator.draft import TRAINER_READY, Draft, timestamp
from opd_operator.observe import Failure, JobView, PodView, failure_of, parse_time

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
    if job:
        _remember_disruption(d, role, job)
    if job and (failure := _failure(d, role, job)):
        if not another(d, role, stage, failure):
            return Start(None)
        job = None
    if job is None and pauses(d, role, stage):
        return Start(None)
    if outdated(d, role, pod) and not begun:
        _next(d, role)
        job = None
    if job is None:
        starts["pod"] = _settings(d, pod)
        # Two of them in one folder would overwrite each other's checkpoints.
        if left := d.observed.active(role):
            d.mark(stage, False, Reason.STOPPING, f"{left[0].name} of an earlier start is still ending")
            return Start(None)
    return Start(starts["number"], job)


def outdated(d: Draft, role: str, pod: Pod) -> bool:
    """Whether the newest Job of a role was made with other settings of its pods."""
    return bool(d.starts(role).get("pod", _settings(d, pod)) != _settings(d, pod))


def _settings(d: Draft, pod: Pod) -> str:
    return digest(said(pod), d.spec.student.output.uri)[:8]


def ended(d: Draft, job: JobView | None) -> bool:
    """Whether the Job is done and what its pods said is known: the watches of Jobs and pods are two streams."""
    if job is None:
        return False
    if job.complete:
        return not _speaking(d, job)
    return _held(d, job) and not any(_exit_code(pod) for pod in pods_of(d, job))


def in_queue(d: Draft, role: str, stage: Stage, job: JobView) -> bool:
    """Whether a queue has not admitted the Job, or has taken it out of work; the stage's condition says so. It is never
    written to, or two would fight for it."""
    gated = next((pod for pod in d.observed.pods_of(role) if pod.queued), None)
    if not (job.suspended or gated) or job.finished:
        return False
    d.wait_in_queue()
    text = f"Job {job.name} waits for its admission by {d.queue}"
    d.mark(stage, False, Reason.QUEUED, f"{text}; {gated.trouble[1]}" if gated and gated.trouble else text)
    return True


def pods_of(d: Draft, job: JobView) -> list[PodView]:
    return [pod for pod in d.observed.pods if pod.job == job.name]


def ask_again(d: Draft, role: str, stage: Stage, job: JobView) -> None:
    """A finished Job whose result cannot be read; the next one finds the work done and says it again."""
    first = next((pod for pod in pods_of(d, job) if pod.index == 0 and pod.ended), None)
    failure = Failure(Reason.DISRUPTED, "its pod was deleted before its result was read", "", "", 0, False, False)
    if first and first.ended:
        text = f"its last words are no result of this release: {first.ended.message[:200]!r}"
        failure = Failure(Reason.FAILED, text, first.name, first.ended.container, 0, counts=True, final=False)
    if another(d, role, stage, failure):
        pauses(d, role, stage)


def another(d: Draft, role: str, stage: Stage, failure: Failure) -> bool:
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
    if failure.counts:
        _forgive(d, role)
    if failure.counts and starts["failures"] >= limit:
        text = f"failed {limit + 1} times (backoffLimit {limit}); {said_}"
        d.stop(Reason.BACKOFF_LIMIT_EXCEEDED, text, stage)
        return False
    d.status["restarts" if failure.counts else "disruptions"] += 1
    starts["failures"] += failure.counts
    _next(d, role)
    starts["nextStart"] = timestamp(
        d.now + _pause(d, starts["failures"] if failure.counts else d.status["disruptions"])
    )
    return True


def pauses(d: Draft, role: str, stage: Stage) -> bool:
    """Whether the next start has to wait; the stage's condition says so."""
    starts = d.starts(role)
    at = starts.get("nextStart")
    if at is None:
        return False
    if d.now >= parse_time(at):
        del starts["nextStart"]
        return False
    d.wake.append(parse_time(at))
    failure = d.status.get("lastFailure", {})
    text = f"starts again at {at} after {failure.get('reason')}: {failure.get('message', '')}"
    d.mark(stage, False, Reason.RESTARTING, text)
    return True


def _next(d: Draft, role: str) -> None:
    starts = d.starts(role)
    starts["number"] += 1
    starts.pop("disrupted", None)


def _remember_disruption(d: Draft, role: str, job: JobView) -> None:
    """A Job has failed when the last of its pods has gone, and the one that was evicted goes first."""
    starts, pods = d.starts(role), pods_of(d, job)
    if marked := [pod.name for pod in pods if pod.disrupted]:
        starts["disrupted"] = marked[0]
    elif any(pod.name == starts.get("disrupted") and pod.active for pod in pods):
        del starts["disrupted"]  # it stayed after all


def _failure(d: Draft, role: str, job: JobView) -> Failure | None:
    """Why this start is over without a result, if it is."""
    starts = d.starts(role)
    if job.suspended and not job.finished and job.succeeded and not _speaking(d, job):
        # Admitted again, it would make the missing pods alone, which wait for peers that have gone (kueue#10487).
        text = f"Job {job.name} was suspended when {job.succeeded} of its pods had ended"
        return Failure(Reason.DISRUPTED, text, "", "", 0, counts=False, final=False)
    over = job.over and not _speaking(d, job)
    if not over and not (_held(d, job) and any(_exit_code(pod) for pod in pods_of(d, job))):
        return None
    ran = d.completed(TRAINER_READY)
    return failure_of(job, d.observed.pods, starts.get("disrupted", ""), ran=ran)


def _speaking(d: Draft, job: JobView) -> bool:
    return any(pod.active for pod in pods_of(d, job))


def _held(d: Draft, job: JobView) -> bool:
    """Whether all our programs of a Job have ended, and containers that somebody put beside them keep its pods: the Job
    will never say so (kubeflow/trainer#1577)."""
    pods = pods_of(d, job)
    return len(pods) == job.pods and all(pod.ended for pod in pods) and any(pod.active and pod.held for pod in pods)


def _exit_code(pod: PodView) -> int:
    return pod.ended.exit_code if pod.ended else 0


def _forgive(d: Draft, role: str) -> None:
    """Failures before the newest checkpoint do not count: there was progress between them, and rounds are finite."""
    starts = d.starts(role)
    reached = min(d.status.get("checkpoint", {}).get("round", 0), d.spec.training.rounds)
    if reached > starts.get("checkpoint", 0):
        starts.update(failures=0, checkpoint=reached)


def _pause(d: Draft, count: int) -> float:
    """Seconds until the next start: doubling, capped, and spread by the object so that many do not start as one."""
    spread = int(hashlib.sha256(f"{d.namespace}/{d.name}/{count}".encode()).hexdigest(), 16) % 1000 / 1000
    return min(_FIRST_PAUSE * 2.0 ** max(0, count - 1), _LONGEST_PAUSE) * (1 + 0.2 * spread)
