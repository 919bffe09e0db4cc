"""`opd` on a real node: what needs pods that run, logs and a copy out of a claim."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from opd_core.artifacts import read_student

from .conftest import Namespace

pytestmark = pytest.mark.timeout(1500)


def opd(namespace: Namespace, *arguments: str | Path, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "opd_cli.main", *map(str, arguments), "--namespace", namespace.name]
    return subprocess.run(
        [*command, "--kubeconfig", str(namespace.cluster.kubeconfig)],
        input=stdin, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def content(repository: Path) -> dict[str, Any]:
    """`examples/tiny/distill.yaml` with a few rounds, and a gate that asks for nothing."""
    document: dict[str, Any] = yaml.safe_load((repository / "examples" / "tiny" / "distill.yaml").read_text())
    document["spec"]["training"].update(rounds=12)
    gate = [{"task": "ocr", "reward": "tiny-ocr", "atLeast": 0.0}]
    document["spec"]["evaluation"].update(promptsPerTask=4, gate=gate)
    return document


def test_from_submit_to_a_copy_of_the_student(
    namespace: Namespace, operator: str, content: dict[str, Any], tmp_path: Path
) -> None:
    name = content["metadata"]["name"]
    done = opd(namespace, "submit", "-", stdin=json.dumps(content))
    assert (done.returncode, done.stderr) == (0, "")

    done = opd(namespace, "logs", "trainer", name, "-f")
    assert done.returncode == 0, done.stderr
    assert "student sha256:" in done.stdout, done.stdout
    assert f"{name} has no pod of role trainer" in done.stderr, "it has said what it waited for"

    done = opd(namespace, "status", name, "-w")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed its gate" in done.stdout
    assert "student sha256:" in opd(namespace, "logs", "trainer", name).stdout, "a finished trainer keeps its log"
    assert opd(namespace, "logs", "endpoint", name).returncode == 0

    target = tmp_path / "student"
    done = opd(namespace, "get-student", name, "-o", target)
    assert done.returncode == 0, done.stderr
    manifest, _ = read_student(target)
    status = json.loads(opd(namespace, "status", name, "-o", "json").stdout)["status"]
    assert manifest.digest == status["student"]["digest"]

    assert "Pod/" in opd(namespace, "events", name).stdout
    done = opd(namespace, "delete", name, "--wait", "--timeout=5m")
    assert done.returncode == 0, done.stderr
    assert not json.loads(namespace.kubectl("get", "pods", "-o", "json"))["items"]
