"""An endpoint behind a real gateway: Traefik splits its traffic by the route's weights, and says when it does not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from devcluster import images, node

from .kit import Namespace, wait_until
from .load import Load, connect, image

pytestmark = pytest.mark.timeout(900)

HOST = "images.example.com"
ROUTE = {"gateway": "web", "gatewayNamespace": "gateways", "sectionName": "open", "hostnames": [HOST]}
BROKEN = """# Python runs this before a program: no image can be written any more.
from PIL import Image
Image.Image.save = None
"""


@pytest.fixture(scope="module")
def gateway(cluster: node.Node) -> Iterator[str]:
    """The address of Gateway `web`, for its host names."""
    cluster.load(images.build_traefik())
    manifest = Path(__file__).with_name("gateway.yaml")
    cluster.kubectl("apply", "-f", manifest)
    cluster.kubectl("wait", "-n", "gateways", "gateway/web", "--for=condition=Programmed", "--timeout=120s")
    yield "http://" + cluster.kubectl("get", "service", "web", "-n", "gateways", "-o", "jsonpath={.spec.clusterIP}")
    cluster.kubectl("delete", "-f", manifest, "--wait=false")


def weights(namespace: Namespace, name: str) -> list[int]:
    (rule,) = namespace.get(f"httproute/{name}-endpoint")["spec"]["rules"]
    return [backend["weight"] for backend in rule["backendRefs"]]


def test_a_canary_gets_its_weight_a_broken_one_goes_back_and_a_closed_gateway_is_told(
    namespace: Namespace, operator: str, gateway: str, alone: dict[str, Any]
) -> None:
    spec = alone["spec"]
    spec["training"].update(rounds=2, imagesPerTask=1)
    spec["evaluation"].update(promptsPerTask=1, gate=[])
    spec["endpoint"] = {"route": ROUTE, "rollout": {"steps": [50], "intervalSeconds": 20}}
    name = namespace.apply(alone)
    namespace.until(name, "Ready", "True", seconds=400)
    assert namespace.status(name)["endpoint"]["url"] == f"http://{HOST}"
    client = connect(gateway, {"Host": HOST})
    old = image(client, name, 1)
    assert old.startswith(b"\x89PNG")

    with Load(gateway, name, headers={"Host": HOST}) as load:
        wait_until(lambda: load.answered > 5, "the first answers")
        namespace.edit(name, training={"rounds": 3})
        wait_until(lambda: weights(namespace, name) == [50, 50], "half of the traffic", 400)
        wait_until(lambda: len({image(client, name, 1) for _ in range(4)}) == 2, "pictures of both students", 20)
        namespace.until(name, "Ready", "True", seconds=120)
        assert weights(namespace, name) == [100]
        wait_until(lambda: len(namespace.pods("endpoint")) == 1, "the end of the old student")
        answered = load.answered
        wait_until(lambda: load.answered > answered + 5, "answers of the new student")
    assert load.lost == []
    new = image(client, name, 1)
    assert new != old

    # A revision that answers its probes and fails on images: the one before it goes on serving.
    namespace.kubectl("create", "configmap", "broken", f"--from-literal=sitecustomize.py={BROKEN}")
    volumes, env = [{"mountPath": "/broken", "configMap": "broken"}], [{"name": "PYTHONPATH", "value": "/broken"}]
    with Load(gateway, name, headers={"Host": HOST}) as load:
        namespace.edit(name, endpoint={"pod": {"volumes": volumes, "env": env}})
        message = namespace.until(name, "Deployed", "False", "RolledBack", seconds=200)
        wait_until(lambda: weights(namespace, name) == [100], "all traffic to be the old revision's", 20)
    assert "requests failed" in message
    assert len(load.lost) >= 10
    assert all("Error code: 500" in lost for lost in load.lost), load.lost
    assert namespace.condition(name, "Serving")[0] == "True"
    wait_until(lambda: len(namespace.pods("endpoint")) == 1, "the end of the broken revision")
    assert {image(client, name, 1) for _ in range(4)} == {new}
    namespace.edit(name, endpoint={"pod": None})
    namespace.until(name, "Ready", "True")

    namespace.edit(name, endpoint={"route": {"sectionName": "closed"}})
    message = namespace.until(name, "Deployed", "False", "NotRouted")
    assert "Gateway web does not use" in message
    assert "NotAllowedByListeners" in message
    assert namespace.condition(name, "Serving")[:2] == ("False", "NotRouted")
    namespace.edit(name, endpoint={"route": {"sectionName": "open"}})
    namespace.until(name, "Ready", "True")

    def answers() -> bool:
        """Traefik accepts a route up to two seconds before it follows it."""
        try:
            return image(client, name, 1) != old
        except openai.NotFoundError:
            return False

    wait_until(answers, "the open listener", 10)
