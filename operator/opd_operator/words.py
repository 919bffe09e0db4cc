"""What pods say about themselves, checked: whoever writes a container's last words cannot stop the operator, nor reach
the terminal of whoever reads them."""

import sys
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from opd_core.api.sentences import DIGEST_PATTERN
from opd_core.api.status import Score
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import from_json

_NUMBER = 2**31 - 1
_MESSAGE = 4096  # characters of last words: the kubelet keeps as many bytes
_FIGURES = 64  # of a task, each with a name of as many characters


def printable(text: str) -> str:
    """`text` with U+FFFD for what steers a terminal or hides, such as escapes, surrogates and changes of direction; new
    lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _STEERING else "\ufffd" for c in text)


_STEERING = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}


class _Said(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True, allow_inf_nan=False)


_Text = Annotated[str, AfterValidator(printable)]


def _named(score: Score) -> Score:
    if not (score.task + score.reward).isprintable():
        raise ValueError("no name of a task or reward")
    return score


class Facts(_Said):
    """The JSON that trainer and evaluator leave as their last words; empty where a container left anything else."""

    exit_code: Annotated[int, Field(ge=-_NUMBER, le=_NUMBER)] | None = None
    message: _Text = ""
    digest: Annotated[str, Field(min_length=1, pattern=DIGEST_PATTERN)] | None = None
    gate_passed: bool | None = None
    beats_base: bool | None = None
    scores: Annotated[list[Annotated[Score, AfterValidator(_named)]], Field(max_length=256)] = []


class TaskProgress(BaseModel):
    """One task's figures; their names are the trainer's."""

    model_config = ConfigDict(frozen=True)

    task: Annotated[_Text, Field(max_length=253)]
    figures: dict[str, float]

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, row: Any) -> Any:
        """Of everything beside the task's name the finite numbers, and not too many of them."""
        if not isinstance(row, Mapping):
            return row
        numbers = [
            (printable(key)[:_FIGURES], float(value))
            for key, value in row.items()
            if isinstance(value, int | float) and abs(value) <= sys.float_info.max
        ]
        return {"task": row.get("task"), "figures": dict(numbers[:_FIGURES])}


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
            message, facts = (ended.get("message") or "")[:_MESSAGE], Facts()
            if said := _facts(message):
                facts, message = said, said.message
            return Words(
                container["name"],
                ended.get("exitCode", 0),
                printable(ended.get("reason") or ""),
                printable(message).strip(),
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
    written = message.encode(errors="replace")
    try:
        return Facts.model_validate_json(written)
    except ValidationError:
        pass
    try:
        content = from_json(written)  # bounded in depth and digits, unlike json.loads
    except ValueError:
        return None
    # Ours in part: what is wrong is left out, so that the text at least is told.
    text = content.get("message") if isinstance(content, dict) else None
    return Facts(message=text) if isinstance(text, str) else None
