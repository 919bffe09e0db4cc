"""What is applied and what is deleted: no write for what the API server adds, no drift that goes unseen."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opd_operator.diff import changes, differs


def manifest(kind: str = "Service", name: str = "a", **spec: Any) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": name}, "spec": spec}


def live(kind: str = "Service", name: str = "a", **spec: Any) -> dict[str, Any]:
    """As the API server has it, with what it adds."""
    metadata = {"name": name, "uid": "u", "resourceVersion": "7", "generation": 1}
    if kind == "Job":
        spec.setdefault("template", {"spec": {}})
    return {"kind": kind, "metadata": metadata, "spec": {"defaulted": True, **spec}, "status": {}}


def decided(*arguments: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """What is applied, and what is deleted before or after it."""
    due = changes(*arguments, **options)
    return due.apply, [*due.free, *due.sweep]


def leaving(child: dict[str, Any]) -> dict[str, Any]:
    child["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return child


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        pytest.param({"a": 1}, {"a": 1, "terminationMessagePath": "/dev/termination-log"}, id="a default is added"),
        pytest.param({"ports": [{"port": 1}]}, {"ports": [{"port": 1, "nodePort": 0}]}, id="a default within a list"),
        pytest.param({"cpu": "1000m"}, {"cpu": "1"}, id="1000m is 1"),
        pytest.param({"memory": "1024Mi"}, {"memory": "1Gi"}, id="1024Mi is 1Gi"),
        pytest.param({"cpu": "0.5"}, {"cpu": "500m"}, id="0.5 is 500m"),
        pytest.param({"emptyDir": {}}, {"emptyDir": {}}, id="an empty mapping stays"),
        pytest.param({"selector": {}}, {}, id="an empty mapping is dropped"),
        pytest.param({"args": []}, {}, id="an empty list is dropped"),
        pytest.param({"value": ""}, {}, id="an empty text is dropped"),
        pytest.param({"readOnly": False}, {}, id="false is dropped"),
        pytest.param({"replicas": 0}, {}, id="zero is dropped"),
    ],
)
def test_what_the_api_server_does_to_an_object_is_no_difference(wanted: Any, found: Any) -> None:
    assert not differs(wanted, found)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        pytest.param({"a": 1}, {"a": 2}, id="another number"),
        pytest.param({"a": {"b": "x"}}, {"a": {"b": "y"}}, id="another text within"),
        pytest.param({"a": {"b": 1}}, {}, id="a mapping is missing"),
        pytest.param({"a": {"b": 1}}, {"a": "text"}, id="a mapping became text"),
        pytest.param({"args": ["a", "b"]}, {"args": ["b", "a"]}, id="another order"),
        pytest.param({"args": ["a"]}, {"args": ["a", "b"]}, id="a list grew"),
        pytest.param({"args": ["a"]}, {}, id="a list is missing"),
        pytest.param({"args": []}, {"args": ["a"]}, id="a list should be empty"),
        pytest.param({"cpu": "1"}, {"cpu": "2"}, id="another quantity"),
        pytest.param({"cpu": "1"}, {"cpu": "1Gi"}, id="another suffix"),
        pytest.param({"replicas": 0}, {"replicas": 3}, id="scaled by hand"),
        pytest.param({"readOnly": False}, {"readOnly": True}, id="switched by hand"),
        pytest.param({"labels": {}}, {"labels": {"a": "b"}}, id="labels should be empty"),
        pytest.param({"value": "true"}, {"value": True}, id="text is not a truth value"),
        pytest.param({"name": "5"}, {"name": "x5"}, id="a text that no quantity is"),
    ],
)
def test_what_others_do_to_an_object_is_a_difference(wanted: Any, found: Any) -> None:
    assert differs(wanted, found)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab1", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner),
    max_leaves=12,
)


@given(PLAIN)
def test_an_object_never_differs_from_itself(value: Any) -> None:
    assert not differs(value, copy.deepcopy(value))


@given(
    st.dictionaries(st.text("xyz", min_size=1, max_size=2), PLAIN, min_size=1),
    st.dictionaries(st.text("pq", min_size=1), PLAIN),
)
def test_further_fields_are_no_difference(value: dict[str, Any], added: dict[str, Any]) -> None:
    assert not differs(value, {**copy.deepcopy(value), **added})


def test_a_child_that_is_missing_is_applied_and_one_that_is_right_is_left_alone() -> None:
    wanted = [manifest(name="a", port=1), manifest(name="b", port=2)]
    assert decided(wanted, [live(name="a", port=1)]) == ([wanted[1]], [])


def test_a_child_that_was_edited_is_applied_again() -> None:
    """It, and no other of its name: whoever made that owns it."""
    wanted = manifest(port=1)
    (applied,), swept = decided([wanted], [live(port=2)])
    assert applied == {**wanted, "metadata": {**wanted["metadata"], "uid": "u"}}
    assert not swept


def test_what_applying_would_make_again_is_left_alone() -> None:
    wanted, found = manifest(port=1), live(port=2)
    assert decided([wanted], [found], settled=lambda one, other: (one, other) == (wanted, found)) == ([], [])


def test_a_child_that_nobody_wants_is_deleted() -> None:
    child = live(name="old")
    assert decided([], [child]) == ([], [child])


def test_the_same_name_of_another_kind_is_another_object() -> None:
    wanted, child = manifest("Service"), live("Deployment")
    assert decided([wanted], [child]) == ([wanted], [child])


@pytest.mark.parametrize("kind", ["Job", "ConfigMap"])
def test_what_is_immutable_is_made_once_and_never_applied_again(kind: str) -> None:
    wanted = manifest(kind, image="new")
    assert decided([wanted], []) == ([wanted], [])
    assert decided([wanted], [live(kind, image="old")]) == ([], [])


@pytest.mark.parametrize("kind", ["Job", "Deployment"])
def test_a_child_that_is_leaving_is_waited_for(kind: str) -> None:
    gone = leaving(live(kind, port=2))
    assert decided([manifest(kind, port=1)], [gone]) == ([], [])
    assert decided([], [gone]) == ([], [])


def test_finished_jobs_that_are_kept_are_not_deleted_but_other_kinds_of_that_name_are() -> None:
    job, service = live("Job", "kept"), live("Service", "kept")
    assert decided([], [job, service], keep=[("Job", "kept")]) == ([], [service])


def test_pods_are_left_to_their_jobs_and_deployments() -> None:
    assert decided([], [live("Pod")]) == ([], [])


def test_what_pods_mount_goes_after_what_mounts_it_is_replaced() -> None:
    job, config, account = live("Job", "old"), live("ConfigMap", "old"), live("ServiceAccount", "old")
    job["spec"]["template"] = {"spec": {}}
    due = changes([manifest("Deployment", "new")], [config, account, job])
    assert (due.free, due.sweep) == ([job], [config, account])
    assert [each["kind"] for each in due.apply] == ["Deployment"]


@pytest.mark.parametrize("kept", [{"keep": [("Job", "a")]}, {"desired": [manifest("Job", "a")]}])
def test_a_spec_stays_as_long_as_a_job_mounts_it(kept: dict[str, Any]) -> None:
    job, spec, other = live("Job", "a"), live("ConfigMap", "a-spec-1"), live("ConfigMap", "a-spec-0")
    job["spec"]["template"] = {"spec": {"volumes": [{"emptyDir": {}}, {"configMap": {"name": "a-spec-1"}}]}}
    due = changes(kept.get("desired", []), [job, spec, other], keep=kept.get("keep", []))
    assert (due.free, due.sweep) == ([], [other])
