"""What a fresh machine gets from `make setup` is enough for everything else."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_environments_go_is_new_enough_for_the_cluster(repository: Path) -> None:
    tools = repository / "tools" / "devcluster"
    needed = found(r"^go (\d+\.\d+)", tools / "kube" / "go.mod")
    assert found(r"^go_wanted=(\S+)", tools / "build.sh") == needed
    command = [Path(sys.executable).with_name("go"), "env", "GOVERSION"]
    local = {**os.environ, "GOTOOLCHAIN": "local"}  # itself, and not what it would fetch
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=local)
    assert done.returncode == 0, done.stderr
    assert numbers(done.stdout) >= numbers(needed)


def test_uv_is_installed_in_the_version_that_it_would_install(repository: Path) -> None:
    """Else the second setup of a machine replaces what the first one ran."""
    requirements = repository / "requirements"
    assert found(r"^uv==(\S+)", requirements / "uv.txt") == found(r"^uv==(\S+)", requirements / "dev.txt")


def found(pattern: str, file: Path) -> str:
    match = re.search(pattern, file.read_text(), re.M)
    assert match, f"{file.name} has no {pattern}"
    return match[1]


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
