"""`make reproduce`: the quickstart's spec at full length with three seeds, and the page docs/reproduction.md of what is
done.

Each is an ordinary `opd run` in runs/reproduce/seed-N; a finished one is not repeated. Base and teachers are the same in
all of them and are scored once. From the base, as the paper starts, and with attention alone it takes longer than an hour
allows (docs/recipe.md).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from opd_cli.ablation.scores import copy_scores
from opd_trainer.evaluation.statistics import RESAMPLES, Floats, interval, per_prompt, resampled_sums

REPOSITORY = Path(__file__).resolve().parents[1]
SPEC = REPOSITORY / "examples" / "tiny" / "quickstart.yaml"
PAGE = REPOSITORY / "docs" / "reproduction.md"
SEEDS = (42, 43, 44)
ROUNDS = 2200
PROMPTS = 256


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "reproduce")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = options.parse_args()
    for seed in arguments.seeds:
        run(arguments.work, seed, arguments.rounds)
    text = page(arguments.work)
    print(text)
    PAGE.write_text(text)
    return 0


# ---------------------------------------------------------------------------------------------------- runs


def run(work: Path, seed: int, rounds: int) -> None:
    """One distillation, in work/seed-N."""
    changes = {
        "training.seed": seed,
        "training.rounds": rounds,
        "evaluation.promptsPerTask": PROMPTS,
        "evaluation.gate": [],
        "endpoint.enabled": False,
    }
    folder, known = work / f"seed-{seed}", work / "base-and-teachers"
    copy_scores(known, folder / "evaluation")
    told = [f"--set={path}={json.dumps(value)}" for path, value in changes.items()]
    command = ["-m", "opd_cli.main", "run", str(SPEC), f"--work={folder}", *told]
    subprocess.run([sys.executable, *command], check=True)
    copy_scores(folder / "evaluation", known)


# ---------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run: `rewards` of base, each task's teacher and the student, by task and model [N]."""

    seed: int
    summary: Mapping[str, Any]
    rounds: int
    learning_rate: float
    prompts: Mapping[str, list[str]]
    rewards: Mapping[str, Mapping[str, Floats]]

    @property
    def minutes(self) -> dict[str, float]:
        """Wall-clock time, by stage."""
        return {stage: (seconds or 0) / 60 for stage, seconds in self.summary["stageSeconds"].items()}


def finished(work: Path) -> Iterator[Finished]:
    for file in sorted(work.glob("seed-*/summary.json")):
        spec = json.loads((file.parent / "spec.json").read_text())["spec"]
        first = {teacher["name"]: teacher["rewards"][0] for teacher in spec["teachers"]}
        scored = {
            model: json.loads((file.parent / "evaluation" / f"{model}.json").read_text())
            for model in ("base", "student", *(f"teacher-{task}" for task in first))
        }
        yield Finished(
            seed=spec["training"]["seed"],
            summary=json.loads(file.read_text()),
            rounds=spec["training"]["rounds"],
            learning_rate=spec["training"]["optimizer"]["learningRate"],
            prompts=scored["base"]["prompts"],
            rewards={
                task: {
                    role: np.array(scored[model]["rewards"][task][reward])
                    for role, model in (("base", "base"), ("teacher", f"teacher-{task}"), ("student", "student"))
                }
                for task, reward in first.items()
            },
        )


def pooled(runs: Sequence[Finished], seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Mean kept share over `runs` with its 95 % bootstrap interval, by task and over "all" of them.

    Runs are drawn with replacement, and so are prompts: the same ones for all runs, which were scored on the same.
    Three runs say little about how much runs differ; the interval knows no more than they do.
    """
    draws = np.random.default_rng(seed).integers(len(runs), size=(RESAMPLES, len(runs)))
    means, points = {}, {}
    for task, prompts in runs[0].prompts.items():
        gain = runs[0].rewards[task]["teacher"] - runs[0].rewards[task]["base"]
        kept = [each.rewards[task]["student"] - each.rewards[task]["base"] for each in runs]
        sums = resampled_sums(per_prompt(np.stack([gain, *kept], 1), prompts), seed)
        if (sums[:, 0] <= 0).any():
            raise SystemExit(f"task {task}: in some draws of prompts the teacher gains nothing; use more prompts")
        shares = sums[:, 1:] / sums[:, :1]
        means[task] = np.take_along_axis(shares, draws, axis=1).mean(1)
        points[task] = float(np.mean([each.mean() for each in kept]) / gain.mean())
    means["all"] = np.mean(list(means.values()), axis=0)
    points["all"] = float(np.mean(list(points.values())))
    return {name: (points[name], *interval(resampled)) for name, resampled in means.items()}


# ---------------------------------------------------------------------------------------------------- page


def page(work: Path) -> str:
    runs = list(finished(work))
    tasks = list(runs[0].prompts)
    lines = ["# Reproduction on the tiny world", ""]
    lines += [
        f"`make reproduce`: examples/tiny/quickstart.yaml with {runs[0].rounds} rounds at a peak learning rate of "
        f"{runs[0].learning_rate:g}; seeds that are done: {len(runs)} of {len(SEEDS)}.",
        "Share of each teacher's gain over the base that the student keeps, on the task's own reward, with 95 % bootstrap intervals.",
        f"{PROMPTS} held-out images per task, the same prompts and noise for all models.",
        "",
        "| seed | " + " | ".join(tasks) + " | mean | training | evaluation |",
        "|---|" + "---:|" * (len(tasks) + 3),
        *(row(str(each.seed), pooled([each]), [each]) for each in runs),
        row("all", pooled(runs), runs),
        "",
        "The last row draws seeds and prompts anew, with replacement.",
        "",
        *reward_table(runs),
    ]
    return "\n".join(lines) + "\n"


def row(name: str, shares: Mapping[str, tuple[float, float, float]], runs: Sequence[Finished]) -> str:
    cells = [f"{share:.3f} ({low:.3f} to {high:.3f})" for share, low, high in shares.values()]
    minutes = [f"{sum(each.minutes[stage] for each in runs):.0f} min" for stage in ("Trained", "Evaluated")]
    return f"| {name} | " + " | ".join([*cells, *minutes]) + " |"


def reward_table(runs: Sequence[Finished]) -> list[str]:
    """Mean rewards; of the student over all runs."""
    lines = ["| task | base | teacher | student |", "|---|---:|---:|---:|"]
    for task, rewards in runs[0].rewards.items():
        student = np.mean([each.rewards[task]["student"].mean() for each in runs])
        lines.append(f"| {task} | {rewards['base'].mean():.3f} | {rewards['teacher'].mean():.3f} | {student:.3f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
