"""Where models, prompts and students live: `hf://`, `pvc://`, `s3://` and `file://`.

hf://organisation/name@revision[/folder]   a repository of the Hugging Face hub, pinned
pvc://claim/path                           a PersistentVolumeClaim; on one machine a folder of that name
s3://bucket/key                            an object store, through fsspec
file:///absolute/path                      this machine, or a path inside the image
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from opd_core.errors import InvalidError, StorageError, UnavailableError

MAX_LENGTH = 512
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_SEGMENT = r"[A-Za-z0-9._=+-]*"
_PATH = rf"(?:/[A-Za-z0-9_]{_SEGMENT})*"  # no segment starts with "." or "-": no "..", no option of a program
_SCHEMES = {
    "hf": rf"hf://(?P<place>{_NAME}/{_NAME})@(?P<revision>{_NAME})(?P<path>{_PATH})/?",
    "pvc": rf"pvc://(?P<place>[a-z0-9](?:[-a-z0-9.]{{0,61}}[a-z0-9])?)(?P<path>{_PATH})/?",
    "s3": rf"s3://(?P<place>[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9])(?P<path>{_PATH})/?",
    "file": rf"file://(?P<path>/[A-Za-z0-9_]{_SEGMENT}{_PATH})/?",
}
# One expression for pydantic, the CRD's schema and this module.
PATTERN = "^(?:" + "|".join(re.sub(r"\?P<\w+>", "?:", scheme) for scheme in _SCHEMES.values()) + ")$"
CLAIM_FOLDER = "^" + re.sub(r"\?P<\w+>", "?:", _SCHEMES["pvc"]).replace(")*)/?", ")+)/?") + "$"
FORMS = "hf://organisation/name@revision[/folder], pvc://claim/path, s3://bucket/key or file:///absolute/path"

# In a hub's repository, beside the safetensors: pickles, and weights in other formats or for other programs.
_NEVER_LOADED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.onnx*", "*.fp16.*", "*.non_ema.*"]


@dataclass(frozen=True)
class Location:
    """A parsed URI: `place` is the repository, claim or bucket; `path` is relative to it and may be empty."""

    scheme: str
    place: str
    path: str
    revision: str = ""


def is_valid(uri: str) -> bool:
    return len(uri) <= MAX_LENGTH and re.fullmatch(PATTERN, uri) is not None


def parse(uri: str) -> Location:
    scheme = uri.partition("://")[0]
    match = re.fullmatch(_SCHEMES[scheme], uri) if scheme in _SCHEMES and len(uri) <= MAX_LENGTH else None
    if match is None:
        raise InvalidError(f"{uri[:MAX_LENGTH]!r} is not a URI that can be read here; write {FORMS}")
    parts = match.groupdict(default="")
    return Location(scheme, parts.get("place", ""), parts["path"].strip("/"), parts.get("revision", ""))


def claim_path(uri: str, claims: Path) -> Path | None:
    """The path of a `pvc://` or `file://` URI on this machine, whether or not it exists; None for a remote one."""
    location = parse(uri)
    if location.scheme == "pvc":
        return claims / location.place / location.path
    return Path("/", location.path) if location.scheme == "file" else None


def resolve(uri: str, claims: Path) -> Path:
    """An existing local file or folder for `uri`; remote ones are fetched into the cache first.

    Args:
        claims: folder with one entry per claim (`/mnt/claims` in a pod, `WORK/claims` on one machine).

    Raises:
        InvalidError: malformed, or nothing is there. UnavailableError: the remote side did not answer.
    """
    local = claim_path(uri, claims)
    if local is None:
        location = parse(uri)
        local = _from_hub(uri, location) if location.scheme == "hf" else _from_object_store(uri)
    if not local.exists():
        raise InvalidError(
            f"{uri} points at {local}, and nothing is there; check the claim, the path and who mounts it"
        )
    return local


def cache_dir() -> Path:
    """`$OPD_CACHE`, or diffusion-opd in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-opd"
    return Path(os.environ.get("OPD_CACHE") or default)


def _from_hub(uri: str, location: Location) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(patterns: list[str] | None) -> Path:
        root = snapshot_download(
            location.place, revision=location.revision, allow_patterns=patterns, ignore_patterns=_NEVER_LOADED
        )
        return Path(root, location.path)

    inside = f"{location.path}/" if location.path else ""
    try:
        index = fetch([f"{inside}model_index.json"]) / "model_index.json"
        if (
            index.is_file()
        ):  # of a model, the components alone: single-file checkpoints and other copies lie beside them
            return fetch([f"{inside}{name}" for name in ("model_index.json", *_component_folders(index))])
        return fetch([location.path, f"{inside}*"] if inside else None)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InvalidError(f"{uri}: no such repository or revision, or no right to read it (set HF_TOKEN)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UnavailableError(f"{uri}: the hub did not answer ({error}); try again, or copy it to a claim") from error


def _component_folders(index: Path) -> list[str]:
    """Patterns of the files of the components that a model_index.json names."""
    try:
        named = json.loads(index.read_bytes()).items()
    except (ValueError, RecursionError, AttributeError) as error:
        raise InvalidError(f"{index} is not valid JSON: {error}") from error
    return [f"{name}/*" for name, value in named if isinstance(value, list) and value[:1] not in ([], [None])]


def _from_object_store(uri: str) -> Path:
    try:
        import fsspec
        import s3fs  # noqa: F401  (fsspec finds it by name and explains its absence badly)
    except ImportError as error:
        raise InvalidError(f"{uri} needs fsspec and s3fs; in the checkout: pip install '.[s3]'") from error

    target = cache_dir() / "s3" / hashlib.sha256(uri.encode()).hexdigest()[:32] / PurePosixPath(uri.rstrip("/")).name
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
    except OSError as error:
        raise StorageError(
            f"cannot write to the cache {target.parent}: {error}; set OPD_CACHE to another folder"
        ) from error
    try:
        store, key = fsspec.core.url_to_fs(uri)
        store.get(key, str(scratch / target.name), recursive=True)
        (scratch / target.name).replace(target)
    except FileNotFoundError as error:
        raise InvalidError(f"{uri}: no such object") from error
    except OSError as error:
        raise UnavailableError(f"{uri}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
