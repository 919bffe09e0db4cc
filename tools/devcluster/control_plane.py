"""etcd, API server and controller manager: what reconciling needs, without a node. Ready in 3 seconds, no root."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from devcluster import pki
from devcluster.daemons import Daemons

HERE = Path(__file__).parent
_PREFIX = "opd-control-plane-"

# Workload namespaces enforce the strictest profile unless they say otherwise; system pods need host networking.
ADMISSION = {
    "apiVersion": "apiserver.config.k8s.io/v1",
    "kind": "AdmissionConfiguration",
    "plugins": [
        {
            "name": "PodSecurity",
            "configuration": {
                "apiVersion": "pod-security.admission.config.k8s.io/v1",
                "kind": "PodSecurityConfiguration",
                "defaults": {"enforce": "restricted", "enforce-version": "latest"},
                "exemptions": {"namespaces": ["kube-system"]},
            },
        }
    ],
}
# Who did what to which object; the cluster's own programs would be nine tenths of the lines.
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {
            "level": "None",
            "users": [
                "system:apiserver",
                "system:kube-controller-manager",
                "system:kube-scheduler",
                "system:kube-proxy",
                "system:kube-dns",
                "system:kube-router",
            ],
        },
        {"level": "None", "userGroups": ["system:nodes", "system:serviceaccounts:kube-system"]},
        {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/openapi*"]},
        {"level": "Metadata"},
    ],
}


@dataclass(frozen=True)
class Cluster:
    """What a client needs to talk to a running cluster."""

    binaries: Path
    kubeconfig: Path  # an administrator's
    audit_log: Path  # one JSON object a line

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """Standard output of kubectl.

        Raises:
            RuntimeError: kubectl failed; with what it said.
        """
        command = [str(self.binaries / "kubectl"), "--kubeconfig", str(self.kubeconfig), *map(str, arguments)]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"kubectl {' '.join(map(str, arguments))}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


@dataclass(frozen=True)
class ControlPlane(Cluster):
    """A running control plane. `daemons` has etcd, apiserver and controller-manager, to be stopped or restarted."""

    daemons: Daemons


def build(what: str) -> Path:
    """The folder of the programs; what is missing is built first: `control-plane` takes 6 minutes on 2 cores, once."""
    done = subprocess.run([str(HERE / "build.sh"), what], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


@contextmanager
def control_plane(
    etcd: Sequence[str] = (), apiserver: Sequence[str] = (), crds: Sequence[Path] = ()
) -> Iterator[ControlPlane]:
    """A control plane of its own on free ports, gone at the end.

    Args:
        etcd: further flags of the program.
        apiserver: further flags of the program.
        crds: manifests to apply before the controllers start. The garbage collector looks for types when it starts and
            every 30 s; it deletes nothing for an owner whose type came in between.
    """
    binaries = build("control-plane")
    _remove_left_behind()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    daemons = Daemons(folder / "log", binaries)
    try:
        client_port, peer_port, port = _free_ports(3)
        etcd_url = f"http://127.0.0.1:{client_port}"
        url = f"https://127.0.0.1:{port}"
        make_pki(folder / "pki", "DNS:localhost,IP:127.0.0.1,IP:10.96.0.1")
        for user in ("admin", "controller-manager"):
            pki.write_kubeconfig(folder / "pki", user, url, folder / f"{user}.kubeconfig")
        daemons.start("etcd", [*etcd_command(folder, etcd_url, f"http://127.0.0.1:{peer_port}"), *etcd])
        network = ["--bind-address", "127.0.0.1", "--endpoint-reconciler-type", "none"]
        command = [*apiserver_command(folder, etcd_url, port, "10.96.0.0/16"), *network, *apiserver]
        daemons.start("apiserver", ["env", "GOGC=400", *command])  # a fifth of its time was garbage collection
        wait_ready(daemons, folder, url)
        cluster = ControlPlane(binaries, folder / "admin.kubeconfig", folder / "audit.log", daemons)
        for crd in crds:
            _install(cluster, crd)
        daemons.start("controller-manager", controller_manager_command(folder))
        wait_default_service_account(daemons, folder, url)
        yield cluster
    finally:
        daemons.stop_all(signal.SIGKILL)  # nothing of it is kept
        shutil.rmtree(folder)


def make_pki(folder: Path, server_names: str) -> None:
    """Authority, the API server's certificate, and clients admin and controller-manager."""
    pki.make_authority(folder)
    pki.make_certificate(folder, "apiserver", "/CN=kube-apiserver", server_names)
    pki.make_certificate(folder, "admin", "/O=system:masters/CN=admin", "DNS:admin")
    pki.make_certificate(folder, "controller-manager", "/CN=system:kube-controller-manager", "DNS:controller-manager")


def etcd_command(folder: Path, client_url: str, peer_url: str) -> list[str]:
    client = ["--listen-client-urls", client_url, "--advertise-client-urls", client_url]
    peer = ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url]
    cluster = ["--initial-cluster", f"default={peer_url}"]
    return [
        "etcd",
        "--data-dir",
        str(folder / "etcd"),
        *client,
        *peer,
        *cluster,
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver_command(folder: Path, etcd_url: str, port: int, service_range: str) -> list[str]:
    """The API server with authentication by certificate, RBAC, the audit log and Pod Security; writes its files."""
    (folder / "admission.json").write_text(json.dumps(ADMISSION))
    (folder / "audit-policy.json").write_text(json.dumps(AUDIT))
    keys = folder / "pki"
    options = {
        "etcd-servers": etcd_url,
        "secure-port": port,
        "service-cluster-ip-range": service_range,
        "tls-cert-file": keys / "apiserver.crt",
        "tls-private-key-file": keys / "apiserver.key",
        "client-ca-file": keys / "ca.crt",
        "service-account-key-file": keys / "sa.pub",
        "service-account-signing-key-file": keys / "sa.key",
        "service-account-issuer": "https://kubernetes.default.svc",
        "authorization-mode": "Node,RBAC",
        # The second as some distributions have it: who sets blockOwnerDeletion must be allowed to finalize the owner.
        "enable-admission-plugins": "NodeRestriction,OwnerReferencesPermissionEnforcement",
        "admission-control-config-file": folder / "admission.json",
        "audit-policy-file": folder / "audit-policy.json",
        "audit-log-path": folder / "audit.log",
        "audit-log-maxsize": 10_000,  # MB: one file, so that a reader finds every line
        "allow-privileged": "true",
    }
    return ["kube-apiserver", *(f"--{name}={value}" for name, value in options.items())]


def controller_manager_command(folder: Path) -> list[str]:
    options = {
        "kubeconfig": folder / "controller-manager.kubeconfig",
        "service-account-private-key-file": folder / "pki" / "sa.key",
        "root-ca-file": folder / "pki" / "ca.crt",
        "use-service-account-credentials": "true",  # each controller with its own role
        "leader-elect": "false",
        "secure-port": 0,
        "kube-api-qps": 500,
        "kube-api-burst": 1000,
    }
    return ["kube-controller-manager", *(f"--{name}={value}" for name, value in options.items())]


def wait_ready(daemons: Daemons, folder: Path, url: str) -> None:
    """Until the API server says that it is ready, its bootstrap roles included."""
    daemons.wait("the API server", lambda: _answers(folder, f"{url}/readyz"), 60)


def wait_default_service_account(daemons: Daemons, folder: Path, url: str) -> None:
    """Until the controllers work: they make the account that pods and Jobs of namespace `default` use."""
    path = "/api/v1/namespaces/default/serviceaccounts/default"
    daemons.wait("the controller manager", lambda: _answers(folder, url + path), 60)


def _install(cluster: ControlPlane, crd: Path) -> None:
    """Apply a CRD and wait until its objects can be made."""
    cluster.kubectl("apply", "--server-side", "-f", crd)

    def established() -> bool:  # `kubectl wait` fails on an object whose status has no conditions yet
        found = json.loads(cluster.kubectl("get", "-f", crd, "-o", "json"))
        conditions = found["status"].get("conditions") or []
        return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

    cluster.daemons.wait(crd.name, established, 30)


def _answers(folder: Path, url: str) -> bool:
    context = ssl.create_default_context(cafile=str(folder / "pki" / "ca.crt"))
    context.load_cert_chain(folder / "pki" / "admin.crt", folder / "pki" / "admin.key")
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _remove_left_behind() -> None:
    """Delete folders whose starter was killed; the kernel has ended its programs already."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(_PREFIX).partition("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all held at once, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
