"""Prompt files, held-out prompts, and the order of training."""

from pathlib import Path

import pytest
from opd_core.errors import InvalidError
from opd_trainer.prompts import PromptRecord, load_prompts, split_held_out, task_prompts, training_prompt

RECORDS = [PromptRecord(f"prompt {i}") for i in range(10)]


def test_json_lines_keep_what_rewards_need(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red 7", "count": 1}\n\n{"prompt": "zwei Äpfel"}\n')
    assert load_prompts(file) == [PromptRecord("a red 7", {"count": 1}), PromptRecord("zwei Äpfel")]


def test_text_has_a_prompt_per_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red 7\n  a blue 3 \n\n")
    assert [record.prompt for record in load_prompts(file)] == ["a red 7", "a blue 3"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "\n \n", "holds no prompts"),
        ("a.txt", "", "holds no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "line 2.*non-empty text"),
        ("a.jsonl", '{"prompt": "  "}\n', "line 1.*non-empty text"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1"),
        ("a.jsonl", '["x"]\n', "line 1"),
        ("a.jsonl", "{prompt\n", "line 1: not JSON"),
        ("a.csv", "x\n", "use .jsonl or .txt"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InvalidError, match=message):
        load_prompts(file)


def test_missing_file_and_wrong_encoding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="cannot be read"):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InvalidError, match="cannot be read"):
        load_prompts(tmp_path / "latin.txt")


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    epochs = [[training_prompt(RECORDS, 7, "ocr", e * 10 + i).prompt for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == sorted(r.prompt for r in RECORDS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = [training_prompt(RECORDS, 7, "ocr", sample).prompt for sample in reversed(range(30))][::-1]
    assert again == [prompt for epoch in epochs for prompt in epoch]


def test_tasks_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, task: str) -> list[str]:
        return [training_prompt(RECORDS, seed, task, i).prompt for i in range(10)]

    assert order(1, "ocr") != order(2, "ocr")
    assert order(1, "ocr") != order(1, "geneval")


def test_held_out_prompts_leave_training_with_all_their_lines() -> None:
    records = [*RECORDS, *RECORDS]
    training, held_out = split_held_out(records, 4, seed=1)
    assert len(held_out) == len({record.prompt for record in held_out}) == 4
    assert not {record.prompt for record in held_out} & {record.prompt for record in training}
    assert len(training) == 12
    assert split_held_out(records, 4, seed=1) == (training, held_out)
    assert split_held_out(records, 4, seed=2)[1] != held_out


def test_nothing_left_to_train_on_is_refused() -> None:
    with pytest.raises(InvalidError, match="promptsPerTask=10"):
        split_held_out([*RECORDS, *RECORDS], 10, seed=1)


def test_a_spec_without_held_out_file_splits_its_own(make_spec, tiny_claims: Path) -> None:
    spec = make_spec({"spec.teachers.0.prompts": {"uri": "pvc://tiny-world/prompts/geneval.train.jsonl"}}).spec
    prompts = task_prompts(spec.teachers[0], spec.evaluation, tiny_claims)
    assert len(prompts.held_out) == spec.evaluation.prompts_per_task
    assert not {r.prompt for r in prompts.training} & {r.prompt for r in prompts.held_out}
