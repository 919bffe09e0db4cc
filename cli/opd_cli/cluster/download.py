"""A student out of a claim, through a running pod that mounts it."""

import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_core.artifacts import MANIFEST, WEIGHTS, StudentManifest, read_student, write_card
from opd_core.errors import InvalidError, RefusedError
from opd_core.uris import parse

from opd_cli.cluster.connection import Connection
from opd_cli.cluster.execute import output_of

# A hundred times the LoRA of Stable Diffusion 3.5 Medium at rank 32: 19 million parameters in float32.
_LARGEST = 8 << 30
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


def copy_student(
    connection: Connection, source: Source, directory: Path, digest: str, base: str, limit: int = _LARGEST
) -> StudentManifest:
    """Copy a student directory to `directory` as a whole, after its digest has proved right.

    The digest is of the weights. What else the manifest says is the pod's word; of that, `base`, the URI of the model
    that the weights belong to, must be the one of the object's spec, since a model is what `opd serve` loads.

    Args:
        limit: bytes that are taken from the pod, and bytes that a file may unpack to.

    Raises:
        InvalidError: something is there already. RefusedError: the copy is another student, of another base, no
            student at all, or larger than `limit`. UnavailableError: the connection broke.
    """
    if directory.exists():
        raise InvalidError(f"{directory} is there already; choose another folder with --out, or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        archive, copy = Path(scratch, "archive"), Path(scratch, "student")
        with archive.open("wb") as file:
            command = [source.python, "-c", _PACK, source.folder]
            for data in output_of(connection, source.namespace, source.pod, source.container, command):
                file.write(data)
                if file.tell() > limit:
                    raise RefusedError(f"pod {source.pod} sends more than {limit} bytes, which is no student")
        _unpack(archive, copy, source, limit)
        manifest, _ = read_student(copy)
        if manifest.digest != digest:
            raise RefusedError(f"{source.folder} holds student {manifest.digest}, and {digest} was asked for")
        if manifest.base.uri != base:
            raise RefusedError(f"{source.folder} names {manifest.base.uri} as its base, and the spec {base}")
        write_card(copy, manifest)  # the pod's own is the pod's word
        copy.rename(directory)
    return manifest


def _unpack(archive: Path, folder: Path, source: Source, limit: int) -> None:
    """Manifest and weights, and nothing else that a pod may have packed."""
    try:
        with tarfile.open(archive) as packed:
            members = [member for member in packed if Path(member.name) in (Path(MANIFEST), Path(WEIGHTS))]
            if any(not member.isreg() or member.size > limit for member in members):
                raise RefusedError(f"{source.folder} in pod {source.pod} holds something else than a student's files")
            packed.extractall(folder, members, filter="data")
    except tarfile.TarError as error:
        raise RefusedError(f"pod {source.pod} sent something else than a student: {error}") from error
