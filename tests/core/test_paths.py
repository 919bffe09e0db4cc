"""A path for a shell that quotes nothing."""

import subprocess
import tempfile
from pathlib import Path

import pytest
from opd_core.errors import InvalidError
from opd_core.paths import is_shell_safe, shell_safe

NAMES = [
    "a b",
    "[1]",
    "(x)",
    "$(touch evil)",
    "`id`",
    "a;b",
    "a&b",
    "a'b",
    'a"b',
    "~x",
    "ü",
    "a\nb",
    "*",
    "#a",
    "{a,b}",
]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_shell_would_change_is_reached_by_a_link(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "file").write_text("found")
    with shell_safe(folder) as safe:
        assert is_shell_safe(safe)
        command = f"exec cat {safe}/file"
        assert subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout == "found"
    assert not safe.is_symlink()
    assert not safe.parent.exists()
    assert (folder / "file").exists()


def test_an_ordinary_path_stays(tmp_path: Path) -> None:
    with shell_safe(tmp_path) as safe:
        assert safe == tmp_path


def test_where_no_link_helps_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a b"))
    with pytest.raises(InvalidError, match="set TMPDIR"), shell_safe(tmp_path / "a b"):
        pass
