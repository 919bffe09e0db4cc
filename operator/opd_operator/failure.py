"""Why a Job failed: the pod to blame, and whether another start may help. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from opd_core.exit_codes import ExitCode
from opd_core.stages import Reason

from opd_operator.observe import JobView, PodView


@dataclass(frozen=True)
class Failure:
    """Why a Job failed. `counts`: towards backoffLimit; `final`: starting it again cannot help."""

    reason: Reason
    message: str
    pod: str
    container: str
    exit_code: int
    counts: bool
    final: bool


def failure_of(job: JobView, pods: Iterable[PodView], disrupted: str = "", *, ran: bool = False) -> Failure:
    """The cause of a failed Job: the pod that ended first on its own, not those that ended because of it.

    Args:
        disrupted: a pod of it that was seen evicted or lost: by now the garbage collector may have taken it.
        ran: whether all of its pods have run, so that one that is missing was deleted.
    """
    own = [pod for pod in pods if pod.job == job.name]
    failed = [pod for pod in own if pod.phase == "Failed" or pod.disrupted or pod.held]
    if lost := next((pod.name for pod in failed if pod.disrupted), disrupted):
        return _disruption(f"pod {lost} was evicted or lost", lost)
    spoke = [pod for pod in failed if pod.ended is not None and pod.ended.exit_code != 0]
    spoke.sort(key=lambda pod: (_follows(pod), pod.ended.finished if pod.ended else "", pod.index))
    if not failed:
        # A program that fails leaves its pod; without one, somebody deleted it.
        return _disruption(f"its pods were deleted: {job.message}")
    if not spoke:
        pod = next((pod for pod in failed if pod.failed), failed[0])
        words, text = pod.failed, pod.message or job.message
        if words:
            text = f"container {words.container} ended with exit code {words.exit_code}: {words.message}"
        code = words.exit_code if words else 0
        container = words.container if words else ""
        return Failure(Reason.FAILED, text, pod.name, container, code, counts=True, final=False)
    if ran and len(own) < job.pods and all(_follows(pod) for pod in spoke):
        # A peer that lost it ended with 75, and the pod itself has gone with its node before anybody looked.
        return _disruption(f"{job.pods - len(own)} of {job.pods} pods were deleted")
    pod = spoke[0]
    assert pod.ended is not None
    said = pod.ended
    code = _code(pod)
    reason, counts, final = _classify(code, said.reason)
    return Failure(reason, said.message or said.reason, pod.name, said.container, code, counts, final)


def _disruption(text: str, pod: str = "") -> Failure:
    return Failure(Reason.DISRUPTED, text, pod, "", 0, counts=False, final=False)


def _follows(pod: PodView) -> int:
    """How likely a pod ended because of another: 143 was told to stop, 75 may have lost another rank."""
    order: dict[int, int] = {ExitCode.TERMINATED: 2, ExitCode.UNAVAILABLE: 1}
    return order.get(_code(pod), 0)


def _code(pod: PodView) -> int:
    """The launcher may be gone before it could speak for its rank: the code the program wrote is the closer one."""
    assert pod.ended is not None
    return pod.ended.exit_code if pod.ended.facts.exit_code is None else pod.ended.facts.exit_code


def _classify(code: int, reason: str) -> tuple[Reason, bool, bool]:
    """(reason, counts, final) of an exit code: docs/cli.md has the table."""
    if reason == "OOMKilled":
        return Reason.OUT_OF_MEMORY, True, False
    if code == ExitCode.OUT_OF_MEMORY:  # of a GPU, where the same work fails at the same place again
        return Reason.OUT_OF_MEMORY, True, True
    if code == ExitCode.TERMINATED:
        return Reason.DISRUPTED, False, False
    if code in (ExitCode.INVALID, ExitCode.REFUSED):
        return Reason.USER_ERROR, True, True
    if code in (ExitCode.DIVERGED, ExitCode.STORAGE):
        return Reason.FAILED, True, True
    return Reason.FAILED, True, False
