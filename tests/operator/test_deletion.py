"""An object, or its namespace, that is deleted in any stage leaves nothing behind."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from devcluster.control_plane import ControlPlane

from tests.operator.live import STUDENT, Api, Operator, to_student, wait_for

Start = Callable[..., Operator]


def everything(api: Api) -> list[str]:
    kinds = ("deployments", "jobs", "pods", "services", "configmaps", "networkpolicies")
    found = [item for kind in kinds for item in api.find(kind, **{"app.kubernetes.io%2Fmanaged-by": "opd-operator"})]
    return [f"{item['metadata']['name']}" for item in found]


def gone(api: Api) -> bool:
    api.sweep()
    return not api.call("GET", api.path("opddistillations"))["items"] and not everything(api)


def at_teachers(api: Api) -> None:
    wait_for(lambda: api.pods("teachers"))


def at_training(api: Api) -> None:
    api.run("teachers")
    api.run("trainer")
    api.until("Trained", "False", "Running")


def at_evaluation(api: Api) -> None:
    at_training(api)
    api.end("trainer", digest=STUDENT)
    wait_for(lambda: api.pods("evaluator"))


def at_rollout(api: Api) -> None:
    to_student(api)
    wait_for(lambda: api.pods("endpoint"))


def at_pause(api: Api) -> None:
    at_training(api)
    api.end("trainer", 1, "broken")
    api.until("Trained", "False", "Restarting")


CASES = list(
    itertools.product((at_teachers, at_training, at_pause, at_evaluation, at_rollout), ("Background", "Foreground"))
)


@pytest.fixture
def ten_apis(control_plane: ControlPlane) -> Iterator[list[Api]]:
    """One for each of CASES."""
    namespaces = [f"deleted-{stage.__name__.replace('_', '-')}-{policy.lower()}" for stage, policy in CASES]
    for namespace in namespaces:
        control_plane.kubectl("create", "namespace", namespace)
    yield [Api(control_plane, namespace) for namespace in namespaces]
    control_plane.kubectl("delete", "namespace", *namespaces, "--wait=false")


def test_deleted_in_any_stage_nothing_is_left(ten_apis: list[Api], start: Start) -> None:
    """Ten objects at once, each deleted in a stage of its own, in both orders."""
    start(ten_apis[0], "--no-leader-election", *(f"--watch-namespace={api.namespace}" for api in ten_apis[1:])).ready()

    def live_and_die(api: Api, stage: Callable[[Api], None], policy: str) -> None:
        api.submit()
        stage(api)
        api.delete("opddistillations", "tiny", propagationPolicy=policy)
        wait_for(lambda: gone(api), f"everything in {api.namespace} to go")

    with ThreadPoolExecutor(len(CASES)) as pool:
        for done in [pool.submit(live_and_die, api, *case) for api, case in zip(ten_apis, CASES, strict=True)]:
            done.result()
    time.sleep(2)
    assert [everything(api) for api in ten_apis] == [[]] * len(CASES), "made again after its end"


def test_a_namespace_that_goes_takes_everything_and_is_left_in_peace(api: Api, operator: Operator) -> None:
    api.submit()
    at_training(api)
    api.cluster.kubectl("delete", "namespace", api.namespace, "--wait=false")

    def over() -> bool:
        api.sweep()
        # The controller looks again after half the longest grace period of a pod (5 minutes here), or 5 s after a change.
        touched = {"metadata": {"annotations": {"test/touched": str(time.monotonic())}}}
        try:
            api.call("PATCH", f"/api/v1/namespaces/{api.namespace}", touched, "application/merge-patch+json")
        except RuntimeError as error:
            if "not found" not in str(error):
                raise
            return True
        return False

    wait_for(over, "the end of the namespace", 60)
    assert "Traceback" not in operator.log.read_text()


def test_a_finished_object_removes_itself(api: Api, operator: Operator) -> None:
    api.submit(runPolicy={"ttlSecondsAfterFinished": 3})
    to_student(api)
    api.run("endpoint")
    wait_for(lambda: gone(api), "its end", 40)
