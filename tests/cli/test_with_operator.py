"""The commands and the operator, as a user has them; the test plays the kubelet."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from opd_cli.cluster import Distillations

from tests.cli.conftest import Done
from tests.operator.live import STUDENT, Api, Operator, to_student, wait_for

Opd = Callable[..., Done]

NEXT = "sha256:" + "b" * 64


@pytest.fixture
def operator(api: Api, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Operator]:
    options = (f"--watch-namespace={api.namespace}", "--no-leader-election")
    running = Operator(api.cluster, tmp_path, (free_port(), free_port()), *options)
    yield running.start().ready()
    running.kill()


def while_kubelet(api: Api, work: Callable[[], Any]) -> Any:
    """The result of `work`, with every endpoint pod becoming ready and every leaving pod gone meanwhile."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()

    def done() -> bool:
        api.sweep()
        api.ready(api.pods("endpoint"))
        return not thread.is_alive()

    wait_for(done, "the command", seconds=60)
    return result[0]


def test_a_student_a_newer_one_back_again_suspended_and_deleted(
    opd: Opd, cluster: Distillations, api: Api, operator: Operator, example: Path
) -> None:
    content = yaml.safe_load(example.read_text())
    content["metadata"]["name"] = "tiny"
    content["spec"]["endpoint"]["rollout"] = {"strategy": "Replace"}
    assert "created" in opd("submit", "-", stdin=json.dumps(content)).out
    followed: list[Done] = []
    follower = threading.Thread(target=lambda: followed.append(opd("status", "tiny", "-w")))
    follower.start()
    to_student(api)
    while_kubelet(api, lambda: follower.join(60))
    assert followed, "it still follows"
    assert followed[0].code == 0, followed[0]
    for stage in ("TeachersReady", "Trained", "Evaluated", "Deployed"):
        assert f"{stage:15} Completed" in followed[0].out
    assert "sha256:aaaaaaaaaaaa, passed its gate" in followed[0].out
    assert {"Starting", "Completed"} <= {event.reason for event in cluster.events("tiny")}

    content["spec"]["training"]["seed"] = 7
    assert "configured" in opd("submit", "-", stdin=json.dumps(content)).out
    to_student(api, NEXT)
    ready = while_kubelet(api, lambda: cluster.wait("tiny", "Ready", timeout=60))
    assert ready.status.endpoint.stable.digest == NEXT

    assert "shall serve student sha256:aaaaaaaaaaaa" in opd("rollback", "tiny").out
    done = while_kubelet(api, lambda: opd("wait", "tiny", "--for=Deployed", "--timeout=60s"))
    assert done.code == 0, done
    assert cluster.get("tiny").status.endpoint.stable.digest == STUDENT

    opd("suspend", "tiny")
    done = while_kubelet(api, lambda: opd("wait", "tiny", "--for=Suspended", "--timeout=60s"))
    assert done.code == 0, done
    assert "opd resume tiny" in opd("status", "tiny").out

    assert while_kubelet(api, lambda: opd("delete", "tiny", "--wait", "--timeout=60s")).code == 0
    assert not api.find("pods")
