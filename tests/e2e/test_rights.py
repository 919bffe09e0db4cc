"""Once everything has happened: what the operator's role grants, and what the audit log shows of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from devcluster import node

from .kit import SYSTEM, audit, refusals

Right = tuple[str, str, str]  # API group, resource, verb

# Asked by admission, not by a request: who sets blockOwnerDeletion must be allowed to finalize the owner. The API
# server of these tests enforces it, so without this right no child could be made.
BY_ADMISSION: set[Right] = {("opd.dev", "opddistillations/finalizers", "update")}


def granted(cluster: node.Node) -> set[Right]:
    role = json.loads(cluster.kubectl("get", "clusterrole", "diffusion-opd", "-o", "json"))
    leader = json.loads(cluster.kubectl("-n", SYSTEM, "get", "role", "diffusion-opd-leader", "-o", "json"))
    return {
        (group, resource, verb)
        for rule in (*role["rules"], *leader["rules"])
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def used(lines: list[dict[str, Any]]) -> set[Right]:
    found = set()
    for line in lines:
        ref = line.get("objectRef", {})
        if not ref.get("resource"):
            continue  # discovery
        resource = "/".join(part for part in (ref["resource"], ref.get("subresource")) if part)
        found.add((ref.get("apiGroup", ""), resource, line["verb"]))
        if line["verb"] == "patch" and line["responseStatus"]["code"] == 201:
            found.add((ref.get("apiGroup", ""), resource, "create"))  # server-side apply of what was not there
    return found


@pytest.mark.last
def test_every_right_is_used_and_no_request_was_refused(
    cluster: node.Node, operator: str, request: pytest.FixtureRequest
) -> None:
    lines = audit(cluster)
    assert not refusals(cluster)
    assert used(lines) <= granted(cluster)
    config = request.config
    if not config.option.keyword and [Path(argument).name for argument in config.args] == ["e2e"]:  # the whole run
        assert granted(cluster) - used(lines) == BY_ADMISSION


@pytest.mark.last
def test_no_workload_had_a_token(cluster: node.Node, operator: str) -> None:
    """Nobody but the operator and the cluster's own programs has spoken to the API server from a pod."""
    users = {
        json.loads(line)["user"].get("username", "")
        for line in cluster.audit_log.read_text().splitlines()
        if line.strip()
    }
    accounts = {user for user in users if user.startswith("system:serviceaccount:")}
    assert {user for user in accounts if "-workload" in user or user.startswith("system:serviceaccount:e2e-")} == set()
