"""A whole one-node cluster in namespaces of its own (processes, mounts, network).

When the first process in there ends, the kernel ends all others, unmounts everything and drops the network with its
rules and bridges: nothing is left to clean but a folder and empty control groups, however the cluster ended. It also
lets several clusters use the same ports. Needs root.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.control_plane import Cluster, build
from devcluster.images import Image, cache_dir
from devcluster.network import BLOCKS, Network

TOOLS = Path(__file__).parents[1]
CGROUPS = Path("/sys/fs/cgroup")
_VOLUME: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
_SIZE = "100Gi"


def home(name: str) -> Path:
    """The folder of cluster `name`; short, since sockets in it may have 108 characters."""
    return Path(tempfile.gettempdir()) / "opd-devcluster" / name


@dataclass(frozen=True)
class Node(Cluster):
    """A running one-node cluster. Addresses of its pods and Services can be reached from the host."""

    name: str
    folder: Path

    def run(self, *command: str | Path) -> str:
        """Standard output of a command inside the cluster's namespaces, for example `ctr` or `ip`.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        inside = ["nsenter", "--all", "--target", str(_read_pid(self.folder)), "--"]
        path = f"{self.binaries}:{os.environ.get('PATH', '')}"
        env = {**os.environ, "PATH": path, "CONTAINERD_ADDRESS": str(self.folder / "containerd.sock")}
        done = subprocess.run([*inside, *map(str, command)], capture_output=True, text=True, check=False, env=env)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def load(self, image: Image) -> None:
        """Import an image; layers that the node has already are not copied again."""
        present = self.run("ctr", "-n", "k8s.io", "content", "ls", "--quiet").split()
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            archive = Path(scratch, "image.tar")
            image.write(archive, without=present)
            self.run("ctr", "-n", "k8s.io", "images", "import", "--local", archive)

    def signal(self, daemon: str, sig: signal.Signals) -> None:
        """Send a signal to etcd, apiserver, controller-manager, scheduler, kubelet, proxy, coredns or containerd.

        A daemon that ends is started again after a second, as on a real node.
        """
        self.run("kill", f"-{sig.value}", (self.folder / "pids" / daemon).read_text())

    def make_volume(self, claim: str, namespace: str, host_folder: Path) -> str:
        """A PersistentVolume that is `host_folder` and waits for a claim: there is no provisioner. Returns its name.

        Kubelet applies no fsGroup to such a volume; the folder must be writable for the pods' user (65532).
        """
        volume, path = f"{namespace}-{claim}", {"path": str(host_folder.resolve()), "type": "Directory"}
        spec = {**_VOLUME, "capacity": {"storage": _SIZE}, "hostPath": path}
        spec["claimRef"] = {"namespace": namespace, "name": claim}
        meta = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume}}
        self.kubectl("apply", "-f", "-", stdin=json.dumps({**meta, "spec": spec}))
        return volume

    def make_default_volumes(self, count: int = 16) -> None:
        """A default StorageClass and `count` empty volumes of it, folders of the cluster: claims find one at once."""
        names = {"name": "folders", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}
        kind = {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": names}
        items: list[dict[str, Any]] = [{**kind, "provisioner": "kubernetes.io/no-provisioner"}]
        for index in range(count):
            folder = self.folder / "volumes" / str(index)
            folder.mkdir(parents=True)
            folder.chmod(0o777)  # whoever the pods are
            spec = {
                "accessModes": ["ReadWriteMany", "ReadWriteOnce", "ReadOnlyMany"],
                "storageClassName": "folders",
                "capacity": {"storage": _SIZE},
                "hostPath": {"path": str(folder), "type": "Directory"},
            }
            meta = {"name": f"folder-{index}"}
            items.append({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": meta, "spec": spec})
        self.kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))

    def make_claim(self, claim: str, namespace: str, host_folder: Path) -> None:
        """A PersistentVolumeClaim that is bound to a volume of `host_folder`."""
        volume = self.make_volume(claim, namespace, host_folder)
        meta = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": namespace},
        }
        spec = {**_VOLUME, "volumeName": volume, "resources": {"requests": {"storage": _SIZE}}}
        self.kubectl("apply", "-f", "-", stdin=json.dumps({**meta, "spec": spec}))
        self.kubectl("wait", "--for=jsonpath={.status.phase}=Bound", f"pvc/{claim}", "-n", namespace, "--timeout=60s")


def up(name: str, die_with_me: bool = False) -> Node:
    """Start cluster `name` and wait until its node is Ready; with `die_with_me` it ends with the calling thread.

    Raises:
        RuntimeError: it runs already, or something did not start; with the last lines of the logs.
    """
    if os.geteuid() != 0:
        raise RuntimeError("a whole cluster needs root; for the control plane alone use control_plane()")
    binaries = build("node")
    folder = home(name)
    if _read_pid(folder):
        raise RuntimeError(f"cluster {name} runs already in {folder}; take another name or `down {name}`")
    down(name)  # what is left of one that was killed
    folder.mkdir(parents=True)
    store(name).mkdir(parents=True, exist_ok=True)
    log = folder / "supervisor.log"
    unshare = ["unshare", "--net", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child", "--"]
    leash = ["setpriv", "--pdeathsig", "KILL", "--"] if die_with_me else []
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*leash, *unshare, sys.executable, "-m", "devcluster.supervisor", name, str(binaries)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(TOOLS)},
        )
    try:
        first = _child(process)
        _claim_network(folder, first)
        _write_pid(folder, first)
        deadline = time.monotonic() + 120
        while not (folder / "ready").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"cluster {name} did not come up:\n{log.read_text()[-4000:]}")
            time.sleep(0.1)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return find(name)


def find(name: str) -> Node:
    """The running cluster `name`.

    Raises:
        RuntimeError: there is none.
    """
    folder = home(name)
    if not _read_pid(folder):
        raise RuntimeError(f"no cluster {name} is running; start it with `up {name}`")
    return Node(build("node"), folder / "admin.kubeconfig", folder / "audit.log", name, folder)


def store(name: str) -> Path:
    """Where the images of cluster `name` stay between its lives: importing gigabytes takes a minute."""
    return cache_dir() / f"node-{name}"


def down(name: str, images: bool = False) -> None:
    """Stop cluster `name` and remove everything of it, with `images` its images too.

    Nothing happens where there is none.
    """
    folder = home(name)
    pid = _read_pid(folder)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while _read_pid(folder):
            time.sleep(0.05)
    for group in _groups(name):
        # Deepest first; the kernel may need a moment to let a killed process go.
        for inner in [*sorted(group.rglob("*/"), key=lambda path: -len(path.parts)), group]:
            if inner.is_dir():
                _remove_group(inner)
    if folder.exists():
        shutil.rmtree(folder)
    if images and store(name).exists():
        shutil.rmtree(store(name))


@contextmanager
def cluster(name: str) -> Iterator[Node]:
    """A cluster for the time of a `with` block; the kernel ends it too if the caller is killed."""
    try:
        yield up(name, die_with_me=True)
    finally:
        down(name)


def _groups(name: str) -> list[Path]:
    """The cluster's control groups: one with cgroup v2, one in every hierarchy with v1."""
    roots = (
        [CGROUPS]
        if (CGROUPS / "cgroup.controllers").exists()
        else [each for each in CGROUPS.iterdir() if each.is_dir()]
    )
    return [root / f"opd-{name}" for root in roots if (root / f"opd-{name}").is_dir()]


def _remove_group(group: Path) -> None:
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"control group {group} is still in use")


def _child(process: subprocess.Popen[bytes]) -> int:
    """The process that unshare started: the first one of the new namespaces."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        found = children.read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.02)
    raise RuntimeError("unshare did not start; does this machine allow new namespaces?")


def _claim_network(folder: Path, pid: int) -> None:
    """Take the first free block by making its link, which fails if somebody has it."""
    for index in range(BLOCKS):
        network = Network(index)
        link = ["ip", "link", "add", network.interface, "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        if subprocess.run(link, capture_output=True, check=False).returncode == 0:
            break
    else:
        raise RuntimeError(f"could not make a network link; the last try was: {' '.join(link)}")
    device = ["dev", network.interface]
    for command in (
        ["ip", "address", "add", f"{network.host}/24", *device],
        ["ip", "link", "set", network.interface, "up"],
        ["ip", "route", "add", network.pods, "via", network.node, *device],
        ["ip", "route", "add", network.services, "via", network.node, *device],
    ):
        subprocess.run(command, check=True)
    partial = folder / "network.partial"
    partial.write_text(str(index))
    partial.rename(folder / "network")  # the supervisor waits for it


def _started(pid: int) -> str:
    """When a process started, in clock ticks: tells it from a later one with the same number. '' if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _write_pid(folder: Path, pid: int) -> None:
    (folder / "pid").write_text(f"{pid} {_started(pid)}")


def _read_pid(folder: Path) -> int:
    """The cluster's first process; 0 if it does not run."""
    try:
        pid, started = (folder / "pid").read_text().split()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return int(pid) if _started(int(pid)) == started else 0
