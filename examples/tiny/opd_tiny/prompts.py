"""Train and held-out prompts of every task.

The split is by prompt, group by group: no student is ever distilled on a held-out prompt. Base and teachers have seen
pictures of every kind of scene; what is held out from them is the noise. The ``ocr`` task has only 100 prompts and
``aesthetic`` 50: 60 % train, 40 % held out, and the held-out files repeat theirs up to 256 lines, each line with noise
of its own.
"""

import json
import random
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from .scenes import TASKS, Scene, scenes_of

HELD_OUT = 256
_RELATIONS_TRAIN, _RELATIONS_HELD_OUT = 1248, 208
# An epoch of the train file then shows single : count : relation as the held-out file does (16 : 32 : 208).
_RARE_REPEATS = 4


def split(task: str) -> tuple[list[Scene], list[Scene]]:
    """(train, held-out) scenes of ``task``, deterministic; the held-out list has :data:`HELD_OUT` entries."""
    rng = random.Random(f"opd-tiny-world/{task}")
    train: list[Scene] = []
    held_out: list[Scene] = []
    for group in scenes_of(task):
        shuffled = rng.sample(group, len(group))
        if group[0].kind == "relation":
            held_out += shuffled[:_RELATIONS_HELD_OUT]
            train += shuffled[_RELATIONS_HELD_OUT:][:_RELATIONS_TRAIN]
        else:
            cut = len(group) * 2 // 5
            held_out += shuffled[:cut]
            train += shuffled[cut:] * (_RARE_REPEATS if task == "geneval" else 1)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, list(islice(cycle(held_out), HELD_OUT))


def write_prompt_files(folder: Path) -> None:
    """Write ``{task}.train.jsonl`` and ``{task}.heldout.jsonl``: one ``{"prompt": ..., "scene": ...}`` a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        train, held_out = split(task)
        _write(folder / f"{task}.train.jsonl", train)
        _write(folder / f"{task}.heldout.jsonl", held_out)


def _write(path: Path, scenes: Sequence[Scene]) -> None:
    lines = [json.dumps({"prompt": s.prompt, "scene": s.to_json()}, separators=(", ", ": ")) for s in scenes]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
