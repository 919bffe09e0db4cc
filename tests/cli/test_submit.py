"""`opd submit`: checked here, checked there, and then one object that is as the file says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from opd_cli.cluster import Distillations, RejectedError
from opd_core.exit_codes import ExitCode

from tests.cli.conftest import NAME, Done, say
from tests.operator.live import Api

Opd = Callable[..., Done]


@pytest.fixture
def content(example: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(example.read_text())
    return document


def test_created_configured_unchanged(opd: Opd, api: Api, example: Path, content: dict[str, Any]) -> None:
    first = opd("submit", example)
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith(f"opd/{NAME} created in namespace {api.namespace}\n")
    assert f"opd status {NAME} -w -n {api.namespace}" in first.out
    say(api, NAME)  # what the operator writes is no change of the spec
    assert f"opd/{NAME} unchanged" in opd("submit", example).out
    content["spec"]["endpoint"]["replicas"] = 2
    assert f"opd/{NAME} configured" in opd("submit", "-", stdin=json.dumps(content)).out
    assert api.get(NAME)["spec"]["endpoint"]["replicas"] == 2
    assert f"opd/{NAME} configured" in opd("submit", example).out, "what is left out falls back to its default"
    assert api.get(NAME)["spec"]["endpoint"]["replicas"] == 1


def test_only_what_the_file_says_is_ours(opd: Opd, api: Api, content: dict[str, Any]) -> None:
    opd("submit", "-", stdin=json.dumps(content))
    (entry,) = api.get(NAME)["metadata"]["managedFields"]
    assert (entry["manager"], entry["operation"]) == ("opd-cli", "Apply")
    assert set(entry["fieldsV1"]["f:spec"]) == {f"f:{key}" for key in content["spec"]}
    assert "f:suspend" not in entry["fieldsV1"]["f:spec"]


def test_problems_are_told_all_at_once_before_anything_is_sent(opd: Opd, content: dict[str, Any]) -> None:
    content["spec"]["training"]["rounds"] = 0
    content["spec"]["model"]["uri"] = "x"
    done = opd("submit", "-", stdin=json.dumps(content))
    assert done.code == ExitCode.INVALID
    assert "standard input: 2 problems" in done.err
    assert "spec.training.rounds" in done.err
    assert "spec.model.uri" in done.err


def test_what_only_the_api_server_knows_is_told_with_field_value_and_remedy(
    opd: Opd, api: Api, example: Path, content: dict[str, Any]
) -> None:
    opd("submit", example)
    say(api, NAME, run={"key": "k", "attempt": 1}, begun=True)
    content["spec"]["model"]["uri"] = "pvc://other/base"
    done = opd("submit", "-", stdin=json.dumps(content))
    assert done.code == ExitCode.INVALID
    assert done.err.splitlines() == [
        "error: the API server refuses it: 1 problem",
        "  spec.model.uri: a trainer has run, and students of this object are adapters of pvc://tiny-world/base "
        '(got "pvc://other/base"); write pvc://tiny-world/base, or make another object',
    ]


def test_a_dry_run_keeps_nothing(opd: Opd, api: Api, example: Path) -> None:
    done = opd("submit", example, "--dry-run")
    assert done.code == 0
    assert "created" in done.out
    assert "dry run" in done.out
    assert not api.find("opddistillations")


def test_options_that_mean_nothing_without_another_are_refused(opd: Opd, api: Api, example: Path) -> None:
    assert "--timeout limits --wait=CONDITION" in opd("submit", example, "--timeout=1s").err
    assert "leave --wait out" in opd("submit", example, "--dry-run", "--wait=Ready").err
    assert "--timeout limits --wait" in opd("delete", "tiny", "--timeout=1s").err
    assert not api.find("opddistillations")


def test_a_field_of_somebody_else_is_taken_over_only_on_request(opd: Opd, api: Api, example: Path) -> None:
    opd("submit", example)
    rounds = api.get(NAME)["spec"]["training"]["rounds"]
    api.call(
        "PATCH", api.path("opddistillations", NAME) + "?fieldManager=autoscaler",
        {"spec": {"training": {"rounds": 77}}}, "application/merge-patch+json",
    )  # fmt: skip
    done = opd("submit", example)
    assert done.code == ExitCode.INVALID
    assert "1 field belongs to somebody else; leave it out of the file, or take it over" in done.err
    assert f"spec.training.rounds: set by autoscaler (77 there, {rounds} here)" in done.err
    assert "configured" in opd("submit", example, "--force-conflicts").out
    assert api.get(NAME)["spec"]["training"]["rounds"] == rounds


def test_what_suspend_and_resume_set_is_no_conflict(opd: Opd, api: Api, content: dict[str, Any]) -> None:
    content["spec"]["suspend"] = False
    opd("submit", "-", stdin=json.dumps(content))
    opd("suspend", NAME)
    assert "configured" in opd("submit", "-", stdin=json.dumps(content)).out
    assert api.get(NAME)["spec"]["suspend"] is False
    opd("suspend", NAME)
    del content["spec"]["suspend"]
    done = opd("submit", "-", stdin=json.dumps(content))
    assert f"opd resume {NAME}" in done.out, "a file that says nothing about it leaves it suspended, and that is told"


def test_an_exported_object_can_be_submitted_again(opd: Opd, api: Api, example: Path) -> None:
    api.cluster.kubectl("apply", "-n", api.namespace, "-f", example)
    exported = api.cluster.kubectl("get", "-n", api.namespace, f"opd/{NAME}", "-o", "yaml")
    assert "unchanged" in opd("submit", "-", stdin=exported).out


def test_the_namespace_is_the_options_or_the_files(opd: Opd, api: Api, content: dict[str, Any]) -> None:
    content["metadata"]["namespace"] = api.namespace
    assert f"in namespace {api.namespace}" in opd("submit", "-", stdin=json.dumps(content), namespace="").out
    done = opd("submit", "-", stdin=json.dumps(content), namespace="default")
    assert done.code == ExitCode.INVALID
    assert f"metadata.namespace is {api.namespace}, and this is namespace default" in done.err
    del content["metadata"]["namespace"]
    done = opd("submit", "-", stdin=json.dumps(content), namespace="nowhere")
    assert done.code == ExitCode.INVALID
    assert 'namespaces "nowhere" not found' in done.err


def test_the_object_as_json(opd: Opd, example: Path) -> None:
    printed = json.loads(opd("submit", example, "-o", "json").out)
    assert printed["metadata"]["name"] == NAME
    assert "managedFields" not in printed["metadata"]


def test_an_older_type_in_the_cluster_is_said_to_be_older(api: Api, cluster: Distillations) -> None:
    """As an API server answers whose type lacks a field of this release."""
    path = api.path("opddistillations", "tiny") + "?fieldManager=opd-cli"
    api.submit()
    with pytest.raises(RejectedError, match=r"spec.news: the type OPDDistillation .* is older than this opd"):
        cluster.connection.request(
            "PATCH", path.replace("?fieldManager=opd-cli", ""), {"fieldManager": "opd-cli"},
            {"apiVersion": "opd.dev/v1alpha1", "kind": "OPDDistillation", "spec": {"news": 1}},
            content_type="application/apply-patch+yaml",
        )  # fmt: skip
