"""`opd validate`: every problem of a spec at once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from opd_core.api.load import SpecError, load_spec, parse_spec, spec_digest
from opd_core.api.sentences import Problem
from opd_core.errors import InvalidError
from opd_core.exit_codes import ExitCode
from opd_trainer.evaluation.checks import gate_line

from opd_cli.options import Changes
from opd_cli.terminal import echo


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Specs, YAML or JSON; - is standard input.")],
    changes: Changes = None,
    output: Annotated[Literal["text", "json"], typer.Option("--output", "-o", help="text or json.")] = "text",
) -> None:
    """Check specs and print all their problems: where, what was found, what to write instead; and, of a valid one with
    a gate, what the gate can tell with so many prompts.

    Ends with 0 if all are valid, with 2 otherwise.

    Example: opd validate examples/*/distill.yaml
    """
    results = [_check(file, changes or []) for file in files]
    if output == "json":
        echo(json.dumps(results, indent=2))
    else:
        for result in results:
            echo(result["text"])
    if not all(result["valid"] for result in results):
        raise typer.Exit(int(ExitCode.INVALID))


def _check(file: Path, changes: list[str]) -> dict[str, Any]:
    source = "standard input" if str(file) == "-" else str(file)
    try:
        text = _standard_input() if str(file) == "-" else None
        distillation = load_spec(file, changes) if text is None else parse_spec(text, source, changes)
    except InvalidError as error:
        unreadable = [Problem("(file)", None, str(error), "name a readable YAML or JSON file")]
        problems = error.problems if isinstance(error, SpecError) else unreadable
        listed = [
            {"path": p.path, "value": _plain(p.value), "message": p.message, "remedy": p.remedy} for p in problems
        ]
        return {"file": source, "valid": False, "problems": listed, "text": str(error)}
    digest, evaluation = spec_digest(distillation), distillation.spec.evaluation
    notes = [gate_line(len(evaluation.gate), evaluation.prompts_per_task)] if evaluation.gate else []
    text = "\n  ".join([f"{source}: valid, {digest}", *notes])
    return {"file": source, "valid": True, "problems": [], "digest": digest, "notes": notes, "text": text}


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidError(f"cannot read standard input: {error}") from error


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    try:
        json.dumps(value)
    except TypeError:
        return repr(value)
    return value
