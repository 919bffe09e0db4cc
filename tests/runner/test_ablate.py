"""A grid of runs: what it stands for, what its table says, and that it goes on where it stopped."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from opd_cli.ablation.grid import Cell, Grid, cells, read_grid
from opd_cli.ablation.results import Result, as_csv, as_figure, as_markdown, forwards_per_round, with_interval
from opd_core.api.load import load_spec
from opd_core.errors import InvalidError
from opd_core.exit_codes import ExitCode

STEPS, TYPE = "training.sampler.steps", "training.objective.type"


def test_every_combination_is_a_run_for_every_seed() -> None:
    grid = Grid(spec="x.yaml", set={"training.rounds": 9}, grid={STEPS: [4, 6], TYPE: ["KL", "X0"]}, seeds=[1, 2])
    found = cells(grid)
    assert [(cell.values[STEPS], cell.values[TYPE], cell.seed) for cell in found] == [
        (steps, kind, seed) for seed in (1, 2) for steps in (4, 6) for kind in ("KL", "X0")
    ]
    assert found[0].changes == ("training.rounds=9", f"{STEPS}=4", f'{TYPE}="KL"', "training.seed=1")
    assert found[0].words == "steps 4, type KL"
    assert len({cell.name for cell in found}) == 8
    more = cells(grid.model_copy(update={"grid": {STEPS: [2, 4, 6], TYPE: ["KL", "X0"]}}))
    assert {cell.name for cell in found} < {cell.name for cell in more}, "a larger grid takes the runs that are there"


def test_variants_are_sets_of_changes_by_name() -> None:
    named = {"few steps": {STEPS: 2}, "as it is": {}}
    grid = Grid(spec="x.yaml", variants=named, grid={TYPE: ["KL", "X0"]}, seeds=[1])
    assert [(cell.words, cell.changes[:-1]) for cell in cells(grid)] == [
        ("few steps, type KL", (f"{STEPS}=2", f'{TYPE}="KL"')),
        ("few steps, type X0", (f"{STEPS}=2", f'{TYPE}="X0"')),
        ("as it is, type KL", (f'{TYPE}="KL"',)),
        ("as it is, type X0", (f'{TYPE}="X0"',)),
    ]
    (cell,) = cells(Grid(spec="x.yaml", variants={"few steps": {STEPS: 2}}))
    (other,) = cells(Grid(spec="x.yaml", variants={"few steps": {STEPS: 3}}))
    assert cell.name != other.name, "what a name stands for has changed: another run"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("spec: x.yaml", "neither grid nor variants; write grid: {PATH: [VALUE, ...]}"),
        ("{spec: x, variants: {a: 3}}", "variants.a: Input should be a valid dictionary"),
        ("{spec: x, grid: {b: [1]}, variants: {a: {b: 2}}}", "b is said twice"),
        ("[", "cannot be read"),
        ("{spec: x, grid: {a: []}}", "grid.a: List should have at least 1 item"),
        ("{spec: x, grid: {a: [1]}, seed: 3}", "seed: Extra inputs are not permitted"),
        ("{spec: x, grid: {training.seed: [1]}}", "training.seed is said twice"),
        ("{spec: x, grid: {spec.a: [1]}, set: {a: 2}}", "a is said twice"),
        ("{spec: x, grid: {a: [1, 1]}}", "has a 1, seed 42, twice"),
        ("{spec: x, grid: {a: [1, 2]}, seeds: [7, 7]}", "has a 1, seed 7, twice"),
    ],
)
def test_what_is_no_grid_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(InvalidError, match=re.escape(words)):
        cells(read_grid(file))


def test_the_students_forwards_are_images_times_steps(repository: Path) -> None:
    file = repository / "examples" / "tiny" / "distill.yaml"
    assert forwards_per_round(load_spec(file).spec) == 3 * 2 * 4
    assert forwards_per_round(load_spec(file, ["training.passes=Two"]).spec) == 2 * 3 * 2 * 4
    learning = {"algorithm": "DiffusionNFT", "promptsPerRound": 5, "groupSize": 6}
    from_rewards = ["training.method=RL", f"training.reinforcement={json.dumps(learning)}"]
    assert forwards_per_round(load_spec(file, from_rewards).spec) == 5 * 6 * (4 + 3), "sampled, then trained"


def result(steps: int, seed: int, kept: float | None, reached: int | None = None, curve: Any = ()) -> Result:
    cell = Cell({STEPS: steps}, seed, ())
    return Result(cell, f"{steps} {seed}", 1000, 2.5, {"ocr": kept, "geneval": 1.0}, {"tiny-ocr": 0.5}, reached, curve)


def test_the_table_has_means_with_intervals_and_the_fewest_forwards_first() -> None:
    results = [result(4, 1, 0.5), result(4, 2, 0.7), result(6, 1, 0.4, 800), result(6, 2, 0.6, 600), result(8, 1, None)]
    lines = as_markdown(results).splitlines()
    assert lines[2].startswith("| steps 6 | 2 | 1,000 | 700 | 0.75 (0.11 to 1.39) | 0.50 (-0.77 to 1.77) |")
    assert (
        lines[3]
        == "| steps 4 | 2 | 1,000 | 0 of 2 runs | 0.80 (0.16 to 1.44) | 0.60 (-0.67 to 1.87) | 1.00 (1.00 to 1.00) |"
    )
    assert lines[4] == "| steps 8 | 1 | 1,000 | 0 of 1 runs | - | - | 1.00 |"
    rows = list(csv.DictReader(as_csv(results).splitlines()))
    assert [row["kept/ocr"] for row in rows] == ["0.5", "0.7", "0.4", "0.6", ""]
    assert (rows[2][STEPS], rows[2]["seed"], rows[2]["forwards_to_reach"]) == ("6", "1", "800")


def test_an_interval_is_students() -> None:
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t 4.303."""
    assert with_interval([1.0, 2.0, 3.0]) == "2.00 (-0.48 to 4.48)"
    assert with_interval([1.0, None]) == "-"


def test_the_figure_has_a_curve_a_combination() -> None:
    looks = [(100, 0.2), (200, 0.6)]
    figure = as_figure(
        [result(4, 1, 0.5, curve=looks), result(4, 2, 0.5, curve=looks[:1]), result(6, 1, 0.5, curve=looks)]
    )
    assert figure.count("<polyline") == 2
    assert as_figure([result(4, 1, 0.5)]) == ""


# ---------------------------------------------------------------------------------------------------- real runs


@pytest.fixture
def grid(repository: Path, tmp_path: Path) -> Path:
    content = yaml.safe_load((repository / "examples" / "tiny" / "distill.yaml").read_text())
    spec = content["spec"]
    spec["teacherServing"] = {"placement": "InProcess", "precision": "FP32"}
    spec["training"].update(rounds=4, sampler={"steps": 2}, optimizer={}, checkpoint={"everyRounds": 1})
    spec["evaluation"].update(promptsPerTask=2, sampler={"steps": 2}, gate=[], everyRounds=2)
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(content))
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps({"spec": "distill.yaml", "grid": {TYPE: ["Velocity", "Nonesuch"]}, "seeds": [5]}))
    return file


@pytest.mark.timeout(900)
def test_a_grid_goes_on_where_it_stopped_and_names_what_failed(grid: Path, repository: Path) -> None:
    work = grid.parent / "work"
    claim = f"tiny-world={repository / 'examples' / 'tiny' / 'tiny-world'}"
    command = [sys.executable, "-m", "opd_cli.main", "ablate", str(grid), f"--work={work}", f"--claim={claim}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [*command, "--device=cpu"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    deadline = time.monotonic() + 300
    while not list(work.glob("cells/*/train/log.jsonl")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == ExitCode.INTERRUPTED, output
    assert "0 of 2 runs finished; the same command goes on" in output

    done = subprocess.run([*command, "--device=cpu"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    assert "1 of 2 runs failed:\n  type Nonesuch, seed 5: code 2" in done.stderr
    assert "type Velocity" in (work / "results.md").read_text()
    (row,) = csv.DictReader((work / "results.csv").read_text().splitlines())
    assert (row[TYPE], row["seed"], row["forwards"]) == ('"Velocity"', "5", str(4 * 3 * 2 * 2))
    assert "<polyline" in (work / "results.svg").read_text()

    grid.write_text(json.dumps({**json.loads(grid.read_text()), "grid": {TYPE: ["Velocity"]}}))
    again = subprocess.run([*command, "--device=cpu"], capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("kept") > 0
    assert ": /" not in again.stdout, "no run was started"

    elsewhere = [*command[:-2], f"--work={work.with_name('elsewhere')}", "--device=cpu"]
    work.with_name("elsewhere").mkdir()
    shutil.copy(work / "results.json", work.with_name("elsewhere"))
    named = grid.with_name("named.yaml")
    named.write_text(json.dumps({"spec": "distill.yaml", "variants": {"as it is": {TYPE: "Velocity"}}, "seeds": [5]}))
    elsewhere[elsewhere.index(str(grid))] = str(named)
    other = subprocess.run(elsewhere, capture_output=True, text=True, check=False, env=environment)
    assert other.returncode == 0, other.stderr
    assert "| as it is | 1 |" in other.stdout
    assert ": /" not in other.stdout, "the same run by another name, known by its file alone"

    grid.write_text(json.dumps({**json.loads(grid.read_text()), "grid": {TYPE: ["Velocity", "X0"]}}))
    more = subprocess.run([*command, "--device=cpu"], capture_output=True, text=True, check=False, env=environment)
    assert more.returncode == 0, more.stderr
    for model in ("base", "teacher-ocr"):  # seconds included: scored once
        assert len({file.read_text() for file in work.glob(f"cells/*/evaluation/{model}.json")}) == 1
    assert len(list(work.glob("cells/*/evaluation/student.json"))) == 2
