"""The stages of a distillation, its conditions and their reasons: one vocabulary for `opd run` and the operator."""

from enum import StrEnum
from typing import Self


class _Described(StrEnum):
    """Words with what they mean, for the reference."""

    _value_: str
    description: str

    def __new__(cls, value: str, description: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.description = description
        return member


class Stage(StrEnum):
    """In this order. Each is the condition that becomes True when the stage is done."""

    TEACHERS_TRAINED = "TeachersTrained"
    TEACHERS_READY = "TeachersReady"
    TRAINED = "Trained"
    EVALUATED = "Evaluated"
    DEPLOYED = "Deployed"


class Condition(_Described):
    """What `kubectl wait --for=condition=...` can wait for; each is always present."""

    ACCEPTED = "Accepted", "the spec can be run"
    TEACHERS_TRAINED = Stage.TEACHERS_TRAINED.value, "every teacher is there: given, or trained by this run or another"
    TEACHERS_READY = Stage.TEACHERS_READY.value, "every teacher server answers, or has done its work"
    TRAINED = Stage.TRAINED.value, "the student of this spec is trained"
    EVALUATED = Stage.EVALUATED.value, "the student is compared with base and teachers, and passed its gate"
    DEPLOYED = Stage.DEPLOYED.value, "the student that this spec asks for takes all the traffic"
    SERVING = "Serving", "some student answers requests, this one or an earlier one"
    SUSPENDED = "Suspended", "spec.suspend, and the run holds nothing"
    FAILED = "Failed", "this run has ended without what was asked for"
    STALLED = "Stalled", "nothing goes on without a change: Failed, or a spec that cannot be run; kstatus reads it"
    READY = "Ready", "everything that the spec asks for is there"


class Reason(_Described):
    """Why a condition is what it is."""

    WAITING = "Waiting", "an earlier stage is not done"
    STARTING = "Starting", "programs of this stage are coming up"
    RUNNING = "Running", "this stage is at work"
    COMPLETED = "Completed", "done in this run"
    RESUMED = "Resumed", "continues at a checkpoint"
    UP_TO_DATE = "UpToDate", "done by an earlier run, nothing has changed"
    RESTARTING = "Restarting", "a program ended and is started again"
    FREED = "Freed", "served its purpose; its resources are given back"
    DISABLED = "Disabled", "the spec turns it off"
    GATE_MISSED = "GateMissed", "the student did not reach spec.evaluation.gate"
    INTERRUPTED = "Interrupted", "stopped by the user, after a checkpoint"
    FAILED = "Failed", "a program failed for good"
    DEADLINE_EXCEEDED = "DeadlineExceeded", "took longer than a limit of spec.runPolicy"
    # In a cluster only:
    ACCEPTED = "Accepted", "the spec is valid"
    INVALID = "Invalid", "the spec cannot be run; nothing was started"
    SUSPENDED = "Suspended", "spec.suspend or spec.endpoint.suspend is true"
    ACTIVE = "Active", "spec.suspend is false"
    STOPPING = "Stopping", "pods are being removed before the outcome is told"
    QUEUED = "Queued", "a queue has not admitted it; no deadline runs"
    UNSCHEDULABLE = "Unschedulable", "a pod finds no node"
    IMAGE_PULL_FAILED = "ImagePullFailed", "a container's image cannot be pulled"
    CRASHING = "Crashing", "a container keeps ending"
    OUT_OF_MEMORY = "OutOfMemory", "memory ran out: that of a container, or of a GPU"
    DISRUPTED = "Disrupted", "a pod was evicted, preempted or lost with its node; not counted as a failure"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded", "failed more often than spec.runPolicy.backoffLimit"
    USER_ERROR = "UserError", "prompts, adapters or models that cannot be used: change something, then try again"
    REJECTED = "Rejected", "a cluster rule (quota, admission, permission) refused an object of this run"
    CANARY = "Canary", "a part of the traffic goes to the new student"
    NO_FIGURES = "NoFigures", "a new student gets traffic, and nothing tells how its requests end; it goes no further"
    ROLLED_BACK = "RolledBack", "the new student failed in service; the old one keeps the traffic"
    AVAILABLE = "Available", "as many pods as asked for answer"
    UNAVAILABLE = "Unavailable", "no pod answers"
    NOT_ROUTED = "NotRouted", "no gateway sends requests through the endpoint's HTTPRoute"
    UNKNOWN_STUDENT = "UnknownStudent", "spec.endpoint.studentDigest names no student of this object"
    NOT_FAILED = "NotFailed", "nothing has gone wrong for good"
