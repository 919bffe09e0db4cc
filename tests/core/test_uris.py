"""URIs: four schemes, nothing that could leave its claim or become an option of a program."""

import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

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


# ---------------------------------------------------------------- a hub on this machine


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as downloads need: one commit of every repository in `root`."""

    root: Path
    asked: list[str]
    commit = "c" * 40

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        api, file = (
            re.match(r"/api/models/(\w+/\w+)/(?:revision|tree)/\w+", path),
            re.match(r"/(\w+/\w+)/resolve/\w+/(.+)", path),
        )
        if api:
            repository = self.root / api[1]
            files = [p for p in sorted(repository.rglob("*")) if p.is_file()]
            names = [(p.relative_to(repository).as_posix(), p.stat().st_size) for p in files]
            if "/tree/" in path:
                content = json.dumps([{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in names])
            else:
                content = json.dumps(
                    {"id": api[1], "sha": self.commit, "siblings": [{"rfilename": n} for n, _ in names]}
                )
            self.reply(content.encode(), {"Content-Type": "application/json"}, body)
        elif file and (self.root / file[1] / file[2]).is_file():
            content = (self.root / file[1] / file[2]).read_bytes()
            if body:
                self.asked.append(file[2])
            self.reply(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

    def reply(self, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "X-Repo-Commit": self.commit, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    """A function that gives what `resolve` makes of a URI, and which files were fetched for it."""
    Hub.root, Hub.asked = tmp_path / "hub", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def fetch(uri: str) -> tuple[Path, list[str]]:
        """In a process of its own: the library reads its address once."""
        Hub.asked.clear()
        source = "import sys; from pathlib import Path; from opd_core.uris import resolve; print(resolve(sys.argv[1], Path()))"
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", source, uri], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.splitlines()[-1]), sorted(Hub.asked)

    yield fetch
    server.shutdown()
    server.server_close()


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_of_a_model_on_the_hub_only_its_components_are_fetched(hub, tmp_path):
    """https://github.com/huggingface/diffusers/issues/1811: single-file checkpoints and other copies lie beside them."""
    parts = {"transformer": ["diffusers", "X"], "vae": ["diffusers", "Y"], "image_encoder": [None, None]}
    for folder in (tmp_path / "hub" / "org" / "model", tmp_path / "hub" / "org" / "several" / "sd35"):
        wanted = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json"]
        add(folder, *wanted, "all_in_one.safetensors", "text_encoders/t5.safetensors", "image_encoder/config.json")
        add(folder, "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors", "x.png")
        (folder / "model_index.json").write_text(json.dumps(parts))
    expected = sorted(["model_index.json", *wanted])
    path, asked = hub("hf://org/model@main")
    assert asked == expected
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) == expected
    path, asked = hub("hf://org/several@main/sd35")
    assert asked == [f"sd35/{name}" for name in expected]
    assert (path / "transformer" / "config.json").is_file()


def test_of_an_adapter_or_prompts_on_the_hub_what_is_named_is_fetched(hub, tmp_path):
    add(
        tmp_path / "hub" / "org" / "lora",
        "a.safetensors",
        "b/pytorch_lora_weights.safetensors",
        "b/adapter.bin",
        "c.txt",
    )
    assert hub("hf://org/lora@main/b")[1] == ["b/pytorch_lora_weights.safetensors"]
    path, asked = hub("hf://org/lora@main/c.txt")
    assert (path.read_text(), asked) == ("c.txt", ["c.txt"])
