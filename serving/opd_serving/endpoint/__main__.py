"""`python -m opd_serving.endpoint`: serves a student, or a model, over HTTP."""

import argparse
import sys
from pathlib import Path

from opd_core.errors import OPDError
from opd_core.process import leave

from opd_serving.endpoint.engine import Limits
from opd_serving.endpoint.server import Settings, log_to_stderr, run


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m opd_serving.endpoint", description=__doc__)
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--student", metavar="DIR", help="student directory, or its URI")
    what.add_argument("--model", metavar="URI", help="a model without a student")
    options.add_argument("--claims", type=Path, required=True, help="folder with one entry per claim")
    options.add_argument("--host", default=Settings.host, help="address to listen on; :: is all")
    options.add_argument("--port", type=int, default=Settings.port)
    options.add_argument(
        "--metrics-port", type=int, help="port of health and metrics, which are then not at --port any more"
    )
    options.add_argument(
        "--served-name",
        action="append",
        default=[],
        metavar="NAME",
        help="name of the model in the API, default: the student's own; repeatable: those after the first are aliases",
    )
    options.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="SHA-256 digests of API keys, one per line, with names"
    )
    options.add_argument("--device", default=Settings.device, help="auto, cpu or cuda")
    options.add_argument("--precision", default=Settings.precision, help="auto, BF16, FP16 or FP32")
    options.add_argument(
        "--max-batch-size",
        type=_positive,
        default=Limits.max_batch_size,
        help="images of the default size a tick advances",
    )
    options.add_argument(
        "--max-queued-images", type=_positive, default=Limits.max_queued_images, help="images admitted beyond those"
    )
    options.add_argument(
        "--fixed-rows",
        type=_not_negative,
        default=Limits.fixed_rows,
        help="rows of every forward pass, so that an image does not depend on its company; "
        "0: as there are, rounded up to 2, 4, 8 or 16, which is faster",
    )
    sampling = options.add_argument_group("defaults of requests, instead of those in the student's manifest")
    sampling.add_argument("--width", type=_positive)
    sampling.add_argument("--height", type=_positive)
    sampling.add_argument("--frames", type=_positive)
    sampling.add_argument("--steps", type=_positive)
    sampling.add_argument("--guidance-scale", type=float)
    sampling.add_argument("--true-cfg-scale", type=float)
    sampling.add_argument("--max-sequence-length", type=_positive)
    limits = options.add_argument_group("limits")
    limits.add_argument(
        "--max-pixels",
        type=_positive,
        help="pixels of an image, or of all frames; default: four times the default size",
    )
    limits.add_argument("--max-request-seconds", type=float, default=Settings.max_request_seconds)
    limits.add_argument(
        "--leave-seconds",
        type=float,
        default=Settings.leave_seconds,
        help="after SIGTERM, not ready but answering, until load balancers have noticed",
    )
    limits.add_argument("--drain-seconds", type=float, default=Settings.drain_seconds, help="after that, at most")
    return options


def settings(arguments: argparse.Namespace) -> Settings:
    values = vars(arguments)
    limits = Limits(*(values.pop(name) for name in ("max_batch_size", "max_queued_images", "fixed_rows")))
    return Settings(limits=limits, **values)


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def main(argv: list[str] | None = None) -> int:
    log_to_stderr()
    try:
        return int(run(settings(parser().parse_args(argv))))
    except OPDError as error:
        print(f"endpoint: {error}", file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    leave(main())
