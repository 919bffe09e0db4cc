"""A folder becomes a layer, layers become an OCI archive that `ctr images import` takes: no daemon, no registry."""

import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_IMAGE = "application/vnd.oci.image"


@dataclass(frozen=True)
class Layer:
    """An uncompressed tar file and its digest, `sha256:<hex>`."""

    file: Path
    digest: str


@dataclass(frozen=True)
class Config:
    """What an image says about how to run it."""

    entrypoint: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = "/"


class _Hashing:
    """A file opened for writing that knows the digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def write_layer(root: Path, file: Path, prefix: str = ".") -> Layer:
    """All of folder `root` below `prefix`, owned by root, in sorted order and without times: same content, same digest.

    Does not compress: on one machine that only costs time.
    """

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mtime = 0
        return member

    partial = file.with_suffix(".partial")
    with partial.open("wb", buffering=1 << 20) as raw:
        hashing = _Hashing(raw)
        with tarfile.open(fileobj=cast(Any, hashing), mode="w|", bufsize=1 << 20) as tar:
            tar.add(root, arcname=prefix, filter=plain)
    digest = f"sha256:{hashing.sha256.hexdigest()}"
    partial.rename(file)
    return Layer(file, digest)


def write_archive(name: str, layers: Sequence[Layer], config: Config, file: Path) -> None:
    """One image, `name` (`docker.io/who/what:tag`), its layers from bottom to top."""
    settings = {
        "Entrypoint": list(config.entrypoint),
        "Env": [f"{name}={value}" for name, value in config.env.items()],
        "User": config.user,
        "WorkingDir": config.workdir,
    }
    image = _encode(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": settings,
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        }
    )
    manifest = _encode(
        {
            "schemaVersion": 2,
            "mediaType": f"{_IMAGE}.manifest.v1+json",
            "config": _describe(f"{_IMAGE}.config.v1+json", image),
            "layers": [
                {
                    "mediaType": f"{_IMAGE}.layer.v1.tar",
                    "digest": layer.digest,
                    "size": os.path.getsize(layer.file),
                }
                for layer in layers
            ],
        }
    )
    described = _describe(f"{_IMAGE}.manifest.v1+json", manifest)
    written = [(_digest(blob), blob) for blob in (image, manifest)]
    _write(file, name, described, [*written, *((layer.digest, layer.file) for layer in layers)])


def pack(layout: Path, tag: str, name: str, file: Path, without: Container[str]) -> None:
    """The image that an OCI layout has under `tag`, as an archive of image `name`; layers in `without` are left out, since
    who imports it has them."""
    described = _tagged(layout)[tag]
    manifest, config, *layers = _blobs_of(layout, described)
    missing = [layer for layer in layers if layer not in without]
    _write(file, name, described, [(digest, layout / _blob(digest)) for digest in (manifest, config, *missing)])


def prune(layout: Path) -> None:
    """Delete what no tag of an OCI layout refers to any more."""
    tagged = _tagged(layout)
    (layout / "index.json").write_bytes(_encode({"schemaVersion": 2, "manifests": list(tagged.values())}))
    wanted = {digest for described in tagged.values() for digest in _blobs_of(layout, described)}
    for file in (layout / "blobs" / "sha256").iterdir():
        if f"sha256:{file.name}" not in wanted:
            file.unlink()


def _tagged(layout: Path) -> dict[str, dict[str, Any]]:
    """Descriptors of an OCI layout's manifests by tag; one that has lost its tag to another stays in the index."""
    index = json.loads((layout / "index.json").read_bytes())
    name = "org.opencontainers.image.ref.name"
    return {each["annotations"][name]: each for each in index["manifests"] if name in each.get("annotations", {})}


def _blobs_of(layout: Path, described: Mapping[str, Any]) -> list[str]:
    """Digests of a manifest, its configuration and its layers."""
    manifest = json.loads((layout / _blob(described["digest"])).read_bytes())
    return [described["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]


def _write(file: Path, name: str, manifest: Mapping[str, Any], blobs: Iterable[tuple[str, bytes | Path]]) -> None:
    """An OCI archive with one image; `blobs` by digest."""
    named = {**manifest, "annotations": {"io.containerd.image.name": name}}
    partial = file.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(tar, "index.json", _encode({"schemaVersion": 2, "manifests": [named]}))
        for digest, blob in blobs:
            if isinstance(blob, Path):
                tar.add(blob, arcname=_blob(digest))
            else:
                _add(tar, _blob(digest), blob)
    partial.rename(file)


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode()


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _describe(media_type: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _blob(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
