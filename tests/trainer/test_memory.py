"""What fits on a card: the accounting on SD3.5-Medium's real configuration, and the choice made from it."""

import re
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.api.training import LoRA, Passes
from opd_core.models.adapters import add_student_adapter
from opd_core.models.pipeline import Model
from opd_core.precision import arithmetic
from opd_trainer.loop import play_round
from opd_trainer.memory import IN_FLIGHT, Footprint, Plan, measure, plan, saved_bytes
from opd_trainer.methods.opd import one_pass
from opd_trainer.run import Run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .test_shapes import CONTEXT, POOLED, TOKENS, medium, medium_model  # noqa: F401  (a fixture)

GIB = 2**30
# Of Stable Diffusion 3.5 Medium at 512 pixels with guidance, by the test below.
MEDIUM = Footprint(graph=int(4.0 * GIB), checkpointed=int(0.18 * GIB), block=int(0.17 * GIB))
# Transformer in half precision, the student with its optimiser, the CUDA context.
RESIDENT = 7 * GIB


@pytest.fixture(scope="module")
def footprint(medium: Model) -> Footprint:  # noqa: F811
    """Fake tensors: shapes and dtypes of a CPU's kernels, autocast and attention, without numbers or memory."""
    lora = LoRA()
    add_student_adapter(
        medium.transformer, rank=lora.rank, alpha=lora.alpha, target_modules=medium.family.targets, seed=0
    )
    with FakeTensorMode():
        for name, module in medium.transformer.named_modules():
            trained = name.endswith(".student")  # float32, as in training
            for key, tensor in module.named_parameters(recurse=False):
                dtype = torch.float32 if trained else tensor.dtype
                fake = torch.empty(tensor.shape, dtype=dtype)
                module.register_parameter(key, nn.Parameter(fake, requires_grad=trained))
            for key, tensor in module.named_buffers(recurse=False):
                module.register_buffer(key, torch.empty(tensor.shape, dtype=tensor.dtype))
        model = medium_model(medium.transformer, torch.device("cpu"))
        half = {"dtype": torch.bfloat16}

        def forward(images: int) -> Tensor:
            rows = 2 * images  # guidance asks twice; which rows need it cannot be asked of fake numbers
            with arithmetic(model.device, torch.bfloat16):
                return model.forward(
                    torch.empty(rows, 16, 64, 64), torch.empty(rows),
                    {
                        "embeds": torch.empty(rows, TOKENS, CONTEXT, **half),  # type: ignore[arg-type]
                        "pooled": torch.empty(rows, POOLED, **half),  # type: ignore[arg-type]
                    },
                    torch.empty(rows),
                )  # fmt: skip

        found = measure(model, forward)
        assert saved_bytes(model.transformer, lambda: forward(3)) == pytest.approx(3 * found.graph, rel=0.01)
    return found


def test_the_accounting_at_the_real_size(footprint: Footprint) -> None:
    """37 GiB for the paper's nine images of a rank; a graph of an image is 4.1 GiB, 0.18 with checkpointing."""
    assert footprint.graph == pytest.approx(MEDIUM.graph, rel=0.1)
    assert footprint.checkpointed == pytest.approx(MEDIUM.checkpointed, rel=0.3)
    assert footprint.block == pytest.approx(footprint.graph / 24, rel=0.01)


@pytest.mark.parametrize(
    ("card", "images", "expected"),
    [
        (24, 9, (1, False, 2)),
        (40, 9, (1, False, 2)),
        (80, 9, (3, False, 2)),
        (80, 72, (4, False, 2)),
        (141, 9, (9, False, 2)),
        (12, 9, (1, False, 0)),
        (8, 9, (1, True, 2)),
    ],
)
def test_the_defaults_fit_the_card(card: int, images: int, expected: tuple[int, bool, int]) -> None:
    chosen = plan(MEDIUM, images, card * GIB - RESIDENT, Passes.ONE)
    assert (chosen.micro_batch_size, chosen.gradient_checkpointing, chosen.in_flight) == expected
    assert chosen.fits
    assert chosen.needed + RESIDENT < card * GIB
    assert images % chosen.micro_batch_size == 0


def test_the_documented_table_is_the_plans(repository: Path) -> None:
    text = (repository / "docs" / "training.md").read_text()
    rows = re.findall(r"\| (\d+) GB \| (\d+) \| (\d+) \| (on|off) \| (\d) \| (\d+) GiB \|", text)
    assert len(rows) == 6
    for card, images, *told in rows:
        chosen = plan(MEDIUM, int(images), int(card) * GIB - RESIDENT, Passes.ONE)
        switch = "on" if chosen.gradient_checkpointing else "off"
        assert told == [
            str(chosen.micro_batch_size), switch, str(chosen.in_flight + 1), str(round(chosen.needed / GIB)),
        ]  # fmt: skip
    line = f"9 images of a rank: {plan(MEDIUM, 9, 80 * GIB - RESIDENT, Passes.ONE)}"
    assert line in text


def test_what_the_spec_says_stays(make_spec: Any) -> None:
    room = 80 * GIB - RESIDENT
    assert plan(MEDIUM, 9, room, Passes.ONE, micro_batch_size=1).micro_batch_size == 1
    recomputed = plan(MEDIUM, 9, room, Passes.ONE, gradient_checkpointing=True)
    assert (recomputed.gradient_checkpointing, recomputed.micro_batch_size) == (True, 9)
    both = plan(MEDIUM, 9, room, Passes.ONE, 9, False)  # two graphs of nine are too much, one is not
    assert (both.micro_batch_size, both.gradient_checkpointing, both.in_flight, both.fits) == (9, False, 0, True)
    absurd = plan(MEDIUM, 72, room, Passes.ONE, 72, False)
    assert not absurd.fits
    assert absurd.in_flight == 0
    assert "this may be too much" in str(absurd)
    assert plan(MEDIUM, 72, None, Passes.ONE) == Plan(
        72, False, IN_FLIGHT, 72 * (3 * MEDIUM.graph + MEDIUM.block), None
    )
    assert plan(MEDIUM, 9, room, Passes.TWO).micro_batch_size == 9  # it holds one graph


def test_a_graph_that_does_not_even_fit_for_one_image_is_recomputed(make_run: Callable[..., Run]) -> None:
    """A small card: measuring the plain graph runs out of memory, and that decides it."""
    run = make_run()

    def forward(images: int) -> Tensor:
        if not run.model.transformer.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run.engine.parameters[0].exp()

    found = measure(run.model, forward)
    assert plan(found, 6, 8 * GIB, Passes.ONE).gradient_checkpointing
    with pytest.raises(RuntimeError, match="something else"):
        measure(run.model, lambda images: (_ for _ in ()).throw(RuntimeError("something else")))


def test_a_smaller_room_never_asks_for_more() -> None:
    plans = [plan(MEDIUM, 72, room * GIB, Passes.ONE) for room in range(1, 200)]
    assert all(a.needed <= b.needed for a, b in pairwise(plans) if a.fits)
    assert all(chosen.needed <= chosen.room for chosen in plans if chosen.fits and chosen.room is not None)


@dataclass
class Count:
    """Bytes of saved tensors, without those of the storages `own`."""

    own: set[int]
    graphs: dict[int, int] = field(default_factory=dict)  # that keep a storage
    alive: int = 0
    peak: int = 0


class Kept:
    """A saved tensor for as long as a graph keeps it."""

    def __init__(self, count: Count, tensor: Tensor) -> None:
        self.count, self.tensor, self.key = count, tensor, tensor.untyped_storage()._cdata
        self._add(1)

    def __del__(self) -> None:
        self._add(-1)

    def _add(self, graphs: int) -> None:
        count, before = self.count, self.count.graphs.get(self.key, 0)
        count.graphs[self.key] = before + graphs
        if self.key not in count.own and bool(before) != bool(before + graphs):
            count.alive += graphs * self.tensor.untyped_storage().nbytes()
            count.peak = max(count.peak, count.alive)


def test_the_plan_bounds_what_a_round_really_keeps(
    make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where a whole round's saved tensors can be counted as they come and go."""
    for room, changes in ((None, {}), (40 << 20, {}), (40 << 20, {"spec.training.gradientCheckpointing": True})):
        monkeypatch.setattr("opd_trainer.setup.free_bytes", lambda device, room=room: room)
        run = make_run({**changes, "spec.training.sampler": {"type": "ODE", "steps": 5}})
        assert f"6 images of a rank: {run.plan}" in capsys.readouterr().out
        assert run.batches[0] == run.batches[0][: run.plan.micro_batch_size]
        count = Count({parameter.untyped_storage()._cdata for parameter in run.model.transformer.parameters()})
        with torch.autograd.graph.saved_tensors_hooks(partial(Kept, count), lambda kept: kept.tensor):
            play_round(run, 0)
        assert 0 < count.peak <= run.plan.needed
        assert count.alive == 0


class LateAnswer(Future[Tensor]):
    def done(self) -> bool:
        return False


@dataclass
class LateTeachers:
    in_flight: int
    asked: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)

    def start(self) -> Tensor:
        return torch.zeros(1, 1, 2, 2)

    def noise(self, step: int) -> Tensor:
        return torch.zeros(1, 1, 2, 2)

    def student(self, x: Tensor, step: int) -> Tensor:
        return x + 1

    def teachers(self, x: Tensor, step: int) -> LateAnswer:
        self.asked.append(step)
        assert len(self.asked) - len(self.finished) <= self.in_flight + 2  # the next step is asked about already
        answer = LateAnswer()
        answer.set_result(x)
        return answer


def test_the_next_step_is_asked_about_before_a_match_is_trained(make_run: Callable[..., Run]) -> None:
    """A backward pass is queued before the state that follows has left the GPU otherwise."""
    path = make_run({"spec.training.sampler": {"type": "ODE", "steps": 4}}).path
    batch = LateTeachers(in_flight=0)
    asked = []
    for match in one_pass(path, [1.0, 0.0, 1.0, 1.0], batch, 0):
        asked.append(len(batch.asked))
        batch.finished.append(match.step)
    assert batch.asked == batch.finished == [0, 2, 3]
    assert asked == [1, 3, 3]


def test_a_window_is_the_most_that_waits(make_run: Callable[..., Run]) -> None:
    """However late the teachers are, no more graphs are alive than the plan allows, in the order of the steps."""
    path = make_run({"spec.training.sampler": {"type": "ODE", "steps": 6}}).path
    for in_flight in (0, 1, 2):
        batch = LateTeachers(in_flight)
        for match in one_pass(path, [1.0] * 6, batch, in_flight):
            batch.finished.append(match.step)
        assert batch.asked == batch.finished == list(range(6))
