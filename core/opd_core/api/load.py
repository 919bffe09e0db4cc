"""YAML or JSON to `OPDDistillation` and back; all problems of a file at once."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from opd_core.api import rules, sentences
from opd_core.api.changes import Loader, set_value
from opd_core.api.sentences import Problem
from opd_core.api.types import API_VERSION, KIND, OPDDistillation
from opd_core.errors import InvalidError


class SpecError(InvalidError):
    """A spec that cannot be used; `problems` holds every reason."""

    def __init__(self, problems: list[Problem], source: str) -> None:
        self.problems = problems
        self.source = source
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))


def load_spec(path: Path, changes: Sequence[str] = ()) -> OPDDistillation:
    """Read and check a spec file, with `changes` as of `opd_core.api.changes`.

    Raises:
        SpecError: with every problem of the file. InvalidError: the file cannot be read.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse_spec(text, str(path), changes)


def parse_spec(text: str, source: str = "spec", changes: Sequence[str] = ()) -> OPDDistillation:
    """As `load_spec`, from text; `source` names it in messages."""
    try:
        documents = [document for document in yaml.load_all(text, Loader) if document is not None]
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = f"line {where.line + 1}, column {where.column + 1}" if where else "the file"
        what = getattr(error, "problem", None) or "not YAML"
        raise SpecError([Problem(place, text[:40], str(what), "correct the YAML")], source) from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        found = f"{len(documents)} documents" if len(documents) != 1 else type(documents[0]).__name__
        raise SpecError([Problem("(file)", found, "one object is expected", f"write one {KIND}")], source)
    for change in changes:
        set_value(documents[0], change)
    return check_spec(documents[0], source)


def check_spec(content: Mapping[str, Any], source: str = "spec") -> OPDDistillation:
    """As `load_spec`, from parsed content."""
    # What `kubectl get -o yaml` writes is a spec, too: its status is the operator's word, not the user's.
    content = {key: value for key, value in content.items() if key != "status"}
    try:
        # As JSON: strict about numbers and text, and a YAML date is text.
        distillation = OPDDistillation.model_validate_json(json.dumps(_as_api_server(content), default=str))
    except ValidationError as error:
        raise SpecError([_field_problem(item, content) for item in error.errors()], source) from error
    problems = rules.problems(distillation.spec)
    if problems:
        raise SpecError(problems, source)
    return distillation


def _as_api_server(value: Any) -> Any:
    """As an API server reads it: a field that is null is left out, and a whole number may be written 4.0."""
    if isinstance(value, Mapping):
        return {key: _as_api_server(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_as_api_server(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def dump_spec(distillation: OPDDistillation) -> dict[str, Any]:
    """The object as plain data with camelCase keys, defaults included."""
    return distillation.model_dump(mode="json", by_alias=True, exclude_none=True)


def spec_digest(distillation: OPDDistillation) -> str:
    """Names what a run computes: the same for another order of keys or a written-out default."""
    spec = dump_spec(distillation)["spec"]
    return "sha256:" + hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------- pydantic's errors


def _field_problem(error: Mapping[str, Any], content: Mapping[str, Any]) -> Problem:
    location, kind, value = error["loc"], error["type"], error["input"]
    path = _path(location)
    pattern = sentences.PATTERNS.get(error.get("ctx", {}).get("pattern"))
    if location and location[-1] == "[key]":
        place = _path(location[:-2])
        return pattern.problem(place, value) if pattern else sentences.LONG_KEY.problem(place, len(value))
    if kind == "missing":
        return Problem(path, None, "is required", "add it")
    if kind == "extra_forbidden":
        known = _known_fields(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return Problem(path, value, "unknown field", remedy)
    if path == "apiVersion":
        return Problem(path, value, "not an API version of this release", f"write {API_VERSION}")
    if path == "kind":
        return Problem(path, value, "not a kind of this release", f"write {KIND}")
    if path == "metadata.name" and kind != "string_type":
        return sentences.OBJECT_NAME.problem(path, value)
    if pattern:
        return pattern.problem(path, value)
    return Problem(path, value, _sentence(error["msg"]), _remedy(kind, error.get("ctx", {})))


def _path(location: tuple[Any, ...]) -> str:
    return re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in location))


def _sentence(message: str) -> str:
    """Pydantic's words, without those that speak of itself."""
    message = message.removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0]
    return message[0].lower() + message[1:]


def _remedy(kind: str, context: Mapping[str, Any]) -> str:
    if "expected" in context:
        return f"write {context['expected']}"
    bounds = {
        "ge": "at least",
        "gt": "more than",
        "le": "at most",
        "lt": "less than",
        "min_length": "at least",
        "max_length": "at most",
    }
    for name, words in bounds.items():
        if name in context:
            return f"write {words} {sentences.shown(context[name])}"
    if "pattern" in context:
        return f"it must match {context['pattern']}"
    types = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text",
        "list": "a list",
        "model": "a mapping",
    }
    return f"write {next((words for start, words in types.items() if kind.startswith(start)), 'another value')}"


def _known_fields(location: tuple[Any, ...]) -> list[str]:
    model: Any = OPDDistillation
    for part in location:
        if isinstance(part, int):
            continue
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        if field is None:
            return []
        model = _model_of(field.annotation)
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for item in get_args(annotation) if (found := _model_of(item))), None)
