"""What the runs of an ablation came to: a row a run, a line a combination of values, a figure."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_core.api.teachers import completed_for
from opd_core.api.training import Method, Passes
from opd_core.api.types import Spec
from opd_core.errors import InvalidError
from opd_trainer.evaluation import VALIDATION_PROMPTS
from pydantic import TypeAdapter, ValidationError

from opd_cli.ablation.grid import Cell, varied
from opd_cli.charts import Line, line_chart

REACHED = 0.98  # of every teacher's gain: what the leaderboard counts forwards to
# Student's t at 97.5 %, by degrees of freedom from 1; more have no wider interval than the last.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Result:
    """One finished run.

    Args:
        spec_digest: of all that it was told, by which it is known again.
        forwards: images times solver steps that the student computed in training, guidance not counted.
        kept: share of each teacher's gain, by task; None where there is none. scores: of the student, by reward.
        reached: forwards at the first look at which it had `REACHED` of every teacher's gain; None: never, or no looks.
        curve: (forwards, share of the teachers' gains, mean over tasks) at every look.
    """

    cell: Cell
    spec_digest: str
    forwards: int
    seconds: float
    kept: Mapping[str, float | None]
    scores: Mapping[str, float]
    reached: int | None
    curve: Sequence[tuple[int, float]]

    @property
    def mean_kept(self) -> float | None:
        """Over all tasks; None where one of them has none."""
        known = [share for share in self.kept.values() if share is not None]
        return sum(known) / len(known) if len(known) == len(self.kept) else None


_RESULTS = TypeAdapter(list[Result])


def known_results(file: Path) -> dict[str, Result]:
    """What `as_json` has written, by the digests of the specs; none where there is no such file.

    Raises:
        InvalidError: it holds something else.
    """
    try:
        return {result.spec_digest: result for result in _RESULTS.validate_json(file.read_bytes())}
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise InvalidError(
            f"{file} holds no results of this release ({error.errors()[0]['msg']}); move it away, and the runs whose "
            "folders are there are read again"
        ) from error


def read_result(cell: Cell, spec: Spec, work: Path) -> Result:
    """Of a run that is evaluated, in its work folder."""
    summary = json.loads((work / "summary.json").read_text())
    log = work / "train" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    of_round = forwards_per_round(spec)
    looks = []
    if validated := [line for line in lines if "rewards" in line]:
        levels = _levels(spec, work / "evaluation")
        for line in validated if levels else []:
            rewards = line["rewards"]
            gains = [(rewards[task][name] - base) / (own - base) for (task, name), (base, own) in levels.items()]
            looks.append((line["round"] * of_round, gains))
    return Result(
        cell=cell,
        spec_digest=summary["specDigest"],
        forwards=spec.training.rounds * of_round,
        seconds=sum(line["seconds"] for line in lines),
        kept={task.name: summary["kept"].get(task.name, {}).get("share") for task in spec.teachers},
        scores={reward: score["mean"] for reward, score in summary["scores"]["student"].items()},
        reached=next((forwards for forwards, gains in looks if min(gains) >= REACHED), None),
        curve=[(forwards, sum(gains) / len(gains)) for forwards, gains in looks],
    )


def forwards_per_round(spec: Spec) -> int:
    """Images times solver steps that the student computes; by reinforcement learning in sampling and in training."""
    training = spec.training
    if training.reinforcement is not None:
        learning = completed_for(training.reinforcement, training.sampler.steps)
        assert learning.steps_per_image is not None
        return learning.images_per_round * (training.sampler.steps + learning.steps_per_image)
    twice = training.method == Method.OPD and training.passes == Passes.TWO
    return len(spec.teachers) * training.images_per_task * training.sampler.steps * (2 if twice else 1)


def _levels(spec: Spec, evaluation: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Means of base and teacher on the prompts of a look by task and first reward, where the teacher gains on them."""
    levels = {}
    for teacher in filter(lambda each: each.teaches, spec.teachers):
        reward = teacher.rewards[0]
        base, own = (
            statistics.fmean(_scored(evaluation / f"{model}.json", teacher.name, reward))
            for model in ("base", f"teacher-{teacher.name}")
        )
        if own > base:
            levels[teacher.name, reward] = base, own
    return levels


def _scored(file: Path, task: str, reward: str) -> list[float]:
    found: list[float] = json.loads(file.read_text())["rewards"][task][reward][:VALIDATION_PROMPTS]
    return found


# ---------------------------------------------------------------------------------------------------- what is written


def as_json(results: Sequence[Result]) -> str:
    """All of them, a line a run: what was run elsewhere is known by it, too."""
    lines = (json.dumps(each) for each in _RESULTS.dump_python(list(results), mode="json"))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def as_csv(results: Sequence[Result]) -> str:
    """A row a run."""
    paths = varied([result.cell for result in results])
    tasks, rewards = list(results[0].kept), list(results[0].scores)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [*paths, "seed", "forwards", "seconds", "forwards_to_reach", *(f"kept/{task}" for task in tasks), *rewards]
    writer.writerow(names)
    for result in results:
        cell = result.cell
        writer.writerow(
            [
                *(json.dumps(cell.values[path]) for path in paths),
                cell.seed,
                result.forwards,
                round(result.seconds, 1),
                result.reached,
                *(_rounded(result.kept[task]) for task in tasks),
                *(_rounded(result.scores[reward]) for reward in rewards),
            ]
        )
    return text.getvalue()


def as_markdown(results: Sequence[Result]) -> str:
    """A line a combination: means over its seeds with 95 % intervals, the best first."""
    groups = grouped(results)
    tasks = list(results[0].kept)
    head = ["", "runs", "forwards", f"forwards to {REACHED:g}", "kept, mean", *tasks]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for group in sorted(groups, key=_rank):
        first = group[0]
        reached = [result.reached for result in group if result.reached is not None]
        told = (
            f"{statistics.fmean(reached):,.0f}"
            if len(reached) == len(group)
            else f"{len(reached)} of {len(group)} runs"
        )
        cells_ = [
            first.cell.words,
            str(len(group)),
            f"{first.forwards:,}",
            told,
            with_interval([result.mean_kept for result in group]),
            *(with_interval([result.kept[task] for result in group]) for task in tasks),
        ]
        lines.append(f"| {' | '.join(cells_)} |")
    return "\n".join(lines) + "\n"


def as_figure(results: Sequence[Result]) -> str:
    """SVG: the share of the teachers' gains over the student's forwards, where runs looked at it; empty without."""
    lines = []
    for group in grouped(results):
        curves = [result.curve for result in group if result.curve]
        if curves:
            shortest = min(len(curve) for curve in curves)
            xs = [float(forwards) for forwards, _ in curves[0][:shortest]]
            ys = [statistics.fmean(curve[i][1] for curve in curves) for i in range(shortest)]
            lines.append(Line(group[0].cell.words.replace(",", ";"), xs, ys))
    return line_chart(lines, "student forwards", from_zero=False) if lines else ""


def grouped(results: Sequence[Result]) -> list[list[Result]]:
    """The seeds of every combination."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.cell.words, []).append(result)
    return list(groups.values())


def with_interval(values: Sequence[float | None]) -> str:
    """Mean over seeds with Student's 95 % interval; one seed has none."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean = statistics.fmean(known)
    if len(known) == 1:
        return f"{mean:.2f}"
    half = half_width(known)
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"


def half_width(values: Sequence[float]) -> float:
    """Of Student's 95 % interval of the mean of two values or more."""
    return _T[min(len(values) - 2, len(_T) - 1)] * statistics.stdev(values) / math.sqrt(len(values))


def _rank(group: Sequence[Result]) -> tuple[float, float]:
    """Fewest forwards first, then by what is kept."""
    reached = [result.reached for result in group]
    kept = [result.mean_kept for result in group if result.mean_kept is not None]
    known = [each for each in reached if each is not None]
    first = statistics.fmean(known) if len(known) == len(reached) else math.inf
    return first, -statistics.fmean(kept) if kept else math.inf


def _rounded(value: Any) -> Any:
    return "" if value is None else round(value, 4)
