"""Images per second of the endpoint's engine with 8 requests in flight, against one request at a time.

Same process, same model, same requests (mixed prompts, step counts, guidance and seeds), turn about; medians. Three ways:

    one at a time       each request waits for the one before
    batched             step-level batching, rows rounded up to 2, 4, 8 or 16 (the default): equal up to rounding
    batched, exact      the same with --fixed-rows 8: the same bytes alone and in company
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from figures import write
from opd_core.artifacts import SamplingDefaults
from opd_core.models.pipeline import load_model
from opd_serving.endpoint.engine import Engine, Limits
from opd_serving.endpoint.request import ImageRequest

TINY = Path(__file__).parents[1] / "examples" / "tiny" / "tiny-world" / "base"


def requests(count: int, size: int) -> list[ImageRequest]:
    return [
        ImageRequest(f"a red {i % 10}", "", (i,), size, size, 8 + i % 5, 4.5 if i % 4 else 1.0, guided=i % 4 > 0)
        for i in range(count)
    ]


def seconds(engine: Engine, wanted: list[ImageRequest], concurrency: int) -> float:
    """Time for all of `wanted` with `concurrency` in flight at any moment."""
    began, flying = time.perf_counter(), []
    for request in wanted:
        if len(flying) == concurrency:
            flying.pop(0).result()
        flying.append(engine.submit(request))
    for future in flying:
        future.result()
    return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, default=TINY)
    options.add_argument("--device", default="cpu")
    options.add_argument("--size", type=int, default=32)
    options.add_argument("--requests", type=int, default=32)
    options.add_argument("--concurrency", type=int, default=8)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--max-sequence-length", type=int, default=10)
    options.add_argument("--write", action="store_true", help="keep the figures in docs/figures")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    model = load_model(arguments.model, device=arguments.device)
    defaults = SamplingDefaults(
        width=arguments.size,
        height=arguments.size,
        steps=10,
        guidance_scale=4.5,
        max_sequence_length=arguments.max_sequence_length,
    )
    ways = {
        "one at a time": (Engine(lambda: model, model.guidance, defaults, Limits()), 1),
        "batched": (Engine(lambda: model, model.guidance, defaults, Limits()), arguments.concurrency),
        "batched, exact": (
            Engine(lambda: model, model.guidance, defaults, Limits(fixed_rows=8)),
            arguments.concurrency,
        ),
    }
    wanted = requests(arguments.requests, arguments.size)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for engine, _ in ways.values():
        engine.start()
        engine.wait_loaded()
    for _ in range(arguments.rounds):
        for name, (engine, concurrency) in ways.items():
            times[name].append(seconds(engine, wanted, concurrency))
    for engine, _ in ways.values():
        engine.stop()
    speeds = {name: len(wanted) / statistics.median(values) for name, values in times.items()}
    base = speeds["one at a time"]
    if arguments.write:
        lines = ["| way | images/s | ratio |", "|---|---:|---:|"]
        lines += [f"| {name} | {speed:.1f} | {speed / base:.2f} |" for name, speed in speeds.items()]
        ratios = {name.rpartition(", ")[2]: f"{speed / base:.1f}" for name, speed in speeds.items()}
        write("endpoint", ratios, lines)
    print(f"{arguments.size}x{arguments.size}, 8 to 12 steps, {arguments.concurrency} requests in flight, 1 CPU thread")
    for name, speed in speeds.items():
        print(f"  {name:16} {speed:7.2f} images/s   ratio {speed / base:.2f}")


if __name__ == "__main__":
    main()
