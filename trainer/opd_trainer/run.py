"""Everything a round needs, and the clock of its phases."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING

from opd_core.api.training import Training
from opd_core.conditioning import Conditioning, Prompts
from opd_core.diffusion.transitions import Transition
from opd_core.models.pipeline import Model
from torch import Tensor

from opd_trainer.batches import Row, Task
from opd_trainer.ema import Ema
from opd_trainer.encoders import PromptCache
from opd_trainer.engine import Engine, World
from opd_trainer.memory import Plan
from opd_trainer.precision import GradientScale
from opd_trainer.record import PHASES
from opd_trainer.validation import Validation

if TYPE_CHECKING:  # a method knows the run that it is a method of
    from opd_trainer.methods.method import Method

STUDENT = "student"  # name of the trained adapter


@dataclass(eq=False)
class Run:
    """Built once by `setup`; only `seconds` and `steps`, the optimiser steps so far, change from round to round.

    `hurry`: to be set by whoever tells the run to stop; nobody is asked again then who did not answer.
    """

    training: Training
    tasks: Sequence[Task]
    model: Model
    path: Sequence[Transition]
    method: "Method"
    encode: PromptCache
    negative: Conditioning
    engine: Engine
    ema: Ema
    scale: GradientScale | None
    world: World
    plan: Plan
    batches: Sequence[list[Row]]
    hurry: Event
    validation: Validation | None = None
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def velocity(self, x: Tensor, sigma: Tensor | float, prompts: Prompts) -> Tensor:
        """The student's guided velocity [B, ...] at `x` and `sigma`, one for all or [B], with its graph where gradients
        are on."""
        return self._scaled(self.model.velocity(x, sigma, prompts))

    def branches(self, x: Tensor, sigma: Tensor | float, prompts: Prompts) -> Tensor:
        """The same of both branches of guidance, [B, 2, ...]."""
        return self._scaled(self.model.branches(x, sigma, prompts))

    def _scaled(self, answer: Tensor) -> Tensor:
        if self.scale is not None and answer.requires_grad:
            self.scale.attach(answer)
        return answer

    @contextmanager
    def spent(self, phase: str) -> Iterator[None]:
        """Count the time inside as `phase`. A GPU's time shows where the program next needs a result of it: rollout and
        update can only be told apart on a CPU, waiting for a teacher everywhere."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - began
