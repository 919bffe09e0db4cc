"""`opd status` of an object with fifty teachers: one screen, the worst first, and how many others there are."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.cli.conftest import Done, say
from tests.cli.test_status import READY, TRAINING
from tests.operator.live import Api

TASKS = [f"task-{i:02}" for i in range(50)]
METRICS = [
    {"name": f"{key}/{task}", "value": f"{0.1 + i / 100:.4f}"}
    for i, task in enumerate(TASKS)
    for key in ("loss", "kl", "velocityMse", "reward/tiny-ocr")
]
LARGE_TRAINING: dict[str, Any] = {
    **TRAINING,
    "teachers": [{"name": f"tiny-teachers-{i}", "ready": i % 2 == 0} for i in range(50)],
    "teachersReady": "25/50",
    "progress": {**TRAINING["progress"], "metrics": METRICS},  # type: ignore[dict-item]
}
LARGE_STUDENT: dict[str, Any] = {
    **READY,
    "student": {
        **READY["student"],  # type: ignore[dict-item]
        "scores": [
            {"task": task, "reward": "tiny-ocr", "base": 0.2, "teacher": 0.7, "student": 0.6, "kept": 1 - i / 100}
            for i, task in enumerate(TASKS)
        ],
    },
}
LARGE_TEACHING: dict[str, Any] = {
    "phase": "TrainingTeachers",
    "conditions": {"TeachersTrained": ("False", "Running", "20 of 50 teachers are trained; task-20: 100 rounds")},
    "progress": {"round": 150, "totalRounds": 200, "percentage": 75, "metrics": []},
    "teaching": [
        {
            "name": task, "uri": f"pvc://students/opd-teachers/{task}-0123456789ab/adapter", "totalRounds": 100,
            **({"digest": "sha256:" + "b" * 64} if i < 20 else {"round": 50} if i == 20 else {"round": 0}),
        }
        for i, task in enumerate(TASKS)
    ],
}  # fmt: skip


def in_a_terminal(api: Api) -> list[str]:
    """What 50 lines of 120 columns show of `opd status tiny`."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "120", "LINES": "50"}
    command = [sys.executable, "-m", "opd_cli.main", "status", "tiny", "-n", api.namespace]
    with subprocess.Popen(
        [*command, f"--kubeconfig={api.cluster.kubeconfig}"], stdout=theirs, stderr=theirs, env=environment
    ):
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the end of a terminal
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    return shown.decode().replace("\r", "").rstrip("\n").split("\n")


@pytest.mark.parametrize(
    "status", [LARGE_TRAINING, LARGE_STUDENT, LARGE_TEACHING], ids=["training", "student", "teaching"]
)
def test_the_page_is_a_screen(api: Api, status: dict[str, Any]) -> None:
    api.submit()
    say(api, **status)
    lines = in_a_terminal(api)
    assert lines[0].startswith("tiny  ")
    assert len(lines) <= 50, "\n".join(lines)
    assert max(map(len, lines)) <= 120, "\n".join(lines)


def test_in_training_the_largest_losses_come_first(opd: Callable[..., Done], api: Api) -> None:
    api.submit()
    say(api, **LARGE_TRAINING)
    page = opd("status", "tiny").out
    shown = [line.split() for line in page.splitlines() if line.startswith("task-")]
    assert [line[0] for line in shown] == TASKS[:-9:-1]
    assert shown[0][1:] == [*["0.59"] * 3, "tiny-ocr", "0.590"]
    assert "42 others  <= 0.51  <= 0.51         <= 0.51" in page
    assert "25/50 answer, not tiny-teachers-1, tiny-teachers-3, " in page
    assert "tiny-teachers-15 and 17 others" in page


def test_of_a_student_the_least_kept_comes_first(opd: Callable[..., Done], api: Api) -> None:
    api.submit()
    say(api, **LARGE_STUDENT)
    page = opd("status", "tiny").out
    shown = [line.split() for line in page.splitlines() if line.startswith("task-")]
    assert [(line[0], line[-1]) for line in shown] == [(f"task-{i}", f"{100 - i}%") for i in range(49, 41, -1)]
    (others,) = [line for line in page.splitlines() if line.startswith("42 others")]
    assert others.split()[-2:] == [">=", "59%"]


def test_of_teachers_in_training_what_is_at_work_comes_first(opd: Callable[..., Done], api: Api) -> None:
    api.submit()
    say(api, **LARGE_TEACHING)
    page = opd("status", "tiny").out
    rows = [line.split()[1] for line in page.splitlines() if line.startswith("teacher task-")]
    assert rows == TASKS[20:28]
    assert "42 others, of which 20 are trained" in page
