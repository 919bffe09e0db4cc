"""A distillation's life against the real API server and its controllers."""

import signal
import time
from collections.abc import Callable

from tests.operator.live import STUDENT, Api, Operator, quiet, to_student, wait_for


def test_from_teachers_to_a_student_in_service_and_nothing_is_left_after_it(api: Api, operator: Operator) -> None:
    api.submit()
    to_student(api)
    api.run("endpoint")
    api.until("Ready", "True")
    assert api.status()["student"]["digest"] == STUDENT
    assert not api.ours("deployments", "teachers")
    assert {job["metadata"]["name"].rsplit("-", 2)[0] for job in api.find("jobs")} == {"tiny-trainer", "tiny-evaluator"}
    quiet(api)
    page = operator.metrics()
    labels = f'name="tiny",namespace="{api.namespace}",reason="Completed",status="True",type="Ready"'
    assert f"opd_condition{{{labels}}} 1.0" in page
    reasons = {event["reason"] for event in api.find("events") if event["involvedObject"]["kind"] == "OPDDistillation"}
    assert {"Starting", "Running", "Completed", "Freed"} <= reasons
    waited = api.cluster.kubectl("wait", "-n", api.namespace, "opd/tiny", "--for=condition=Deployed", "--timeout=5s")
    assert "condition met" in waited

    api.delete("opddistillations", "tiny")

    def gone() -> bool:
        api.sweep()
        kinds = ("deployments", "jobs", "pods", "services", "networkpolicies")
        return not any(api.ours(kind, role) for kind in kinds for role in ("teachers", "trainer", "endpoint"))

    wait_for(gone, "everything to go")
    wait_for(lambda: f'name="tiny",namespace="{api.namespace}"' not in operator.metrics(), "the series to go")


def test_a_new_operator_finds_everything_as_it_should_be(api: Api, start: Callable[..., Operator]) -> None:
    first = start(api, "--no-leader-election").ready()
    api.submit()
    api.run("teachers")
    api.run("trainer")
    api.until("Trained", "False", "Running")
    first.stop(signal.SIGKILL)
    time.sleep(1)
    before = api.writes()
    start(api, "--no-leader-election").ready()
    time.sleep(3)
    assert api.writes() == before


def test_a_failed_trainer_starts_again_and_a_user_error_ends_the_run(api: Api, operator: Operator) -> None:
    api.submit()
    api.run("teachers")
    api.run("trainer")
    api.end("trainer", 1, "Traceback ...")
    wait_for(lambda: api.status()["restarts"] == 1)
    wait_for(lambda: any("trainer-1-1" in job["metadata"]["name"] for job in api.find("jobs")), seconds=40)
    api.run("trainer")
    api.end("trainer", 2, "no prompts in the file")
    wait_for(lambda: not api.ours("deployments", "teachers"), "the teachers to go")

    def failed() -> bool:
        api.sweep()
        return api.condition("Failed") == ("True", "UserError")

    wait_for(failed)
    failure = api.status()["lastFailure"]
    assert (failure["exitCode"], failure["message"]) == (2, "no prompts in the file")
    quiet(api)


def test_children_removed_or_changed_by_hand_come_back(api: Api, operator: Operator) -> None:
    api.submit()
    (service,) = wait_for(lambda: api.ours("services", "teachers"))
    wait_for(lambda: api.ours("deployments", "teachers"))
    api.delete("services", "tiny-teachers-0")
    wait_for(
        lambda: [s for s in api.ours("services", "teachers") if s["metadata"]["uid"] != service["metadata"]["uid"]]
    )
    api.patch("deployments", "tiny-teachers-0", {"spec": {"replicas": 5}})
    wait_for(lambda: api.ours("deployments", "teachers")[0]["spec"]["replicas"] == 1)
    api.delete("deployments", "tiny-teachers-0", propagationPolicy="Background")
    wait_for(lambda: api.ours("deployments", "teachers"))


def test_suspend_frees_everything_and_resume_goes_on(api: Api, operator: Operator) -> None:
    api.submit()
    api.run("teachers")
    api.run("trainer")
    api.until("Trained", "False", "Running")
    api.edit(suspend=True)
    api.until("Suspended", "True")

    def free() -> bool:
        api.sweep()
        return not api.find("pods") and not api.find("jobs") and not api.find("deployments")

    wait_for(free, "everything to be free")
    api.edit(suspend=False)
    api.run("teachers")
    wait_for(lambda: [job["metadata"]["name"] for job in api.find("jobs")] == ["tiny-trainer-1-1"])


def test_two_operators_and_the_second_takes_over(api: Api, start: Callable[..., Operator]) -> None:
    lease = f"--lease-namespace={api.namespace}"
    first = start(api, lease).ready()
    wait_for(lambda: "opd_leader 1.0" in first.metrics())
    second = start(api, lease)
    api.submit()
    wait_for(lambda: api.ours("deployments", "teachers"))
    wait_for(second.log.exists)
    assert "opd_leader 0.0" in second.ready().metrics()
    first.stop(signal.SIGKILL)
    began = time.monotonic()
    api.run("teachers")
    wait_for(lambda: api.find("jobs"), "the second operator", seconds=25)
    assert time.monotonic() - began < 20


def test_a_recreated_object_adopts_nothing(api: Api, start: Callable[..., Operator]) -> None:
    operator = start(api, "--no-leader-election").ready()
    api.submit()
    (old,) = wait_for(lambda: api.ours("deployments", "teachers"))
    operator.stop(signal.SIGKILL)
    api.delete("opddistillations", "tiny", propagationPolicy="Background")
    wait_for(lambda: not api.find("opddistillations"))
    api.submit()
    start(api, "--no-leader-election").ready()

    def renewed() -> bool:
        api.sweep()
        found = [d for d in api.ours("deployments", "teachers") if d["metadata"]["uid"] != old["metadata"]["uid"]]
        return bool(found) and found[0]["metadata"]["ownerReferences"][0]["uid"] == api.get()["metadata"]["uid"]

    wait_for(renewed)


def test_a_quota_is_told_and_lifted(api: Api, operator: Operator) -> None:
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/deployments.apps": "0"}}}
    api.call("POST", f"/api/v1/namespaces/{api.namespace}/resourcequotas", quota)
    wait_for(lambda: api.call("GET", f"/api/v1/namespaces/{api.namespace}/resourcequotas/none")["status"].get("hard"))
    api.submit()
    api.until("TeachersReady", "False", "Rejected")
    api.call("DELETE", f"/api/v1/namespaces/{api.namespace}/resourcequotas/none")
    wait_for(lambda: api.ours("deployments", "teachers"), seconds=40)
    api.until("TeachersReady", "False", "Starting")


def test_an_object_of_another_manager_is_left_alone(api: Api, operator: Operator) -> None:
    api.submit(managedBy="kueue.x-k8s.io/multikueue")
    quiet(api, 3)
    assert api.get()["status"] == {"observedGeneration": -1}
    assert not api.find("deployments")
