"""Clients of a deployed student: the real `openai` package, one picture or a constant stream of them."""

import base64
import threading
from collections.abc import Mapping
from datetime import UTC, datetime

import openai


class Load:
    """Clients that ask for one image after the other, with a breath in between since everything shares two cores, and
    keep count; a request is never repeated."""

    def __init__(self, url: str, model: str, clients: int = 2, headers: Mapping[str, str] | None = None) -> None:
        self.url, self.model, self.headers = url, model, headers
        self.answered = 0
        self.lost: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        client = connect(self.url, self.headers)
        seed = number
        while not self._stop.is_set():
            seed += 2
            try:
                image(client, self.model, seed)
                self.answered += 1
            except Exception as error:
                self.lost.append(f"{datetime.now(UTC):%H:%M:%S.%f} {error!r}")
            self._stop.wait(0.4)


def connect(url: str, headers: Mapping[str, str] | None = None) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, default_headers=headers)


def image(client: openai.OpenAI, model: str, seed: int) -> bytes:
    answer = client.images.generate(
        model=model, prompt="a red 3", response_format="b64_json", extra_body={"seed": seed, "num_inference_steps": 4}
    )
    assert answer.data
    return base64.b64decode(answer.data[0].b64_json or "")
