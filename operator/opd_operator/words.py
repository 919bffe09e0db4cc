"""What pods say about themselves, checked: whoever writes a container's last words cannot stop the operator."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from opd_core.api.sentences import DIGEST_PATTERN
from opd_core.api.status import Score
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

_NUMBER = 2**31 - 1


class _Said(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True, allow_inf_nan=False)


class Facts(_Said):
    """The JSON that trainer and evaluator leave as their last words; empty where a container left anything else."""

    exit_code: Annotated[int, Field(ge=-_NUMBER, le=_NUMBER)] | None = None
    message: str = ""
    digest: Annotated[str, Field(min_length=1, pattern=DIGEST_PATTERN)] | None = None
    gate_passed: bool | None = None
    scores: Annotated[list[Score], Field(max_length=256)] = []


class TaskProgress(BaseModel):
    """One task's figures; their names are the trainer's."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    task: str

    @property
    def figures(self) -> dict[str, float]:
        return {key: value for key, value in (self.model_extra or {}).items() if isinstance(value, int | float)}


class CheckpointProgress(_Said):
    round: int = Field(ge=0, le=_NUMBER)


class Progress(_Said):
    """The trainer's /progress."""

    round: int = Field(ge=0, le=_NUMBER)
    total_rounds: int = Field(ge=0, le=_NUMBER)
    percentage: float = Field(ge=0, le=100)
    remaining_seconds: Annotated[float, Field(ge=0, le=_NUMBER)] | None = None
    metrics: Annotated[list[TaskProgress], Field(max_length=64)] = []
    checkpoint: CheckpointProgress | None = None


@dataclass(frozen=True)
class Words:
    """What a container left behind when it ended."""

    container: str
    exit_code: int
    reason: str
    message: str
    facts: Facts = field(default_factory=Facts)
    finished: str = ""


def words(containers: Iterable[Mapping[str, Any]], which: str = "state") -> Words | None:
    """Of the first container that has ended; `which`: state, or lastState for the one before a restart."""
    for container in containers:
        ended = container.get(which, {}).get("terminated")
        if ended:
            message, facts = ended.get("message") or "", Facts()
            if said := _facts(message):
                facts, message = said, said.message
            return Words(
                container["name"],
                ended.get("exitCode", 0),
                ended.get("reason") or "",
                message.strip(),
                facts,
                ended.get("finishedAt") or "",
            )
    return None


def progress(text: str | None) -> Progress | None:
    """None where it is not what a trainer says."""
    try:
        return Progress.model_validate_json(text) if text else None
    except ValidationError:
        return None


def _facts(message: str) -> Facts | None:
    """None: these are the last lines of a log."""
    try:
        return Facts.model_validate_json(message)
    except ValidationError:
        pass
    try:
        content = json.loads(message)
    except ValueError:
        return None
    # Ours in part: what is wrong is left out, so that the text at least is told.
    text = content.get("message") if isinstance(content, dict) else None
    return Facts(message=text) if isinstance(text, str) else None
