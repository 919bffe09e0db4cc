"""YAML in the pages is what its reader takes it for: objects for the API server, values of the chart, a part of a pod."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from devcluster.control_plane import ControlPlane
from helm_chart import CHART, REPOSITORY, helm
from opd_core.api.pod import Pod

NAMESPACES = ("research", "argocd")


def blocks(wanted: str) -> Iterator[tuple[str, str]]:
    """(page, text) of the YAML in docs/: objects, values, or a pod."""
    for file in sorted((REPOSITORY / "docs").glob("*.md")):
        for text in re.findall(r"```ya?ml\n(.*?)```", file.read_text(), re.S):
            first = next(yaml.safe_load_all(text))
            kind = "objects" if "kind" in first else "values" if text.startswith("# my-values.yaml") else "rest"
            if kind == "rest" and set(first) <= {field.alias for field in Pod.model_fields.values()}:
                kind = "pod"
            if kind == wanted:
                yield file.name, text


OBJECTS, VALUES, PODS = (list(blocks(kind)) for kind in ("objects", "values", "pod"))


def test_there_is_some_of_each() -> None:
    assert len(OBJECTS) >= 3
    assert len(VALUES) >= 2
    assert len(PODS) >= 3


@pytest.mark.parametrize(("page", "text"), OBJECTS)
def test_the_api_server_takes_objects(control_plane: ControlPlane, page: str, text: str) -> None:
    present = control_plane.kubectl("get", "namespaces", "-o", "jsonpath={.items[*].metadata.name}").split()
    for namespace in set(NAMESPACES) - set(present):
        control_plane.kubectl("create", "namespace", namespace)
    control_plane.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)


@pytest.mark.parametrize(("page", "text"), VALUES)
def test_the_chart_takes_values(page: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "my-values.yaml"
    file.write_text(text)
    done = helm("template", "diffusion-opd", CHART, "--values", file)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "text"), PODS)
def test_a_pod_of_a_spec_takes_the_rest(page: str, text: str) -> None:
    Pod.model_validate(yaml.safe_load(text))
