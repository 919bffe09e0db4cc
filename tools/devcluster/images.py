"""The project's images, built without a daemon or a registry from the same requirements as `images/*.Containerfile`.

Operator, trainer (which is also the evaluator), teacher and endpoint; the teacher with the tritonserver of the
nvidia-pytriton wheel, since the NGC base cannot be had without its registry. Layers are kept in the cache under a digest
of what went in, and what two images have in common (the system, PyTorch) is one layer of both.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster import control_plane, oci

REPOSITORY = Path(__file__).parents[2]
BUILD_PINS = REPOSITORY / "requirements" / "build.txt"
VENV = "opt/opd"
USER = 65532
VERSION = "0.1.0"

SUITE = "bookworm"
PYTHON = "python3.11"
PACKAGES = ("ca-certificates", PYTHON, f"lib{PYTHON}")  # libpython: Triton's Python backend loads it
NOT_NEEDED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "var/log")

# Gigabytes that PyTorch's CUDA build only opens on a GPU: cuDNN's kernels, what links or compiles CUDA code.
GPU_ONLY = (
    "nvidia/cudnn/lib/libcudnn_*",
    "nvidia/**/*.a",
    "nvidia/**/*.bc",
    "triton/backends/**/*.a",
    "triton/backends/*/bin/*",
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENV = {"PATH": f"/{VENV}/bin:{PATH}", "HOME": "/tmp", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Image:
    """A name, and layers from bottom to top."""

    name: str
    layers: tuple[oci.Layer, ...]
    entrypoint: tuple[str, ...] = ()

    def write(self, file: Path, without: Iterable[str] = ()) -> None:
        """An archive of it; layers whose digest is in `without` are only referred to."""
        missing = set(without)
        config = oci.Config(self.entrypoint, ENV, f"{USER}:{USER}")
        oci.write_archive(
            self.name, self.layers, config, file, [each for each in self.layers if each.digest not in missing]
        )


def build(extra: Sequence[Path] = ()) -> tuple[Image, ...]:
    """All four. `extra`: further packages for the trainer, for example rewards, with what they name as dependencies."""
    system = _system()
    operator, trainer, serving = (_pins(name) for name in ("operator", "trainer", "serving"))
    further = _dependencies(extra)
    trainer += [pin for pin in _pins("dev") if pin not in trainer and _name_of(pin) in further]
    both = [pin for pin in serving if pin in trainer]
    base = _layer(system)
    torch = (base, _layer(_packages("torch", system, both, prune=GPU_ONLY, whole=True)))
    of_trainer = _layer(_packages("trainer", system, [pin for pin in trainer if pin not in both]))
    of_serving = _layer(_packages("serving", system, [pin for pin in serving if pin not in both]))
    of_operator = _layer(_packages("operator", system, operator, whole=True))
    project = _project("project", system, [REPOSITORY])
    return (
        Image(_image_name("operator"), (base, of_operator, project)),
        Image(_image_name("trainer"), (*torch, of_trainer, _project("project-trainer", system, [REPOSITORY, *extra]))),
        Image(_image_name("teacher"), (*torch, of_serving, _triton(), project)),
        Image(_image_name("endpoint"), (*torch, of_serving, project)),
    )


def build_traefik() -> Image:
    """docker.io/diffusion-opd/traefik: a gateway to test against; it is no part of the project."""
    binary = control_plane.build("traefik") / "traefik"
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        place = Path(scratch, "usr", "local", "bin")
        place.mkdir(parents=True)
        shutil.copy(binary, place)
        layer = oci.write_layer(Path(scratch), cache_dir() / "traefik.tar")
    return Image("docker.io/diffusion-opd/traefik:e2e", (layer,), entrypoint=("/usr/local/bin/traefik",))


def cache_dir() -> Path:
    """Folder of layers and of the nodes' images, next to the cluster's programs."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "diffusion-opd" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _image_name(role: str) -> str:
    return f"docker.io/diffusion-opd/{role}:{VERSION}"


def _system() -> Path:
    """Debian with Python and our user, as a folder."""

    def make(root: Path) -> None:
        include = ",".join(PACKAGES)
        _run("debootstrap", "--variant=minbase", f"--include={include}", SUITE, root)
        for place in NOT_NEEDED:
            shutil.rmtree(root / place)
            (root / place).mkdir()
        with (root / "etc/passwd").open("a") as file:
            file.write(f"nonroot:x:{USER}:{USER}:nonroot:/tmp:/usr/sbin/nologin\n")
        with (root / "etc/group").open("a") as file:
            file.write(f"nonroot:x:{USER}:\n")
        for name in (VENV, "mnt/claims", "etc/opd"):
            (root / name).mkdir(parents=True)

    return _once("system", [SUITE, *PACKAGES, *NOT_NEEDED, str(USER)], make)


def _pins(name: str) -> list[str]:
    """The entries of requirements/NAME.txt, each with its digests."""
    text = (REPOSITORY / "requirements" / f"{name}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return re.findall(r"^\S.*(?:\n\s.*)*", "\n".join(lines), re.MULTILINE)


def _name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def _dependencies(sources: Sequence[Path]) -> set[str]:
    projects = [tomllib.loads((source / "pyproject.toml").read_text())["project"] for source in sources]
    return {_name_of(each) for project in projects for each in project["dependencies"]}


def _packages(name: str, system: Path, pins: Sequence[str], prune: Sequence[str] = (), whole: bool = False) -> Path:
    """`pins`, as a folder. `whole`: with what makes it a virtual environment; else it goes on top of such a layer."""

    def make(root: Path) -> None:
        venv = root / VENV
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.write("\n".join(pins))
            requirements.flush()
            _install(venv, ["--no-deps", "--require-hashes", f"--requirement={requirements.name}"])
        if whole:
            (venv / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n")
            for link in ("python", "python3", PYTHON):
                (venv / "bin" / link).symlink_to(f"/usr/bin/{PYTHON}")
        for pattern in prune:
            for file in _site(venv).glob(pattern):
                if not file.is_dir():
                    file.unlink()
        _compile(system, venv)

    return _once(f"packages-{name}", [system.name, *pins, *prune, str(whole)], make)


def _triton() -> oci.Layer:
    from opd_serving.teacher.server_binary import PREPARED_WHEEL, WHEEL_SHA256, unpacked_wheel

    file = cache_dir() / f"triton-{WHEEL_SHA256[:16]}.tar"
    return oci.read_layer(file) if file.exists() else oci.write_layer(unpacked_wheel(), file, str(PREPARED_WHEEL)[1:])


def _project(name: str, system: Path, sources: Sequence[Path]) -> oci.Layer:
    """Wheels of `sources`, installed. Always built: that takes seconds, and no cache can be stale."""
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        wheels = Path(scratch, "wheels")
        for source in sources:
            _run(_uv(), "build", "--quiet", "--wheel", f"--build-constraint={BUILD_PINS}", "--out-dir", wheels, source)
        venv = Path(scratch, "root", VENV)
        _install(venv, ["--no-deps", *map(str, sorted(wheels.glob("*.whl")))])
        # uv notes where a wheel came from and when: neither belongs into the image.
        for folder in _site(venv).glob("*.dist-info"):
            notes = ("uv_cache.json", "direct_url.json")
            for note in notes:
                (folder / note).unlink(missing_ok=True)
            record = (folder / "RECORD").read_text().splitlines(keepends=True)
            (folder / "RECORD").unlink()  # it may be a link into uv's cache
            (folder / "RECORD").write_text("".join(line for line in record if not any(note in line for note in notes)))
        _compile(system, venv)
        return oci.write_layer(Path(scratch, "root"), cache_dir() / f"{name}.tar")


def _install(venv: Path, arguments: Sequence[str]) -> None:
    """Into folder `venv` of an image; scripts name the interpreter they will find there."""
    target = ["--prefix", str(venv), "--python", sys.executable, "--python-version", PYTHON.removeprefix("python")]
    _run(_uv(), "pip", "install", "--quiet", f"--build-constraint={BUILD_PINS}", *target, *arguments)
    for script in (venv / "bin").glob("*"):
        content = script.read_bytes()
        if content.startswith(b"#!") and sys.executable.encode() in content.partition(b"\n")[0]:
            mode = script.stat().st_mode
            script.unlink()  # it may be a link into uv's cache
            script.write_bytes(f"#!/{VENV}/bin/python\n".encode() + content.partition(b"\n")[2])
            script.chmod(mode)


def _compile(system: Path, venv: Path) -> None:
    """Byte code, since a read-only root keeps none; not checked against times, which layers do not have."""
    compile_all = f"/usr/bin/{PYTHON} -m compileall -q -j0 --invalidation-mode unchecked-hash /{VENV}/lib"
    # Some packages carry templates and code for other Pythons, which does not compile: no error.
    inside = f'mount --bind "$1" "$2/{VENV}" || exit 1; chroot "$2" {compile_all} || true'
    _run("unshare", "--mount", "sh", "-c", inside, "sh", venv, system)


def _once(kind: str, ingredients: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, made once for the same ingredients; replaces the one of other ingredients."""
    key = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
    folder = cache_dir() / f"{kind}-{key}"
    if not folder.exists():
        print(f"images: making {folder.name}", file=sys.stderr)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache_dir()))
        partial.chmod(0o755)
        try:
            make(partial)
        except BaseException:
            shutil.rmtree(partial)
            raise
        partial.rename(folder)
        for old in cache_dir().glob(f"{kind}-*"):  # gigabytes that nobody will ask for again
            if not old.name.startswith(folder.name):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    return folder


def _layer(folder: Path) -> oci.Layer:
    file = folder.with_suffix(".tar")
    return oci.read_layer(file) if file.exists() else oci.write_layer(folder, file)


def _site(venv: Path) -> Path:
    return venv / "lib" / PYTHON / "site-packages"


def _uv() -> str:
    found = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        raise RuntimeError("building images needs uv; run: pip install uv")
    return found


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command[:4]))}: {(done.stderr or done.stdout).strip()[-2000:]}")
