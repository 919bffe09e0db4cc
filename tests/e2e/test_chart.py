"""The chart on a real node: its own test, and an upgrade to two replicas and back."""

import json
from collections.abc import Callable
from pathlib import Path

from devcluster import node

from .kit import SYSTEM


def test_helms_own_test_of_the_release(helm: Callable[..., str], operator: str) -> None:
    assert "Succeeded" in helm("test", "diffusion-opd", "--timeout=120s")


def test_an_upgrade_to_two_replicas_and_back(
    helm: Callable[..., str], operator: str, repository: Path, cluster: node.Node
) -> None:
    chart = repository / "charts" / "diffusion-opd"
    try:
        values = chart / "ci" / "ha-values.yaml"
        helm("upgrade", "diffusion-opd", chart, "--values", values, "--set=device=cpu", "--wait", "--timeout=180s")
        pods = json.loads(
            cluster.kubectl("-n", SYSTEM, "get", "pods", "-l", "app.kubernetes.io/component=operator", "-o", "json")
        )
        staying = [pod for pod in pods["items"] if "deletionTimestamp" not in pod["metadata"]]
        assert [pod["status"]["phase"] for pod in staying] == ["Running", "Running"]
    finally:
        helm("rollback", "diffusion-opd", "--wait", "--timeout=180s")
