"""What a dead teacher server costs beside a living one of the same teachers.

    PYTHONPATH=tools python benchmarks/teachers.py [--queries 200] [--rows 1]

Two clients take turns with single queries: one knows the living server alone, the other both. The dead one answered
when the clients connected, and was killed then. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from opd_core.api.load import load_spec
from opd_core.conditioning import Conditioning
from opd_core.teachers.contract import FREE
from opd_core.teachers.grpc_client import GrpcTeachers, connect
from training import triton

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200, help="of each client")
    parser.add_argument("--rows", type=int, default=1, help="of a query")
    arguments = parser.parse_args()
    distillation = load_spec(EXAMPLE / "distill.yaml")
    with ExitStack() as stack:
        living_folder, dead_folder = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        living = stack.enter_context(triton(distillation, EXAMPLE, living_folder, "cpu"))
        with triton(distillation, EXAMPLE, dead_folder, "cpu") as dead:
            alone, both = connect([living]), connect([living, dead])
        info = alone.describe()
        prompt = Conditioning(
            {
                name: torch.zeros([2 if size == FREE else size for size in shape])
                for name, shape in info.conditioning.items()
            }
        )
        latents = torch.zeros(arguments.rows, info.latents[0], 8, 8)

        def ask(client: GrpcTeachers) -> None:
            ones = torch.ones(arguments.rows)
            client.submit(
                "ocr", latents, ones, torch.ones(arguments.rows, 2), [prompt] * arguments.rows, prompt
            ).result()

        seconds: dict[str, list[float]] = {"alone": [], "beside a dead one": []}
        clients = dict(zip(seconds, (alone, both), strict=True))
        for client in clients.values():
            ask(client)
        for i in range(arguments.queries):
            for name in list(seconds) if i % 2 else list(seconds)[::-1]:
                began = time.perf_counter()
                ask(clients[name])
                seconds[name].append(time.perf_counter() - began)
        both.close()
        alone.close()
    medians = {name: 1000 * statistics.median(of_one) for name, of_one in seconds.items()}
    slowest = {name: 1000 * max(of_one) for name, of_one in seconds.items()}
    for name, median in medians.items():
        print(f"{name:18} median {median:7.2f} ms   slowest {slowest[name]:7.2f} ms")
    ratio = medians["beside a dead one"] / medians["alone"]
    print(json.dumps({"dead_replica_ratio": round(ratio, 3), "ms": medians, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
