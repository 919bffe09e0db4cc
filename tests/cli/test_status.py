"""`opd status`: the list that kubectl shows, the page of one object, and its life as it goes on."""

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import yaml
from opd_core.exit_codes import ExitCode

from tests.cli.conftest import Done, say
from tests.operator.live import Api, wait_for
from tests.operator.world import teachers

Opd = Callable[..., Done]

OLD, NEW = "sha256:" + "a" * 64, "sha256:" + "b" * 64
SCORES = [
    {"task": "ocr", "reward": "tiny-ocr", "base": 0.17, "teacher": 0.91, "student": 0.87, "kept": 0.9459},
    {"task": "geneval", "reward": "tiny-geneval", "base": 0.34, "teacher": 0.53, "student": 0.49},
]
TRAINING = {
    "phase": "Training",
    "conditions": {"TeachersReady": ("True", "Completed", "1 servers answer"), "Trained": ("False", "Running", "500 rounds")},
    "teachers": [{"name": "tiny-teachers-0", "ready": True}], "teachersReady": "1/1",
    "workers": {"desired": 2, "ready": 2}, "workersReady": "2/2",
    "progress": {
        "round": 256, "totalRounds": 500, "percentage": 51, "remainingSeconds": 197,
        "metrics": [{"name": "loss/ocr", "value": "1.983"}, {"name": "velocityMse/ocr", "value": "0.25"}],
    },
    "checkpoint": {"round": 250}, "restarts": 1, "disruptions": 0,
    "lastFailure": {
        "stage": "Trained", "reason": "OutOfMemory", "message": "round 12\nKilled", "pod": "tiny-trainer-1-0-0-x",
        "container": "trainer", "exitCode": 137, "time": "2026-01-01T00:00:00Z",
    },
}  # fmt: skip
DONE = {
    "TeachersReady": ("True", "Freed"),
    "Trained": ("True", "Completed"),
    "Evaluated": ("True", "Completed", "ocr 0.95"),
}
READY = {
    "phase": "Ready",
    "conditions": {**DONE, "Deployed": ("True", "Completed"), "Serving": ("True", "Available"), "Ready": ("True", "Completed")},
    "student": {"digest": NEW, "uri": "pvc://students/tiny.runs/k/student", "gatePassed": True, "scores": SCORES},
    "endpoint": {
        "url": "http://tiny-endpoint.x.svc:8000", "replicas": 2, "readyReplicas": 2,
        "stable": {"revision": "0123abcd", "digest": OLD},
        "canary": {"revision": "4567cdef", "digest": NEW, "trafficPercent": 10},
    },
}  # fmt: skip


def failed(reason: str, where: str = "Trained", **failure: Any) -> dict[str, Any]:
    conditions = {where: ("False", reason, "what went wrong"), "Failed": ("True", reason, "what went wrong")}
    return {"phase": "Failed", "conditions": conditions, **({"lastFailure": failure} if failure else {})}


# ---------------------------------------------------------------------------------------------------- the list


def test_the_list_has_the_columns_of_kubectl(opd: Opd, api: Api) -> None:
    api.submit()
    say(api, **READY)
    ours, theirs = (
        text.splitlines() for text in (opd("status").out, api.cluster.kubectl("get", "opd", "-n", api.namespace))
    )
    assert ours[0].split() == theirs[0].split()
    assert [cell for cell in ours[1].split() if not cell.endswith("s")] == [
        cell for cell in theirs[1].split() if cell != "<none>" and not cell.endswith("s")
    ]


def test_the_list_of_all_namespaces_names_them(opd: Opd, api: Api) -> None:
    api.submit()
    lines = opd("status", "-A", namespace="").out.splitlines()
    assert lines[0].split()[:2] == ["NAMESPACE", "NAME"]
    assert [api.namespace, "tiny"] in [line.split()[:2] for line in lines[1:]]


def test_an_empty_list_says_so(opd: Opd, api: Api) -> None:
    assert opd("status").out == f"no distillations in namespace {api.namespace}\n"


@pytest.mark.parametrize(("form", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_objects_as_documents(opd: Opd, api: Api, form: str, read: Callable[[str], Any]) -> None:
    api.submit()
    one, several = read(opd("status", "tiny", "-o", form).out), read(opd("status", "-o", form).out)
    assert several["items"] == [one]
    assert one["kind"] == "OPDDistillation"
    assert one["spec"] == api.get()["spec"]


def test_options_that_exclude_each_other(opd: Opd) -> None:
    assert opd("status", "-w").code == opd("status", "tiny", "-A").code == ExitCode.INVALID


# ---------------------------------------------------------------------------------------------------- the page


def test_the_page_of_a_training(opd: Opd, api: Api) -> None:
    api.submit()
    say(api, **TRAINING)
    page = opd("status", "tiny").out
    for words in (
        f"tiny  Training, namespace {api.namespace}", "500 rounds", "round 256/500  3 min 17 s left", "velocity error",
        "1.983", "0.25", "1/1 answer", "2/2 run", "1 after failures, 0 after disruptions", "round 250",
        "Trained OutOfMemory: pod tiny-trainer-1-0-0-x, container trainer, exit code 137, ", "Killed",
        f"opd logs tiny trainer -f -n {api.namespace}",
    ):  # fmt: skip
        assert words in page, page
    rows = {line.split()[0]: line.split()[1:3] for line in page.splitlines() if line.strip()}
    assert rows["TeachersReady"] == ["True", "Completed"]
    assert rows["Ready"] == ["False", "Waiting"]


def test_the_page_of_teachers_in_training(opd: Opd, api: Api) -> None:
    api.submit(teachers=teachers("geneval", "ocr"))
    said = "1 of 2 teachers are trained; ocr: 100 rounds"
    better = "teacher geneval is better than the base"
    where = "pvc://students/opd-teachers/geneval-0123456789ab/adapter"
    say(
        api,
        phase="TrainingTeachers",
        conditions={"TeachersTrained": ("False", "Running", said)},
        progress={"round": 150, "totalRounds": 200, "percentage": 75, "metrics": []},
        teaching=[
            {"name": "geneval", "uri": where, "digest": NEW, "verdict": better, "round": 100, "totalRounds": 100},
            {"name": "ocr", "uri": where, "round": 50, "totalRounds": 100, "checkpoint": 30},
        ],
    )
    page = opd("status", "tiny").out
    for words in (
        said, "round 150/200", f"sha256:bbbbbbbbbbbb in {where}; {better}", "round 50/100, checkpoint of round 30",
        f"opd logs tiny teach -f -n {api.namespace}",
    ):  # fmt: skip
        assert words in page, page


def test_the_page_of_a_served_student(opd: Opd, api: Api) -> None:
    api.submit()
    say(api, **READY)
    page = opd("status", "tiny").out
    for words in (
        "sha256:bbbbbbbbbbbb, passed its gate, in pvc://students/tiny.runs/k/student", "95%",
        "http://tiny-endpoint.x.svc:8000, 2 of 2 pods answer", "sha256:aaaaaaaaaaaa, revision 0123abcd",
        "sha256:bbbbbbbbbbbb, revision 4567cdef, 10 % of the traffic", "opd get-student tiny --out",
        "kubectl port-forward service/tiny-endpoint 8000", "--url http://127.0.0.1:8000",
    ):  # fmt: skip
        assert words in page, page


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        ({"conditions": {"Suspended": ("True", "Suspended")}}, "opd resume tiny"),
        ({**failed("GateMissed", "Evaluated"), "student": {"digest": NEW}}, "opd promote tiny sha256:bbbbbbbbbbbb"),
        (failed("BackoffLimitExceeded", stage="Evaluated"), "opd logs tiny evaluator"),
        (failed("DeadlineExceeded", "TeachersReady"), "opd logs tiny teachers"),
        ({"conditions": {"Accepted": ("False", "Invalid", "x")}}, "opd submit FILE"),
        ({"conditions": {"TeachersReady": ("False", "Unschedulable", "no GPU")}}, "opd events tiny"),
    ],
    ids=["suspended", "gate", "failed", "late", "invalid", "unschedulable"],
)
def test_what_to_do_next(opd: Opd, api: Api, status: dict[str, Any], advice: str) -> None:
    api.submit()
    say(api, **status)
    assert advice in opd("status", "tiny").out


def test_a_spec_that_nobody_has_judged_is_said_to_be_so(opd: Opd, api: Api) -> None:
    api.submit()
    assert "the operator has not judged this spec yet" in opd("status", "tiny").out
    say(api, **READY)
    assert "the operator has not judged" not in opd("status", "tiny").out
    api.edit(suspend=True)
    assert "the operator has not judged this spec yet" in opd("status", "tiny").out


# ---------------------------------------------------------------------------------------------------- live


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (READY, ExitCode.OK),
        (failed("GateMissed", "Evaluated"), ExitCode.GATE),
        (failed("UserError", exitCode=2), ExitCode.INVALID),
        (failed("UserError", exitCode=3), ExitCode.REFUSED),
        (failed("Failed", exitCode=5), ExitCode.DIVERGED),
        (failed("BackoffLimitExceeded", exitCode=74), ExitCode.STORAGE),
        (failed("BackoffLimitExceeded", exitCode=137), ExitCode.INTERNAL),
        (failed("DeadlineExceeded", exitCode=1), ExitCode.UNAVAILABLE),
        (failed("RolledBack", "Deployed"), ExitCode.REFUSED),
        ({"conditions": {"Accepted": ("False", "Invalid", "what went wrong")}}, ExitCode.INVALID),
    ],
    ids=lambda value: value.name if isinstance(value, ExitCode) else "",
)
def test_following_ends_with_the_exit_code_of_the_outcome(
    opd: Opd, api: Api, status: dict[str, Any], code: ExitCode
) -> None:
    api.submit()
    say(api, **status)
    done = opd("status", "tiny", "-w")
    assert done.code == code
    assert ("what went wrong" in done.err) == (code != ExitCode.OK)


def test_following_prints_a_line_per_change(opd: Opd, api: Api) -> None:
    api.submit()
    done: list[Done] = []
    thread = threading.Thread(target=lambda: done.append(opd("status", "tiny", "-w")))
    thread.start()
    watchers(api)
    say(api, **TRAINING)
    say(api, **TRAINING)  # nothing new
    say(api, **{**TRAINING, "progress": {"round": 300, "totalRounds": 500, "remainingSeconds": 100}})
    say(api, **READY)
    thread.join(20)
    assert done, "it still runs"
    lines = [line.split(maxsplit=1)[1] for line in done[0].out.partition("\ntiny  ")[0].splitlines()]
    assert lines == [
        "the operator has not judged this spec yet",
        "TeachersTrained Disabled     no teacher is trained",
        "TeachersReady   Completed    1 servers answer",
        "Trained         Running      500 rounds",
        "round 256/500  3 min 17 s left  loss ocr 1.983",
        "round 300/500  1 min 40 s left  loss ocr 1.983",
        "TeachersReady   Freed",
        "Trained         Completed",
        "Evaluated       Completed    ocr 0.95",
        "Deployed        Completed",
        "Serving         Available",
        "Ready           Completed",
    ]


def test_following_as_documents(opd: Opd, api: Api) -> None:
    api.submit()
    say(api, **READY)
    (line,) = opd("status", "tiny", "-w", "-o", "json").out.splitlines()
    assert json.loads(line)["status"]["phase"] == "Ready"


def test_a_terminal_shows_the_page_live_and_ctrl_c_ends_it(api: Api) -> None:
    api.submit()
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150", "LINES": "50"}
    command = [sys.executable, "-m", "opd_cli.main", "status", "tiny", "-w", "-n", api.namespace]
    process = subprocess.Popen(
        [*command, f"--kubeconfig={api.cluster.kubeconfig}"], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = ""

    def shows(words: str) -> bool:
        nonlocal shown
        shown += os.read(ours, 65536).decode(errors="replace")
        return words in shown

    wait_for(lambda: shows("has not judged"), "the page")
    say(api, **TRAINING)
    wait_for(lambda: shows("round 256/500"), "the progress")
    process.send_signal(2)
    with suppress(OSError):  # until the other end is closed; a full terminal would hold the program up
        while os.read(ours, 65536):
            pass
    assert process.wait(60) == ExitCode.INTERRUPTED
    os.close(ours)


def watchers(api: Api) -> None:
    """Until somebody watches the object: the API server's audit log tells."""

    def watched() -> bool:
        with api.cluster.audit_log.open("rb") as log:
            log.seek(max(0, api.cluster.audit_log.stat().st_size - 200_000))
            _, *lines = log.read().splitlines()
        entries = (json.loads(line) for line in lines)
        return any(
            each["verb"] == "watch" and (each.get("objectRef") or {}).get("namespace") == api.namespace
            for each in entries
        )

    wait_for(watched, "a watcher")
