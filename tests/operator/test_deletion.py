"""An object, or its namespace, that is deleted in any stage leaves nothing behind."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest
from devcluster.control_plane import ControlPlane

from tests.operator.live import STUDENT, Api, Operator, to_student, wait_for
from tests.operator.world import teachers

Start = Callable[..., Operator]


def everything(api: Api) -> list[str]:
    kinds = ("deployments", "jobs", "pods", "services", "configmaps", "networkpolicies")
    found = [item for kind in kinds for item in api.find(kind, **{"app.kubernetes.io%2Fmanaged-by": "opd-operator"})]
    return [f"{item['metadata']['name']}" for item in found]


def gone(api: Api) -> bool:
    api.sweep()
    return not api.call("GET", api.path("opddistillations"))["items"] and not everything(api)


def at_teaching(api: Api) -> None:
    api.edit(teachers=teachers("ocr"))
    api.run("teach")
    api.until("TeachersTrained", "False", "Running")


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


def alone(api: Api, policy: str) -> None:
    api.delete("opddistillations", "tiny", propagationPolicy=policy)
    wait_for(lambda: gone(api), f"everything in {api.namespace} to go")


def with_its_namespace(api: Api) -> None:
    api.call("DELETE", f"/api/v1/namespaces/{api.namespace}")

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

    wait_for(over, "the end of the namespace")


STAGES = (at_teaching, at_teachers, at_training, at_pause, at_evaluation, at_rollout)
ENDS = (partial(alone, policy="Background"), partial(alone, policy="Foreground"))
CASES = [*itertools.product(STAGES, ENDS), (at_training, with_its_namespace)]


@pytest.fixture
def apis(control_plane: ControlPlane) -> Iterator[list[Api]]:
    """One for each of CASES."""
    namespaces = [f"deleted-{stage.__name__.replace('_', '-')}-{i}" for i, (stage, _) in enumerate(CASES)]
    with ExitStack() as made:
        yield [made.enter_context(Api(control_plane, namespace).lasting()) for namespace in namespaces]


def test_deleted_in_any_stage_alone_or_with_its_namespace_nothing_is_left(apis: list[Api], start: Start) -> None:
    """All at once, each with a namespace of its own."""
    operator = start(
        apis[0], "--no-leader-election", *(f"--watch-namespace={api.namespace}" for api in apis[1:])
    ).ready()

    def live_and_die(api: Api, stage: Callable[[Api], None], end: Callable[[Api], None]) -> None:
        api.submit()
        stage(api)
        end(api)

    with ThreadPoolExecutor(len(CASES)) as pool:
        for done in [pool.submit(live_and_die, api, *case) for api, case in zip(apis, CASES, strict=True)]:
            done.result()
    time.sleep(2)
    assert [everything(api) for api in apis] == [[]] * len(CASES), "made again after its end"
    assert "Traceback" not in operator.log.read_text()


def test_a_finished_object_removes_itself(api: Api, operator: Operator) -> None:
    api.submit(runPolicy={"ttlSecondsAfterFinished": 3})
    to_student(api)
    api.run("endpoint")
    api.until("Ready", "True")
    time.sleep(4)
    assert not gone(api), "it serves"
    api.edit(endpoint={"suspend": True})
    wait_for(lambda: gone(api), "its end", 40)
