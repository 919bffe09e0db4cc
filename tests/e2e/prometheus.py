"""A real Prometheus with the scrape configuration of docs/monitoring.md and the chart's alerts.

Debian builds it without Kubernetes' service discovery, whose part is played here: a target for each port of each pod, with
the labels that the configuration's rules choose by.
"""

import json
import re
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from devcluster import node
from devcluster.control_plane import build
from monitoring.dashboards import queries
from opd_core.ports import free_ports

REPOSITORY = Path(__file__).parents[2]
ALERTS = REPOSITORY / "charts" / "diffusion-opd" / "files" / "alerts.yaml"
JOB = "diffusion-opd"


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url, self.began = url, time.time()

    def get(self, path: str, **parameters: str | float) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def ever(self, query: str) -> list[dict[str, Any]]:
        """The series that a query has had since the start."""
        found = self.get("api/v1/query_range", query=query, start=self.began, end=time.time(), step=2)
        series: list[dict[str, Any]] = found["result"]
        return series

    def silent_panels(self, namespace: str, name: str) -> set[str]:
        """Titles of what has never drawn anything for this distillation."""
        chosen = {"$namespace": namespace, "$name": name, "$job": JOB, "$__rate_interval": "20s"}
        return {
            title
            for title, query, _ in queries()
            if not self.ever(re.sub(r"\$\w+", lambda found: chosen[found[0]], query))
        }


@contextmanager
def prometheus(cluster: node.Node, folder: Path) -> Iterator[Prometheus]:
    page = (REPOSITORY / "docs" / "monitoring.md").read_text()
    (block,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", page, re.S)
    config = yaml.safe_load(block)
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["file_sd_configs"] = [{"files": [str(folder / "targets.json")], "refresh_interval": "1s"}]
    config |= {"global": {"scrape_interval": "2s", "evaluation_interval": "2s"}, "rule_files": [str(ALERTS)]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    command = [str(build("prometheus") / "prometheus"), *options, f"--web.listen-address=127.0.0.1:{port}"]
    done = threading.Event()
    discovery = threading.Thread(target=_discover, args=(cluster, folder / "targets.json", done))
    discovery.start()
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, folder / "prometheus.log")
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait()
        done.set()
        discovery.join()


def _discover(cluster: node.Node, file: Path, done: threading.Event) -> None:
    while not done.wait(2):
        pods = json.loads(cluster.kubectl("get", "pods", "--all-namespaces", "-o", "json"))["items"]
        targets = [target for pod in pods if pod["status"].get("podIP") for target in _targets(pod)]
        file.with_suffix(".partial").write_text(json.dumps(targets))
        file.with_suffix(".partial").rename(file)


def _targets(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    metadata = pod["metadata"]
    labels = {
        f"pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}": value for key, value in metadata.get("labels", {}).items()
    }
    labels |= {"namespace": metadata["namespace"], "pod_name": metadata["name"]}
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", []):
            meta = {**labels, "pod_container_port_name": port.get("name", "")}
            yield {
                "targets": [f"{pod['status']['podIP']}:{port['containerPort']}"],
                "labels": {f"__meta_kubernetes_{name}": value for name, value in meta.items()},
            }


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
