"""What the pods of a role print."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from opd_core.errors import InvalidError, OPDError
from opd_core.stages import Condition, Stage
from opd_operator import names
from opd_operator.observe import PodView, observe

from opd_cli.cluster.connection import Connection, Lines, core
from opd_cli.cluster.distillation import Distillation
from opd_cli.cluster.refusals import RejectedError

_LOOK_SECONDS = 1.0  # between two looks for pods


class Role(StrEnum):
    TEACH = names.TEACH
    TEACHERS = names.TEACHERS
    TRAINER = names.TRAINER
    EVALUATOR = names.EVALUATOR
    ENDPOINT = names.ENDPOINT


ROLES = {
    Stage.TEACHERS_TRAINED: Role.TEACH,
    Stage.TEACHERS_READY: Role.TEACHERS,
    Stage.TRAINED: Role.TRAINER,
    Stage.EVALUATED: Role.EVALUATOR,
    Stage.DEPLOYED: Role.ENDPOINT,
}
_STAGES = {role: stage for stage, role in ROLES.items()}
_JOBS = (Role.TEACH, Role.TRAINER, Role.EVALUATOR)
_RANKS = (Role.TEACH, Role.TRAINER)


@dataclass(frozen=True)
class LogLine:
    """`pods`: of how many pods lines are given."""

    pod: str
    text: str
    pods: int


@dataclass(frozen=True)
class Wanted:
    """Which logs. `previous`: of the containers before their last restart. `all_ranks`: of every training pod."""

    role: Role
    follow: bool = False
    previous: bool = False
    all_ranks: bool = False


def read(
    connection: Connection, get: Callable[[], Distillation], wanted: Wanted, tell: Callable[[str], None]
) -> Generator[LogLine, None, None]:
    """The lines that are there, pod by pod; with `follow`, wait for the pods and give their lines until they end.

    Args:
        get: the object as it is now. tell: what is waited for, whenever that changes.

    Raises:
        InvalidError: no pod has started; with the reason. UnavailableError: the connection broke.
    """
    told = ""
    while True:
        distillation = get()
        pods = choose(labelled(connection, distillation, wanted.role.value), wanted)
        missing = why_not(distillation, wanted, pods)
        if not missing:
            break
        if not wanted.follow or _nothing_comes(distillation, wanted.role):
            raise InvalidError(f"{missing}; `opd status {distillation.name}` shows more")
        if missing != told:
            tell(missing)
            told = missing
        time.sleep(_LOOK_SECONDS)
    started = [pod.name for pod in pods if _started(pod)]
    with ExitStack() as opened:
        streams = ((pod, _open(opened, connection, distillation, pod, wanted)) for pod in started)
        if wanted.follow:
            yield from _merged(dict(streams))
        else:
            for pod, lines in streams:  # opened when it is its turn
                yield from (LogLine(pod, text, len(started)) for text in lines)


def labelled(connection: Connection, distillation: Distillation, role: str = "") -> list[dict[str, Any]]:
    """Pods of an object as the API server has them."""
    labels = names.selector(distillation.name, role) if role else {names.DISTILLATION: distillation.name}
    query = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())}
    items: list[dict[str, Any]] = connection.request("GET", core(distillation.namespace, "pods"), query)["items"]
    return items


def choose(pods: list[dict[str, Any]], wanted: Wanted) -> list[PodView]:
    """Of Deployments every pod; of Jobs those at work, else those of the newest, and of what trains the first of each
    unless all are wanted."""
    pods = sorted(pods, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))
    views = [_view(pod) for pod in pods]
    if wanted.role in _JOBS and views:
        jobs = {view.job for view in views if view.active} or {views[-1].job}
        views = [view for view in views if view.job in jobs]
        if not wanted.all_ranks:
            views = [view for view in views if view.index == 0]
    return sorted(views, key=lambda view: (view.index, view.name))


def _view(pod: dict[str, Any]) -> PodView:
    """What the operator sees in a pod. Whoever may write its status chooses what becomes of that: where it cannot be
    made sense of, the pod's name, job and phase are left, which is enough to read its log."""
    try:
        return observe([{**pod, "kind": "Pod"}]).pods[0]
    except Exception:
        metadata, status = pod["metadata"], pod.get("status") or {}
        kept = {key: metadata[key] for key in ("name", "labels") if key in metadata}
        return observe([{"kind": "Pod", "metadata": kept, "status": {"phase": status.get("phase", "")}}]).pods[0]


def why_not(distillation: Distillation, wanted: Wanted, pods: list[PodView]) -> str:
    """Why there is nothing to read yet; empty if there is."""
    every_rank = wanted.role in _RANKS and wanted.all_ranks
    needed = distillation.spec["training"]["nodes"] if every_rank else 1
    if sum(_started(pod) for pod in pods) >= needed:
        return ""
    if waiting := next((pod for pod in pods if not _started(pod)), None):
        reason, message = waiting.trouble or (waiting.phase, "its container is not there yet")
        return f"pod {waiting.name} has not started: {reason}: {message}"
    stage = _STAGES[wanted.role]
    found = distillation.condition(Condition(stage.value))
    state = (
        f"{found.reason}: {found.message}" if found and found.message else found.reason if found else "not judged yet"
    )
    return f"{distillation.name} has no pod of role {wanted.role.value}: {stage.value} is {state}"


def _started(pod: PodView) -> bool:
    return pod.phase != "Pending"


def _nothing_comes(distillation: Distillation, role: Role) -> bool:
    stage = Condition(_STAGES[role].value)
    return distillation.finished or distillation.holds(stage) or distillation.holds(Condition.SUSPENDED)


def _open(opened: ExitStack, connection: Connection, distillation: Distillation, pod: str, wanted: Wanted) -> Lines:
    """The log of a pod, until `opened` is left."""
    query = {
        "container": names.CONTAINERS[wanted.role],
        "follow": "true" if wanted.follow else "",
        "previous": "true" if wanted.previous else "",
    }
    path = core(distillation.namespace, "pods", pod, "log")
    try:
        return opened.enter_context(
            closing(connection.lines(path, query, None if wanted.follow else connection.timeout))
        )
    except RejectedError as error:
        if not wanted.previous:
            raise
        raise InvalidError(f"{error}; status.lastFailure keeps the last words of a pod that is gone") from error


def _merged(streams: dict[str, Lines]) -> Iterator[LogLine]:
    """As they come, a thread a pod."""
    arrived: queue.SimpleQueue[LogLine | OPDError | None] = queue.SimpleQueue()

    def pump(pod: str, lines: Lines) -> None:
        try:
            for text in lines:
                arrived.put(LogLine(pod, text, len(streams)))
        except OPDError as error:
            arrived.put(error)
        finally:
            arrived.put(None)

    for pod, lines in streams.items():
        threading.Thread(target=pump, args=(pod, lines), name=f"log of {pod}", daemon=True).start()
    left = len(streams)
    while left:
        item = arrived.get()
        if isinstance(item, OPDError):
            raise item
        if item is None:
            left -= 1
        else:
            yield item
