"""Scores of the averaged student while it trains: what they are, that they cost the weights nothing, how they fail."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opd_core.artifacts import SamplingDefaults, Source, StudentManifest, write_student
from opd_core.errors import InvalidError
from opd_core.models.adapters import save_adapter
from opd_trainer import setup
from opd_trainer.engine import World
from opd_trainer.evaluate import evaluate
from opd_trainer.evaluation import VALIDATION_PROMPTS
from opd_trainer.run import STUDENT, Run
from opd_trainer.validation import look

from .conftest import SDE
from .test_published_defects import play

MakeRun = Callable[..., Run]

VALIDATED = {
    "spec.training.deepspeed.zeroStage": 1,
    "spec.evaluation.everyRounds": 2,
    "spec.evaluation.promptsPerTask": 3,
    "spec.evaluation.sampler": {"steps": 2},
}


def scores(run: Run, folder: Path, world: World | None = None) -> dict[str, dict[str, float]]:
    assert run.validation is not None
    return look(run.validation, run.model, STUDENT, run.ema, world or run.world, folder)  # type: ignore[return-value]


@pytest.mark.parametrize("sampler", [{}, SDE], ids=["ODE", "SDE"])
def test_the_weights_are_to_the_bit_what_they_are_without(
    make_run: MakeRun, tmp_path: Path, sampler: dict[str, Any]
) -> None:
    ours, theirs = make_run({**sampler, **VALIDATED}), make_run({**sampler, **VALIDATED, "spec.evaluation": {}})
    metrics = play(ours, tmp_path / "with", until=4)
    play(theirs, tmp_path / "without", until=4)
    for a, b in ((ours.engine.parameters, theirs.engine.parameters), (ours.ema.tensors, theirs.ema.tensors)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    log = [json.loads(line) for line in (tmp_path / "with" / "train" / "log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in log if "rewards" in line] == [2, 4]
    assert log[-1]["rewards"] == scores(ours, tmp_path / "again")
    for number in range(3):
        first, again = tmp_path / "with" / "train" / "looks" / "4", tmp_path / "again"
        file = Path("geneval", f"{number}.png")
        assert (first / file).read_bytes() == (again / file).read_bytes()
        assert (first / file).read_bytes() != (first.parent / "2" / file).read_bytes()
    row = metrics.progress["metrics"][1]
    assert row["reward/tiny-ocr"] == log[-1]["rewards"]["ocr"]["tiny-ocr"]
    assert theirs.validation is theirs.model.pipeline.vae is None  # nothing is loaded that nobody asked for


def test_it_scores_the_average_as_the_evaluation_does(
    make_run: MakeRun, make_spec, tiny_claims: Path, tmp_path: Path
) -> None:
    """The same prompts, noise, guidance and sampler: the first images of the evaluation of this student."""
    run = make_run(VALIDATED)
    for i, tensor in enumerate(run.ema.tensors):  # an average that differs from the trained weights
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    names = [name for name, _ in run.model.transformer.named_parameters() if f".{STUDENT}." in name]
    state = {n.replace(f".{STUDENT}.", "."): t for n, t in zip(names, run.ema.tensors, strict=True)}
    write_student(
        tmp_path / "student",
        lambda folder: save_adapter(run.model.transformer, folder, STUDENT, state),
        lambda digest: StudentManifest(
            name="s", digest=digest, base=Source(uri="pvc://tiny-world/base", fingerprint="x"), teachers=[],
            spec_digest="y", round=1, license="z",
            sampling=SamplingDefaults(width=32, height=32, steps=2, guidance_scale=4.5, max_sequence_length=10),
        ),
    )  # fmt: skip
    spec = make_spec({**VALIDATED, "spec.evaluation.gate": []}).spec
    evaluate(
        spec, claims=tiny_claims, student=tmp_path / "student", kinds=["student"], output=tmp_path, device="cpu",
        quiet=True,
    )  # fmt: skip
    rewards = json.loads((tmp_path / "student.json").read_text())["rewards"]
    expected = {task: {name: sum(v) / 3 for name, v in of_task.items()} for task, of_task in rewards.items()}
    found = scores(run, tmp_path)
    assert found == {task: pytest.approx(of_task, abs=1e-6) for task, of_task in expected.items()}
    assert len({value for of_task in found.values() for value in of_task.values()}) > 1


def test_ranks_share_the_images_and_none_is_counted_twice(make_run: MakeRun, tmp_path: Path) -> None:
    """What each of two ranks adds to the sum, one after the other here; sums over real ranks are tested elsewhere."""
    run = make_run(VALIDATED)
    whole = scores(run, tmp_path / "whole")
    parts = [scores(run, tmp_path / "parts", World(rank, 2, rank)) for rank in range(2)]
    names = [sorted(file.relative_to(folder) for file in folder.rglob("*.png")) for folder in tmp_path.iterdir()]
    assert names[0] == names[1]
    assert len(names[0]) == 3 * 3
    for task, of_task in whole.items():
        for name, value in of_task.items():
            assert sum(part[task][name] for part in parts) == pytest.approx(value, abs=1e-6)
    assert 0 < parts[0]["aesthetic"]["tiny-aesthetic"] < whole["aesthetic"]["tiny-aesthetic"]


def test_few_prompts_are_looked_at_however_many_the_evaluation_has(make_spec, tiny_claims: Path) -> None:
    many = setup.validation_prompts(make_spec().spec, tiny_claims)
    assert {len(records) for records in many.values()} == {VALIDATION_PROMPTS}
    few = setup.validation_prompts(make_spec(VALIDATED).spec, tiny_claims)
    assert {len(records) for records in few.values()} == {3}
    other = setup.validation_prompts(make_spec({"spec.evaluation.seed": 1}).spec, tiny_claims)
    assert other["geneval"] != many["geneval"]


def test_a_wrong_reward_fails_before_anything_is_loaded(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    wrong = {"spec.teachers.1.rewards": ["beauty"], "spec.evaluation.gate": []}
    monkeypatch.setattr(setup, "load_model", fail)
    with pytest.raises(InvalidError, match="there is no reward beauty"):
        make_run({**VALIDATED, **wrong})
    with pytest.raises(InvalidError, match=r"holds out 256 prompts, evaluation.promptsPerTask asks for 300"):
        make_run({**VALIDATED, "spec.evaluation.promptsPerTask": 300})
    with pytest.raises(AssertionError, match="a model was loaded"):
        make_run(wrong)  # a trainer that validates nothing needs no rewards


def test_the_average_is_taken_out_again_after_a_failure(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(VALIDATED)
    before = [parameter.detach().clone() for parameter in run.engine.parameters]
    for tensor in run.ema.tensors:
        tensor.add_(1.0)

    def fail(*_: Any) -> None:
        raise RuntimeError("a reward fails")

    assert run.validation is not None
    run.validation = replace(run.validation, rewards={"geneval": {"tiny-geneval": fail}})  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match="a reward fails"):
        scores(run, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(run.engine.parameters, before, strict=True))
