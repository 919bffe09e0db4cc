"""A real engine on the tiny model behind a real uvicorn."""

import contextlib
import json
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from opd_core import artifacts
from opd_core.artifacts import SamplingDefaults, Source, StudentManifest
from opd_core.models.fingerprint import fingerprint
from opd_core.ports import listen
from opd_serving.endpoint.server import Settings, make_service, uvicorn_config
from opd_serving.endpoint.service import Service

SAMPLING = SamplingDefaults(width=32, height=32, steps=4, guidance_scale=4.5, max_sequence_length=10)


def status(url: str, path: str) -> int | None:
    """The HTTP status of a path; None while nobody listens."""
    try:
        with urllib.request.urlopen(url + path, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


class Endpoint:
    """A running endpoint: its service, its address, and what its metrics say."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def status(self, path: str) -> int | None:
        return status(self.url, path)

    def json(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path) as response:
            return json.load(response)

    def metric(self, name: str) -> float:
        """The value of a series, written as Prometheus shows it."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            match = re.search(rf"^{re.escape(name)} (\S+)$", response.read().decode(), re.MULTILINE)
        assert match, name
        return float(match[1])


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def running(service: Service, *, loaded: bool = True) -> Iterator[Endpoint]:
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(service, 1))
    thread = threading.Thread(target=server.run, args=([listener],))
    service.engine.start()
    thread.start()
    try:
        if loaded:
            service.engine.wait_loaded()
        wait_until(lambda: server.started)
        yield Endpoint(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()
        service.engine.stop()
        listener.close()


@pytest.fixture(scope="session")
def make_student(tiny_world: Path) -> Callable[..., Path]:
    """A function that writes a student directory: the weights of a teacher, the manifest of a student."""

    def make(directory: Path, base_fingerprint: str | None = None) -> Path:
        def save(folder: Path) -> Path:
            return Path(shutil.copy(tiny_world / "teachers" / "ocr" / artifacts.WEIGHTS, folder))

        def describe(digest: str) -> StudentManifest:
            return StudentManifest(
                name="tiny",
                digest=digest,
                base=Source(
                    uri="pvc://tiny-world/base",
                    fingerprint=base_fingerprint or fingerprint(tiny_world / "base"),
                ),
                teachers=[],
                spec_digest="sha256:0",
                round=1,
                sampling=SAMPLING,
                license="test",
            )

        artifacts.write_student(directory, save, describe)
        return directory

    return make


@pytest.fixture(scope="session")
def student(make_student, tmp_path_factory) -> Path:
    return make_student(tmp_path_factory.mktemp("student") / "student")


@pytest.fixture(scope="session")
def settings(student: Path, tiny_claims: Path) -> Settings:
    return Settings(claims=tiny_claims, student=str(student), device="cpu")


@pytest.fixture(scope="module")
def endpoint(settings: Settings) -> Iterator[Endpoint]:
    """An endpoint that the tests of a module share."""
    with running(make_service(settings)) as started:
        yield started
