"""URIs: four schemes, nothing that could leave its claim or become an option of a program."""

import re

import pytest
from opd_core import uris
from opd_core.errors import InvalidError
from opd_core.uris import Location, claim_path, is_valid, parse, resolve

GOOD = {
    "hf://stabilityai/stable-diffusion-3.5-medium@main": Location(
        "hf", "stabilityai/stable-diffusion-3.5-medium", "", "main"
    ),
    "hf://a/b@v1.0/sub/x.safetensors": Location("hf", "a/b", "sub/x.safetensors", "v1.0"),
    "pvc://tiny-world/base": Location("pvc", "tiny-world", "base"),
    "pvc://models": Location("pvc", "models", ""),
    "s3://bucket/a/b.jsonl": Location("s3", "bucket", "a/b.jsonl"),
    "file:///opt/model/": Location("file", "", "opt/model"),
}
BAD = [
    "", "base", "/etc/passwd", "file://", "file:///", "file://relative", "http://x/y", "hf://a/b", "hf://b@main", "pvc://../x",
    "pvc://claim/../../etc", "pvc://claim/a/./b", "pvc://claim/.hidden", "pvc://claim/--option", "pvc://Claim/x", "pvc://claim/a b",
    "pvc://claim/$(id)", "pvc://claim/a;b", "pvc://claim/a\nb", "s3://b/x?y", "file:///a/../b", "pvc://claim/" + "a" * 600,
]  # fmt: skip


@pytest.mark.parametrize("uri", GOOD)
def test_good_uris_parse(uri):
    assert is_valid(uri)
    assert parse(uri) == GOOD[uri]


@pytest.mark.parametrize("uri", BAD)
def test_bad_uris_are_refused_with_the_forms_to_write(uri):
    assert not is_valid(uri)
    with pytest.raises(InvalidError, match=re.escape("pvc://claim/path")):
        parse(uri)


def test_claims_and_files_resolve_on_this_machine(tmp_path):
    claims = tmp_path / "claims"
    (claims / "world" / "base").mkdir(parents=True)
    assert resolve("pvc://world/base", claims) == claims / "world" / "base"
    assert resolve(f"file://{claims}", claims) == claims
    assert claim_path("pvc://world/new", claims) == claims / "world" / "new"
    assert claim_path("s3://bucket/x", claims) is None


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidError, match=r"pvc://world/base points at .*world/base, and nothing is there"):
        resolve("pvc://world/base", tmp_path)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "here"))
    assert uris.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("OPD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert uris.cache_dir() == tmp_path / "diffusion-opd"
