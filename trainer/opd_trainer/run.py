"""Everything a round needs, and the clock of its phases."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from opd_core.api.types import Training
from opd_core.conditioning import Conditioning
from opd_core.diffusion.transitions import Transition
from opd_core.models.pipeline import Model
from opd_core.teachers.client import TeacherClient

from opd_trainer.batches import Row, Task
from opd_trainer.ema import Ema
from opd_trainer.encoders import PromptCache
from opd_trainer.engine import Engine, World
from opd_trainer.memory import Plan
from opd_trainer.objectives.match import Loss
from opd_trainer.precision import GradientScale
from opd_trainer.record import PHASES
from opd_trainer.validation import Validation


@dataclass(eq=False)
class Run:
    """Built once by `setup.build_run`; only `seconds` changes from round to round."""

    training: Training
    tasks: Sequence[Task]
    model: Model
    path: Sequence[Transition]
    loss: Loss
    weights: Sequence[float]
    encode: PromptCache
    negative: Conditioning
    teachers: TeacherClient
    engine: Engine
    ema: Ema
    scale: GradientScale | None
    world: World
    plan: Plan
    batches: Sequence[list[Row]]
    validation: Validation | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def spent(self, phase: str) -> Iterator[None]:
        """Count the time inside as `phase`. A GPU's time shows where the program next needs a result of it: rollout and
        update can only be told apart on a CPU, waiting for a teacher everywhere."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - began
