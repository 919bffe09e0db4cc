"""docs/results.md: what it says is what its rows say."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import pytest
import results
from opd_cli.ablation.grid import cells, read_grid
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


def rows(**kept: Sequence[float | None]) -> dict[str, dict[int, results.Row]]:
    """Of each variant: what its seeds 1, 2, ... keep of each of two tasks."""
    return {
        variant: {seed: {"kept/a": as_text(value), "kept/b": as_text(value), "forwards": "10"} for seed, value in told}
        for variant, told in ((variant, enumerate(values, 1)) for variant, values in kept.items())
    }


def as_text(value: Any) -> str:
    return "" if value is None else str(value)


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
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["variant", "seed", "forwards", "kept/a"], ['"first"', 1, 10, 0.5], ['"first"', 2, 10, ""]])
    (tmp_path / "methods.csv").write_text(text.getvalue())
    monkeypatch.setattr(results, "KEPT", tmp_path)
    found = results.read_rows("methods")
    assert {seed: results.mean(row) for seed, row in found["first"].items()} == {1: 0.5, 2: None}
    assert results.read_rows("noise") == {}
