"""The model repository: the same files for the wheel's tritonserver and for the NGC container."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from opd_core.errors import InvalidError
from opd_core.models.adapter_file import AdapterFile
from opd_core.models.teacher_files import TeacherFiles
from opd_core.teachers import contract
from opd_core.teachers.contract import ServiceInfo
from opd_core.teachers.describe import service_info

CACHE_BYTES = 4 << 30  # 1,500 prompts of SD3.5 at 333 tokens; a round reuses each of its prompts at every step
_QUEUE_MICROSECONDS = 1000
_QUEUE_REQUESTS = 256  # of up to MAX_ROWS rows: 1 GB at 512 x 512 pixels

_MODEL_PY = '''"""Triton's entry point; the work is in opd_serving.teacher.backend."""

from opd_serving.teacher.backend import TeacherBackend as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    folder: Path,
    *,
    base: Path,
    teachers: Mapping[str, TeacherFiles],
    precision: str,
    max_sequence_length: int,
    device: str,
    adapter_bytes: int | None = None,
) -> ServiceInfo:
    """Write a repository with the one model `contract.MODEL` into `folder`, replacing what is there.

    Raises:
        InvalidError: the teachers are not all on one model.
    """
    model, *others = {base if isinstance(files, AdapterFile) else files for files in teachers.values()}
    if others:
        raise InvalidError(
            f"one server computes with one model, and {', '.join(teachers)} have several; name some that have one with "
            "--teacher: LoRAs on the base, or teachers of one model"
        )
    info = service_info(base, teachers, precision, max_sequence_length)
    setup = {
        "model": str(model.resolve()),
        # A teacher without an adapter is the model itself.
        "teachers": {
            name: {"path": str(files.file.resolve()), "alpha": files.stated} if isinstance(files, AdapterFile) else None
            for name, files in teachers.items()
        },
        "device": device,
        "cache_bytes": CACHE_BYTES,
        "adapter_bytes": adapter_bytes,
    }
    shutil.rmtree(folder, ignore_errors=True)
    version = folder / contract.MODEL / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(_MODEL_PY)
    (version / "setup.json").write_text(json.dumps(setup, indent=2))
    (folder / contract.MODEL / "config.pbtxt").write_text(config_pbtxt(info, device))
    return info


def config_pbtxt(info: ServiceInfo, device: str) -> str:
    """The model configuration. One instance: the prompt cache lives in its process."""
    latents, shape = contract.WIRE_TYPES[info.precision], f"[ {', '.join(map(str, info.latents))} ]"
    key = f"[ {contract.KEY_BYTES} ]"
    inputs = [
        (contract.LATENTS, latents, shape),
        (contract.SIGMA, "FP32", "[ 1 ]"),
        (contract.GUIDANCE, "FP32", "[ 1 ]"),
        (contract.TRUE_CFG, "FP32", "[ 1 ]"),
        (contract.TEACHER, "INT32", "[ 1 ]"),
        (contract.KEY, "UINT8", key),
        (contract.NEGATIVE_KEY, "UINT8", key),
        (contract.MEAN_A, "FP32", "[ 1 ]"),
        (contract.MEAN_B, "FP32", "[ 1 ]"),
        (contract.CONDITIONING, "UINT8", "[ -1 ]"),
    ]
    outputs = [
        (contract.VELOCITY, "FP16", shape),
        (contract.MEAN, "FP32", shape),
        (contract.BRANCHES, "FP16", f"[ {', '.join(map(str, (2, *info.latents)))} ]"),
        (contract.REGISTERED, "UINT8", "[ 1 ]"),
    ]
    lines = [f'name: "{contract.MODEL}"', 'backend: "python"', f"max_batch_size: {contract.MAX_ROWS}"]
    lines += [
        f'input {{ name: "{name}" data_type: TYPE_{dtype} dims: {dims} optional: true }}'
        for name, dtype, dims in inputs
    ]
    lines += [f'output {{ name: "{name}" data_type: TYPE_{dtype} dims: {dims} }}' for name, dtype, dims in outputs]
    # No preferred sizes: they serve TensorRT profiles, and a client that has rows sends them all at once anyway.
    # A client whose request finds no place is told UNAVAILABLE, and asks again or elsewhere.
    queue = f"default_queue_policy {{ max_queue_size: {_QUEUE_REQUESTS} }}"
    lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_MICROSECONDS} {queue} }}")
    kind, _, number = device.partition(":")
    # Without a number there would be an instance per GPU, each with a prompt cache that the client knows nothing of.
    where = f"kind: KIND_GPU gpus: [ {number or 0} ]" if kind == "cuda" else "kind: KIND_CPU"
    lines.append(f"instance_group {{ count: 1 {where} }}")
    description = json.dumps(info.model_dump_json())  # a JSON string is a valid pbtxt string
    lines.append(f'parameters {{ key: "{contract.DESCRIPTION}" value: {{ string_value: {description} }} }}')
    return "\n".join(lines) + "\n"
