"""The status of one object while it is being thought through: conditions, stage times, deadlines, the next look."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from opd_core.api.types import OPDDistillation, Spec
from opd_core.stages import Condition, Reason, Stage

from opd_operator.names import QUEUE_LABELS
from opd_operator.observe import Observed, parse_time
from opd_operator.words import Progress, printable

TRAINER_READY = "TrainerReady"  # a time that is kept beside those of the stages: all training pods run
_MESSAGE = 1024
_FIGURES = 256  # what the status has room for: four of each of 64 tasks


@dataclass(frozen=True)
class Served:
    """One revision of the endpoint that shall exist. `settings`: spec.endpoint as it was for its pods, JSON."""

    revision: str
    digest: str
    key: str
    image: str
    settings: str
    replicas: int
    weight: int  # its share of a route's traffic


@dataclass
class Wanted:
    """The workloads that shall exist; what is not here goes."""

    teach: dict[int, int] = field(default_factory=dict)  # by index of the teacher: number of the start
    teachers: bool = False
    trainer: int | None = None  # number of the start
    evaluator: tuple[str, int] | None = None  # key of the evaluation, number of the start
    served: list[Served] = field(default_factory=list)
    keep: set[tuple[str, str]] = field(default_factory=set)  # (kind, name) that stay although unwanted


@dataclass
class Draft:
    """`status` starts as a copy of the stored one and ends as the new one."""

    distillation: OPDDistillation
    generation: int
    namespace: str
    observed: Observed
    images: Mapping[str, str]
    now: float
    status: dict[str, Any]
    wanted: Wanted = field(default_factory=Wanted)
    marks: dict[Condition, tuple[str, Reason, str]] = field(default_factory=dict)
    wake: list[float] = field(default_factory=list)
    in_queue: bool = False  # whether the run waits for its admission

    @property
    def name(self) -> str:
        return self.distillation.metadata.name

    @property
    def spec(self) -> Spec:
        return self.distillation.spec

    @property
    def run(self) -> dict[str, Any]:
        run: dict[str, Any] = self.status["run"]
        return run

    def starts(self, role: str, teacher: str = "") -> dict[str, Any]:
        """The part of the run that counts the Jobs of a role, or of a teacher that is trained."""
        of = self.run.setdefault(role, {}) if teacher else self.run
        starts: dict[str, Any] = of.setdefault(teacher or role, {"number": 0, "failures": 0})
        return starts

    @property
    def queue(self) -> str:
        """The queue that admits this object's pods, for people."""
        labels = (self.distillation.metadata.model_extra or {}).get("labels") or {}
        name = labels.get(QUEUE_LABELS[0])
        return f"LocalQueue {name}" if name else "whoever suspended it"

    def wait_in_queue(self) -> None:
        """No deadline runs until the run is admitted; then its time begins anew, as that of a Job does."""
        self.in_queue = True
        self.run.setdefault("queued", timestamp(self.now))

    @property
    def times(self) -> dict[str, dict[str, str]]:
        times: dict[str, dict[str, str]] = self.status.setdefault("stageTimes", {})
        return times

    def mark(self, condition: Condition | Stage, value: bool, reason: Reason, message: str = "") -> None:
        """Set a condition; the last word counts."""
        self.marks[Condition(condition.value)] = ("True" if value else "False", reason, printable(message)[:_MESSAGE])

    def holds(self, condition: Condition | Stage) -> bool:
        """Whether a condition is True as far as it is known by now."""
        return self.marks.get(Condition(condition.value), ("False",))[0] == "True"

    def begin(self, stage: str) -> None:
        self.times.setdefault(stage, {}).setdefault("startTime", timestamp(self.now))

    def complete(self, stage: str) -> None:
        self.begin(stage)
        self.times[stage].setdefault("completionTime", timestamp(self.now))

    def completed(self, stage: str) -> bool:
        return "completionTime" in self.times.get(stage, {})

    def tell_progress(self, fresh: dict[str, Any], sources: Iterable[Progress]) -> None:
        """`fresh`: what status.progress says beside the figures, which are those of `sources`."""
        fresh["metrics"] = [
            {"name": f"{key}/{row.task}"[:253], "value": f"{value:.4g}"}
            for said in sources
            for row in said.metrics
            for key, value in row.figures.items()
        ][:_FIGURES]
        if {**self.status.get("progress", {}), **fresh} != self.status.get("progress"):
            self.status["progress"] = {**fresh, "lastUpdateTime": timestamp(self.now)}

    def late(self, start: str | None, limit: int | None) -> bool:
        """Whether `limit` seconds have passed since `start`; if not, look again when they have."""
        if start is None or limit is None:
            return False
        end = parse_time(start) + limit
        if self.now >= end:
            return True
        self.wake.append(end)
        return False

    def stop(self, reason: Reason, message: str, stage: Stage, **more: str) -> None:
        """End the run: first its pods go, then it is called failed."""
        self.status["stopping"] = {
            "reason": reason.value, "message": printable(message)[:_MESSAGE], "stage": stage.value, **more
        }  # fmt: skip

    def conditions(self) -> list[dict[str, Any]]:
        """All conditions, in one order; the time moves only where the value changes."""
        old = {condition["type"]: condition for condition in self.status.get("conditions", [])}
        conditions = []
        for kind in Condition:
            value, reason, message = self.marks.get(kind, ("False", Reason.WAITING, ""))
            before = old.get(kind.value)
            since = before["lastTransitionTime"] if before and before["status"] == value else timestamp(self.now)
            conditions.append(
                {
                    "type": kind.value,
                    "status": value,
                    "reason": reason.value,
                    "message": message,
                    "lastTransitionTime": since,
                    "observedGeneration": self.generation,
                }
            )
        return conditions


def draft(
    obj: Mapping[str, Any], distillation: OPDDistillation, observed: Observed, images: Mapping[str, str], now: float
) -> Draft:
    """A draft on the stored status of `obj`."""
    metadata = obj["metadata"]
    status = copy.deepcopy(dict(obj.get("status") or {}))
    return Draft(distillation, metadata["generation"], metadata["namespace"], observed, images, now, status)


def timestamp(now: float) -> str:
    """RFC 3339, whole seconds, as Kubernetes writes it."""
    return datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
