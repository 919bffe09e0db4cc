"""What the user sees while a run goes on: a live table in a terminal, a line per event elsewhere."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_core.brief import SHOWN, lost, others, worst
from opd_core.stages import Reason, Stage
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from opd_cli.terminal import make_console

_TRAININGS = (Stage.TEACHERS_TRAINED, Stage.TRAINED)
_LINE_EVERY_SECONDS = 15.0  # of progress, where there is no terminal


class Display:
    """Use as a context manager; everything it is told goes to `events` as well."""

    def __init__(self, events: Path, console: Console | None = None) -> None:
        self.console = console or make_console()
        self._events = events
        self._stages: dict[Stage, tuple[Reason, str]] = {}
        self._progress: Mapping[str, Any] | None = None
        self._last_line = 0.0
        live = self.console.is_terminal
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=2) if live else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def stage(self, stage: Stage, reason: Reason, message: str) -> None:
        """The condition `stage` has a new reason."""
        self._stages[stage] = (reason, message)
        self._record({"stage": stage.value, "reason": reason.value, "message": message})
        if not self._live:
            self.console.print(f"{clock()}  {stage.value:15} {reason.value:12} {message}", markup=False)

    def interrupted(self, message: str) -> None:
        """The stage that was at work stops by the user's wish."""
        if self._stages:
            self.stage(max(self._stages, key=list(Stage).index), Reason.INTERRUPTED, message)

    def note(self, message: str) -> None:
        """Something that is no stage."""
        self._record({"message": message})
        self.console.print(message if self._live else f"{clock()}  {message}", markup=False)

    def progress(self, progress: Mapping[str, Any]) -> None:
        """The trainer's own account of itself (its /progress)."""
        self._progress = progress
        if not self._live and time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"{clock()}  {_progress_line(progress)}  loss {losses(progress)}", markup=False)

    def _record(self, event: Mapping[str, Any]) -> None:
        with self._events.open("a") as file:
            file.write(json.dumps({"time": time.time(), **event}) + "\n")

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False, show_header=False)
        for stage in Stage:
            reason, message = self._stages.get(stage, (Reason.WAITING, ""))
            style = STYLES.get(reason, "")
            table.add_row(Text(stage.value, style="bold"), Text(reason.value, style=style), Text(message))
        at_work = any(self._stages.get(stage, ("",))[0] == Reason.RUNNING for stage in _TRAININGS)
        if self._progress is None or not at_work:
            return Group(table)
        bar = ProgressBar(total=100, completed=float(self._progress["percentage"]), width=40)
        return Group(table, bar, Text(_progress_line(self._progress)), task_table(self._progress))


STYLES = {
    Reason.RUNNING: "cyan",
    Reason.STARTING: "cyan",
    Reason.COMPLETED: "green",
    Reason.UP_TO_DATE: "green",
    Reason.FREED: "green",
    Reason.RESTARTING: "yellow",
    Reason.INTERRUPTED: "yellow",
    Reason.FAILED: "red",
    Reason.GATE_MISSED: "red",
    Reason.DEADLINE_EXCEEDED: "red",
}


def _progress_line(progress: Mapping[str, Any]) -> str:
    return (
        f"round {progress['round']}/{progress['totalRounds']}  {progress['imagesPerSecond']:.1f} images/s  "
        f"{duration(progress['remainingSeconds'])} left"
    )


# Keys of a task's row in /progress, in the words of docs/training.md. There is no KL under a deterministic sampler, and
# no reward before the first validation.
_FIGURES = {"loss": "loss", "kl": "KL", "velocityMse": "velocity error"}
_REWARD = "reward/"


def task_table(progress: Mapping[str, Any]) -> Table:
    """A row per task: the spec's objective, the KL where there is one, the distance to the teacher, the rewards. Of
    many those with the largest loss."""
    metrics = progress["metrics"]
    shown, rest = worst(metrics, _loss)
    figures = {key: name for key, name in _FIGURES.items() if any(key in metric for metric in metrics)}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("task")
    for name in figures.values():
        table.add_column(name, justify="right")
    if rewarded := any(_rewards(metric) for metric in metrics):
        table.add_column("reward")
    for metric in shown:
        cells = [f"{metric[key]:.4g}" for key in figures]
        table.add_row(Text(metric["task"]), *cells, *([Text(_rewards(metric))] if rewarded else []))
    if rest:
        most = [f"<= {max(metric[key] for metric in rest):.4g}" for key in figures]
        table.add_row(others(len(rest)), *most, style="dim")
    return table


def losses(progress: Mapping[str, Any]) -> str:
    """By task, and then KL and rewards where there are some; of many those with the largest loss."""
    metrics, rest = worst(progress["metrics"], _loss)
    words = ["  ".join(f"{metric['task']} {metric['loss']:.4g}" for metric in metrics)]
    if rest:
        words.append(f"{others(len(rest))} <= {_loss(rest[0]):.4g}")
    if any("kl" in metric for metric in metrics):
        words.append("KL " + "  ".join(f"{metric['task']} {metric['kl']:.4g}" for metric in metrics))
    if any(_rewards(metric) for metric in metrics):
        words.append("reward " + "  ".join(_rewards(metric) for metric in metrics))
    return "  ".join(words)


def _loss(metric: Mapping[str, Any]) -> float:
    return float(metric["loss"])


def _rewards(metric: Mapping[str, Any]) -> str:
    """Of the newest validation."""
    return "  ".join(
        f"{key.removeprefix(_REWARD)} {value:.3f}" for key, value in metric.items() if key.startswith(_REWARD)
    )


def result_table(summary: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> Table:
    """Models by rewards; where these are too many for a line, tasks by models, that of which least is kept first.

    Args:
        tasks: {task, reward, base, teacher, student, kept}, as far as they were scored.
    """
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = summary["scores"]
    rewards = list(next(iter(scores.values())))
    if len(rewards) > SHOWN:
        return score_table(sorted(tasks, key=lambda row: lost(row.get("kept")), reverse=True), len(tasks))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    for reward in rewards:
        table.add_column(reward, justify="right")
    for model, by_reward in scores.items():
        cells = [
            f"{by_reward[r]['mean']:.3f}  [{by_reward[r]['low']:.3f}, {by_reward[r]['high']:.3f}]" for r in rewards
        ]
        table.add_row(model, *[Text(cell) for cell in cells], style="bold" if model == "student" else "")
    return table


def score_table(rows: Sequence[Mapping[str, Any]], shown: int = SHOWN) -> Table:
    """Mean rewards of base, teacher and student by task, and the share of the teacher's gain that the student keeps. Of
    many the `shown` ones of which it keeps least."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("task", "reward", "base", "teacher", "student", "kept"):
        table.add_column(name, justify="left" if name in ("task", "reward") else "right")
    first, rest = worst(rows, lambda row: lost(row.get("kept")), shown)
    for row in first:
        means = ["" if row.get(who) is None else f"{row[who]:.3f}" for who in ("base", "teacher", "student")]
        kept = "" if row.get("kept") is None else f"{row['kept']:.0%}"
        table.add_row(Text(row["task"]), Text(row["reward"]), *means, kept)
    if rest:
        shares = [row["kept"] for row in rest if row.get("kept") is not None]
        table.add_row(others(len(rest)), "", "", "", "", f">= {min(shares):.0%}" if shares else "", style="dim")
    return table


def kept_lines(summary: Mapping[str, Any]) -> list[str]:
    """The student's share of every teacher's gain, in words, of many the least; none where nobody teaches."""
    kept: Mapping[str, Mapping[str, float | None]] = summary.get("kept", {})
    first, rest = worst(list(kept), lambda task: lost(kept[task]["share"]))
    parts = []
    for task in first:
        share, low, high = (kept[task][key] for key in ("share", "low", "high"))
        if share is None or low is None or high is None:
            parts.append(f"{task}: the teacher gains nothing here")
        else:
            parts.append(f"{task} {share:.0%} [{low:.0%}, {high:.0%}]")
    if rest:
        parts.append(f"and of {others(len(rest))} no less")
    return ["of the teachers' gains the student keeps: " + ", ".join(parts)] if parts else []


def teacher_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line per teacher that its student had better not learn from."""
    return [
        f"teacher {task} is worse than the base at its own task: is it a LoRA of this base, and is its guidanceScale "
        "the one that it was made with?"
        for task in summary.get("belowBase", [])
    ]


_BY_CHANCE = "passed, below it by no more than chance"


def gate_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line per rule of the gate, of many the missed ones first."""
    first, rest = worst(summary["gate"], lambda check: not check["passed"])
    lines = [
        f"gate:    {check['task']} {check['reward']} {check['actual']:.3f}, required {check['required']:.3f}: "
        + ("MISSED" if not check["passed"] else "passed" if check["actual"] >= check["required"] else _BY_CHANCE)
        for check in first
    ]
    if rest:
        missed = sum(not check["passed"] for check in rest)
        lines.append(f"gate:    {others(len(rest))}: " + (f"{missed} MISSED" if missed else "passed"))
    return lines


def clock() -> str:
    return time.strftime("%H:%M:%S")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
