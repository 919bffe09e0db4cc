"""`python -m opd_serving.teacher.probe`: can the teacher service answer? Asks it for one row.

Triton's own readiness stays 200 when the Python stub behind a model is dead
(https://github.com/triton-inference-server/server/issues/7230); an inference does not. Plain HTTP and no torch: it
runs every few seconds.
"""

import argparse
import json
import struct
import sys
import urllib.error
import urllib.request
from math import prod
from typing import Any

from opd_core.errors import OPDError, RefusedError, UnavailableError
from opd_core.teachers import contract
from opd_core.teachers.contract import ServiceInfo

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is for the way out of here


def probe(address: str, seconds: float) -> None:
    """One row through the first teacher at `address`, the HTTP port of a server, which has tried all of them itself
    before it answered anybody. A row of each would ask for every LoRA, every few seconds, in the place of others.

    Raises:
        UnavailableError: no velocity in time. RefusedError: one that is not finite, or another service; waiting does
            not help.
    """
    url = f"http://{address}/v2/models/{contract.MODEL}"
    info = _describe(url, seconds)
    key, file = _conditioning(info)
    _infer(
        url,
        [
            (contract.KEY, "UINT8", [1, len(key)], key),
            (contract.CONDITIONING, "UINT8", [1, len(file)], file),
        ],
        contract.REGISTERED,
        seconds,
    )
    shape = [1, *contract.sized(info.latents, contract.TRIAL_SIDE)]
    state = bytes(prod(shape) * contract.ITEM_BYTES[info.precision])
    one = struct.pack("<f", 1.0)
    inputs = [
        (contract.LATENTS, contract.WIRE_TYPES[info.precision], shape, state),
        (contract.SIGMA, "FP32", [1, 1], one),
        (contract.GUIDANCE, "FP32", [1, 1], one),
        (contract.TEACHER, "INT32", [1, 1], bytes(4)),
        (contract.KEY, "UINT8", [1, len(key)], key),
        (contract.NEGATIVE_KEY, "UINT8", [1, len(key)], key),
    ]
    _infer(url, inputs, contract.VELOCITY, seconds)


def _conditioning(info: ServiceInfo) -> tuple[bytes, bytes]:
    """Key and safetensors file of a prompt of `TRIAL_TOKENS` tokens, all zeros and masked in."""
    header: dict[str, Any] = {}
    tensors, content = {}, b""
    for name, free in sorted(info.conditioning.items()):
        shape = contract.sized(free, contract.TRIAL_TOKENS)
        masks = name == contract.MASK
        data = b"\1" * prod(shape) if masks else bytes(prod(shape) * contract.ITEM_BYTES[info.precision])
        dtype = "BOOL" if masks else contract.FILE_TYPES[info.precision]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(data)]}
        tensors[name] = ("torch.bool" if masks else contract.DTYPES[info.precision], shape, data)
        content += data
    text = json.dumps(header).encode()
    return contract.content_key(tensors), struct.pack("<Q", len(text)) + text + content


def _describe(url: str, seconds: float) -> ServiceInfo:
    try:
        config = json.loads(_call(f"{url}/config", None, {}, seconds))
        return ServiceInfo.model_validate_json(config["parameters"][contract.DESCRIPTION]["string_value"])
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{url}/config answers, but not as a teacher server does; who listens there?") from error


def _infer(url: str, inputs: list[tuple[str, str, list[int], bytes]], output: str, seconds: float) -> None:
    """Tensors as bytes behind the JSON: Triton's binary extension of the inference protocol."""
    header = {
        "inputs": [
            {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(data)}}
            for name, kind, shape, data in inputs
        ],
        "outputs": [{"name": output, "parameters": {"binary_data": True}}],
    }
    text = json.dumps(header).encode()
    body = text + b"".join(data for *_, data in inputs)
    _call(f"{url}/infer", body, {"Inference-Header-Content-Length": str(len(text))}, seconds)


def _call(url: str, body: bytes | None, headers: dict[str, str], seconds: float) -> Any:
    request = urllib.request.Request(url, data=body, headers=headers)  # noqa: S310  (http:// is written above)
    try:
        with _DIRECT.open(request, timeout=seconds) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace")
        if contract.NOT_FINITE in reason:
            raise RefusedError(json.loads(reason)["error"]) from error
        raise UnavailableError(f"{url} answered {error.code}: {reason[:500]}") from error
    except OSError as error:
        raise UnavailableError(f"{url} does not answer: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """0: it can. REFUSED: it answers what must not be used. UNAVAILABLE: it does not answer now."""
    options = argparse.ArgumentParser(prog="python -m opd_serving.teacher.probe", description=__doc__)
    options.add_argument("--address", required=True, help="host:port of the server's HTTP service")
    options.add_argument("--timeout", type=float, default=5.0, help="seconds")
    arguments = options.parse_args(argv)
    try:
        probe(arguments.address, arguments.timeout)
    except OPDError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
