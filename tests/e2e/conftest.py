"""A real one-node cluster with the project's images and chart: `make e2e`. Needs root; `make test` leaves it out."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster import images, node
from devcluster.control_plane import build

from .kit import SYSTEM, Namespace

NAME = "e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What replays the audit log comes after what fills it."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: runs after all other tests")


@pytest.fixture(scope="session")
def cluster(repository: Path) -> Iterator[node.Node]:
    """The cluster with the four images loaded."""
    with node.cluster(NAME) as running:
        for image in images.build(repository / "examples" / "tiny"):
            running.load(image)
        yield running


@pytest.fixture(scope="session")
def helm(cluster: node.Node) -> Callable[..., str]:
    """Helm for this cluster and the operator's namespace."""

    def run(*arguments: str | Path) -> str:
        command = [str(build("helm") / "helm"), "--kubeconfig", str(cluster.kubeconfig), "--namespace", SYSTEM]
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr or done.stdout
        return done.stdout

    return run


@pytest.fixture(scope="session")
def operator(helm: Callable[..., str], repository: Path) -> str:
    """The chart installed, which brings the CRD and the operator; the operator's namespace."""
    chart = repository / "charts" / "diffusion-opd"
    helm("install", "diffusion-opd", chart, "--create-namespace", "--set=device=cpu", "--wait", "--timeout=120s")
    return SYSTEM


@pytest.fixture(scope="session")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny world that the pods' user may read, whatever the modes in the working tree."""
    copy = tmp_path_factory.mktemp("world") / "tiny-world"
    return Path(shutil.copytree(tiny_world, copy, copy_function=shutil.copyfile))


@pytest.fixture
def namespace(cluster: node.Node, world: Path, tmp_path: Path) -> Iterator[Namespace]:
    """Deleted with everything in it at the end of the test."""
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    students = tmp_path / "students"
    students.mkdir()
    os.chown(students, images.USER, images.USER)
    cluster.kubectl("create", "namespace", name)
    try:
        cluster.make_claim("tiny-world", name, world)
        cluster.make_claim("students", name, students)
        yield Namespace(cluster, name, students)
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false")  # the volumes go with the cluster


@pytest.fixture
def example(repository: Path) -> dict[str, Any]:
    """`examples/tiny/distill.yaml`, shortened to minutes: few larger rounds at a constant learning rate, few prompts."""
    document: dict[str, Any] = yaml.safe_load((repository / "examples" / "tiny" / "distill.yaml").read_text())
    document["spec"]["training"].update(rounds=10, imagesPerTask=4, checkpoint={"everyRounds": 4, "keep": 2})
    document["spec"]["training"]["sampler"]["steps"] = 6
    document["spec"]["training"]["optimizer"] = {"learningRate": 4e-3}
    document["spec"]["evaluation"].update(promptsPerTask=16)
    document["spec"]["evaluation"]["gate"] = [{"task": "aesthetic", "reward": "tiny-aesthetic", "ofTeacher": 0.8}]
    return document


@pytest.fixture
def alone(example: dict[str, Any]) -> dict[str, Any]:
    """Teachers inside the trainer: one pod, quick to start."""
    example["spec"]["teacherServing"] = {"placement": "InProcess", "precision": "FP32"}
    example["spec"]["endpoint"]["enabled"] = False
    return example
