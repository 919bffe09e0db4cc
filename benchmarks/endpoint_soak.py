"""A soak of the endpoint: minutes of clients as they are, and then nothing may be left.

The real program, real HTTP and two API keys. First three times as many official clients at once as fit, with their own
two retries: none gives up. Then at once: official clients with their own retries, clients that vanish in the middle,
clients that send half a request or take their answer slowly, keys that are written anew, and memory that runs out at
random ticks. Every accepted request has to be answered once, with its own image: the seed and size that it asked for,
and pixels like those that the server made for that seed before the soak began, within the promise of docs/endpoint.md.
Memory, open files and threads have to stay where they are. Prints figures, ends with 1 if anything is wrong.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import openai
import psutil
import torch
import uvicorn
from opd_core.ports import free_ports, listen
from opd_serving.endpoint.engine import Limits
from opd_serving.endpoint.server import Settings, make_service, uvicorn_config
from opd_serving.endpoint.service import Service
from PIL import Image

TINY = Path(__file__).parents[1] / "examples" / "tiny" / "tiny-world" / "base"
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
SIZES = ("32x32", "16x16", "32x16", "24x24")
SEEDS = range(12)
STEPS = 4
BURST = 120


@dataclass
class Tally:
    """What happened. `wrong`: answers that are not what was asked for."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds since the beginning, MiB
    burst: str = ""


class Faults:
    """Memory that runs out at random ticks."""

    def __init__(self, service: Service, share: float) -> None:
        transformer = service.engine.model.transformer
        self.share, self.original, self.dice = share, transformer.forward, random.Random(1)
        transformer.forward = self.forward

    def forward(self, *arguments: object, **options: object) -> object:
        if self.dice.random() < self.share:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.original(*arguments, **options)


def write_keys(file: Path, comment: str) -> None:
    lines = [f"{hashlib.sha256(key.encode()).hexdigest()} {name}" for name, key in KEYS.items()]
    fresh = file.with_suffix(".new")
    fresh.write_text("\n".join([f"# {comment}", *lines]) + "\n")
    fresh.replace(file)


def pixels(answer: openai.types.ImagesResponse) -> list[np.ndarray]:
    opened = (Image.open(io.BytesIO(base64.b64decode(item.b64_json or ""))) for item in answer.data or [])
    return [np.asarray(image, int) for image in opened]


async def honest(
    client: openai.AsyncOpenAI,
    known: dict[tuple[str, int], np.ndarray],
    tally: Tally,
    until: float,
    dice: random.Random,
) -> None:
    """Waits for its answer, looks at it, and asks again; now and then after a pause."""
    while time.monotonic() < until:
        size, seed, n = dice.choice(SIZES), dice.choice(SEEDS), dice.choice((1, 1, 2))
        began = time.monotonic()
        try:
            answer = await client.images.generate(
                prompt="a red 3", size=size, n=n, extra_body={"seed": seed, "steps": STEPS}
            )
        except openai.APIStatusError as error:
            tally.outcomes[f"{error.status_code} {error.code}"] += 1
            continue
        except openai.APIConnectionError as error:
            tally.wrong.append(f"no answer: {error!r} {error.__cause__!r}")
            continue
        tally.seconds.append(time.monotonic() - began)
        tally.outcomes["200"] += 1
        if [item.seed for item in answer.data] != list(range(seed, seed + n)) or answer.size != size:
            tally.wrong.append(f"asked for {size}, {seed}: {answer.size}, {[item.seed for item in answer.data]}")
        for offset, image in enumerate(pixels(answer)):
            expected = known[size, seed + offset]
            if image.shape != expected.shape or np.abs(image - expected).max() > 1:
                tally.wrong.append(f"another image for {size}, {seed + offset}")
        if dice.random() < 0.1:
            await asyncio.sleep(dice.random() * 2)


async def burst(client: openai.AsyncOpenAI, service: Service, tally: Tally) -> None:
    """All at once, with the two retries that the client has by itself: nobody gives up."""
    began = time.monotonic()
    ask = client.images.generate
    answers = await asyncio.gather(
        *(ask(prompt="a red 3", extra_body={"seed": seed, "steps": 5 * STEPS}) for seed in range(BURST)),
        return_exceptions=True,
    )
    refused = service.metrics.rejected.labels("queue_full")._value.get()
    tally.burst = f"{BURST} clients at once: {time.monotonic() - began:.1f} s until the last has its image, {refused:.0f} refusals"
    tally.wrong += [f"in the burst: {answer!r}" for answer in answers if isinstance(answer, BaseException)]


async def rude(port: int, tally: Tally, until: float, dice: random.Random) -> None:
    """Half heads, half bodies, requests that are left in the middle, answers that are not taken."""
    body = json.dumps({"prompt": "a", "n": 4, "steps": 60}).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEYS['bob']}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    while time.monotonic() < until:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        kind = dice.choice(("half a head", "half a body", "left", "not taken"))
        tally.outcomes[f"({kind})"] += 1
        writer.write({"half a head": head[:40], "half a body": head + body[:9]}.get(kind, head + body))
        await asyncio.sleep(dice.random() * (3 if kind == "not taken" else 1))
        writer.transport.abort()


async def rotate(file: Path, until: float) -> None:
    while time.monotonic() < until:
        await asyncio.sleep(2)
        write_keys(file, f"written at {time.monotonic()}")


async def watch(tally: Tally, began: float, until: float) -> None:
    process = psutil.Process()
    while time.monotonic() < until:
        tally.memory.append((time.monotonic() - began, process.memory_info().rss / 2**20))
        await asyncio.sleep(1)


async def play(service: Service, port: int, keys: Path, seconds: float, share: float) -> Tally:
    tally = Tally()
    clients = {
        name: openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, timeout=600)
        for name, key in KEYS.items()
    }
    known = {}
    for size in SIZES:
        for seed in range(SEEDS.start, SEEDS.stop + 2):
            answer = await clients["alice"].images.generate(
                prompt="a red 3", size=size, extra_body={"seed": seed, "steps": STEPS}
            )
            (known[size, seed],) = pixels(answer)
    await burst(clients["alice"], service, tally)
    Faults(service, share)
    began = time.monotonic()
    until = began + seconds
    await asyncio.gather(
        *(honest(clients["alice"], known, tally, until, random.Random(i)) for i in range(4)),
        *(honest(clients["bob"], known, tally, until, random.Random(i)) for i in range(50, 74)),
        *(rude(port, tally, until, random.Random(i)) for i in range(6)),
        rotate(keys, until),
        watch(tally, began, until),
    )
    deadline = time.monotonic() + 60
    while not service.engine.idle and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    if not service.engine.idle:
        tally.wrong.append("requests are left in the engine")
    if not service.engine.alive:
        tally.wrong.append("the engine is not alive")
    for client in clients.values():
        await client.close()
    return tally


def soak(settings: Settings, seconds: float, share: float) -> tuple[Tally, list[str]]:
    """Runs it; the second value are the figures, one a line."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        write_keys(keys, "first")
        port = free_ports(1)[0]
        service = make_service(replace(settings, api_keys=keys))
        listener = listen("127.0.0.1", port)
        server = uvicorn.Server(uvicorn_config(service, 1))
        thread = threading.Thread(target=server.run, args=([listener],))
        service.engine.start()
        service.engine.wait_loaded()
        thread.start()
        process = psutil.Process()
        files = process.num_fds()
        try:
            tally = asyncio.run(play(service, port, keys, seconds, share))
            time.sleep(1)
            left = process.num_fds() - files
        finally:
            server.should_exit = True
            thread.join()
            service.engine.stop()
            listener.close()
    if left > 4:
        tally.wrong.append(f"{left} files are left open")
    half = [size for at, size in tally.memory if seconds * 0.25 <= at <= seconds * 0.5]
    end = [size for at, size in tally.memory if at >= seconds * 0.75]
    grown = statistics.median(end) - statistics.median(half) if half and end else 0.0
    if grown > 32:
        tally.wrong.append(f"memory has grown by {grown:.0f} MiB")
    metrics = service.metrics
    ordered = sorted(tally.seconds)
    lines = [
        tally.burst,
        f"{seconds:.0f} s: " + ", ".join(f"{name} {count}" for name, count in sorted(tally.outcomes.items())),
        f"images {metrics.images._value.get():.0f}, out of memory {metrics.out_of_memory._value.get():.0f} times",
        f"answers after {statistics.median(ordered):.2f} s (median), {ordered[int(len(ordered) * 0.95)]:.2f} s (95 %)",
        f"memory {tally.memory[0][1]:.0f} MiB at first, {grown:+.1f} MiB from the second quarter to the last",
        f"open files {left:+d}",
        *(f"WRONG {what}" for what in tally.wrong[:20]),
    ]
    return tally, lines


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=str(TINY))
    options.add_argument("--device", default="cpu")
    options.add_argument("--seconds", type=float, default=20)
    options.add_argument("--out-of-memory", type=float, default=0.01, help="share of the ticks")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        claims=Path(),
        model=arguments.model,
        device=arguments.device,
        limits=Limits(16, 24),
        max_sequence_length=10,
        width=32,
        height=32,
        steps=60,
    )
    tally, lines = soak(settings, arguments.seconds, arguments.out_of_memory)
    print("\n".join(lines))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
