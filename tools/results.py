"""`make results`: what the project claims, measured on the tiny world, and the page docs/results.md.

Every claim has a grid in examples/tiny/results, an `opd ablate` in runs/results/NAME. Finished runs are kept in
docs/results/NAME.json and not repeated, not even by another grid or machine, so hours of work can be cut anywhere; all
grids together are about six hours on two idle cores. The page is written from what is kept alone (`make generate` does,
too).

    python tools/results.py [NAME ...]        run the grids that are named, or all, and write the page
    python tools/results.py --page            write the page
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_cli.ablation.grid import VARIANT, Grid, cells, read_grid
from opd_cli.ablation.results import Result, as_json, half_width, known_results, with_interval

REPOSITORY = Path(__file__).resolve().parents[1]
GRIDS, KEPT = REPOSITORY / "examples" / "tiny" / "results", REPOSITORY / "docs" / "results"
STUDENT = KEPT / "student"
PAGE = REPOSITORY / "docs" / "results.md"
Rows = Mapping[str, Mapping[int, Result]]  # by variant and seed


@dataclass(frozen=True)
class Claim:
    """`first` keeps more of the teachers' gains than each of `others`, in runs with the same seed."""

    grid: str
    text: str
    first: str
    others: Sequence[str]


CLAIMS = (
    Claim(
        "methods",
        "On-policy distillation keeps more of the teachers' gains than supervised fine-tuning on their images, DMD2 and "
        "TDM, at equal student forwards (paper, section 4.3).",
        "OPD",
        ("SFT", "DMD2", "TDM"),
    ),
    Claim(
        "reinforcement",
        "On-policy distillation of given teachers keeps more of their gains than joint and cascade reinforcement learning "
        "reach, with a small share of the student's forwards (paper, Table 1).",
        "OPD",
        ("joint GRPO-Guard", "joint NFT", "cascade NFT"),
    ),
    Claim(
        "gradients",
        "The closed-form KL learns more than policy gradients of the same KL (paper, section 3.3).",
        "KL",
        ("PPO", "policy gradient"),
    ),
    Claim(
        "noise",
        "Less noise on the student's trajectories is better, and none is best (paper, ablation of the noise level).",
        "noise 0",
        ("noise 0.1", "noise 0.3", "noise 0.7"),
    ),
    Claim(
        "objectives",
        "Among objectives without noise the plain distance of velocities learns fastest.",
        "Velocity",
        (
            *("Velocity, normalised", "MeanMatching", "X0", "PDM"),
            *("Velocity, extrapolation 1.25", "Velocity, one step a round"),
        ),
    ),
    Claim(
        "solvers",
        "Euler's trajectories teach more than those of a second-order solver, or with all noise new.",
        "Euler",
        ("DPM2", "CPS, all noise new"),
    ),
    Claim(
        "images",
        "Two images of a task in a round are better than one, four or eight, at equal forwards.",
        "2 images a task",
        ("1 image a task", "4 images a task", "8 images a task"),
    ),
    Claim(
        "start",
        "A student that starts from the mean of its teachers keeps more than one that starts from the base.",
        "teachers' mean",
        ("base",),
    ),
    Claim(
        "rank",
        "A student with the sum of its teachers' ranks keeps more than one with the rank of one of them, or less.",
        "rank 48",
        ("rank 16", "rank 4"),
    ),
)

FIRST = cells(read_grid(GRIDS / f"{CLAIMS[0].grid}.yaml"))[0]  # whose student is kept: a test evaluates it again


def main() -> int:
    known, options = [claim.grid for claim in CLAIMS], argparse.ArgumentParser(description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    options.add_argument("--page", action="store_true", help="run nothing")
    options.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    arguments = options.parse_args()
    if unknown := [name for name in arguments.names if name not in known]:
        options.error(f"no grid {unknown[0]}; write some of {', '.join(known)}")
    for name in [] if arguments.page else arguments.names or known:
        work = REPOSITORY / "runs" / "results" / name
        work.mkdir(parents=True, exist_ok=True)
        known = known_results(work / "results.json")
        for file in KEPT.glob("*.json"):
            known.update(known_results(file))
        (work / "results.json").write_text(as_json(list(known.values())))
        command = [
            "-m",
            "opd_cli.main",
            "ablate",
            str(GRIDS / f"{name}.yaml"),
            f"--work={work}",
            f"--jobs={arguments.jobs}",
        ]
        code = subprocess.run([sys.executable, *command], check=False).returncode
        KEPT.mkdir(exist_ok=True)
        for source in (work / "results.json", work / "results.svg"):
            if source.exists():
                shutil.copy(source, KEPT / f"{name}{source.suffix}")
        student = work / "cells" / FIRST.name / "student"
        if name == CLAIMS[0].grid and student.exists():
            shutil.copytree(student, STUDENT, dirs_exist_ok=True)
        if code:
            return code
    PAGE.write_text(page())
    return 0


# ---------------------------------------------------------------------------------------------------- the page


def page() -> str:
    """docs/results.md, from the rows that are kept."""
    parts = [
        "# Results on the tiny world",
        "",
        "`make results` measures them and goes on where it stopped; nothing here is typed by hand. Every row is a run of",
        "`opd ablate` on a grid of examples/tiny/results: share of the teachers' gains over the base that the student keeps,",
        "means over seeds with Student's 95 % intervals. A claim is judged on the differences of runs with one seed: it",
        "*holds* where the whole interval of each difference is above 0, it *does not hold here* where one is below, and",
        "else it *cannot be told*. Four solver steps and 300 rounds are a short run: who learns faster, not who ends higher.",
        "",
    ]
    for claim in CLAIMS:
        grid, rows = read_grid(GRIDS / f"{claim.grid}.yaml"), read_rows(claim.grid)
        parts += [f"## {claim.grid.capitalize()}", "", f"{claim.text} **{verdict(claim, rows)}.**", ""]
        parts += [f"[{claim.grid}.yaml](../examples/tiny/results/{claim.grid}.yaml): {note(claim.grid)}", ""]
        if rows:
            parts += [*table(claim, grid, rows), ""]
        if (KEPT / f"{claim.grid}.svg").exists():
            parts += [f"![share of the gains over the student's forwards](results/{claim.grid}.svg)", ""]
    return "\n".join(parts).rstrip() + "\n"


def read_rows(name: str) -> Rows:
    """None where nothing was run yet."""
    found: dict[str, dict[int, Result]] = {}
    for result in known_results(KEPT / f"{name}.json").values():
        found.setdefault(result.cell.values[VARIANT], {})[result.cell.seed] = result
    return found


def note(name: str) -> str:
    """The sentence at the head of a grid's file."""
    return (GRIDS / f"{name}.yaml").read_text().splitlines()[0].removeprefix("# ")


def table(claim: Claim, grid: Grid, rows: Rows) -> list[str]:
    tasks = list(next(iter(next(iter(rows.values())).values())).kept)
    head = ["", "runs", "forwards", "kept, mean", f"less than {claim.first}", *tasks]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for variant in grid.variants:
        runs = rows.get(variant, {})
        if not runs:
            continue
        ends = list(runs.values())
        pairs = [] if variant == claim.first else differences(rows, claim.first, variant)
        cells = [
            *(variant, f"{len(runs)} of {len(grid.seeds)}", f"{ends[0].forwards:,}"),
            *(with_interval([end.mean_kept for end in ends]), with_interval(pairs) if pairs else ""),
            *(with_interval([end.kept[task] for end in ends]) for task in tasks),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdict(claim: Claim, rows: Rows) -> str:
    """Of the claim, from the rows there are."""
    limits = []
    for other in claim.others:
        known = [value for value in differences(rows, claim.first, other) if value is not None]
        if len(known) < 2:
            return "Cannot be told yet: fewer than two seeds of each"
        middle, half = statistics.fmean(known), half_width(known)
        limits.append((middle - half, middle + half))
    if any(high < 0 for _, high in limits):
        return "Does not hold here"
    return "Holds" if all(low > 0 for low, _ in limits) else "Cannot be told"


def differences(rows: Rows, first: str, other: str) -> list[float | None]:
    """What `first` keeps more than `other`, by seed that both have."""
    ours, theirs = rows.get(first, {}), rows.get(other, {})
    pairs = [(ours[seed].mean_kept, theirs[seed].mean_kept) for seed in sorted(ours.keys() & theirs.keys())]
    return [None if a is None or b is None else a - b for a, b in pairs]


if __name__ == "__main__":
    sys.exit(main())
