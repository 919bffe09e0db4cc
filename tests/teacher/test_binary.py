"""Finding tritonserver without touching the user's environment."""

import os
import shutil
import subprocess
import sys
import tarfile

import pytest
from opd_core.errors import InvalidError, UnavailableError
from opd_core.exit_codes import ExitCode
from opd_serving.teacher import server_binary


def test_the_environment_variable_comes_first(monkeypatch, tmp_path):
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    monkeypatch.setenv("TRITONSERVER", str(binary))
    with pytest.raises(InvalidError, match="not an executable file"):
        server_binary.find_server()
    binary.chmod(0o755)
    assert server_binary.find_server() == server_binary.Server(binary)


def test_then_the_container_then_the_wheel(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITONSERVER", raising=False)
    monkeypatch.setattr(server_binary, "CONTAINER_BINARY", tmp_path / "tritonserver")
    found = server_binary.find_server()
    assert found.binary.name == "tritonserver"
    assert server_binary.cache_dir() in found.binary.parents
    assert found.env["PATH"].startswith(str(server_binary.Path(sys.executable).parent))
    (tmp_path / "tritonserver").touch()
    assert server_binary.find_server().binary == tmp_path / "tritonserver"


def test_a_wheel_that_is_not_the_pinned_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path))
    monkeypatch.setattr(server_binary, "WHEEL", "six==1.16.0")
    with pytest.raises(InvalidError, match=r"six==1.16.0 has not SHA-256 21f063ff"):
        server_binary.unpacked_wheel()
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_source_distribution_of_the_index_is_not_built(monkeypatch, tmp_path):
    """Its build would run before anything of it is known."""
    source = tmp_path / "nvidia_pytriton-0.7.0"
    source.mkdir()
    ran = tmp_path / "ran"
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(backend)
    (source / "backend.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n")
    (tmp_path / "links").mkdir()
    with tarfile.open(tmp_path / "links" / "nvidia_pytriton-0.7.0.tar.gz", "x:gz") as archive:
        archive.add(source, source.name)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    with pytest.raises(UnavailableError, match="No matching distribution"):
        server_binary.unpacked_wheel()
    assert not ran.exists()


def test_a_wheel_that_cannot_be_fetched_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path))
    monkeypatch.setattr(server_binary, "WHEEL", "nvidia-pytriton==0.0.0")
    with pytest.raises(UnavailableError, match="set TRITONSERVER to a tritonserver binary"):
        server_binary.unpacked_wheel()


def test_a_python_without_a_stub_is_refused_before_anything_is_fetched(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITONSERVER", raising=False)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path))
    monkeypatch.setattr(server_binary, "CONTAINER_BINARY", tmp_path / "tritonserver")
    monkeypatch.setattr(server_binary, "PYTHONS", ((3, 8), (3, 10)))
    with pytest.raises(InvalidError, match=r"Python is 3\.\d+, .* a stub for 3\.8 to 3\.10; .*TRITONSERVER"):
        server_binary.find_server()
    assert list(tmp_path.iterdir()) == []


def test_setup_refuses_a_python_without_a_stub_before_it_installs_anything(repository, tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(repository / "tools" / "setup.sh", tmp_path / "tools")
    newer = tmp_path / "python3.14"
    newer.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 14, 0)\nexec(sys.argv[2])\n")
    newer.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "TRITONSERVER"}
    setup = [str(tmp_path / "tools" / "setup.sh")]
    done = subprocess.run(setup, env={**env, "PYTHON": str(newer)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is Python 3.14, and Triton's Python backend has a stub for 3.11 to 3.13" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python3.14", "tools"]


def test_the_program_ends_with_a_message_instead_of_a_stack_trace():
    program = [sys.executable, "-m", "opd_serving.teacher.server_binary"]
    env = {**os.environ, "TRITONSERVER": "/no/such/file"}
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.INVALID
    assert done.stderr == "tritonserver: TRITONSERVER is /no/such/file, which is not an executable file\n"
