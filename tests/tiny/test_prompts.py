"""The prompt files are what the code writes, and hold out what they say."""

import json
from pathlib import Path

import pytest
from opd_tiny.prompts import HELD_OUT, write_prompt_files
from opd_tiny.scenes import TASKS, Scene


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("part", ["train", "heldout"])
def test_every_prompt_describes_the_scene_beside_it(tiny_world: Path, task: str, part: str) -> None:
    for record in records(tiny_world / "prompts" / f"{task}.{part}.jsonl"):
        assert set(record) == {"prompt", "scene"}
        assert Scene.from_json(record["scene"]).prompt == record["prompt"]


@pytest.mark.parametrize("task", TASKS)
def test_no_held_out_prompt_is_trained_on(tiny_world: Path, task: str) -> None:
    train = {r["prompt"] for r in records(tiny_world / "prompts" / f"{task}.train.jsonl")}
    held_out = [r["prompt"] for r in records(tiny_world / "prompts" / f"{task}.heldout.jsonl")]
    assert len(held_out) == HELD_OUT
    assert train.isdisjoint(held_out)
    assert len(set(held_out)) == {"geneval": 256, "ocr": 40, "aesthetic": 20}[task]


def test_the_committed_files_are_what_the_code_writes(tiny_world: Path, tmp_path: Path) -> None:
    write_prompt_files(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted(p.name for p in (tiny_world / "prompts").iterdir())
    assert all((tmp_path / n).read_bytes() == (tiny_world / "prompts" / n).read_bytes() for n in names)
