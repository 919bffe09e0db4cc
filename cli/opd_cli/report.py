"""report.html: one file without outside resources that shows what a run did."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from opd_core.api.load import load_spec
from opd_core.api.teachers import teacher_path, trained_teachers
from opd_core.api.training import Method
from opd_core.api.types import Spec
from opd_core.brief import lost, worst
from opd_core.errors import StorageError
from opd_trainer.evaluation import VALIDATION_PROMPTS, looks_of
from opd_trainer.evaluation.summary import task_means
from opd_trainer.figures import FIGURES

from opd_cli.charts import COLOURS, Line, Style, line_chart

_SMOOTHING = 0.05  # share of the rounds that a point of a curve averages over
_LOOKS = 6  # of all rounds that were looked at: the first, the last, and some between
_GRID_ROWS = ("base", "teacher", "student")

Chart = tuple[str, str, str]  # title, explanation, SVG


def write_report(work: Path) -> Path:
    """Write WORK/report.html from summary.json, train/log.jsonl, evaluation/, spec.json and the logs of the teachers
    that it trains.

    Raises:
        StorageError: it cannot be written.
    """
    summary = json.loads((work / "summary.json").read_text())
    spec = load_spec(work / "spec.json").spec
    rounds = _rounds(work / "train" / "log.jsonl")
    learning = spec.training.reinforcement
    objective = learning.algorithm.value if learning else spec.training.objective.type
    shown, rest = worst(task_means(spec, summary), lambda row: lost(row.get("kept")), COLOURS)
    tasks, folded = ([str(row["task"]) for row in rows] for rows in (shown, rest))
    environment = Environment(loader=PackageLoader("opd_cli"), autoescape=select_autoescape())
    page = environment.get_template("report.html").render(
        summary=summary,
        rewards=list(next(iter(summary["scores"].values()))),
        best=_best(summary["scores"]),
        rows=[*shown, *rest] if rest else [],  # a table where cards and columns would be too many
        gate=sorted(summary.get("gate", []), key=lambda check: bool(rest) and check["passed"]),
        charts=_charts(rounds, objective) + _of_tasks(work, spec, rounds, tasks),
        folded=_of_tasks(work, spec, rounds, folded),
        grids=_grids(work, tasks),
        looks=_looks(work, spec, rounds, tasks),
        rounds=rounds[-1] if rounds else None,
        spec=yaml.safe_dump(json.loads((work / "spec.json").read_text()), sort_keys=False),
    )
    target, scratch = work / "report.html", work / ".report.html"
    try:
        scratch.write_text(page)
        scratch.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error}") from error
    return target


def _rounds(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _best(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, str]:
    """The model with the highest mean, by reward."""
    rewards = next(iter(scores.values()))
    return {reward: max(scores, key=lambda model: scores[model][reward]["mean"]) for reward in rewards}


def _charts(rounds: Sequence[Mapping[str, Any]], objective: str) -> list[Chart]:
    """What every round says."""
    if len(rounds) < 2:
        return []
    numbers = [float(r["round"]) for r in rounds]
    tasks = _tasks(rounds)
    window = max(1, int(len(rounds) * _SMOOTHING))

    def curve(key: str) -> list[Line]:
        of = {task: [r for r in rounds if task in r["tasks"]] for task in tasks}
        lines = [
            Line(task, [float(r["round"]) for r in own], _smooth([r["tasks"][task][key] for r in own], window))
            for task, own in of.items()
        ]
        shown, rest = worst(lines, lambda line: line.y[-1], COLOURS)  # at the end
        return [*shown, *(replace(line, faint=True) for line in rest)]

    pace = _smooth([r["images_per_second"] for r in rounds], window)
    loss = curve("loss")
    largest = [line.name for line in loss if not line.faint]
    of_whom = f"; {len(largest)} tasks of {len(tasks)}, with the largest loss" if len(largest) < len(tasks) else ""
    steps = f"{objective}, what each solver step adds{of_whom}"
    charts = [
        ("Loss per task", f"{objective}, sum over steps, moving average", line_chart(loss, "round", log=True)),
        ("Velocity error", "mean squared, over trained steps", line_chart(curve("velocity_mse"), "round", log=True)),
        ("Loss per step", steps, _per_step(rounds, largest, "loss_per_step")),
    ]
    if any(task["kl_per_step"] for task in rounds[0]["tasks"].values()):
        why = f"closed form, at the steps with noise{of_whom}"
        charts.append(("KL per step", why, _per_step(rounds, largest, "kl_per_step")))
    return [*charts, ("Training speed", "images per second", line_chart([Line("images/s", numbers, pace)], "round"))]


def _tasks(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """In the order of their first round; in reinforcement learning they take turns."""
    return list(dict.fromkeys(task for r in rounds for task in r["tasks"]))


def _per_step(rounds: Sequence[Mapping[str, Any]], tasks: Sequence[str], key: str) -> str:
    """Means over the first and the last tenth of the rounds, of the steps that have a value."""
    tenth = max(1, len(rounds) // 10)
    lines = []
    for when, part in (("first tenth", rounds[:tenth]), ("last tenth", rounds[-tenth:])):
        for task in tasks:
            own = [r["tasks"][task][key] for r in part if task in r["tasks"]]
            steps = [j for j, value in enumerate(own[0]) if value is not None] if own else []
            means = [sum(values[j] for values in own) / len(own) for j in steps]
            style: Style = "dashed" if when == "first tenth" else "solid"
            lines.append(Line(f"{task}, {when}", [float(j) for j in steps], means, style))
    return line_chart(lines, "solver step", log=True)


def _of_tasks(work: Path, spec: Spec, rounds: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[Chart]:
    """Charts that each of `tasks` has of its own."""
    return _reward_charts(work, rounds, tasks) + _learning_charts(work, spec, rounds, tasks)


def _reward_charts(work: Path, rounds: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[Chart]:
    """The validations of the averaged student, with base and teacher, if any, on the same prompts and noise."""
    validated = [r for r in rounds if "rewards" in r]
    if not validated:
        return []
    numbers = [float(r["round"]) for r in validated]
    charts = []
    for task in tasks:
        for reward in validated[0]["rewards"][task]:
            lines = [Line("student, average", numbers, [r["rewards"][task][reward] for r in validated])]
            levels: tuple[tuple[str, str, Style], ...] = (
                ("base", "base", "dotted"), (f"teacher {task}", f"teacher-{task}", "dashed")
            )  # fmt: skip
            for name, model, style in levels:
                file = work / "evaluation" / f"{model}.json"
                if not file.exists():  # the task has no teacher
                    continue
                scored = json.loads(file.read_text())
                first = scored["rewards"][task][reward][:VALIDATION_PROMPTS]
                lines.append(Line(name, [0.0, numbers[-1]], [sum(first) / len(first)] * 2, style))
            why = f"{reward} of the first {len(first)} held-out prompts"
            charts.append((f"Reward: {task}", why, line_chart(lines, "round", from_zero=False)))
    return charts


def _learning_charts(work: Path, spec: Spec, rounds: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[Chart]:
    """Of whoever learned from rewards: every teacher that was trained, and the student in each of its tasks."""
    charts: list[Chart] = []
    for teacher in (teacher for teacher in trained_teachers(spec) if teacher.name in tasks):
        own = _rounds(teacher_path(spec, teacher, work / "claims") / "train" / "log.jsonl")
        charts += [*_reinforcement(f"Teacher {teacher.name}", teacher.name, own, looks=True)]
    if spec.training.method == Method.RL:
        for task in (task for task in _tasks(rounds) if task in tasks):
            charts += [*_reinforcement(f"Student, {task}", task, [r for r in rounds if task in r["tasks"]])]
    return charts


def _reinforcement(
    name: str, task: str, rounds: Sequence[Mapping[str, Any]], *, looks: bool = False
) -> Iterator[Chart]:
    """Reward, way from the base, and what the images of one prompt differ in."""
    if len(rounds) < 2:
        return
    numbers = [float(r["round"]) for r in rounds]
    window = max(1, int(len(rounds) * _SMOOTHING))

    def curve(key: str) -> Line:
        return Line(key, numbers, _smooth([r["figures"][key] for r in rounds], window))

    reward, error = ([r["figures"][key] for r in rounds] for key in ("reward", "reward_error"))
    limits = [[r + side * e for r, e in zip(reward, error, strict=True)] for side in (-1.96, 1.96)]
    bounds = [Line("reward, 95 %", numbers, limit, "dotted") for limit in limits]
    away = [r["tasks"][task]["velocity_mse"] for r in rounds]
    why = "of the images of each round, with its interval over prompts"
    lines = [Line("reward", numbers, reward), *bounds]
    yield f"{name}: reward", why, line_chart(lines, "round", from_zero=False)
    looked = [r for r in rounds if "rewards" in r] if looks else []
    if looked:
        when, of_task = [float(r["round"]) for r in looked], [r["rewards"][task] for r in looked]
        lines = [Line(each, when, [rewards[each] for rewards in of_task]) for each in of_task[0]]
        why = f"of the average, on {VALIDATION_PROMPTS} held-out prompts at most"
        yield f"{name}: held-out reward", why, line_chart(lines, "round", from_zero=False)
    lines = [Line("distance", numbers, _smooth(away, window))]
    yield f"{name}: way from the base", "squared distance of the velocities", line_chart(lines, "round")
    why = "deviation within, and share of those without any"
    yield f"{name}: groups", why, line_chart([curve("group_std"), curve("flat_groups")], "round")
    for key in ("ratio", "clipped", "old_distance"):
        if key in rounds[0]["figures"]:
            yield f"{name}: {key}", FIGURES[key], line_chart([curve(key)], "round", from_zero=False)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    sums, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        sums.append(total / min(i + 1, window))
    return sums


def _grids(work: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Per task the same prompts and noise for base, the task's own teacher, if it has one, and the student."""
    grids = []
    for task in tasks:
        rows = []
        for row in _GRID_ROWS:
            model = f"teacher-{task}" if row == "teacher" else row
            folder = work / "evaluation" / "images" / model / task
            if folder.exists():
                rows.append((row, _images(folder)))
        scored = json.loads((work / "evaluation" / "base.json").read_text())
        prompts = scored["prompts"][task][: len(rows[0][1])]
        grids.append({"task": task, "prompts": prompts, "rows": rows})
    return grids


def _looks(work: Path, spec: Spec, rounds: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Images over the rounds: of the student by task, and of every teacher that was trained, where something was looked
    at."""
    found = [(f"student, {task}", task, work, rounds) for task in tasks]
    for teacher in (teacher for teacher in trained_teachers(spec) if teacher.name in tasks):
        folder = teacher_path(spec, teacher, work / "claims")
        found.append((f"teacher {teacher.name}", teacher.name, folder, _rounds(folder / "train" / "log.jsonl")))
    looks = []
    for title, task, folder, logged in found:
        numbers = [r["round"] for r in logged if "rewards" in r]
        shown = sorted({numbers[i * (len(numbers) - 1) // (_LOOKS - 1)] for i in range(_LOOKS)}) if numbers else []
        rows = [(f"round {number}", _images(looks_of(folder) / str(number) / task)) for number in shown]
        if any(images for _, images in rows):
            looks.append({"title": title, "rows": rows})
    return looks


def _images(folder: Path) -> list[str]:
    """Of a video: the animated file."""
    files = (*folder.glob("*.png"), *folder.glob("*.webp"))
    return [_data_uri(file) for file in sorted(files, key=lambda f: int(f.stem))]


def _data_uri(file: Path) -> str:
    return f"data:image/{file.suffix[1:]};base64,{base64.b64encode(file.read_bytes()).decode()}"
