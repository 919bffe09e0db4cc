"""Teachers inside the trainer's own process: `teacherServing.placement: InProcess`, for comparisons."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from opd_core.artifacts import installed_versions
from opd_core.conditioning import Conditioning
from opd_core.errors import OutOfMemoryError, RefusedError
from opd_core.models.adapter_file import AdapterFile
from opd_core.models.adapters import load_adapter
from opd_core.models.fingerprint import adapter_fingerprint, fingerprint
from opd_core.models.pipeline import load_model
from opd_core.precision import TORCH_DTYPES
from opd_core.teachers.client import ClientStats
from opd_core.teachers.contract import ServiceInfo
from opd_core.teachers.engine import Engine, NonFiniteError, Query


class LocalTeachers:
    """A copy of the base with all teachers' adapters; answers before `submit` returns."""

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, AdapterFile],
        *,
        precision: str,
        max_sequence_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.stats = ClientStats()
        self._model = load_model(base, device=device, dtype=TORCH_DTYPES[precision], parts={"transformer"})
        for name, adapter in adapters.items():
            load_adapter(self._model.transformer, adapter, name)
        self._engine = Engine(self._model, tuple(adapters))
        config = self._model.transformer.config
        self._info = ServiceInfo(
            base=fingerprint(base),
            teachers={name: adapter_fingerprint(adapter) for name, adapter in adapters.items()},
            precision=precision,
            max_sequence_length=max_sequence_length,
            latent_channels=self._model.latent_channels,
            embeds_size=config.joint_attention_dim,
            pooled_size=config.pooled_projection_dim,
            versions=installed_versions(),
        )

    def describe(self) -> ServiceInfo:
        return self._info

    def submit(
        self,
        teacher: str,
        latents: Tensor,
        sigmas: Tensor,
        guidance: Tensor,
        conditioning: Sequence[Conditioning],
        negative: Conditioning,
    ) -> "Future[Tensor]":
        self.stats.requests += 1
        future: Future[Tensor] = Future()
        query = Query(
            teachers=torch.full((len(latents),), self._engine.teachers.index(teacher)),
            latents=latents.detach(),
            sigmas=sigmas.detach().cpu().float(),
            guidance=guidance.detach().cpu().float(),
            conditioning=conditioning,
            negative=[negative] * len(latents),
        )
        try:
            query.check(self._engine.teachers)
            future.set_result(self._engine.answer(query).cpu())
        except NonFiniteError as error:
            future.set_exception(RefusedError(str(error)))
        except OutOfMemoryError as error:
            future.set_exception(error)
        return future

    def stop_waiting(self) -> None:
        pass

    def close(self) -> None:
        pass
