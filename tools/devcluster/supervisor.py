"""The first process of a cluster's namespaces: starts every program of the node and starts again what ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from devcluster import control_plane as plane
from devcluster import oci, pki
from devcluster.daemons import Daemons
from devcluster.network import Network
from devcluster.node import CGROUPS, home, store

PAUSE = "opd.local/pause:1"
# Places that the node's programs insist on; in here they are the cluster's own.
PRIVATE = ("/var/lib/cni", "/var/lib/kubelet", "/var/log/pods", "/var/log/containers", "/run/containerd")


def main(name: str, binaries: Path) -> None:
    """As process 1: run the supervisor in a child, and wait for whatever is orphaned in here."""
    supervisor = os.fork()
    if supervisor == 0:
        supervise(name, binaries)
    while os.wait()[0] != supervisor:
        pass


def supervise(name: str, binaries: Path) -> None:
    """Bring everything up, say `ready`, then keep it running until killed."""
    folder = home(name)
    (folder / "pids").mkdir()
    _mount_private(folder)
    network = _join_network(folder)
    node = f"{name}-node"
    daemons = Daemons(folder / "log", binaries)
    url = _start_control_plane(daemons, folder, network, node)
    _start_node(daemons, folder, binaries, network, node)
    client = plane.Cluster(binaries, folder / "admin.kubeconfig", folder / "audit.log")
    client.kubectl(
        "apply", "--server-side", *(f"--filename={file}" for file in sorted(binaries.glob("gateway-api-*/*")))
    )
    plane.wait_default_service_account(daemons, folder, url)
    daemons.wait("the node", lambda: _is_ready(client, node), 90)
    _start_firewall(daemons, folder, network, node)
    _write_pids(daemons, folder)
    (folder / "ready").touch()
    while True:
        time.sleep(1)
        for ended in daemons.exited():
            daemons.start(ended)
            _write_pids(daemons, folder)


def _mount_private(folder: Path) -> None:
    for number, place in enumerate(PRIVATE):
        own = folder / "private" / str(number)
        own.mkdir(parents=True)
        Path(place).mkdir(parents=True, exist_ok=True)
        _run("mount", "--bind", str(own), place)


def _join_network(folder: Path) -> Network:
    """Wait for the link that `up` makes, then bring up this end of it."""
    while not (folder / "network").exists():
        time.sleep(0.02)
    network = Network(int((folder / "network").read_text()))
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "address", "add", f"{network.node}/24", "dev", "eth0")
    _run("ip", "link", "set", "eth0", "up")
    _run("ip", "route", "add", "default", "via", network.host)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    return network


def _start_control_plane(daemons: Daemons, folder: Path, network: Network, node: str) -> str:
    """The same control plane as the one without a node, plus the scheduler; returns the API server's address."""
    keys = folder / "pki"
    names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    addresses = ["127.0.0.1", network.node, network.kubernetes_service]
    plane.make_pki(keys, ",".join([*(f"DNS:{each}" for each in names), *(f"IP:{each}" for each in addresses)]))
    pki.make_certificate(keys, "scheduler", "/CN=system:kube-scheduler", "DNS:scheduler")
    pki.make_certificate(keys, "proxy", "/CN=system:kube-proxy", "DNS:proxy")
    pki.make_certificate(keys, "kubelet", f"/O=system:nodes/CN=system:node:{node}", f"DNS:{node},IP:{network.node}")
    pki.make_certificate(keys, "coredns", "/O=system:masters/CN=system:kube-dns", "DNS:coredns")
    pki.make_certificate(keys, "router", "/O=system:masters/CN=system:kube-router", "DNS:router")
    url = f"https://{network.node}:6443"
    for user in ("admin", "controller-manager", "scheduler", "proxy", "kubelet", "coredns", "router"):
        pki.write_kubeconfig(keys, user, url, folder / f"{user}.kubeconfig")
    etcd = "http://127.0.0.1:2379"
    daemons.start("etcd", plane.etcd_command(folder, etcd, "http://127.0.0.1:2380"))
    kubelet_access = [
        f"--kubelet-client-certificate={keys}/admin.crt",
        f"--kubelet-client-key={keys}/admin.key",
        "--kubelet-preferred-address-types=InternalIP",  # or logs and exec would look the node up by name
    ]
    server = plane.apiserver_command(folder, etcd, 6443, network.services)
    daemons.start("apiserver", [*server, f"--advertise-address={network.node}", *kubelet_access])
    plane.wait_ready(daemons, folder, url)
    daemons.start("controller-manager", plane.controller_manager_command(folder))
    scheduler = [f"--kubeconfig={folder}/scheduler.kubeconfig", "--leader-elect=false", "--secure-port=0"]
    daemons.start("scheduler", ["kube-scheduler", *scheduler])
    return url


def _start_node(daemons: Daemons, folder: Path, binaries: Path, network: Network, node: str) -> None:
    bridge = {
        "type": "bridge",
        "bridge": "pods",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": network.pods}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }
    (folder / "cni").mkdir()
    _write_json(
        folder / "cni" / "10-pods.conflist",
        {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}],
        },
    )
    (folder / "containerd.toml").write_text(_containerd(folder))
    daemons.start("containerd", ["containerd", "--config", folder / "containerd.toml"])
    (folder / "Corefile").write_text(_corefile(folder, network))
    daemons.start("coredns", ["coredns", "-conf", folder / "Corefile"])
    daemons.wait("containerd", lambda: (folder / "containerd.sock").is_socket(), 20)
    _load_pause(folder, binaries)
    for group in _own_control_groups(folder.name):
        group.mkdir(exist_ok=True)
    _write_json(folder / "kubelet.json", _kubelet(folder, network))
    identity = [f"--hostname-override={node}", f"--node-ip={network.node}"]
    files = [f"--config={folder}/kubelet.json", f"--kubeconfig={folder}/kubelet.kubeconfig"]
    daemons.start("kubelet", ["kubelet", *files, *identity])
    _write_json(
        folder / "proxy.json",
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(folder / "proxy.kubeconfig")},
            "clusterCIDR": network.pods,
            "hostnameOverride": node,
            "mode": "iptables",
            "conntrack": {"maxPerCore": 0},
        },
    )
    daemons.start("proxy", ["kube-proxy", "--config", folder / "proxy.json"])


def _start_firewall(daemons: Daemons, folder: Path, network: Network, node: str) -> None:
    """kube-router, of which only the part that makes network policies true; it needs to find its node."""
    parts = ["--run-firewall=true", "--run-router=false", "--run-service-proxy=false", "--run-loadbalancer=false"]
    place = [f"--kubeconfig={folder}/router.kubeconfig", f"--hostname-override={node}"]
    ranges = [f"--service-cluster-ip-range={network.services}", "--enable-ipv6=false"]
    daemons.start("router", ["kube-router", *parts, *place, *ranges, "--health-port=0"])


def _containerd(folder: Path) -> str:
    # restrict_oom_score_adj: a root without CAP_SYS_RESOURCE may not lower the score, and no sandbox would start.
    return f"""version = 3
root = "{store(folder.name)}"
state = "/run/containerd"
[grpc]
  address = "{folder}/containerd.sock"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/usr/lib/cni"]
  conf_dir = "{folder}/cni"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = false
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE}"
"""


def _corefile(folder: Path, network: Network) -> str:
    return f"""cluster.local:53 {{
  bind {network.node}
  kubernetes cluster.local {{
    kubeconfig {folder}/coredns.kubeconfig devcluster
  }}
  cache 5
}}
"""


def _kubelet(folder: Path, network: Network) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,  # kubelet >= 1.35 refuses cgroup v1 otherwise
        "failSwapOn": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/opd-{folder.name}",
        "enforceNodeAllocatable": [],
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(folder / "pki" / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(folder / "pki" / "kubelet.crt"),
        "tlsPrivateKeyFile": str(folder / "pki" / "kubelet.key"),
        "clusterDNS": [network.node],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": f"unix://{folder}/containerd.sock",
        "resolvConf": "",  # names outside the cluster cannot be reached anyway
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        # Images are loaded, not pulled: one that was removed would not come back.
        "imageGCHighThresholdPercent": 100,
        "shutdownGracePeriod": "0s",
    }


def _load_pause(folder: Path, binaries: Path) -> None:
    root = folder / "pause"
    root.mkdir()
    (root / "pause").write_bytes((binaries / "pause").read_bytes())
    (root / "pause").chmod(0o755)
    layer = oci.write_layer(root, folder / "pause-layer.tar")
    oci.write_archive(PAUSE, [layer], oci.Config(entrypoint=["/pause"]), folder / "pause.tar")
    address = ["--address", str(folder / "containerd.sock"), "--namespace", "k8s.io"]
    _run(str(binaries / "ctr"), *address, "images", "import", "--local", str(folder / "pause.tar"))


def _own_control_groups(name: str) -> list[Path]:
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS / f"opd-{name}"]
    return [root / f"opd-{name}" for root in CGROUPS.iterdir() if (root / "cgroup.procs").exists()]


def _is_ready(client: plane.Cluster, node: str) -> bool:
    path = "{.status.conditions[?(@.type=='Ready')].status}"
    return client.kubectl("get", "node", node, "--ignore-not-found", "-o", f"jsonpath={path}") == "True"


def _write_pids(daemons: Daemons, folder: Path) -> None:
    for name in daemons.names():
        (folder / "pids" / name).write_text(str(daemons.pid(name)))


def _write_json(file: Path, document: object) -> None:
    file.write_text(json.dumps(document, indent=2))


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
