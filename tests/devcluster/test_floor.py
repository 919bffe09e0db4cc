"""The oldest Kubernetes that we name takes our type: its own library says so, and nobody names another one."""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster.control_plane import build
from opd_core.api import cel_rule, crd
from opd_core.api.sentences import QUANTITY_PATTERN


@pytest.fixture(scope="module")
def crdcheck() -> Path:
    return build("crdcheck") / "crdcheck"


def check(crdcheck: Path, file: Path) -> str:
    """Why the oldest Kubernetes refuses a type; empty if it takes it."""
    done = subprocess.run([crdcheck, file], capture_output=True, text=True, check=False)
    assert bool(done.returncode) == bool(done.stderr), done
    return done.stderr


def test_it_takes_the_type(crdcheck: Path, repository: Path) -> None:
    assert check(crdcheck, repository / crd.FILE) == ""


def test_it_refuses_what_is_too_dear_there(crdcheck: Path, tmp_path: Path) -> None:
    """A pattern over a quantity, whose maxLength it does not count."""
    content: dict[str, Any] = copy.deepcopy(crd.crd())
    node = content["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for part in ("spec", "training", "pod", "resources", "limits"):
        node = node["properties"][part]
    node["additionalProperties"]["x-kubernetes-validations"] = [{"rule": cel_rule.pattern(QUANTITY_PATTERN)["rule"]}]
    file = tmp_path / "crd.yaml"
    file.write_text(yaml.safe_dump(content))
    said = check(crdcheck, file)
    assert "properties[limits].additionalProperties" in said
    assert "estimated rule cost exceeds budget" in said


def test_everybody_names_the_same_version(repository: Path) -> None:
    library = (repository / "tools" / "devcluster" / "crdcheck" / "go.mod").read_text()
    (minor,) = re.findall(r"k8s\.io/apiextensions-apiserver v0\.(\d+)\.", library)
    chart = yaml.safe_load((repository / "charts" / "diffusion-opd" / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">=1.{minor}.0-0"
    for page in ("docs/install.md", "charts/diffusion-opd/README.md"):
        assert re.findall(r"Kubernetes (1\.\d+) or newer", (repository / page).read_text()) == [f"1.{minor}"], page
