"""What an object may be in for long, against the real API server: queued, preempted, paused, wrong, put away."""

import time
from typing import Any

import pytest

from tests.operator.live import SCORES, STUDENT, Api, Operator, quiet, to_student, wait_for

BASE, OUTPUT = "pvc://tiny-world/base", "pvc://students/tiny-three-tasks"  # the example's
QUEUE = {"kueue.x-k8s.io/queue-name": "gpus"}


def labelled(api: Api, labels: dict[str, str]) -> None:
    api.patch("opddistillations", "tiny", {"metadata": {"labels": labels}})


def trainer(api: Api) -> dict[str, Any]:
    (job,) = wait_for(lambda: api.ours("jobs", "trainer"), "the trainer's Job")
    return job


def suspend(api: Api, job: dict[str, Any], admitted: dict[str, str] | None = None) -> None:
    """As Kueue does: it suspends a Job, or lets it begin on nodes of its choice."""
    template = {"template": {"spec": {"nodeSelector": admitted}}} if admitted else {}
    body = {"spec": {"suspend": admitted is None, **template}}
    api.patch("jobs", job["metadata"]["name"], body)


def test_a_queue_may_hold_admit_and_preempt_a_trainer_and_nobody_fights_it(api: Api, operator: Operator) -> None:
    """kubernetes-sigs/kueue#1726, #3936: a controller that writes to a queued Job."""
    api.submit()
    labelled(api, QUEUE)
    api.run("teachers")
    job = trainer(api)
    assert QUEUE.items() <= job["metadata"]["labels"].items()
    suspend(api, job)
    api.until("Trained", "False", "Queued")
    (message,) = [c["message"] for c in api.status()["conditions"] if c["type"] == "Trained"]
    assert "LocalQueue gpus" in message
    assert api.ours("deployments", "teachers"), "it may be admitted any moment"

    # A template may change only while the Job has not started (KEP-2926), as here.
    suspend(api, job, {"flavor": "spot"})
    api.run("trainer")
    api.until("Trained", "False", "Running")
    suspend(api, job)
    api.until("Trained", "False", "Queued")

    def freed() -> bool:
        api.sweep()
        return not api.ours("deployments", "teachers") and not api.pods("trainer")

    wait_for(freed, "the teachers of a preempted trainer to go")
    assert (api.status()["restarts"], api.status()["disruptions"]) == (0, 1)
    quiet(api)
    suspend(api, job, {"flavor": "spot"})
    api.run("teachers")
    api.run("trainer")
    api.until("Trained", "False", "Running")
    api.end("trainer", digest=STUDENT)
    api.until("Trained", "True")
    written = [(verb, name) for verb, resource, name in api.writes() if resource == "jobs" and "trainer" in name]
    assert [verb for verb, _ in written] in (["patch"], ["create"]), written


def test_an_object_that_serves_outlives_its_time_and_one_that_is_put_away_does_not(
    api: Api, operator: Operator
) -> None:
    api.submit(runPolicy={"ttlSecondsAfterFinished": 5})
    to_student(api)
    api.run("endpoint")
    api.until("Ready", "True")
    time.sleep(8)
    api.until("Ready", "True")
    assert api.pods("endpoint")
    api.edit(endpoint={"suspend": True})

    def gone() -> bool:  # as soon as it serves no more: its time is over already
        api.sweep()
        return not api.find("opddistillations") and not api.find("pods") and not api.find("deployments")

    wait_for(gone, "its time to be over")


def test_the_run_pauses_alone_and_so_does_the_endpoint(api: Api, operator: Operator) -> None:
    api.submit()
    to_student(api)
    api.run("endpoint")
    api.until("Ready", "True")
    revision = api.status()["endpoint"]["stable"]["revision"]
    api.edit(suspend=True, training={"seed": 7})
    api.until("Suspended", "True")
    api.until("Serving", "True")
    assert api.pods("endpoint")
    assert not api.find("jobs")
    api.edit(endpoint={"suspend": True})

    def free() -> bool:
        api.sweep()
        return not api.find("pods") and api.condition("Serving") == ("False", "Suspended")

    wait_for(free, "the endpoint's pods to go")
    api.edit(endpoint={"suspend": False})
    api.run("endpoint")
    api.until("Serving", "True")
    assert api.status()["endpoint"]["stable"]["revision"] == revision


@pytest.mark.parametrize("how", ["suspended", "waiting"])
def test_a_wrong_base_or_output_can_be_mended_until_a_trainer_has_run(api: Api, operator: Operator, how: str) -> None:
    api.submit(suspend=how == "suspended", model__uri="pvc://typo/base", student__output={"uri": "pvc://typo/out"})
    if how == "suspended":
        api.until("Suspended", "True")
    else:
        api.run("teachers")
        trainer(api)
    api.edit(suspend=False, model={"uri": BASE}, student={"output": {"uri": OUTPUT}})

    def mended() -> bool:
        api.sweep()
        api.ready(api.pods("teachers"))
        (job,) = api.ours("jobs", "trainer") or [None]
        return bool(job) and OUTPUT.removeprefix("pvc://") in str(job["spec"]["template"])

    wait_for(mended, "a trainer that writes where it shall")
    api.run("trainer")
    wait_for(lambda: api.status().get("begun"))
    for change in ({"model": {"uri": "pvc://typo/base"}}, {"student": {"output": {"uri": "pvc://typo/out"}}}):
        with pytest.raises(RuntimeError, match="a trainer has run"):
            api.edit(**change)


def test_a_sidecar_neither_speaks_for_the_trainer_nor_keeps_it(api: Api, operator: Operator) -> None:
    """kubeflow/trainer#1577, #1183: the Job of a pod with an injected container never completes."""
    api.submit()
    api.run("teachers")
    api.run("trainer")
    api.until("Trained", "False", "Running")
    (pod,) = api.pods("trainer")
    words = '{"exitCode": 0, "digest": "' + STUDENT + '"}'
    ended = {"exitCode": 0, "reason": "Completed", "message": words, "finishedAt": "2026-01-01T00:00:00Z"}
    common = {"image": "i", "imageID": "", "ready": False, "restartCount": 0}
    status = {
        "phase": "Running",
        "containerStatuses": [
            {"name": "istio-proxy", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, **common},
            {"name": "trainer", "state": {"terminated": ended}, **common},
        ],
    }
    api.patch("pods", pod["metadata"]["name"], {"status": status}, "status")
    api.until("Trained", "True")

    def gone() -> bool:
        api.sweep()
        return not api.pods("trainer")

    wait_for(gone, "the pod that was kept to go")
    api.end("evaluator", digest=STUDENT, gatePassed=True, scores=SCORES)
    api.until("Evaluated", "True")


def test_a_real_autoscaler_scales_the_object_and_the_operator_follows(api: Api, operator: Operator) -> None:
    """The HorizontalPodAutoscaler controller of Kubernetes needs no metrics to reach its bounds."""
    api.submit(endpoint__autoscaling={"minReplicas": 2, "maxReplicas": 3})
    to_student(api)
    api.run("endpoint")

    def replicas() -> tuple[int, list[int]]:
        deployments = api.ours("deployments", "endpoint")
        return api.get()["spec"]["endpoint"]["replicas"], [each["spec"]["replicas"] for each in deployments]

    wait_for(lambda: replicas() == (2, [2]), "the autoscaler's fewest replicas", seconds=60)
    api.run("endpoint")
    api.until("Ready", "True")
    api.edit(endpoint={"replicas": 5})
    wait_for(lambda: replicas() == (3, [3]), "the autoscaler's most replicas", seconds=60)
    quiet(api)
