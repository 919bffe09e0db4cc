"""What every command of `opd` has in common."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from opd_cli.main import main
from opd_core.exit_codes import ExitCode
from opd_core.models.adapter_file import read_adapter_file

COMMANDS = ["run", "validate", "serve", "generate", "eval", "models", "models fingerprint", "models merge"]


PLAIN = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def opd(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In this process: thirty starts of Python take half a minute."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in PLAIN.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["opd", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(arguments, int(end.value.code or 0), out.getvalue(), err.getvalue())


def program(*arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "opd_cli.main", *arguments]
    environment = {**os.environ, **PLAIN, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def without(package: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`opd` where one package is not installed."""
    source = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}: raise ModuleNotFoundError(name={package!r})\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from opd_cli.main import main\nsys.argv = ['opd', *sys.argv[1:]]\nmain()"
    )
    return subprocess.run([sys.executable, "-c", source, *arguments], capture_output=True, text=True, check=False)


def test_help_names_all_commands_and_exit_codes() -> None:
    done = opd("--help")
    assert done.returncode == 0
    for word in ["run", "validate", "serve", "generate", "eval", "models", "4 gate", "75 unavailable"]:
        assert word in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "models"])
def test_every_command_has_an_example(command: str) -> None:
    done = opd(*command.split(), "--help")
    assert done.returncode == 0
    assert re.search(rf"Example: +opd {command}", done.stdout), done.stdout


def test_merged_teachers_are_a_start_for_a_student(tiny_claims: Path, tmp_path: Path) -> None:
    teachers = [f"pvc://tiny-world/teachers/{name}" for name in ("geneval", "ocr", "aesthetic")]
    done = opd("models", "merge", *teachers, f"--claims={tiny_claims}", "--out", str(tmp_path / "start"))
    assert done.returncode == 0, done.stderr
    assert "initFrom: pvc://students/start" in done.stdout
    assert "adapter: {type: LoRA, rank: 48, alpha: 96}" in done.stdout
    written = read_adapter_file(tmp_path / "start")
    assert {(written.rank(layer), written.alphas[layer]) for layer in written.layers} == {(48, 96)}


def test_a_lora_is_looked_at_and_written_for_others(tiny_claims: Path, tmp_path: Path) -> None:
    teacher, out = "pvc://tiny-world/teachers/ocr", tmp_path / "for-comfyui"
    done = opd("models", "export", teacher, f"--claims={tiny_claims}", "--format=comfyui", "--out", str(out))
    assert done.returncode == 0, done.stderr
    looked = opd("models", "inspect", str(out), f"--claims={tiny_claims}", "--base=pvc://tiny-world/base")
    assert looked.returncode == 0, looked.stderr
    assert re.search(r"^alpha +32, from its \.alpha tensors$", looked.stdout, re.MULTILINE)
    assert re.search(r"^base +fits, 39 of its 82 linear layers$", looked.stdout, re.MULTILINE)


def test_what_a_file_says_of_itself_reaches_the_terminal_as_text(tmp_path: Path) -> None:
    name = "transformer.x\x1b[2J.lora_A.weight"
    content = json.dumps(
        {"__metadata__": {"base_model": "a\x1b]0;b\x07"}, name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    )
    (tmp_path / "lora.safetensors").write_bytes(len(content).to_bytes(8, "little") + content.encode())
    done = opd("models", "inspect", str(tmp_path / "lora.safetensors"))
    assert done.returncode == ExitCode.INVALID
    assert "base_model  a\ufffd]0;b\ufffd" in done.stdout
    assert "error: " in done.stderr
    assert "x\ufffd[2J" in done.stderr
    assert not set("\x1b\x07") & set(done.stdout + done.stderr)


def test_commands_are_there_without_torch() -> None:
    source = "import sys, opd_cli.main; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


def test_version() -> None:
    assert re.fullmatch(r"opd \d+\.\d+\.\d+\n", program("--version").stdout)


def test_completion_for_the_shell() -> None:
    done = program("--show-completion", env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "SHELL": "/bin/bash"})
    shown = program("--show-completion", "bash", env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert "complete" in done.stdout + shown.stdout


def test_error_is_one_message_with_its_code(tmp_path: Path) -> None:
    done = program("run", str(tmp_path / "missing.yaml"))
    assert done.returncode == ExitCode.INVALID
    assert done.stderr.startswith("error: cannot read")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
def test_debug_shows_the_stack_trace(before: bool, tmp_path: Path) -> None:
    command = ["run", str(tmp_path / "missing.yaml")]
    done = opd("--debug", *command) if before else opd(*command, "--debug")
    assert done.returncode == ExitCode.INVALID
    assert "Traceback" in done.stderr
    assert "error: cannot read" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--port"], "error: No such option: --port"),
        (["logs", "tiny", "teacher"], "error: Invalid value for 'ROLE': 'teacher' is not one of 'teach',"),
        (["serve", "student", "--port", "99999999"], "error: Invalid value for '--port': "),
        (["generate", "a", "--out", "x.bmp"], "error: --out x.bmp ends in '.bmp'"),
        (["wait", "tiny"], "error: Missing option '--for'"),
        (["run", "x.yaml", "--until", "trained", "--serve"], "error: --serve keeps the endpoint up, --until trained"),
    ],
)
def test_a_wrong_command_line_is_one_message_too(arguments: list[str], words: str) -> None:
    done = opd(*arguments)
    assert (done.returncode, done.stdout) == (ExitCode.INVALID, "")
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == 1


def test_debug_may_be_an_argument_of_its_own() -> None:
    done = opd("generate", "--url", "nonsense", "--", "--debug")
    assert done.returncode == ExitCode.INVALID
    assert done.stderr == "error: --url nonsense is not an address; write http://HOST:PORT\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  training:\n", "  suspend: true\n  training:\n", "spec.suspend is true"),
        ("    rounds:", "    nodes: 2\n    rounds:", "spec.training.nodes is 2"),
    ],
)
def test_what_one_machine_cannot_do_is_refused_before_anything_starts(
    old: str, new: str, message: str, repository: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "distill.yaml"
    spec.write_text((repository / "examples" / "tiny" / "distill.yaml").read_text().replace(old, new, 1))
    done = opd("run", str(spec), "--work", str(tmp_path / "work"))
    assert done.returncode == ExitCode.INVALID
    assert message in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("training.rounds=20", 0, "valid"),
        ("spec.teachers[1].weight=2.5", 0, "valid"),
        ("training.optimizer={learningRate: 1e-3, schedule: Constant}", 0, "valid"),
        ("training.roundz=20", 2, "spec.training.roundz: unknown field (got 20); did you mean rounds?"),
        ("training.rounds=ten", 2, 'spec.training.rounds: should be a valid integer (got "ten"); write a whole number'),
        ("teachers[3].weight=2", 2, "--set teachers[3].weight=2: spec.teachers has 3 items"),
        ("training.rounds.more=2", 2, "spec.training.rounds is 1000, which has no field more"),
        ("training.rounds", 2, "write PATH=VALUE"),
        ("training.rounds=[", 2, "the value is not YAML"),
    ],
)
def test_a_value_of_the_spec_can_be_set_beside_its_file(change: str, code: int, words: str, repository: Path) -> None:
    done = opd("validate", str(repository / "examples" / "tiny" / "distill.yaml"), "--set", change)
    assert (done.returncode, words in done.stdout) == (code, True), done.stdout


def test_what_is_set_is_part_of_the_spec(repository: Path) -> None:
    file = str(repository / "examples" / "tiny" / "distill.yaml")
    as_it_is, same, other = (
        json.loads(opd("validate", file, "-o", "json", *more).stdout)[0]["digest"]
        for more in ([], ["--set", "training.rounds=1000"], ["--set", "training.rounds=999"])
    )
    assert as_it_is == same != other


def test_serve_has_every_option_of_the_endpoint() -> None:
    from opd_cli.main import app
    from opd_serving.endpoint import __main__ as endpoint
    from typer.main import get_command

    def names(options: Iterable[str]) -> set[str]:
        return {option for option in options if option.startswith("--")}

    theirs = names(option for action in endpoint.parser()._actions for option in action.option_strings)
    ours = names(option for each in get_command(app).commands["serve"].params for option in each.opts)  # type: ignore[attr-defined]
    assert theirs - ours == {"--student", "--model", "--help"}
    assert ours <= theirs


def test_tensorboard_needs_its_package(repository: Path, tmp_path: Path) -> None:
    done = without("tensorboard", "run", str(repository / "examples" / "tiny" / "distill.yaml"), "--tensorboard")
    assert done.returncode == ExitCode.INVALID
    assert "tensorboard is missing; in the checkout: pip install" in done.stderr


def test_missing_extra_is_named(repository: Path) -> None:
    spec = str(repository / "examples" / "tiny" / "distill.yaml")
    done = without("torch", "eval", spec, "--student", "student", "--out", "out")
    assert done.returncode == ExitCode.INVALID
    assert "torch is missing; in the checkout: pip install '.[trainer,serving]'" in done.stderr


def test_claim_option_has_a_form(repository: Path, tmp_path: Path) -> None:
    spec = repository / "examples" / "tiny" / "distill.yaml"
    done = opd("run", str(spec), "--work", str(tmp_path / "work"), "--claim", "tiny-world")
    assert done.returncode == ExitCode.INVALID
    assert "--claim tiny-world: write NAME=DIR" in done.stderr


def test_fingerprint_does_not_depend_on_the_place(tiny_base: Path, tiny_claims: Path) -> None:
    by_path = opd("models", "fingerprint", str(tiny_base))
    by_uri = opd("models", "fingerprint", "pvc://tiny-world/base", "--claims", str(tiny_claims))
    assert by_path.returncode == by_uri.returncode == 0
    assert by_path.stdout == by_uri.stdout
    assert by_path.stdout.startswith("sha256:")
