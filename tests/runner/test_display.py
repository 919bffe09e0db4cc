"""What a user sees, in a terminal and in a file."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from opd_cli.runner.display import Display, gate_lines, kept_lines, result_table
from opd_core.stages import Reason, Stage
from rich.console import Console

PROGRESS = {
    "round": 120,
    "totalRounds": 300,
    "percentage": 40.0,
    "remainingSeconds": 190.0,
    "imagesPerSecond": 12.34,
    "metrics": [
        {"task": "geneval", "loss": 0.01234, "velocityMse": 0.5},
        {"task": "ocr", "loss": 2.0, "velocityMse": 0.25},
    ],
}
STOCHASTIC = {
    **PROGRESS,
    "metrics": [
        {"task": "geneval", "loss": 0.01234, "kl": 7.125, "velocityMse": 0.5, "reward/tiny-geneval": 0.4321},
        {"task": "ocr", "loss": 2.0, "kl": 3.5, "velocityMse": 0.25, "reward/tiny-ocr": 0.9, "reward/clipscore": 0.31},
    ],
}
SCORE = {"mean": 0.5, "low": 0.41, "high": 0.59, "n": 96}


def show(terminal: bool, tmp_path: Path, width: int = 120, progress: Mapping[str, Any] = PROGRESS) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None, soft_wrap=True)
    with Display(tmp_path / "events.jsonl", console) as display:
        display.stage(Stage.TEACHERS_READY, Reason.COMPLETED, "geneval, ocr answer after 8 s")
        display.stage(Stage.TRAINED, Reason.RUNNING, "300 rounds")
        display.progress(progress)
        display.note("a note with [brackets]")
    return out.getvalue()


def test_terminal_shows_all_stages_and_every_task(tmp_path: Path) -> None:
    text = show(True, tmp_path)
    for words in (
        "TeachersReady", "Completed", "Evaluated", "Waiting", "round 120/300", "12.3 images/s", "3 min 10 s left",
        "geneval", "0.01234", "0.25", "a note with [brackets]",
    ):  # fmt: skip
        assert words in text
    assert "KL" not in text  # the sampler is deterministic
    assert "reward" not in text  # nothing was validated


def test_terminal_shows_kl_and_rewards_where_there_are_some(tmp_path: Path) -> None:
    lines = show(True, tmp_path, progress=STOCHASTIC).splitlines()
    header = next(
        i for i, line in enumerate(lines) if line.split() == ["task", "loss", "KL", "velocity", "error", "reward"]
    )
    assert lines[header + 1].split() == ["geneval", "0.01234", "7.125", "0.5", "tiny-geneval", "0.432"]
    assert lines[header + 2].split() == ["ocr", "2", "3.5", "0.25", "tiny-ocr", "0.900", "clipscore", "0.310"]


def test_file_has_a_line_per_event(tmp_path: Path) -> None:
    lines = show(False, tmp_path, width=40).splitlines()
    assert len(lines) == 4
    assert lines[0].split(maxsplit=3)[1:] == ["TeachersReady", "Completed", "geneval, ocr answer after 8 s"]
    assert lines[2].endswith("round 120/300  12.3 images/s  3 min 10 s left  loss geneval 0.01234  ocr 2")
    assert lines[3].endswith("a note with [brackets]")
    assert (
        show(False, tmp_path, progress=STOCHASTIC)
        .splitlines()[2]
        .endswith(
            "loss geneval 0.01234  ocr 2  KL geneval 7.125  ocr 3.5  "
            "reward tiny-geneval 0.432  tiny-ocr 0.900  clipscore 0.310"
        )
    )


def test_events_are_recorded_for_programs(tmp_path: Path) -> None:
    show(True, tmp_path)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event.get("reason") for event in events] == ["Completed", "Running", None]
    assert events[1]["stage"] == "Trained"


def test_interruption_belongs_to_the_stage_at_work(tmp_path: Path) -> None:
    with Display(tmp_path / "events.jsonl", Console(file=io.StringIO())) as display:
        display.stage(Stage.TRAINED, Reason.RUNNING, "")
        display.stage(Stage.TEACHERS_READY, Reason.RESTARTING, "")
        display.interrupted("stopped")
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (last["stage"], last["reason"]) == ("Trained", "Interrupted")


def test_result_table_has_a_row_per_model_with_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    models = ["base", "teacher:geneval", "teacher:ocr", "teacher:aesthetic", "student"]
    rewards = ["tiny-geneval", "tiny-ocr", "tiny-aesthetic"]
    scores = {model: dict.fromkeys(rewards, SCORE) for model in models}
    Console(width=200).print(result_table({"scores": scores}, []))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(models)
    assert lines[-1].split() == ["student", *["0.500", "[0.410,", "0.590]"] * 3]


def test_kept_shares_in_words() -> None:
    kept = {
        "ocr": {"share": 0.824, "low": 0.7, "high": 0.95},
        "far": {"share": -0.08, "low": None, "high": None},
        "none": {"share": None, "low": None, "high": None},
    }
    assert kept_lines({"kept": {}}) == kept_lines({}) == []
    (line,) = kept_lines({"kept": kept})
    assert line.endswith(
        "ocr 82% [70%, 95%], far: the teacher gains nothing here, none: the teacher gains nothing here"
    )


# ---------------------------------------------------------------- many teachers

TASKS = [f"task-{i:02}" for i in range(50)]
FIFTY = {
    **PROGRESS,
    "metrics": [{"task": task, "loss": 0.1 + i / 100, "velocityMse": 0.5} for i, task in enumerate(TASKS)],
}


def test_progress_of_many_tasks_is_that_of_the_worst(tmp_path: Path) -> None:
    lines = show(True, tmp_path, progress=FIFTY).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("task-")][:8] == TASKS[:-9:-1]
    assert any(line.split() == ["42", "others", "<=", "0.51", "<=", "0.5"] for line in lines)
    (line,) = (line for line in show(False, tmp_path, progress=FIFTY).splitlines() if "images/s" in line)
    assert line.endswith("loss task-49 0.59  task-48 0.58  task-47 0.57  task-46 0.56  task-45 0.55  task-44 0.54  "
                         "task-43 0.53  task-42 0.52  42 others <= 0.51")  # fmt: skip


def test_a_loss_that_is_no_number_is_the_worst(tmp_path: Path) -> None:
    diverged = {**FIFTY, "metrics": [*FIFTY["metrics"], {"task": "lost", "loss": float("nan"), "velocityMse": 0.5}]}
    assert "loss lost nan  task-49 0.59" in show(False, tmp_path, progress=diverged)


def test_results_of_many_tasks_are_a_row_each_and_their_words_few(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {
        model: dict.fromkeys(TASKS, SCORE) for model in ("base", *(f"teacher:{task}" for task in TASKS), "student")
    }
    rows = [
        {"task": task, "reward": "r", "base": 0.25, "teacher": 0.75, "student": 0.5, "kept": 1 - i / 100}
        for i, task in enumerate(TASKS)
    ]
    Console(width=100).print(result_table({"scores": scores}, rows))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["task", *TASKS[::-1]]
    assert lines[1].split() == ["task-49", "r", "0.250", "0.750", "0.500", "51%"]
    kept = {row["task"]: {"share": row["kept"], "low": row["kept"], "high": 1.0} for row in rows}
    kept["task-49"] = {"share": None, "low": None, "high": None}
    (line,) = kept_lines({"kept": kept})
    assert ": task-48 52% [52%, 100%], task-47" in line
    assert line.count("[") == 8
    assert line.endswith("task-41 59% [59%, 100%], and of 42 others no less")


def test_rules_of_a_long_gate_are_told_missed_first() -> None:
    gate = [
        {
            "task": task,
            "reward": "r",
            "rule": "x",
            "required": 0.5,
            "actual": 0.6 - 0.3 * (i % 7 == 6),
            "passed": i % 7 < 6,
        }
        for i, task in enumerate(TASKS)
    ]
    lines = gate_lines({"gate": gate})
    assert [line.split()[1] for line in lines] == ["task-06", "task-13", "task-20", "task-27", "task-34", "task-41",
                                                   "task-48", "task-00", "42"]  # fmt: skip
    assert [line.rpartition(": ")[2] for line in lines] == ["MISSED"] * 7 + ["passed"] * 2
    assert gate_lines({"gate": [{**check, "passed": False} for check in gate]})[-1] == "gate:    42 others: 42 MISSED"
