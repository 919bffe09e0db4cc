"""The operator with the rights of a namespaced release: no request is refused, and other namespaces are out of reach."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from devcluster.control_plane import ControlPlane, build

from tests.operator.live import REPOSITORY, Api, Operator, quiet, to_student, wait_for


@pytest.fixture
def kubeconfig(control_plane: ControlPlane, api: Api, tmp_path: Path) -> Path:
    """Of the service account that the chart makes when it may watch one namespace only."""
    command = [
        build("helm") / "helm",
        "template",
        "own",
        REPOSITORY / "charts" / "diffusion-opd",
        "--namespace",
        api.namespace,
    ]
    values = [f"--set=watchNamespaces={{{api.namespace}}}", "--set=crds.install=false"]
    rendered = subprocess.run([*command, *values], capture_output=True, text=True, check=True).stdout
    kinds = {"ServiceAccount", "Role", "RoleBinding"}
    for document in yaml.safe_load_all(rendered):
        if document and document["kind"] in kinds:
            control_plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(document))
    token = control_plane.kubectl("-n", api.namespace, "create", "token", "own-diffusion-opd").strip()
    config = yaml.safe_load(control_plane.kubeconfig.read_text())
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    file = tmp_path / "namespaced.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return file


def test_a_life_with_the_rights_of_one_namespace(api: Api, start: Callable[..., Operator], kubeconfig: Path) -> None:
    operator = start(api, f"--lease-namespace={api.namespace}", "--lease-name=own-diffusion-opd")
    operator.kill()
    operator.kubeconfig = kubeconfig
    operator.start().ready()
    api.submit(endpoint__replicas=2)
    to_student(api)
    api.run("endpoint", 2)
    api.until("Ready", "True")
    quiet(api)
    api.delete("opddistillations", "tiny")

    def gone() -> bool:
        api.sweep()
        return not api.find("pods")

    wait_for(gone, "everything to go")
    user = f"system:serviceaccount:{api.namespace}:own-diffusion-opd"
    lines = [json.loads(line) for line in api.cluster.audit_log.read_text().splitlines()]
    ours = [line for line in lines if line["user"].get("username") == user]
    assert ours
    assert [line for line in ours if line["responseStatus"]["code"] == 403] == []
    foreign = {line["objectRef"].get("namespace") for line in ours if line.get("objectRef", {}).get("resource")}
    assert foreign == {api.namespace}


@pytest.mark.parametrize("what", ["secrets", "pods --namespace=kube-system", "nodes", "configmaps --all-namespaces"])
def test_what_it_may_not_do(api: Api, kubeconfig: Path, what: str) -> None:
    resource, *where = what.split()
    with pytest.raises(RuntimeError, match="no"):
        api.cluster.kubectl(
            "--kubeconfig", kubeconfig, "auth", "can-i", "list", resource, *(where or [f"--namespace={api.namespace}"])
        )
