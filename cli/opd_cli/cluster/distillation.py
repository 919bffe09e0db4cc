"""One object as the API server has it, and what it has come to. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from opd_core.api.status import ConditionStatus, Status
from opd_core.errors import (
    DivergedError,
    GateError,
    InvalidError,
    OPDError,
    RefusedError,
    StorageError,
    UnavailableError,
)
from opd_core.exit_codes import ExitCode
from opd_core.stages import Condition, Reason, Stage

_ERRORS: dict[int, type[OPDError]] = {
    error.exit_code: error
    for error in (InvalidError, RefusedError, GateError, DivergedError, StorageError, UnavailableError)
}
_BY_REASON = {
    Reason.GATE_MISSED: GateError,
    Reason.DEADLINE_EXCEEDED: UnavailableError,
    Reason.ROLLED_BACK: RefusedError,
    Reason.INVALID: InvalidError,
    Reason.UNKNOWN_STUDENT: InvalidError,
}


@dataclass(frozen=True)
class Distillation:
    """`manifest` is everything; what is typed here ignores fields of a later release."""

    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.manifest["metadata"]["namespace"])

    @property
    def created(self) -> datetime:
        return parse_time(self.manifest["metadata"]["creationTimestamp"])

    @property
    def spec(self) -> Mapping[str, Any]:
        """With the defaults."""
        spec: Mapping[str, Any] = self.manifest["spec"]
        return spec

    @cached_property
    def status(self) -> Status:
        return Status.model_validate(self.manifest.get("status") or {}, extra="ignore")

    def condition(self, condition: Condition) -> ConditionStatus | None:
        """None while the operator has not judged the newest spec."""
        generation = self.manifest["metadata"]["generation"]
        for each in self.status.conditions or []:
            if each.type == condition.value and (each.observed_generation or 0) >= generation:
                return each
        return None

    def holds(self, condition: Condition) -> bool:
        found = self.condition(condition)
        return found is not None and found.status == "True"

    @property
    def stage(self) -> Stage:
        """The first stage that is not done, else the last."""
        trains = any(teacher.get("training") for teacher in self.spec["teachers"])
        stages = [stage for stage in Stage if trains or stage != Stage.TEACHERS_TRAINED]
        return next((stage for stage in stages if not self.holds(Condition(stage.value))), Stage.DEPLOYED)

    @property
    def finished(self) -> bool:
        """Ready, failed, or not to be run: nothing more happens until the spec changes."""
        return self.holds(Condition.READY) or self.failure is not None

    @property
    def failure(self) -> OPDError | None:
        """Why it ended without what was asked for, as the error whose exit code says the same."""
        accepted, failed = self.condition(Condition.ACCEPTED), self.condition(Condition.FAILED)
        if accepted and accepted.reason == Reason.INVALID:
            return InvalidError(f"{self.name} cannot be run: {accepted.message}")
        if failed is None or failed.status != "True":
            return None
        last = self.status.last_failure
        code = last.exit_code if last and last.exit_code is not None else ExitCode.INTERNAL
        error = next((kind for reason, kind in _BY_REASON.items() if reason == failed.reason), None)
        return (error or _ERRORS.get(code, OPDError))(f"{self.name} failed: {failed.reason}: {failed.message}")

    def reached(self, condition: Condition) -> bool:
        """Whether `condition` is True.

        Raises:
            OPDError: it cannot become True without a change of the spec; the class says why, as an exit code does.
        """
        found = self.condition(condition)
        if found is None or found.status == "True":
            return found is not None
        if condition != Condition.FAILED and (failure := self.failure):
            raise failure
        if found.reason == Reason.DISABLED:
            raise InvalidError(
                f"{self.name} will never be {condition.value}: {found.message or 'the spec turns it off'}"
            )
        return False


def parse_time(text: str) -> datetime:
    """Of RFC 3339."""
    return datetime.fromisoformat(text)
