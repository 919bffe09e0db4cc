"""`opd logs`: the right pods, each line once, and a reason where there is nothing to read."""

import threading
import time
from collections.abc import Callable
from typing import Any

from opd_cli.cluster import Distillations, LogLine
from opd_core.exit_codes import ExitCode

from tests.cli.conftest import Done, make_pod, say
from tests.cli.kubelet import Kubelet
from tests.operator.live import Api, wait_for
from tests.operator.world import teachers

Opd = Callable[..., Done]


def test_without_a_pod_the_stage_says_why(opd: Opd, api: Api) -> None:
    api.submit()
    done = opd("logs", "tiny", "trainer")
    assert done.code == ExitCode.INVALID
    assert done.err.startswith("error: tiny has no pod of role trainer: Trained is not judged yet; `opd status tiny`")
    say(api, conditions={"Trained": ("False", "Waiting", "for the teachers")})
    assert (
        "tiny has no pod of role trainer: Trained is Waiting: for the teachers;" in opd("logs", "tiny", "trainer").err
    )


def test_a_pod_that_has_not_started_says_why(opd: Opd, api: Api) -> None:
    api.submit()
    make_pod(api, "tiny-teachers-0", "teachers", phase="Pending")
    assert "pod tiny-teachers-0 has not started" in opd("logs", "tiny", "teachers").err
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes: no GPU",
    }
    api.patch("pods", "tiny-teachers-0", {"status": {"conditions": [unschedulable]}}, "status")
    done = opd("logs", "tiny", "teachers")
    assert done.code == ExitCode.INVALID
    assert "pod tiny-teachers-0 has not started: Unschedulable: 0/3 nodes: no GPU" in done.err


def test_of_jobs_the_newest_and_of_the_trainer_the_first_rank(opd: Opd, api: Api, node: tuple[str, Kubelet]) -> None:
    api.submit(training__nodes=2)
    name, running = node
    make_pod(api, "old-0", "trainer", name, job="tiny-trainer-1-0", phase="Failed")
    time.sleep(1.1)  # creation times have seconds
    for index in (0, 1):
        make_pod(api, f"new-{index}", "trainer", name, job="tiny-trainer-1-1", index=index)
        running.prints(f"new-{index}", f"rank {index} speaks\n", "no end of line", None)
    done = opd("logs", "tiny", "trainer")
    assert (done.code, done.out) == (0, "rank 0 speaks\nno end of line\n")
    running.prints("new-0", "rank 0 again\n", None)
    done = opd("logs", "tiny", "trainer", "--all-ranks")
    assert done.out == "new-0  rank 0 again\nnew-1  rank 1 speaks\nnew-1  no end of line\n"
    assert {(pod, container) for pod, container, _ in running.asked} == {("new-0", "trainer"), ("new-1", "trainer")}


def test_following_waits_for_the_pod_and_ends_with_it(opd: Opd, api: Api, node: tuple[str, Kubelet]) -> None:
    api.submit()
    say(api, conditions={"Trained": ("False", "Waiting", "for the teachers")})
    name, running = node
    done: list[Done] = []
    thread = threading.Thread(target=lambda: done.append(opd("logs", "tiny", "trainer", "-f")))
    thread.start()
    running.prints("tiny-trainer", "round 1\n")
    make_pod(api, "tiny-trainer", "trainer", name, job="j", phase="Pending")
    api.patch("pods", "tiny-trainer", {"status": {"phase": "Running"}}, "status")
    wait_for(lambda: running.asked, "somebody who reads")
    running.prints("tiny-trainer", "round 2\n", None)
    thread.join(20)
    assert done, "it still runs"
    assert (done[0].code, done[0].out) == (0, "round 1\nround 2\n")
    assert set(done[0].err.splitlines()) <= {
        "tiny has no pod of role trainer: Trained is Waiting: for the teachers",
        "pod tiny-trainer has not started: Pending: its container is not there yet",
    }


def test_following_ends_where_no_pod_can_come(opd: Opd, api: Api) -> None:
    api.submit()
    for conditions in (
        {"Failed": ("True", "UserError", "x")},
        {"TeachersReady": ("True", "Freed", "training is done")},
        {"Suspended": ("True", "Suspended")},
    ):
        say(api, conditions=conditions)
        assert opd("logs", "tiny", "teachers", "-f").code == ExitCode.INVALID


def test_several_pods_are_followed_at_once(cluster: Distillations, api: Api, node: tuple[str, Kubelet]) -> None:
    api.submit()
    name, running = node
    for pod in ("a", "b"):
        make_pod(api, pod, "endpoint", name)
    running.prints("a", "a1\n")
    running.prints("b", "b1\n", None)
    lines = cluster.logs("tiny", "endpoint", follow=True)
    assert {next(lines), next(lines)} == {LogLine("a", "a1", 2), LogLine("b", "b1", 2)}
    running.prints("a", "a2\n")
    assert next(lines) == LogLine("a", "a2", 2)
    lines.close()
    wait_for(
        lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("log of")], "its threads"
    )


def test_an_earlier_container_that_is_gone_says_where_its_words_are(
    opd: Opd, api: Api, node: tuple[str, Kubelet]
) -> None:
    api.submit()
    make_pod(api, "tiny-endpoint", "endpoint", node[0])
    done = opd("logs", "tiny", "endpoint", "--previous")
    assert done.code == ExitCode.INVALID
    assert "status.lastFailure keeps the last words" in done.err


def test_without_a_role_it_is_the_stage_at_work(opd: Opd, api: Api) -> None:
    api.submit()
    assert "tiny has no pod of role teachers" in opd("logs", "tiny").err
    say(api, conditions={"TeachersReady": ("True", "Completed"), "Trained": ("False", "Running")})
    assert "tiny has no pod of role trainer" in opd("logs", "tiny").err
    api.edit(teachers=teachers("ocr"))
    assert "tiny has no pod of role teach:" in opd("logs", "tiny").err


def test_teachers_that_train_side_by_side_are_all_read_and_else_the_newest(
    opd: Opd, api: Api, node: tuple[str, Kubelet]
) -> None:
    api.submit(teachers=teachers("geneval", "ocr"))
    name, running = node
    make_pod(api, "first", "teach", name, job="tiny-teach-0-1-0")
    time.sleep(1.1)  # creation times have seconds
    make_pod(api, "second", "teach", name, job="tiny-teach-1-1-0")
    for pod in ("first", "second"):
        running.prints(pod, "speaks\n", None)
    assert opd("logs", "tiny", "teach").out == "first  speaks\nsecond  speaks\n"
    for pod in ("first", "second"):
        api.patch("pods", pod, {"status": {"phase": "Succeeded"}}, "status")
        running.prints(pod, "spoke\n", None)
    assert opd("logs", "tiny", "teach").out == "spoke\n"
    assert {container for _, container, _ in running.asked} == {"teach"}


def test_a_role_has_one_of_five_names(opd: Opd) -> None:
    done = opd("logs", "tiny", "teacher")
    assert done.code == ExitCode.INVALID
    words: Any = done.err
    for role in ("teach", "teachers", "trainer", "evaluator", "endpoint"):
        assert role in words
