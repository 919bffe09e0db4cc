"""Access modes of claims: what cannot work is said before anything is made, what may not work is said as well."""

from typing import Any

import pytest
from opd_operator import names
from opd_operator.claims import asked_for, modes

from tests.operator.live import Api, Operator, quiet
from tests.operator.world import World, example, teachers

BOTH = {"model__uri": "pvc://models/base", "student__output": {"uri": "pvc://students/tiny"}}
ALONE = {"teacherServing": {"placement": "InProcess"}, "endpoint__enabled": False}


def looked(modes_: dict[str, list[str]], **changes: Any) -> World:
    world = World(**{**BOTH, **changes})
    world.claims = modes_
    return world.settle()


@pytest.mark.parametrize(
    ("modes_", "changes", "told"),
    [
        ({"students": ["ReadOnlyMany"]}, {}, "claim students is ReadOnlyMany, and the student is written to it; use"),
        (
            {"models": ["ReadWriteOncePod"]},
            {},
            "claim models is ReadWriteOncePod, and several pods use it at once; use",
        ),
        ({"students": ["ReadOnlyMany"]}, ALONE, "claim students is ReadOnlyMany"),
    ],
)
def test_what_cannot_work_starts_nothing(modes_: dict[str, list[str]], changes: dict[str, Any], told: str) -> None:
    world = looked(modes_, **changes)
    assert world.condition("Failed") == ("True", "UserError")
    assert told in world.message("TeachersReady")
    assert not [kind for kind, _ in world.children if kind in ("Deployment", "Job")]

    world.claims = {name: ["ReadWriteMany"] for name in modes_}  # made anew
    for suspend in (True, False):
        world.edit(**{**BOTH, **changes, "suspend": suspend})
    assert world.condition("Failed")[0] == "False"
    assert world.plan
    assert world.plan.wanted
    assert world.plan.wanted.teachers or world.plan.wanted.trainer is not None


@pytest.mark.parametrize(
    "modes_",
    [
        {"models": ["ReadOnlyMany"], "students": ["ReadWriteMany"]},
        {"students": ["ReadWriteOnce", "ReadOnlyMany"]},
        {"students": []},  # not there yet: its pods wait for it, and say so
        {},
    ],
)
def test_what_may_work_is_begun(modes_: dict[str, list[str]]) -> None:
    world = looked(modes_)
    assert world.of("Deployment", names.TEACHERS)
    assert (world.condition("Accepted")[0], world.message("Accepted")) == ("True", "the spec is valid")


def test_a_claim_of_one_node_is_named_for_as_long_as_the_run_lasts() -> None:
    world = looked({"models": ["ReadWriteOnce"], "students": ["ReadWriteMany"]})
    told = "pods run on one node only, since ReadWriteOnce is all that models has; ReadWriteMany lets them spread"
    assert told in world.message("Accepted")
    world.claims = {}  # nobody asks again
    world.settle()
    assert told in world.message("Accepted")
    assert looked({"models": ["ReadWriteOnce"]}, **ALONE).message("Accepted") == "the spec is valid"


def test_claims_are_asked_for_at_the_beginning_of_a_run_only() -> None:
    obj = example(**BOTH)
    assert {"models", "students"} <= asked_for(obj)
    obj["status"] = {"observedGeneration": 1, "stageTimes": {"TeachersReady": {"startTime": "2026-01-01T00:00:00Z"}}}
    assert asked_for(obj) == set()
    obj["metadata"]["generation"] = 2
    assert {"models", "students"} <= asked_for(obj)
    assert asked_for(example(**BOTH, suspend=True)) == set()
    assert asked_for(example(model__uri="pvc://")) == set()  # no URI at all: the spec is refused


def test_teachers_that_are_trained_use_the_output_before_anybody_else() -> None:
    trained = {**BOTH, "teachers": teachers("geneval", "ocr")}
    world = looked({"students": ["ReadOnlyMany"]}, **trained)
    assert world.condition("TeachersTrained") == ("False", "UserError")
    assert not world.of("Job")
    alone = {**trained, **ALONE}
    assert looked({"students": ["ReadWriteOncePod"]}, **alone).jobs(names.TEACH), "one pod after the other"
    two = looked({"students": ["ReadWriteOncePod"]}, **alone, runPolicy={"parallelTeachers": 2})
    assert "several pods use it at once" in two.message("Failed")
    begun = looked({}, **trained)
    assert asked_for(begun.obj) == set()


def test_a_bound_claim_has_what_its_volume_has() -> None:
    claim = {"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"accessModes": ["ReadWriteOnce", "ReadWriteMany"]}}
    assert modes(claim) == ["ReadWriteOnce", "ReadWriteMany"]
    assert modes({"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Pending"}}) == ["ReadWriteOnce"]


def test_a_real_claim_that_cannot_be_written_is_told_at_once(api: Api, operator: Operator) -> None:
    claims = f"/api/v1/namespaces/{api.namespace}/persistentvolumeclaims"
    spec = {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}}
    api.call("POST", claims, {"metadata": {"name": "students"}, "spec": spec})
    api.submit(student__output={"uri": "pvc://students/tiny"})
    api.until("Failed", "True", "UserError")
    quiet(api)
    assert not api.find("pods")
    assert not api.find("deployments")
