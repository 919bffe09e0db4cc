"""Finds tritonserver: `$TRITONSERVER`, the container's usual path, or the binary inside the nvidia-pytriton wheel.

The wheel is fetched once, checked against its digest and unpacked into the cache; it is never installed, since it pins
numpy<2 for everybody else.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from opd_core.errors import InvalidError, OPDError, UnavailableError
from opd_core.uris import cache_dir

CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
PREPARED_WHEEL = Path("/opt/tritonserver-wheel")  # unpacked at build time, in images without the NGC base
WHEEL = "nvidia-pytriton==0.7.0"  # embeds Triton 2.51.0
WHEEL_SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
PYTHONS = ((3, 11), (3, 13))  # oldest of this project, newest that the wheel's Triton has a stub for
_OTHER_HASH = "DO NOT MATCH THE HASHES"  # pip's words; it looks before it unpacks anything
_ELSEWHERE = "set TRITONSERVER to a tritonserver binary, or run inside the NGC container"


@dataclass(frozen=True)
class Server:
    """How to start tritonserver: the binary, the folder of its backends where it does not find them by itself (one or
    none), and environment variables to add."""

    binary: Path
    backends: list[Path] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)


def find_server() -> Server:
    """The tritonserver of this machine.

    Raises:
        InvalidError: there is none and none can be had. UnavailableError: the wheel could not be fetched.
    """
    named = os.environ.get("TRITONSERVER")
    if named:
        if not os.access(named, os.X_OK):
            raise InvalidError(f"TRITONSERVER is {named}, which is not an executable file")
        return Server(Path(named))
    if CONTAINER_BINARY.exists():
        return Server(CONTAINER_BINARY)
    _require_stub()  # before the wheel is fetched
    return _from_wheel(PREPARED_WHEEL if PREPARED_WHEEL.exists() else unpacked_wheel())


def _require_stub() -> None:
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return
    ours, oldest, newest = (f"{major}.{minor}" for major, minor in (sys.version_info[:2], *PYTHONS))
    raise InvalidError(
        f"Python is {ours}, and the tritonserver of {WHEEL} has a stub for {oldest} to {newest}; use one of them, or "
        f"{_ELSEWHERE}"
    )


def unpacked_wheel() -> Path:
    """Folder of the unpacked wheel; fetched on first use. Several processes may ask at once."""
    target = cache_dir() / f"tritonserver-{WHEEL_SHA256[:12]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _fetch(target)
    return target


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # Nothing of an index is run before its digest is known: no source distribution is built.
        pinned = Path(scratch, "requirements.txt")
        pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        options = ["-q", "--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", scratch, "-r", str(pinned)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if _OTHER_HASH in done.stderr:
            raise InvalidError(f"what the package index has as {WHEEL} has not SHA-256 {WHEEL_SHA256}; {_ELSEWHERE}")
        if done.returncode != 0 or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UnavailableError(f"cannot fetch {WHEEL} for its tritonserver: {reason}; try again, or {_ELSEWHERE}")
        unpacked = Path(scratch, "unpacked")
        with zipfile.ZipFile(wheels[0]) as archive:
            wanted = ("pytriton/tritonserver/", "nvidia_pytriton.libs/")
            archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(wanted)])
        root = unpacked / "pytriton" / "tritonserver"
        # The backend looks for its stub beside itself; the wheel keeps one stub per Python version elsewhere.
        for stub in (root / "python_backend_stubs").glob("*/triton_python_backend_stub"):
            backends = root / f"backends-{stub.parent.name}"
            shutil.copytree(root / "backends", backends)
            shutil.copy2(stub, backends / "python" / stub.name)
            (backends / "python" / stub.name).chmod(0o755)
        (root / "bin" / "tritonserver").chmod(0o755)
        unpacked.rename(target)


def _from_wheel(folder: Path) -> Server:
    root = folder / "pytriton" / "tritonserver"
    backends = root / f"backends-{sys.version_info.major}.{sys.version_info.minor}"
    # The stub must load the libpython that belongs to this interpreter's standard library, to the patch level.
    library = _libpython()
    return Server(
        root / "bin" / "tritonserver",
        backends=[backends],
        env={
            "LD_LIBRARY_PATH": f"{library.parent}:{folder / 'nvidia_pytriton.libs'}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",  # the stub takes the first python3
            "VIRTUAL_ENV": sys.prefix,
        },
    )


def _libpython() -> Path:
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    for folder in (sysconfig.get_config_var("LIBDIR"), f"/usr/lib/{multiarch}", "/usr/lib"):
        if folder and Path(folder, name).exists():
            return Path(folder, name)
    package = name.partition(".so")[0]
    raise InvalidError(
        f"Triton's Python backend needs {name}; on Debian or Ubuntu: apt-get install {package}; or {_ELSEWHERE}"
    )


def main() -> int:
    try:
        print(find_server().binary)
    except OPDError as error:
        print(f"tritonserver: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
