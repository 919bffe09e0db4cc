"""The Triton Python model: tensors in, checks, the shared engine, tensors out.

Written against what Triton 2.51 (the wheel) and today's containers have in common: DLPack in both directions, since
numpy 2 in the stub of 2.51 corrupts arrays silently, and no parameters in responses.
"""

import json
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from opd_core.conditioning import Conditioning
from opd_core.device import is_out_of_memory
from opd_core.diffusion.guidance import combined
from opd_core.errors import InvalidError, OPDError, OutOfMemoryError, RefusedError
from opd_core.models.adapter_file import read_teacher
from opd_core.models.adapter_pool import AdapterPool, PoolStats, adapter_room
from opd_core.models.pipeline import load_model
from opd_core.precision import TORCH_DTYPES
from opd_core.teachers import contract
from opd_core.teachers.contract import ServiceInfo
from opd_core.teachers.engine import ConditioningCache, Engine, NonFiniteError, Query, UnknownKeyError
from opd_core.teachers.payload import read_conditioning
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from opd_serving.teacher.metrics import METRICS

_QUERY = (contract.LATENTS, contract.SIGMA, contract.GUIDANCE, contract.TEACHER, contract.KEY, contract.NEGATIVE_KEY)
_REGISTER = (contract.KEY, contract.CONDITIONING)


class TeacherBackend:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._info = ServiceInfo.model_validate_json(config["parameters"][contract.DESCRIPTION]["string_value"])
        setup = json.loads(Path(args["model_repository"], args["model_version"], "setup.json").read_text())
        self._dtype = TORCH_DTYPES[self._info.precision]
        self._model = load_model(Path(setup["model"]), device=setup["device"], dtype=self._dtype, parts={"transformer"})
        teachers = setup["teachers"]
        adapters = {name: read_teacher(Path(lora["path"]), lora["alpha"]) for name, lora in teachers.items() if lora}
        pool = None
        if adapters:
            room = setup["adapter_bytes"] or adapter_room(self._model.device)
            pool = AdapterPool(self._model.transformer, adapters, self._info.teachers, room)
        self._engine = Engine(self._model, tuple(teachers), pool)
        self._counters = _Counters(pool) if pool else None
        self._cache = ConditioningCache(_cache_bytes(self._model.device, setup["cache_bytes"]))
        self._prove()
        self._tell()

    def _prove(self) -> None:
        """One row of every teacher: who serves has shown that all of its teachers can answer.

        Raises:
            RefusedError: an answer that is not finite.
        """
        count = len(self._engine.teachers)
        prompt = Conditioning(
            {
                name: torch.ones(
                    contract.sized(shape, contract.TRIAL_TOKENS),
                    dtype=torch.bool if name == contract.MASK else self._dtype,
                )
                for name, shape in self._info.conditioning.items()
            }
        )
        query = Query(
            teachers=torch.arange(count),
            latents=torch.zeros(count, *contract.sized(self._info.latents, contract.TRIAL_SIDE), dtype=self._dtype),
            sigmas=torch.ones(count),
            scales=torch.ones(count, 2),
            conditioning=[prompt] * count,
            negative=[prompt] * count,
        )
        try:
            self._engine.answer(query)
        except NonFiniteError as error:
            raise RefusedError(str(error)) from error
        except OutOfMemoryError as error:  # whoever shares the GPU may give some back
            print(f"teacher server: not tried: {error}", flush=True)

    def _tell(self) -> None:
        if self._counters:
            self._counters.tell()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request. Requests that fit together are computed in one batch, each is checked alone.

        On a CPU every request is a batch of its own: the last bits of a row depend on the batch it is computed in, so
        what happens to wait together would decide them, and a run could not be repeated bit by bit. A larger batch is
        no faster there.
        """
        responses: list[Any] = [None] * len(requests)
        queries: dict[int, Query] = {}
        for i, request in enumerate(requests):
            try:
                inputs = _inputs(request)
                if contract.CONDITIONING in inputs:
                    responses[i] = self._register(inputs)
                else:
                    queries[i] = self._query(inputs, contract.BRANCHES in request.requested_output_names())
            except Exception as error:
                responses[i] = _refuse(error)
        groups: dict[Any, dict[int, Query]] = {}
        for i, query in queries.items():
            alone = i if self._model.device.type == "cpu" else None
            groups.setdefault((query.latents.shape[1:], query.branches, alone), {})[i] = query
        for group in groups.values():
            for i, result in self._answer(group).items():
                responses[i] = self._respond(requests[i], queries[i], result)
        self._tell()
        return responses

    # ------------------------------------------------------------------------------------------ registering

    def _register(self, inputs: dict[str, Tensor]) -> Any:
        _need(inputs, _REGISTER)
        for key, file in zip(_keys(inputs[contract.KEY]), inputs[contract.CONDITIONING], strict=True):
            conditioning = read_conditioning(self._info, file.numpy().tobytes())
            if conditioning.key != key:
                raise InvalidError(f"key {key.hex()} is not the digest of its tensors, {conditioning.key.hex()}")
            self._cache.put(key, conditioning.to(self._model.device))
        done = torch.ones(len(inputs[contract.KEY]), 1, dtype=torch.uint8)
        return pb_utils.InferenceResponse([_to_triton(contract.REGISTERED, done)])

    # ------------------------------------------------------------------------------------------ answering

    def _query(self, inputs: dict[str, Tensor], branches: bool) -> Query:
        _need(inputs, _QUERY)
        guidance = inputs[contract.GUIDANCE].flatten()
        true_cfg = inputs[contract.TRUE_CFG].flatten() if contract.TRUE_CFG in inputs else torch.ones_like(guidance)
        query = Query(
            teachers=inputs[contract.TEACHER].flatten().long(),
            latents=inputs[contract.LATENTS].view(self._dtype),
            sigmas=inputs[contract.SIGMA].flatten(),
            scales=torch.stack([guidance, true_cfg], 1),
            conditioning=self._cache.get(_keys(inputs[contract.KEY])),
            negative=self._cache.get(_keys(inputs[contract.NEGATIVE_KEY])),
            branches=branches,
        )
        query.check(self._engine.teachers)
        return query

    def _answer(self, queries: dict[int, Query]) -> dict[int, Tensor | Exception]:
        """Answers by request; where one of them spoils the batch, each is computed alone and answers for itself."""
        try:
            answers = self._engine.answer(_merge(list(queries.values())))
        except Exception as error:
            if len(queries) == 1:
                return dict.fromkeys(queries, error)
            return {i: result for i, query in queries.items() for result in self._answer({i: query}).values()}
        return dict(zip(queries, torch.split(answers, [len(q.latents) for q in queries.values()]), strict=True))

    def _respond(self, request: Any, query: Query, answer: Tensor | Exception) -> Any:
        try:
            if isinstance(answer, Exception):
                raise answer
            wanted = request.requested_output_names()
            outputs, velocity = [], answer
            if query.branches:
                outputs.append(_to_triton(contract.BRANCHES, answer.half()))
                velocity = combined(self._model.guidance, answer, query.scales.to(answer.device))
            if contract.VELOCITY in wanted:
                outputs.append(_to_triton(contract.VELOCITY, velocity.half()))
            if contract.MEAN in wanted:
                outputs.append(_to_triton(contract.MEAN, self._mean(_inputs(request), query, velocity)))
            return pb_utils.InferenceResponse(outputs)
        except Exception as error:
            return _refuse(error)

    def _mean(self, inputs: dict[str, Tensor], query: Query, velocity: Tensor) -> Tensor:
        if self._dtype != torch.float32:
            raise InvalidError(
                f"a mean needs teacherServing.precision FP32: states travel in {self._info.precision} here, and its "
                "rounding of x is as large as what a mean is asked for; ask for the velocity"
            )
        _need(inputs, (contract.MEAN_A, contract.MEAN_B))
        ones = [1] * (velocity.ndim - 1)
        a, b = (inputs[name].view(-1, *ones).to(velocity) for name in (contract.MEAN_A, contract.MEAN_B))
        return a * query.latents.to(velocity) + b * velocity


class _Counters:
    """A pool's figures among Triton's metrics."""

    def __init__(self, pool: AdapterPool) -> None:
        self._pool, self._told = pool, PoolStats()
        kinds = {"counter": pb_utils.MetricFamily.COUNTER, "gauge": pb_utils.MetricFamily.GAUGE}
        self._families = [  # kept, since a metric ends with its family
            pb_utils.MetricFamily(name=each.name, description=each.meaning, kind=kinds[each.kind]) for each in METRICS
        ]
        self._loads, self._drops, self._there = (family.Metric(labels={}) for family in self._families)

    def tell(self) -> None:
        now, told = replace(self._pool.stats), self._told
        self._loads.increment(now.loads - told.loads)
        self._drops.increment(now.drops - told.drops)
        self._there.set(len(self._pool.resident))
        self._told = now


def _cache_bytes(device: torch.device, wanted: int) -> int:
    """Of prompts on the model's device: of a GPU's memory an eighth at most."""
    if device.type != "cuda":
        return wanted
    return min(wanted, torch.cuda.get_device_properties(device).total_memory // 8)


def _merge(queries: list[Query]) -> Query:
    if len(queries) == 1:
        return queries[0]
    return Query(
        teachers=torch.cat([q.teachers for q in queries]),
        latents=torch.cat([q.latents for q in queries]),
        sigmas=torch.cat([q.sigmas for q in queries]),
        scales=torch.cat([q.scales for q in queries]),
        conditioning=[c for q in queries for c in q.conditioning],
        negative=[c for q in queries for c in q.negative],
        branches=queries[0].branches,
    )


def _need(inputs: dict[str, Tensor], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in inputs]
    if missing:
        raise InvalidError(f"the request has no {', '.join(missing)}; it needs {', '.join(names)}")


def _refuse(error: Exception) -> Any:
    """No exception leaves `execute`, where it would fail every request that happens to wait beside its own."""
    code, message = pb_utils.TritonError.INVALID_ARG, str(error)
    if isinstance(error, UnknownKeyError):
        code = pb_utils.TritonError.NOT_FOUND
    elif isinstance(error, OutOfMemoryError) or is_out_of_memory(error):
        code = pb_utils.TritonError.UNAVAILABLE  # whoever shares the GPU may give some back: clients ask again
        message = f"teacher server: out of memory: {error}"
    elif not isinstance(error, OPDError):
        code = pb_utils.TritonError.INTERNAL
        message = f"{type(error).__name__}: {error}"
        traceback.print_exception(error)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _keys(tensor: Tensor) -> list[bytes]:
    return [bytes(row.tolist()) for row in tensor]


def _inputs(request: Any) -> dict[str, Tensor]:
    return {tensor.name(): from_dlpack(tensor.to_dlpack()) for tensor in request.inputs()}


def _to_triton(name: str, tensor: Tensor) -> Any:
    return pb_utils.Tensor.from_dlpack(name, to_dlpack(tensor.contiguous().cpu()))
