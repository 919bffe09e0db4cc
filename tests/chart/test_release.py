"""A release's life on a real API server: install, upgrade, uninstall, install again. No pod runs here."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster.control_plane import ControlPlane, control_plane
from helm_chart import CHART, helm

NAMESPACE = "opd-system"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def own() -> Iterator[ControlPlane]:
    """One for these tests alone: a release brings the type for the whole cluster."""
    with control_plane() as running:
        yield running


@pytest.fixture
def cluster(own: ControlPlane) -> Iterator[ControlPlane]:
    """Without release and type at the beginning of each test."""
    yield own
    place = ("--kubeconfig", own.kubeconfig, "--namespace", NAMESPACE)
    for name in helm("list", "--short", *place).stdout.split():
        helm("uninstall", name, *place)
    own.kubectl("delete", "crd", "--all")


@pytest.fixture
def release(cluster: ControlPlane) -> Run:
    """Helm on that cluster, in one namespace."""

    def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return helm("--kubeconfig", cluster.kubeconfig, "--namespace", NAMESPACE, *arguments)

    return run


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The chart as it might have been: a version below, a type that lacks a field, an operator with fewer rights."""
    chart = Path(shutil.copytree(CHART, tmp_path / "older"))
    for file, pattern, replacement in (
        ("Chart.yaml", r"^version: .*$", "version: 0.0.9"),
        ("templates/_helpers.tpl", r"^- apiGroups: \[policy\]\n.*\n.*\n", ""),
    ):
        text, count = re.subn(pattern, replacement, (chart / file).read_text(), flags=re.M)
        assert count == 1
        (chart / file).write_text(text)
    crd = yaml.safe_load((CHART / "files" / "opd.dev_opddistillations.yaml").read_text())
    del spec_fields(crd)["suspend"]
    (chart / "files" / "opd.dev_opddistillations.yaml").write_text(yaml.safe_dump(crd, sort_keys=False))
    return chart


def spec_fields(crd: dict[str, Any]) -> dict[str, Any]:
    (version,) = crd["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]


def done(result: "subprocess.CompletedProcess[str]") -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def eventually(ask: Callable[[], str]) -> str:
    """What `ask` says once the API server knows of a type that has just come."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return ask()
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_a_release_and_its_distillations_through_their_lives(
    cluster: ControlPlane, release: Run, older: Path, repository: Path
) -> None:
    done(release("install", "diffusion-opd", older, "--create-namespace"))
    example = repository / "examples" / "tiny" / "distill.yaml"
    eventually(lambda: cluster.kubectl("apply", "-f", example))
    before = json.loads(cluster.kubectl("get", "opd", "-o", "json"))["items"]
    assert len(before) == 1

    done(release("upgrade", "diffusion-opd", CHART))
    assert "suspend" in spec_fields(json.loads(cluster.kubectl("get", "crd/opddistillations.opd.dev", "-o", "json"))), (
        "the type is not upgraded"
    )
    rules = json.loads(cluster.kubectl("get", "clusterrole/diffusion-opd", "-o", "json"))["rules"]
    assert any(rule["apiGroups"] == ["policy"] for rule in rules)

    done(release("uninstall", "diffusion-opd"))
    assert cluster.kubectl(
        "get", "deployments,services,roles,serviceaccounts", "-n", NAMESPACE, "-o", "name"
    ).split() == ["serviceaccount/default"]
    after = json.loads(cluster.kubectl("get", "opd", "-o", "json"))["items"]
    assert [each["spec"] for each in after] == [{**each["spec"], "suspend": False} for each in before]

    done(release("install", "diffusion-opd", CHART))
    assert cluster.kubectl("get", "opd", "-o", "name") == f"opddistillation.opd.dev/{after[0]['metadata']['name']}\n"


def test_the_notes_name_what_is_there(cluster: ControlPlane, release: Run) -> None:
    said = done(release("install", "mine", CHART, "--create-namespace"))
    commands = re.findall(r"^  (kubectl .*)$", said, re.M)
    assert len(commands) == 7
    (deployment,) = re.findall(r"rollout status (\S+)", said)
    cluster.kubectl("get", deployment, "-n", NAMESPACE)
    assert f"helm -n {NAMESPACE} test mine" in said
    assert "opd.dev" in eventually(lambda: cluster.kubectl("explain", "opd.spec"))
    (crd,) = re.findall(r"kubectl delete crd (\S+)", said)
    cluster.kubectl("get", "crd", crd)


def test_a_type_of_somebody_else_is_refused_until_the_release_may_take_it(
    cluster: ControlPlane, release: Run, repository: Path
) -> None:
    cluster.kubectl("apply", "--server-side", "-f", repository / "crds")
    refused = release("install", "diffusion-opd", CHART, "--create-namespace")
    assert refused.returncode != 0
    assert "invalid ownership metadata" in refused.stderr
    done(release("install", "without", CHART, "--create-namespace", "--set", "crds.install=false"))
    done(release("install", "diffusion-opd", CHART, "--take-ownership"))
    done(release("upgrade", "diffusion-opd", CHART))
