"""`opd validate` at the command line: exit codes, output for people and for programs, several files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from opd_cli.main import app
from opd_core.api.load import load_spec, spec_digest
from opd_core.exit_codes import ExitCode
from typer.testing import CliRunner, Result


def validate(*arguments: object, text: bytes = b"") -> Result:
    return CliRunner().invoke(app, ["validate", *map(str, arguments)], input=text)


@pytest.fixture(scope="module")
def good(repository: Path) -> Path:
    return repository / "examples" / "tiny" / "distill.yaml"


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    """Three problems in three places."""
    file = tmp_path / "bad.yaml"
    text = good.read_text().replace("rounds: 1000", "rounds: 0").replace("zeroStage: 0", "zeroStages: 0")
    file.write_text(text.replace("- name: ocr", "- name: Ocr"))
    return file


def test_valid_specs_are_named_with_their_digest(repository: Path) -> None:
    files = sorted((repository / "examples").glob("*/distill.yaml"))
    done = validate(*files)
    assert done.exit_code == ExitCode.OK
    lines = done.stdout.splitlines()
    assert [line for line in lines if line[0] != " "] == [
        f"{file}: valid, {spec_digest(load_spec(file))}" for file in files
    ]


def test_what_a_gate_can_tell_is_said_with_the_prompts_that_it_takes(good: Path) -> None:
    """Of three rules at 96 prompts a task; nothing where there is no gate."""
    _, line = validate(good).stdout.splitlines()
    assert line == (
        "  with 96 prompts a task the gate refuses, 4 times in 5, a student that is 0.22 below a rule, where rewards are "
        "0 or 1; it takes 468 for 0.1 and 1,871 for 0.05"
    )
    assert json.loads(validate("-o", "json", good).stdout)[0]["notes"] == [line.strip()]
    assert len(validate("--set", "evaluation.gate=[]", good).stdout.splitlines()) == 1


def test_every_problem_of_a_file_is_told_with_place_value_and_remedy(bad: Path) -> None:
    done = validate(bad)
    assert done.exit_code == ExitCode.INVALID
    head, *problems = done.stdout.splitlines()
    assert head == f"{bad}: 3 problems"
    assert len(problems) == 3
    told = "\n".join(problems)
    assert 'spec.teachers[1].name: not a valid name (got "Ocr"); use lower-case letters' in told
    assert "spec.training.rounds: should be greater than or equal to 1 (got 0); write at least 1" in told
    assert "spec.training.deepspeed.zeroStages: unknown field (got 0); did you mean zeroStage?" in told
    assert done.stderr == ""


def test_the_program_ends_with_the_code(bad: Path) -> None:
    command = [sys.executable, "-m", "opd_cli.main", "validate", str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.INVALID, "")


def test_programs_get_json(good: Path, bad: Path) -> None:
    done = validate("-o", "json", good, bad)
    assert done.exit_code == ExitCode.INVALID
    first, second = json.loads(done.stdout)
    assert (first["file"], first["valid"], first["problems"]) == (str(good), True, [])
    assert first["digest"] == spec_digest(load_spec(good))
    assert (second["valid"], len(second["problems"])) == (False, 3)
    assert {
        "path": "spec.training.rounds",
        "value": 0,
        "message": "should be greater than or equal to 1",
        "remedy": "write at least 1",
    } in second["problems"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: None, "No such file"),
        (lambda file: file.mkdir(), "Is a directory"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "codec can't decode"),
        (lambda file: file.write_text("spec: [1"), "expected ',' or ']'"),
        (lambda file: file.write_text("---\na: 1\n---\nb: 2\n"), "2 documents"),
    ],
    ids=["missing", "folder", "binary", "no YAML", "two documents"],
)
def test_a_file_that_cannot_be_read_does_not_hide_the_others(make, words: str, good: Path, bad: Path, tmp_path) -> None:
    file = tmp_path / "unreadable.yaml"
    make(file)
    done = validate("-o", "json", file, good, bad)
    assert done.exit_code == ExitCode.INVALID
    assert done.stderr == ""
    results = json.loads(done.stdout)
    assert [result["valid"] for result in results] == [False, True, False]
    assert words in results[0]["text"]
    assert len(results[0]["problems"]) == 1
    assert all(results[0]["problems"][0][key] for key in ("path", "message", "remedy"))


@pytest.mark.parametrize(("text", "code"), [(None, ExitCode.OK), (b"a: 1\n", ExitCode.INVALID), (b"\xff", 2)])
def test_standard_input(text: bytes | None, code: int, good: Path) -> None:
    done = validate("-", text=good.read_bytes() if text is None else text)
    assert done.exit_code == code
    assert "standard input" in done.stdout
    assert done.stderr == ""
