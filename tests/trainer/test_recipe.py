"""`tools/recipe.py`: what it says about two starts before either has learnt anything to speak of."""

from pathlib import Path

import pytest
import recipe
from opd_trainer.engine import World

AT_ONCE = {"optimizer.warmupRounds": 0}


def test_the_teachers_mean_is_nearer_to_every_teacher_than_the_base_is(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "recipe.jsonl")
    monkeypatch.setattr(recipe, "PROMPTS", 8)
    results = {
        name: recipe.measure(name, recipe.variant({**recipe.VARIANTS[name], **AT_ONCE}, images=3), world)
        for name in ("as in the example", "the same, more layers")
    }
    base, mean = (result["errors"] for result in results.values())
    assert list(base) == ["geneval", "ocr", "aesthetic"]
    assert all(base[task] > mean[task] for task in base), results
    assert [result["rounds"] for result in results.values()] == [2, 2]
    rows = recipe.table(list(results.values())).splitlines()
    assert rows[2].startswith("| as in the example | 2 | ")
    assert rows[3].startswith("| the same, more layers | 2 | ")
