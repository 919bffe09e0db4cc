"""Teachers inside the trainer's own process: `teacherServing.placement: InProcess`, for comparisons."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from opd_core.conditioning import Conditioning
from opd_core.errors import InvalidError, OutOfMemoryError, RefusedError
from opd_core.models.adapter_file import AdapterFile
from opd_core.models.adapter_pool import AdapterPool, adapter_room
from opd_core.models.pipeline import load_model
from opd_core.models.teacher_files import TeacherFiles
from opd_core.precision import TORCH_DTYPES
from opd_core.teachers.client import ClientStats
from opd_core.teachers.contract import BASE, ServiceInfo
from opd_core.teachers.describe import service_info
from opd_core.teachers.engine import Engine, NonFiniteError, Query


class LocalTeachers:
    """A copy of the base with the LoRAs of teachers, and the models of those that have one; answers before `submit`
    returns."""

    def __init__(
        self,
        base: Path,
        teachers: Mapping[str, TeacherFiles],
        *,
        precision: str,
        max_sequence_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.stats = ClientStats()
        load = partial(load_model, device=device, dtype=TORCH_DTYPES[precision], parts={"transformer"})
        self._engines: dict[str, Engine] = {}  # by teacher
        self._info = service_info(base, teachers, precision, max_sequence_length)
        adapters = {name: files for name, files in teachers.items() if isinstance(files, AdapterFile)}
        if adapters:
            model = load(base)
            pool = AdapterPool(model.transformer, adapters, self._info.teachers, adapter_room(model.device))
            self._engines |= dict.fromkeys(adapters, Engine(model, tuple(adapters), pool))
        folders: dict[Path, list[str]] = {}
        for name, files in teachers.items():
            if isinstance(files, Path):
                folders.setdefault(files, []).append(name)
        for folder, names in folders.items():
            self._engines |= dict.fromkeys(names, Engine(load(folder), names))

    def describe(self) -> ServiceInfo:
        return self._info

    def submit(
        self,
        teacher: str,
        latents: Tensor,
        sigmas: Tensor,
        scales: Tensor,
        conditioning: Sequence[Conditioning],
        negative: Conditioning,
        base: bool = False,
        branches: bool = False,
    ) -> "Future[Tensor]":
        self.stats.requests += 1
        future: Future[Tensor] = Future()
        engine = self._engines[teacher]
        query = Query(
            teachers=torch.full((len(latents),), BASE if base else engine.teachers.index(teacher)),
            latents=latents.detach(),
            sigmas=sigmas.detach().cpu().float(),
            scales=scales.detach().cpu().float(),
            conditioning=conditioning,
            negative=[negative] * len(latents),
            branches=branches,
        )
        try:
            query.check(engine.teachers)
            future.set_result(engine.answer(query).cpu())
        except NonFiniteError as error:
            future.set_exception(RefusedError(str(error)))
        except (InvalidError, OutOfMemoryError) as error:
            future.set_exception(error)
        return future

    def stop_waiting(self) -> None:
        pass

    def close(self) -> None:
        pass
