"""The teacher server's command line, for the program and for the step that prepares it."""

import argparse
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m opd_serving.teacher", description="Serve the teachers of a spec from Triton Inference Server."
    )
    options.add_argument("--spec", type=Path, required=True)
    options.add_argument("--claims", type=Path, required=True, help="folder with one entry per claim")
    options.add_argument("--repository", type=Path, required=True, help="folder for the model repository; replaced")
    options.add_argument(
        "--teacher", action="append", default=[], metavar="NAME", help="serve only this teacher; repeatable"
    )
    options.add_argument("--host", default="127.0.0.1", help="address of gRPC and metrics; :: is all")
    options.add_argument("--grpc-port", type=int, default=8001)
    options.add_argument("--http-port", type=int, default=8000, help="of the loopback, for the probe")
    options.add_argument("--metrics-port", type=int, default=8002)
    options.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options.add_argument(
        "--adapter-bytes", type=int, help="for LoRAs on the device; by default what fits, on a CPU all of them"
    )
    return options.parse_args(argv)
