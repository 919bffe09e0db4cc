"""docs/results.md: what it says is what its rows say."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import results
from opd_cli.ablation.grid import Cell, cells, read_grid
from opd_cli.ablation.results import Result, as_json, known_results
from opd_core.api.load import load_spec


def test_the_page_is_what_its_rows_say() -> None:
    assert results.PAGE.read_text() == results.page(), "run make generate"


def test_every_grid_is_a_claims_and_can_be_run() -> None:
    files = {file.stem: file for file in results.GRIDS.glob("*.yaml")}
    assert set(files) == {claim.grid for claim in results.CLAIMS}
    for claim in results.CLAIMS:
        grid = read_grid(files[claim.grid])
        assert {claim.first, *claim.others} == set(grid.variants)
        for cell in cells(grid):
            load_spec(results.GRIDS / grid.spec, list(cell.changes))


CLAIM = results.Claim("methods", "First is better.", "first", ("second",))


def end(variant: str, seed: int, kept: float | None) -> Result:
    """A run that keeps as much of each of two tasks."""
    cell = Cell({"variant": variant}, seed, ())
    return Result(cell, f"{variant} {seed}", 10, 1.0, {"a": kept, "b": kept}, {}, None, [(5, 0.1)])


def rows(**kept: Sequence[float | None]) -> results.Rows:
    """What seeds 1, 2, ... of each variant keep."""
    return {
        variant: {seed: end(variant, seed, value) for seed, value in enumerate(values, 1)}
        for variant, values in kept.items()
    }


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        # Seeds differ by more than the variants do, and each pair by the same: only pairs can tell.
        ([0.2, 0.5, 0.8], [0.1, 0.41, 0.7], "Holds"),
        ([0.1, 0.41, 0.7], [0.2, 0.5, 0.8], "Does not hold here"),
        ([0.1, 0.5, 0.3], [0.4, 0.2, 0.3], "Cannot be told"),
        ([0.9], [0.1], "Cannot be told yet: fewer than two seeds of each"),
        ([0.9, 0.9], [None, 0.1], "Cannot be told yet: fewer than two seeds of each"),
    ],
)
def test_a_verdict_looks_at_pairs_of_runs(first: list[float], second: list[Any], verdict: str) -> None:
    assert results.verdict(CLAIM, rows(first=first, second=second)) == verdict


def test_a_claim_over_several_holds_only_if_each_does() -> None:
    claim = results.Claim("methods", "", "first", ("second", "third"))
    first, far, near = [0.5, 0.6, 0.7], [0.1, 0.2, 0.31], [0.45, 0.66, 0.7]
    assert results.verdict(claim, rows(first=first, second=far, third=near)) == "Cannot be told"
    assert results.verdict(claim, rows(first=first, second=far, third=far)) == "Holds"
    assert results.verdict(claim, rows(first=far, second=first, third=near)) == "Does not hold here"


def test_rows_are_read_as_an_ablation_writes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    ends = [end("first", 1, 0.5), end("first", 2, None)]
    (tmp_path / "methods.json").write_text(as_json(ends))
    monkeypatch.setattr(results, "KEPT", tmp_path)
    assert results.read_rows("methods") == {"first": {1: ends[0], 2: ends[1]}}
    assert results.read_rows("noise") == {}


def test_a_row_comes_out_again_from_its_student(tmp_path: Any) -> None:
    """Of another machine's rounding one picture of a task may be judged otherwise."""
    (row,) = [row for row in known_results(results.KEPT / "methods.json").values() if row.cell == results.FIRST]
    student = shutil.copytree(results.STUDENT, tmp_path / "student")
    spec = results.REPOSITORY / "examples" / "tiny" / "distill.yaml"
    command = [sys.executable, "-m", "opd_cli.main", "eval", str(spec), "--student", str(student)]
    command += ["--claims", str(spec.parent), "--models=student", "--out", str(tmp_path / "scores"), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["scores"]["student"]
    assert {reward: score["mean"] for reward, score in scores.items()} == pytest.approx(row.scores, abs=0.01)
