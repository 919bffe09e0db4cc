"""The images as the operator runs them: another user, a read-only root, no capability, no network but the cluster's."""

import json
import time
from collections.abc import Sequence

import pytest

from .conftest import Namespace

IMAGES = ("operator", "trainer", "teacher", "endpoint")


def test_the_trainers_image_trains(namespace: Namespace) -> None:
    code = "import torch, deepspeed, diffusers, opd_trainer; print((torch.ones(2, 2) @ torch.ones(2, 2)).sum().item())"
    assert run(namespace, "trainer", ["-c", code]).splitlines()[-1] == "8.0"


def test_the_tiny_rewards_are_entry_points(namespace: Namespace) -> None:
    code = (
        "from importlib.metadata import entry_points as e;"
        "print(sorted(x.load().__module__ for x in e(group='diffusion_opd.rewards') if x.name.startswith('tiny')))"
    )
    assert run(namespace, "trainer", ["-c", code]).strip() == str(["opd_tiny.rewards"] * 3)


def test_tritonserver_is_found_without_network(namespace: Namespace) -> None:
    assert run(namespace, "teacher", ["-m", "opd_serving.teacher.server_binary"]).strip().endswith("bin/tritonserver")


def test_the_operators_image_has_no_torch(namespace: Namespace) -> None:
    code = "import importlib.util as u, opd_operator, kubernetes; print(u.find_spec('torch'))"
    assert run(namespace, "operator", ["-c", code]).strip() == "None"


@pytest.mark.parametrize("image", IMAGES)
def test_it_runs_as_nobody_with_compiled_modules(namespace: Namespace, image: str) -> None:
    code = "import os, getpass, opd_core; print(os.getuid(), getpass.getuser(), os.path.exists(opd_core.__cached__))"
    assert run(namespace, image, ["-c", code]).strip() == "65532 nonroot True"


def run(namespace: Namespace, image: str, arguments: Sequence[str]) -> str:
    """Log of a pod that runs Python in `image` and ended well."""
    name = f"{image}-{time.monotonic_ns()}"
    restricted = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    container = {
        "name": "python",
        "image": f"diffusion-opd/{image}:0.1.0",
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", *arguments],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": restricted,
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }
    namespace.kubectl("create", "-f", "-", stdin=json.dumps(pod))
    deadline = time.monotonic() + 120
    phase = ""
    while phase not in ("Succeeded", "Failed") and time.monotonic() < deadline:
        phase = namespace.kubectl("get", "pod", name, "-o", "jsonpath={.status.phase}")
        time.sleep(0.2)
    log = namespace.kubectl("logs", name)
    assert phase == "Succeeded", log
    return log
