"""`opd suspend, resume, promote, rollback, delete, events`."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from opd_cli.cluster import Distillation
from opd_cli.cluster.students import before, find
from opd_core.errors import InvalidError
from opd_core.exit_codes import ExitCode

from tests.cli.conftest import POD, Done, say
from tests.operator.live import Api, wait_for

Opd = Callable[..., Done]

FIRST, SECOND, THIRD = (f"sha256:{start}{'0' * 56}" for start in ("a1b2c3d4", "a1b2c3d5", "ffffffff"))


def students(*digests: str, missed: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """As the operator writes them: who missed the gate was not in service."""
    passed = {digest: digest not in missed for digest in digests}
    return [{"digest": digest, "key": "k", "gatePassed": good, "served": good} for digest, good in passed.items()]


def serving(digest: str, canary: str = "") -> dict[str, Any]:
    taking_over = {"canary": {"revision": "r2", "digest": canary}} if canary else {}
    return {"stable": {"revision": "r1", "digest": digest}, **taking_over}


def test_suspend_and_resume(opd: Opd, api: Api) -> None:
    api.submit()
    assert f"opd/tiny suspended; opd resume tiny -n {api.namespace} goes on" in opd("suspend", "tiny").out
    assert api.get()["spec"]["suspend"] is True
    assert "opd/tiny goes on" in opd("resume", "tiny").out
    assert api.get()["spec"]["suspend"] is False
    assert json.loads(opd("resume", "tiny", "-o", "json").out)["spec"]["suspend"] is False


def test_the_endpoint_is_suspended_by_itself(opd: Opd, api: Api) -> None:
    api.submit()
    said = opd("suspend", "tiny", "--endpoint").out
    assert f"opd resume tiny --endpoint -n {api.namespace} brings the same student back" in said
    spec = api.get()["spec"]
    assert (spec["suspend"], spec["endpoint"]["suspend"]) == (False, True)
    opd("resume", "tiny", "--endpoint")
    assert api.get()["spec"]["endpoint"]["suspend"] is False


def test_promote_by_the_beginning_of_a_digest_and_back_to_the_latest(opd: Opd, api: Api) -> None:
    api.submit()
    say(api, students=students(FIRST, SECOND, missed=(SECOND,)))
    assert "shall serve student sha256:a1b2c3d50000" in opd("promote", "tiny", "a1b2c3d5").out
    assert api.get()["spec"]["endpoint"]["studentDigest"] == SECOND
    assert "shall serve the latest student that passes its gate" in opd("promote", "tiny", "latest").out
    assert api.get()["spec"]["endpoint"]["studentDigest"] == ""


@pytest.mark.parametrize(
    ("digest", "words"),
    [
        ("a1b2c3d", "2 students of tiny; write more of one of sha256:a1b2c3d40000, sha256:a1b2c3d50000"),
        ("a1b2c3", "write 7 hexadecimal digits or more"),
        ("newest", "write 7 hexadecimal digits or more"),
        ("sha256:1234567", "no student of tiny"),
    ],
)
def test_a_digest_that_names_no_single_student_is_refused(opd: Opd, api: Api, digest: str, words: str) -> None:
    api.submit()
    say(api, students=students(FIRST, SECOND))
    done = opd("promote", "tiny", digest)
    assert done.code == ExitCode.INVALID
    assert words in done.err
    assert api.get()["spec"]["endpoint"]["studentDigest"] == ""


def test_nothing_is_promoted_where_nothing_is_served(opd: Opd, api: Api) -> None:
    api.submit(endpoint__enabled=False)
    assert "spec.endpoint.enabled is false; submit it with true" in opd("promote", "tiny", "latest").err


def test_rollback(opd: Opd, api: Api) -> None:
    api.submit()
    say(api, students=students(FIRST, SECOND), endpoint=serving(SECOND))
    assert "shall serve student sha256:a1b2c3d40000" in opd("rollback", "tiny").out
    assert api.get()["spec"]["endpoint"]["studentDigest"] == FIRST
    say(api, students=students(FIRST, SECOND), endpoint=serving(FIRST))
    done = opd("rollback", "tiny")
    assert done.code == ExitCode.INVALID
    assert "has no student before sha256:a1b2c3d40000 that was in service" in done.err


def distillation(**status: Any) -> Distillation:
    return Distillation({"metadata": {"name": "tiny", "namespace": "n"}, "spec": {}, "status": status})


def test_rollback_skips_what_was_never_in_service() -> None:
    status = {"students": students(FIRST, SECOND, THIRD, missed=(SECOND,)), "endpoint": serving(THIRD)}
    assert before(distillation(**status)).digest == FIRST


def test_rollback_during_a_rollout_is_to_what_it_replaces() -> None:
    status = {"students": students(FIRST, SECOND, THIRD), "endpoint": serving(SECOND, canary=THIRD)}
    assert before(distillation(**status)).digest == SECOND


def test_rollback_of_a_student_that_history_has_forgotten_is_to_the_last_that_passed() -> None:
    assert before(distillation(students=students(FIRST), endpoint=serving(SECOND))).digest == FIRST


@pytest.mark.parametrize(
    "status", [{}, {"endpoint": {}}, {"students": students(FIRST), "endpoint": serving(FIRST, canary=FIRST)}]
)
def test_rollback_without_a_student_to_go_back_to_is_refused(status: dict[str, Any]) -> None:
    with pytest.raises(InvalidError):
        before(distillation(**status))


def test_the_newest_student_can_be_named_before_it_is_evaluated() -> None:
    found = distillation(students=students(FIRST), student={"digest": THIRD, "uri": "pvc://a/b"})
    assert find(found, "fffffff").uri == "pvc://a/b"


def test_delete_says_what_stays(opd: Opd, api: Api) -> None:
    api.submit()
    done = opd("delete", "tiny")
    assert done.out.startswith("opd/tiny deleted; its students and checkpoints stay in pvc://students/")
    wait_for(lambda: not api.find("opddistillations"))
    assert opd("delete", "tiny").code == ExitCode.INVALID


def test_delete_can_wait_for_what_belongs_to_it(opd: Opd, api: Api) -> None:
    api.submit()
    owner = {
        "apiVersion": "opd.dev/v1alpha1", "kind": "OPDDistillation", "name": "tiny",
        "uid": api.get()["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip
    child = {"name": "child", "ownerReferences": [owner], "finalizers": ["opd.dev/test"]}
    api.call("POST", api.path("configmaps"), {"metadata": child})
    done = opd("delete", "tiny", "--wait", "--timeout=1s")
    assert (done.code, done.err) == (75, "error: tiny is still there after 1 s: its pods are ending\n")
    api.patch("configmaps", "child", {"metadata": {"finalizers": None}})
    assert opd("delete", "tiny", "--wait", "--timeout=2m").code in (ExitCode.OK, ExitCode.INVALID)
    assert not api.find("opddistillations")


def test_events_of_the_object_and_its_pods(opd: Opd, api: Api) -> None:
    api.submit()
    assert opd("events", "tiny").out == "no events of tiny\n"
    labels = {"opd.dev/distillation": "tiny", "opd.dev/role": "trainer"}
    pod = api.call("POST", api.path("pods"), POD | {"metadata": {"name": "tiny-trainer", "labels": labels}})
    other = api.call("POST", api.path("pods"), POD | {"metadata": {"name": "other"}})
    for obj, reason, minute in ((pod, "FailedScheduling", 2), (api.get(), "Running", 1), (other, "Nothing", 3)):
        about = {"kind": obj.get("kind", "Pod"), **{key: obj["metadata"][key] for key in ("name", "namespace", "uid")}}
        event = {"metadata": {"name": f"event-{minute}"}, "involvedObject": about, "reason": reason, "count": minute,
                 "type": "Warning" if minute == 2 else "Normal", "message": f"message {minute}",
                 "lastTimestamp": f"2026-01-01T00:0{minute}:00Z"}  # fmt: skip
        api.call("POST", api.path("events"), event)
    header, first, second = opd("events", "tiny").out.splitlines()
    assert header.split() == ["LAST", "SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"]
    assert first.split()[1:] == ["Normal", "Running", "OPDDistillation/tiny", "message", "1"]
    assert second.split()[1:] == ["(x2)", "Warning", "FailedScheduling", "Pod/tiny-trainer", "message", "2"]
    assert [event["reason"] for event in json.loads(opd("events", "tiny", "-o", "json").out)] == [
        "Running", "FailedScheduling",
    ]  # fmt: skip
