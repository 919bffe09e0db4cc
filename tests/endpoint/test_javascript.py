"""The official client for JavaScript, in node."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from opd_serving.endpoint.engine import Limits
from opd_serving.endpoint.server import make_service

from tests.endpoint.conftest import running, wait_until

PROGRAM = Path(__file__).parent / "javascript"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program beside the client in its pinned version."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not on the PATH")
    folder = Path(shutil.copytree(PROGRAM, tmp_path_factory.mktemp("javascript") / "program"))
    npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(npm, cwd=folder, check=True, capture_output=True, timeout=120)
    return folder / "client.mjs"


def test_the_client_for_javascript_gets_what_the_one_for_python_gets(program, settings):
    with running(make_service(dataclasses.replace(settings, limits=Limits(4, 12)))) as endpoint:
        done = subprocess.run(
            ["node", program, f"{endpoint.url}/v1"], capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
        wait_until(lambda: endpoint.metric('opd_endpoint_cancelled_total{reason="disconnect"}') == 1)
        said = json.loads(done.stdout)
        assert endpoint.metric('opd_endpoint_rejected_total{reason="queue_full"}') >= 1
    assert said == {
        "retrieved": True,
        "seeds": [7, 8],
        "size": "32x16",
        "signatures": ["PNG", "PNG"],
        "named": True,
        "size_refused": {"kind": "BadRequestError", "status": 400, "code": "invalid_value", "param": "size"},
        "model_refused": {"kind": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"},
        "aborted": "APIUserAbortError",
        "burst": list(range(24)),
    }
