"""A proxy before the API server."""

from pathlib import Path

import yaml
from devcluster.control_plane import Cluster

from tests.tcp_proxy import TcpProxy


class Proxy(TcpProxy):
    """`kubeconfig` leads through it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        config = yaml.safe_load(cluster.kubeconfig.read_text())
        server = config["clusters"][0]["cluster"]
        super().__init__("127.0.0.1", int(server["server"].rsplit(":", 1)[1]))
        server["server"] = f"https://127.0.0.1:{self.port}"
        self.kubeconfig = folder / "proxied.kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(config))
