"""Where a server in a pod is reached, on clusters of either family and of both."""

import dataclasses
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import torch
from opd_core.ports import EVERYWHERE, in_url
from opd_core.roles import POD_IP
from opd_core.teachers.grpc_client import connect

from tests import ipv4_only
from tests.teacher.conftest import QUICK


def in_pod(server, *wrapper: str, ip: str = ""):
    argv = [argument.replace("--host=127.0.0.1", f"--host={EVERYWHERE}") for argument in server.recipe.argv]
    env = {**server.recipe.env, **({POD_IP: ip} if ip else {})}
    server.recipe = dataclasses.replace(server.recipe, argv=(*wrapper, *argv), env=env)
    return server


def scraped(host: str, server, port: str) -> bool:
    """Whether a page answers; `port`: of metrics or http."""
    path = {"metrics": "metrics", "http": "v2/health/live"}[port]
    try:
        with urllib.request.urlopen(f"http://{in_url(host)}:{server.ports[port]}/{path}", timeout=5) as page:
            return page.status == 200
    except urllib.error.URLError:
        return False


def test_teachers_and_metrics_are_where_the_pod_is_and_the_http_api_stays_inside(make_server, rows):
    """Triton's HTTP servers take one family only: that of the pod's own address."""
    both = in_pod(make_server("ocr"), ip="fd00::7")
    ipv4 = in_pod(make_server("ocr"), *ipv4_only.COMMAND)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda server: server.start(), (both, ipv4)))  # the probe asks 127.0.0.1
    answers = []
    for host, server in (("::1", both), ("127.0.0.1", both), ("127.0.0.1", ipv4)):
        client = connect([f"{in_url(host)}:{server.ports['grpc']}"], QUICK)
        answers.append(rows[:1].ask(client, "ocr").result())
        client.close()
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert scraped("::1", both, "metrics")
    assert scraped("127.0.0.1", ipv4, "metrics")
    assert scraped("127.0.0.2", ipv4, "metrics")  # every address of the machine ...
    assert not scraped("127.0.0.2", ipv4, "http")  # ... but nobody's from outside
    assert not scraped("::1", both, "http")
