"""Fixtures that every part shares."""

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

# Before torch is imported anywhere: several processes compute at once in these tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from devcluster.control_plane import ControlPlane
from devcluster.control_plane import control_plane as run_control_plane

from tests.whole_teacher import fuse

REPOSITORY = Path(__file__).parents[1]

torch.set_num_threads(1)

# A shell ignores SIGINT in what it starts in the background, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Folders of the longest files, so that no worker has one left when the other has nothing. Those that need a control
# plane are late: each worker has its own, which takes time from the others even while it idles.
LONGEST = ("runner", "teacher", "trainer", "families", "endpoint", "evaluation", "operator")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: folders.get(item.path.parent.name, len(folders)))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_world() -> Path:
    """The folder behind the claim `tiny-world`: base/, teachers/, prompts/."""
    return REPOSITORY / "examples" / "tiny" / "tiny-world"


@pytest.fixture(scope="session")
def tiny_base(tiny_world: Path) -> Path:
    return tiny_world / "base"


@pytest.fixture(scope="session")
def tiny_claims(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A claims folder in which `pvc://tiny-world/...` resolves."""
    claims = tmp_path_factory.mktemp("claims")
    (claims / "tiny-world").symlink_to(tiny_world)
    return claims


@pytest.fixture(scope="session")
def whole_claims(tiny_world: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and `pvc://models/ocr`: the tiny world's ocr teacher as a model of its own."""
    claims = tmp_path_factory.mktemp("claims-with-a-model")
    (claims / "tiny-world").symlink_to(tiny_world)
    fuse(tiny_base, tiny_world / "teachers" / "ocr", claims / "models" / "ocr")
    return claims


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that gives a TCP port which nobody listens on, and of those that no client is given meanwhile."""

    def find() -> int:
        while True:
            port = random.SystemRandom().randrange(10_000, 32_000)  # Linux gives clients 32768 and more
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("", port))
                return port

    return find


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """A real etcd, API server and controller manager that know our type, shared by all tests: use a namespace of your own."""
    with run_control_plane(crds=[REPOSITORY / "crds" / "opd.dev_opddistillations.yaml"]) as running:
        yield running
