"""Prompt files, held-out prompts, and the order of training."""

import json
from pathlib import Path

import pytest
from opd_core.errors import InvalidError
from opd_core.uris import resolve
from opd_trainer import prompt_files
from opd_trainer.preflight import data_notes
from opd_trainer.prompt_files import PromptRecord, load_prompts
from opd_trainer.prompts import split_held_out, task_prompts, training_prompt

RECORDS = [PromptRecord(f"prompt {i}") for i in range(10)]


def test_json_lines_keep_what_rewards_need(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red 7", "count": 1}\n\n{"prompt": "zwei Äpfel"}\n')
    assert load_prompts(file) == [PromptRecord("a red 7", {"count": 1}), PromptRecord("zwei Äpfel")]


def test_text_has_a_prompt_per_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red 7\n  a blue 3 \n\n")
    assert [record.prompt for record in load_prompts(file)] == ["a red 7", "a blue 3"]


ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.txt", [ODD, "x"]),
        ("a.TXT", [ODD, "x"]),
        ("a.jsonl", [json.dumps({"prompt": text}, ensure_ascii=False) for text in (ODD, "x")]),
        ("a.JSONL", [json.dumps({"prompt": text}) for text in (ODD, "x")]),
        ("a.json", ["[", json.dumps(ODD) + ",", '{"prompt": "x"}', "]"]),
        ("a.csv", ["count,prompt", f"1,{ODD}", '2,"x"']),
        ("a.tsv", ["prompt\tcount", f"{ODD}\t1", "x\t2"]),
    ],
)
def test_lines_end_at_newlines_only_and_a_mark_is_no_part_of_them(tmp_path: Path, name, lines, mark, end) -> None:
    """https://github.com/wbolster/jsonlines/issues/53, https://github.com/NVDLI/LDL/issues/3"""
    file = tmp_path / name
    file.write_bytes((mark + end.join(lines) + end).encode())
    assert [record.prompt for record in load_prompts(file)] == [ODD, "x"]


def test_columns_and_quotes_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,class,count\n"a ""red"" 3, and\nmore",digit,2\n\nplain,,\n')
    assert load_prompts(file) == [
        PromptRecord('a "red" 3, and\nmore', {"class": "digit", "count": "2"}),
        PromptRecord("plain", {"class": "", "count": ""}),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,count\nx,1\n", "line 1: needs names of columns.*prompt; got text, count"),
        ("a.csv", "prompt,prompt\nx,1\n", "line 1: needs names of columns"),
        ("a.csv", "prompt,count\nx,1,2\n", "line 2: has 3 fields, and 2 columns"),
        ("a.csv", 'prompt\n"x\n', "line 2: unexpected end"),
        ("a.csv", "prompt,count\n,1\n", "line 2: needs an object"),
        ("a.json", '{"prompt": "x"}', "needs a list"),
        ("a.json", '["x", 3]', "item 2: needs an object"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.jsonl", '{"prompt": "x", "n": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "lone surrogate"),
        ("a.txt", "one\rtwo\rthree", "line 1: has a carriage return within"),
        ("a.parquet", "PAR1", r"ends in \.parquet; write it as \.jsonl, for example with pandas"),
        ("a.xlsx", "x", r"ends in \.xlsx; use \.txt, \.jsonl, \.json, \.csv, \.tsv"),
        ("a.jsonl", "\n \n", "holds no prompts"),
        ("a.txt", "", "holds no prompts"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "fetch it: git lfs pull"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "line 2.*non-empty text"),
        ("a.jsonl", '{"prompt": "  "}\n', "line 1.*non-empty text"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1"),
        ("a.jsonl", '["x"]\n', "line 1"),
        ("a.jsonl", "{prompt\n", "line 1: not JSON"),
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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_prompt_and_what_stands_beside_it_may_be_as_long_in_every_kind_of_file_and_a_file_has_a_bound(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "x" * 200_000
    lines = {
        ".txt": long, ".jsonl": json.dumps({"prompt": long, "of": long}), ".json": json.dumps([long]),
        ".csv": f"prompt,of\n{long},{long}", ".tsv": f"prompt\tof\n{long}\t{long}",
    }  # fmt: skip
    file = tmp_path / name
    file.write_text(lines[file.suffix])
    assert [record.prompt for record in load_prompts(file)] == [long]
    monkeypatch.setattr(prompt_files, "_LARGEST", 1000)
    with pytest.raises(InvalidError, match=r"has \d+ bytes, more than 1000; take a part of it"):
        load_prompts(file)


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


def test_prompts_that_are_held_out_by_a_file_leave_training_and_are_counted(make_spec, tiny_claims, tmp_path) -> None:
    """https://github.com/NVlabs/DiffusionNFT: the one line of dataset/drawbench/train.txt is in test.txt."""
    (tmp_path / "claims").mkdir()
    for name, text in (("train.txt", "a\nb\nb\nc\na\n"), ("heldout.txt", "a\nz\n")):
        (tmp_path / "claims" / name).write_text(text)
    (tmp_path / "claims" / "tiny-world").symlink_to(tiny_claims / "tiny-world")
    uris = {"uri": f"file://{tmp_path}/claims/train.txt", "heldOutUri": f"file://{tmp_path}/claims/heldout.txt"}
    spec = make_spec({"spec.teachers.0.prompts": uris}).spec
    prompts = task_prompts(spec.teachers[0], spec.evaluation, tmp_path / "claims")
    assert [record.prompt for record in prompts.training] == ["b", "b", "c"]
    assert (prompts.overlap, prompts.repeated) == (1, 1)
    notes = data_notes(spec, tmp_path / "claims", lambda uri: resolve(uri, tmp_path / "claims"))
    assert notes[:2] == [
        "spec.teachers[0].prompts: 1 prompts are in heldOutUri too; they are left out of training",
        "spec.teachers[0].prompts: 1 of 3 training lines repeat a prompt, which is then trained on as often as it stands there",
    ]
    (tmp_path / "claims" / "heldout.txt").write_text("a\nb\nc\n")
    with pytest.raises(InvalidError, match="every prompt of .* is held out by .*; name other prompts"):
        task_prompts(spec.teachers[0], spec.evaluation, tmp_path / "claims")


def test_held_out_prompts_that_another_task_trains_on_or_that_repeat_are_counted(make_spec, tiny_claims, tmp_path):
    texts = {"a": ("1\n2\n3\n", "4\n4\n5\n"), "b": ("5\n6\n7\n", "8\n9\n1\n")}
    changes = {}
    for i, (name, parts) in enumerate(texts.items()):
        for field, text in zip(("uri", "heldOutUri"), parts, strict=True):
            file = tmp_path / f"{name}.{field}.txt"
            file.write_text(text)
            changes.setdefault(f"spec.teachers.{i}.prompts", {})[field] = f"file://{file}"
    spec = make_spec(changes).spec
    notes = data_notes(spec, tiny_claims, lambda uri: resolve(uri, tiny_claims))
    assert [note for note in notes if "[2]" not in note and "tokens" not in note] == [
        "spec.teachers[0].prompts: 1 of 2 held-out prompts are trained on by task ocr, so the student will have seen "
        "them; leave them out there to measure what is new to it",
        "spec.teachers[0].prompts: 1 of 3 held-out lines repeat a prompt; its images count together, so intervals and "
        "gate are those of 2 prompts",
        "spec.teachers[1].prompts: 1 of 3 held-out prompts are trained on by task geneval, so the student will have "
        "seen them; leave them out there to measure what is new to it",
    ]


def test_prompts_that_no_encoder_sees_whole_are_counted(make_spec, tiny_claims, tmp_path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("a red 7\n" + "two blue 3 " * 12 + "\n" + "a red 7 above a blue 3 and a green 5\n")
    held = tmp_path / "held.txt"
    held.write_text("a green 5\n")
    spec = make_spec({"spec.teachers.1.prompts": {"uri": f"file://{file}", "heldOutUri": f"file://{held}"}}).spec
    notes = [note for note in data_notes(spec, tiny_claims, lambda uri: resolve(uri, tiny_claims)) if "[1]" in note]
    assert notes == [
        "spec.teachers[1].prompts: 2 of 4 prompts are longer than the 10 tokens that CLIP sees",
        "spec.teachers[1].prompts: 2 of 4 prompts are longer than spec.model.maxSequenceLength, 10 tokens of T5; "
        "no encoder sees the rest",
    ]
    assert "red" not in "".join(notes)
