"""What a checkpoint is tied to, what it survives, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.errors import InvalidError, RefusedError
from opd_trainer import checkpoint
from opd_trainer.checkpoint import Identity
from opd_trainer.loop import distil
from opd_trainer.run import Run

IDENTITY = Identity(
    training_digest="sha256:a", base="sha256:b", teachers={"ocr": "sha256:c"}, prompts={"ocr": "sha256:d"},
    world_size=1, zero_stage=0,
)  # fmt: skip
CONSTANT = {"spec.training.optimizer": {"learningRate": 1e-3}}


def save(run: Run, folder: Path, round_: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, round_, run.engine, run.ema, IDENTITY, run.world, keep)


def step(run: Run, round_: int) -> None:
    distil(run, round_)
    run.engine.step(1e-3)
    run.ema.update(round_)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weights_optimiser_and_average_come_back_exactly(
    make_run: Callable[..., Run], tmp_path: Path, stage: int
) -> None:
    changes = {"spec.training.deepspeed.zeroStage": stage}
    run = make_run(changes)
    step(run, 0)
    folder = save(run, tmp_path, 1)
    step(run, 1)
    expected = [p.detach().clone() for p in run.engine.parameters], [t.clone() for t in run.ema.tensors]

    resumed = make_run(changes)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found[0] == folder
    checkpoint.load(*found, resumed.engine, resumed.ema, IDENTITY)
    step(resumed, found[1].round)
    assert all(torch.equal(a, b) for a, b in zip(resumed.engine.parameters, expected[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed.ema.tensors, expected[1], strict=True))


def test_only_the_newest_are_kept_and_latest_names_the_newest(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run()
    for round_ in (5, 10, 1_000_000):
        save(run, tmp_path, round_)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "round-000010", "round-1000000"]
    assert checkpoint.latest(tmp_path)[1].round == 1_000_000  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training_digest": "sha256:x"}, "training_digest: the checkpoint has sha256:a, this run sha256:x"),
        ({"teachers": {"ocr": "sha256:x"}}, "teachers: "),
        ({"base": "sha256:x"}, "base: "),
        ({"prompts": {"ocr": "sha256:x"}}, "prompts: "),
        ({"world_size": 2}, "written by 1 ranks, and this run has 2; set nodes x processesPerNode to 1"),
    ],
)
def test_another_runs_checkpoint_is_refused(
    make_run: Callable[..., Run], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = make_run()
    save(run, tmp_path, 1)
    folder, manifest = checkpoint.latest(tmp_path)  # type: ignore[misc]
    with pytest.raises(RefusedError, match=message):
        checkpoint.load(folder, manifest, run.engine, run.ema, IDENTITY.model_copy(update=change))


def test_a_damaged_checkpoint_is_named_with_what_to_do(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run()
    folder = save(run, tmp_path, 1)
    manifest = checkpoint.latest(tmp_path)[1]  # type: ignore[index]
    (folder / checkpoint.EMA).write_bytes(b"cut")
    with pytest.raises(InvalidError, match="round-000001 is damaged.*older one"):
        checkpoint.load(folder, manifest, run.engine, run.ema, IDENTITY)
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"round": 1}))
    with pytest.raises(InvalidError, match="cannot be read"):
        checkpoint.latest(tmp_path)


def test_a_folder_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    (tmp_path / ".partial-000001").mkdir()
    assert checkpoint.latest(tmp_path) is None
