"""A student out of a claim, through a running pod that mounts it."""

import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_core.artifacts import StudentManifest, read_student
from opd_core.errors import InvalidError, RefusedError
from opd_core.uris import parse

from opd_cli.cluster.connection import Connection
from opd_cli.cluster.execute import output_of

# The images have Python, but not all of them tar.
_PACK = (
    "import sys, tarfile; t = tarfile.open(fileobj=sys.stdout.buffer, mode='w|'); t.add(sys.argv[1], '.'); t.close()"
)


@dataclass(frozen=True)
class Source:
    """A folder inside a container. `python`: the container's interpreter."""

    namespace: str
    pod: str
    container: str
    python: str
    folder: str


def find_source(pods: list[dict[str, Any]], uri: str) -> Source:
    """Where a `pvc://` URI is mounted in a running pod.

    Raises:
        InvalidError: in none of them; with what to do.
    """
    location = parse(uri)
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        if pod.get("status", {}).get("phase") != "Running" or "deletionTimestamp" in pod["metadata"]:
            continue
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        }
        for container in pod["spec"]["containers"]:
            for mount in container.get("volumeMounts", []):
                if claims.get(mount["name"]) == location.place:
                    folder = f"{mount['mountPath']}/{location.path}"
                    metadata = pod["metadata"]
                    return Source(
                        metadata["namespace"], metadata["name"], container["name"], container["command"][0], folder
                    )
    raise InvalidError(
        f"the student is in {uri}, and no running pod of this object mounts that claim; let its endpoint run "
        f"(spec.endpoint.enabled: true and replicas: 1), or mount the claim {location.place} in a pod of yours and "
        f"copy the folder {location.path}"
    )


def copy_student(connection: Connection, source: Source, directory: Path, digest: str) -> StudentManifest:
    """Copy a student directory to `directory` as a whole, after its digest has proved right.

    Raises:
        InvalidError: something is there already. RefusedError: the copy is another student.
        UnavailableError: the connection broke.
    """
    if directory.exists():
        raise InvalidError(f"{directory} is there already; choose another folder with -o, or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        archive, copy = Path(scratch, "archive"), Path(scratch, "student")
        with archive.open("wb") as file:
            command = [source.python, "-c", _PACK, source.folder]
            for data in output_of(connection, source.namespace, source.pod, source.container, command):
                file.write(data)
        with tarfile.open(archive) as packed:
            packed.extractall(copy, filter="data")
        manifest, _ = read_student(copy)
        if manifest.digest != digest:
            raise RefusedError(f"{source.folder} holds student {manifest.digest}, and {digest} was asked for")
        copy.rename(directory)
    return manifest
