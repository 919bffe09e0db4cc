"""One Job per start of what trains or evaluates: the next one after a failure, a lost result or a changed pod. Pure."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opd_core.api.digests import digest, said
from opd_core.api.pod import Pod
from opd_core.stages import Reason, Stage

from opd_operator.draft import Draft, timestamp
from opd_operator.failure import Failure, failure_of
from opd_operator.observe import JobView, PodView, parse_time
from opd_operator.words import Facts

_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 360.0  # seconds


@dataclass(frozen=True)
class Work:
    """What the Jobs of a role, or of one `teacher` that is trained, are for.

    `pod`: settings of their pods: a Job that has not `begun`, all of its pods running, is made again when they change.
    `name`: of the Job with a number. `checkpoint`: the newest one's round.
    """

    role: str
    stage: Stage
    pod: Pod
    name: Callable[[int], str]
    begun: bool
    checkpoint: int = 0
    teacher: str = ""


@dataclass(frozen=True)
class Start:
    """`number` of the Job that shall exist now, None for none; the Job, if it is there."""

    number: int | None
    job: JobView | None = None


def start(d: Draft, work: Work) -> Start:
    """Which Job shall exist. Where none shall, the stage's condition says why, or the run is stopping."""
    starts = _starts(d, work)
    job = d.observed.jobs.get(work.name(starts["number"]))
    if job:
        _remember_disruption(d, work, job)
    if job and (failure := _failure(d, work, job)):
        if not another(d, work, failure):
            return Start(None)
        job = None
    if job is None and pauses(d, work):
        return Start(None)
    if outdated(d, work) and not work.begun:
        advance_number(starts)
        job = None
    if job is None:
        starts["pod"] = _settings(d, work)
        if left := _left(d, work):
            d.mark(work.stage, False, Reason.STOPPING, f"{left} of an earlier start is still ending")
            return Start(None)
    return Start(starts["number"], job)


def _left(d: Draft, work: Work) -> str:
    """Name of what may still write into the folder of the next start: two would overwrite each other's checkpoints. A
    Job that is deleted goes after its pods, those included that no watch has told of yet."""
    pods = [pod.name for pod in d.observed.pods_of(work.role, work.teacher) if pod.active]
    jobs = [job.name for job in d.observed.jobs_of(work.role, work.teacher) if not job.finished]
    return next(iter([*pods, *jobs]), "")


def outdated(d: Draft, work: Work) -> bool:
    """Whether the newest Job was made with other settings of its pods."""
    return bool(_starts(d, work).get("pod", _settings(d, work)) != _settings(d, work))


def _starts(d: Draft, work: Work) -> dict[str, Any]:
    return d.starts(work.role, work.teacher)


def _settings(d: Draft, work: Work) -> str:
    return digest(said(work.pod), d.spec.student.output.uri)[:8]


def ended(d: Draft, job: JobView | None) -> bool:
    """Whether the Job is done and what its pods said is known: the watches of Jobs and pods are two streams."""
    if job is None:
        return False
    if job.complete:
        return not _speaking(d, job)
    return _held(d, job) and not any(_exit_code(pod) for pod in pods_of(d, job))


def in_queue(d: Draft, work: Work, job: JobView) -> bool:
    """Whether a queue has not admitted the Job, or has taken it out of work; the stage's condition says so. It is never
    written to, or two would fight for it."""
    gated = next((pod for pod in d.observed.pods_of(work.role, work.teacher) if pod.queued), None)
    if not (job.suspended or gated) or job.finished:
        return False
    text = f"Job {job.name} waits for its admission by {d.queue}"
    d.mark(work.stage, False, Reason.QUEUED, f"{text}; {gated.trouble[1]}" if gated and gated.trouble else text)
    return True


def taken_out(d: Draft, work: Work) -> None:
    """A queue has taken out of work what had begun."""
    d.status["disruptions"] += 1
    if outdated(d, work):
        d.wake.append(d.now)  # settings of pods that had to wait: the next look makes a Job of them


def result(d: Draft, job: JobView) -> Facts | None:
    """What the first pod of a Job that trains has said, with the digest of what was made; None if it said no such
    thing."""
    first = next((pod for pod in pods_of(d, job) if pod.index == 0 and pod.ended), None)
    return first.ended.facts if first and first.ended and first.ended.facts.digest else None


def no_pods(d: Draft, job: JobView | None) -> str:
    """Of a Job that makes no pods, which says why in events alone."""
    if job is None or job.finished or pods_of(d, job):
        return ""
    return f"Job {job.name} has no pods; `kubectl describe job {job.name}` shows a quota or rule that refuses them"


def pods_of(d: Draft, job: JobView) -> list[PodView]:
    return [pod for pod in d.observed.pods if pod.job == job.name]


def ask_again(d: Draft, work: Work, job: JobView) -> None:
    """A finished Job whose result cannot be read; the next one finds the work done and says it again."""
    first = next((pod for pod in pods_of(d, job) if pod.index == 0 and pod.ended), None)
    failure = Failure(Reason.DISRUPTED, "its pod was deleted before its result was read", "", "", 0, False, False)
    if first and first.ended:
        text = f"its last words are no result of this release: {first.ended.message[:200]!r}"
        failure = Failure(Reason.FAILED, text, first.name, first.ended.container, 0, counts=True, final=False)
    if another(d, work, failure):
        pauses(d, work)


def another(d: Draft, work: Work, failure: Failure) -> bool:
    """Count a failed start and say whether there is another one."""
    d.status["lastFailure"] = {
        "stage": work.stage.value,
        "reason": failure.reason.value,
        "message": failure.message[:1024],
        "pod": failure.pod,
        "container": failure.container,
        "exitCode": failure.exit_code,
        "time": timestamp(d.now),
    }
    starts, limit = _starts(d, work), d.spec.run_policy.backoff_limit
    said_ = f"{failure.pod or 'its pod'} ended with exit code {failure.exit_code}: {failure.message}"
    if failure.final:
        d.stop(failure.reason, said_, work.stage)
        return False
    if failure.counts:
        _forgive(starts, work.checkpoint)
    if failure.counts and starts["failures"] >= limit:
        text = f"failed {limit + 1} times (backoffLimit {limit}); {said_}"
        d.stop(Reason.BACKOFF_LIMIT_EXCEEDED, text, work.stage)
        return False
    d.status["restarts" if failure.counts else "disruptions"] += 1
    starts["failures"] += failure.counts
    advance_number(starts)
    starts["nextStart"] = timestamp(
        d.now + _pause(d, starts["failures"] if failure.counts else d.status["disruptions"])
    )
    return True


def pauses(d: Draft, work: Work) -> bool:
    """Whether the next start has to wait; the stage's condition says so."""
    starts = _starts(d, work)
    at = starts.get("nextStart")
    if at is None:
        return False
    if d.now >= parse_time(at):
        del starts["nextStart"]
        return False
    d.wake.append(parse_time(at))
    failure, text = d.status.get("lastFailure", {}), f"starts again at {at}"
    # The last one may be of another teacher.
    if not work.teacher or failure.get("pod", "").startswith(f"{work.name(starts['number'] - 1)}-"):
        text += f" after {failure.get('reason')}: {failure.get('message', '')}"
    d.mark(work.stage, False, Reason.RESTARTING, text)
    return True


def advance_number(starts: dict[str, Any]) -> None:
    """To the next Job, about which nothing is known yet."""
    starts["number"] += 1
    for part in ("disrupted", "since", "ran"):
        starts.pop(part, None)


def _remember_disruption(d: Draft, work: Work, job: JobView) -> None:
    """A Job has failed when the last of its pods has gone, and the one that was evicted goes first."""
    starts, pods = _starts(d, work), pods_of(d, job)
    if marked := [pod.name for pod in pods if pod.disrupted]:
        starts["disrupted"] = marked[0]
    elif any(pod.name == starts.get("disrupted") and pod.active for pod in pods):
        del starts["disrupted"]  # it stayed after all


def _failure(d: Draft, work: Work, job: JobView) -> Failure | None:
    """Why this start is over without a result, if it is."""
    if job.suspended and not job.finished and job.succeeded and not _speaking(d, job):
        # Admitted again, it would make the missing pods alone, which wait for peers that have gone (kueue#10487).
        text = f"Job {job.name} was suspended when {job.succeeded} of its pods had ended"
        return Failure(Reason.DISRUPTED, text, "", "", 0, counts=False, final=False)
    over = job.over and not _speaking(d, job)
    if not over and not (_held(d, job) and any(_exit_code(pod) for pod in pods_of(d, job))):
        return None
    return failure_of(job, d.observed.pods, _starts(d, work).get("disrupted", ""), ran=work.begun)


def _speaking(d: Draft, job: JobView) -> bool:
    return any(pod.active for pod in pods_of(d, job))


def _held(d: Draft, job: JobView) -> bool:
    """Whether all our programs of a Job have ended, and containers that somebody put beside them keep its pods: the Job
    will never say so (kubeflow/trainer#1577)."""
    pods = pods_of(d, job)
    return len(pods) == job.pods and all(pod.ended for pod in pods) and any(pod.active and pod.held for pod in pods)


def _exit_code(pod: PodView) -> int:
    return pod.ended.exit_code if pod.ended else 0


def _forgive(starts: dict[str, Any], reached: int) -> None:
    """Failures before the newest checkpoint do not count: there was progress between them, and rounds are finite."""
    if reached > starts.get("checkpoint", 0):
        starts.update(failures=0, checkpoint=reached)


def _pause(d: Draft, count: int) -> float:
    """Seconds until the next start: doubling, capped, and spread by the object so that many do not start as one."""
    spread = int(hashlib.sha256(f"{d.namespace}/{d.name}/{count}".encode()).hexdigest(), 16) % 1000 / 1000
    return min(_FIRST_PAUSE * 2.0 ** max(0, count - 1), _LONGEST_PAUSE) * (1 + 0.2 * spread)
