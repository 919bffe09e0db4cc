"""The project's images, built here as anywhere: `images/*.Containerfile`, by buildah, which needs no daemon and no registry.

Operator, trainer (which is also the evaluator), teacher and endpoint, all on one base that is made here: Debian's Python
stands in for python:slim, the tritonserver of the nvidia-pytriton wheel for NGC's. One base, so that PyTorch, which comes
right above it, is one layer of three images. What buildah made goes into an OCI layout, uncompressed: nodes take from
there what they do not have.
"""

import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from devcluster import control_plane, oci

REPOSITORY = Path(__file__).parents[2]
USER = 65532
VERSION = "0.1.0"
_ROLES = ("operator", "trainer", "teacher", "endpoint")

SUITE = "bookworm"
PYTHON = "python3.11"
PACKAGES = ("ca-certificates", PYTHON, f"lib{PYTHON}")  # libpython: Triton's Python backend loads it
NOT_NEEDED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "var/log")
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True)
class Image:
    """What a node calls it, and its tag in the OCI layout."""

    name: str
    tag: str

    def write(self, file: Path, without: Iterable[str] = ()) -> None:
        """An archive of it; layers whose digest is in `without` are only referred to."""
        oci.pack(_layout(), self.tag, self.name, file, set(without))


def build(extra: Path | None = None) -> tuple[Image, ...]:
    """All four. `extra`: a folder with a Containerfile that is built on top of the trainer's image, and takes its name."""
    base = _base()
    of_role = {role: _build(role, REPOSITORY, REPOSITORY / "images" / f"{role}.Containerfile", base) for role in _ROLES}
    if extra:
        of_role["trainer"] = _build("trainer-extra", extra, extra / "Containerfile", of_role["trainer"])
    made = tuple(_export(tag, f"{role}:{VERSION}") for role, tag in of_role.items())
    # What nothing is built on any more, such as packages of other requirements, and what builds that were killed left.
    _buildah("rmi", "--prune", "--force")
    oci.prune(_layout())
    return made


def build_traefik() -> Image:
    """docker.io/diffusion-opd/traefik: a gateway to test against; it is no part of the project."""
    recipe = (
        f"FROM scratch\nCOPY traefik /usr/local/bin/traefik\nUSER {USER}:{USER}\n"
        'ENTRYPOINT ["/usr/local/bin/traefik"]\n'
    )
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        shutil.copy(control_plane.build("traefik") / "traefik", scratch)
        return _export(_build_text("traefik", Path(scratch), recipe), "traefik:e2e")


def cache_dir() -> Path:
    """Folder of buildah's layers, of the OCI layout and of the nodes' images, next to the cluster's programs."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "diffusion-opd" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _layout() -> Path:
    return cache_dir() / "layout"


def _store() -> Path:
    return cache_dir() / "buildah"


def _base() -> str:
    """Debian with Python and pip, and a tritonserver where the teacher's server looks for one; made once."""
    from opd_serving.teacher.server_binary import PREPARED_WHEEL, WHEEL_SHA256, unpacked_wheel

    recipe = f"FROM scratch\nCOPY system /\nCOPY triton {PREPARED_WHEEL}\n"
    ingredients = "\0".join([SUITE, *PACKAGES, *NOT_NEEDED, WHEEL_SHA256, recipe])
    name = f"base-{hashlib.sha256(ingredients.encode()).hexdigest()[:16]}"
    if _buildah("images", "--quiet", "--filter", f"reference={_tag(name)}").strip():
        return _tag(name)
    print("images: making the base", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        system = Path(scratch, "system")
        _run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, system)
        for place in NOT_NEEDED:
            shutil.rmtree(system / place)
            (system / place).mkdir()
        # As python:slim has them. Debian's pip would bring a hundred packages, which takes debootstrap minutes.
        (system / "usr/local/bin/python3").symlink_to(f"/usr/bin/{PYTHON}")
        pip = Path(sysconfig.get_path("purelib"), "pip")
        shutil.copytree(pip, system / "usr/local/lib" / PYTHON / "dist-packages" / "pip")
        shutil.copytree(unpacked_wheel(), Path(scratch, "triton"), symlinks=True, copy_function=os.link)
        return _build_text(name, Path(scratch), recipe)


def _build_text(name: str, context: Path, recipe: str) -> str:
    file = context / "Containerfile"
    file.write_text(recipe)
    return _build(name, context, file)


def _build(name: str, context: Path, file: Path, base: str = "") -> str:
    """Tag of what buildah makes of `file`; layers come from its cache where nothing changed.

    This machine's certificates, mirror and cache of packages are lent to the build and stay out of the image.
    """
    lent: list[str] = []
    certificates = ssl.get_default_verify_paths().cafile
    if certificates:
        lent.append(f"--volume={Path(certificates).resolve()}:{_CERTIFICATES}:ro")
    lent.append(f"--volume={_run(_uv(), 'cache', 'dir').strip()}:/root/.cache/uv")
    mirror = _mirror()
    if mirror:
        lent.append("--secret=id=PIP_INDEX_URL,env=PIP_INDEX_URL")
    arguments = [f"--build-arg=BASE={base}", "--build-arg=DEVICE=cpu"] if base else []
    print(f"images: {name}", file=sys.stderr)
    how = ("--isolation=chroot", "--layers", "--pull=never", "--format=oci", "--quiet")
    _buildah("build", *how, f"--file={file}", f"--tag={_tag(name)}", *arguments, *lent, context, PIP_INDEX_URL=mirror)
    return _tag(name)


def _export(tag: str, name: str) -> Image:
    """Put it into the layout, where layers that two images share lie once."""
    short = tag.rpartition("/")[2].partition(":")[0]
    # Not `buildah push`, which compresses every layer, every time; it cannot ask for layers to be taken as they are.
    source = f"containers-storage:[overlay@{_store()}+{_store()}-run]{tag}"
    take = ("--insecure-policy", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers")
    _run("skopeo", *take, source, f"oci:{_layout()}:{short}", TMPDIR=str(cache_dir()))
    return Image(f"docker.io/diffusion-opd/{name}", short)


def _tag(name: str) -> str:
    return f"localhost/diffusion-opd/{name}:latest"


def _mirror() -> str:
    """Address of the package index that this machine uses instead of PyPI, '' for none."""
    named = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL") or os.environ.get("PIP_INDEX_URL")
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return named or subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def _uv() -> str:
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        raise RuntimeError("building images needs uv; run: pip install uv")
    return found


def _buildah(*arguments: str | Path, **env: str) -> str:
    place = (
        "--storage-driver=overlay",
        f"--root={_store()}",
        f"--runroot={_store()}-run",
    )
    return _run("buildah", *place, *arguments, TMPDIR=str(cache_dir()), **env)


def _run(*command: str | Path, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command[:6]))}: {said}")
    return done.stdout
