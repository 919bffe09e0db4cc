"""Single values of a spec given beside its file: `training.rounds=10`, `spec.teachers[0].weight=2`."""

import re
from typing import Any

import yaml

from opd_core.errors import InvalidError

_PATH = re.compile(r"[A-Za-z]\w*(?:\[\d+\])*(?:\.[A-Za-z]\w*(?:\[\d+\])*)*")
_ROOTS = ("spec", "metadata")


class Loader(yaml.SafeLoader):
    """`1e-8` is a number here, as kubectl reads it; PyYAML alone wants a dot in it (yaml/pyyaml#173)."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def set_value(content: dict[str, Any], change: str) -> None:
    """Put one value into the parsed file `content`, before it is checked.

    Args:
        change: PATH=VALUE; the path as messages about the spec write it, its `spec.` may be left out; the value is
            YAML, and an empty one gives the field its default.

    Raises:
        InvalidError: no such form, or the path leads through something that has no fields.
    """
    path, separator, text = change.partition("=")
    if not separator or not _PATH.fullmatch(path):
        raise InvalidError(f"--set {change}: write PATH=VALUE, for example training.rounds=10 or teachers[0].weight=2")
    try:
        value = yaml.load(text, Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise InvalidError(f"--set {change}: the value is not YAML ({getattr(error, 'problem', error)})") from error
    steps: list[str | int] = [int(step) if step.isdecimal() else step for step in re.findall(r"\w+", path)]
    if steps[0] not in _ROOTS:
        steps.insert(0, "spec")
    place: Any = content
    for i, (step, below) in enumerate(zip(steps, [*steps[1:], None], strict=True)):
        if isinstance(step, int) and not (isinstance(place, list) and step < len(place)):
            found = f"{len(place)} items" if isinstance(place, list) else f"{place!r}, which is no list"
            raise InvalidError(f"--set {change}: {_written(steps[:i])} has {found}")
        if isinstance(step, str) and not isinstance(place, dict):
            raise InvalidError(f"--set {change}: {_written(steps[:i])} is {place!r}, which has no field {step}")
        if below is None:
            place[step] = value
        elif isinstance(step, str) and place.get(step) is None:
            place[step] = {}
        place = place[step]


def _written(steps: list[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
