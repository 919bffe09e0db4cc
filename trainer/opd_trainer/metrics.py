"""What the trainer tells Prometheus and the operator while it runs."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from opd_trainer.figures import FIGURES
from opd_trainer.record import PHASES, Rewards, RoundRecord, TaskRecord

_RECENT = 20  # rounds that the estimate of the time left looks back on


class Metrics:
    """Prometheus series and the progress document; one writer, many readers."""

    def __init__(self, tasks: Sequence[str], total_rounds: int, validate_every: int | None = None) -> None:
        self.registry = CollectorRegistry()
        self._total_rounds = total_rounds
        self._validate_every = validate_every
        self._validation_seconds = 0.0  # of the newest one
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._progress: dict[str, Any] = {
            "stage": "Loading", "round": 0, "totalRounds": total_rounds, "percentage": 0.0,
            "remainingSeconds": None, "imagesPerSecond": None, "metrics": [], "checkpoint": None,
        }  # fmt: skip

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"opd_train_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"opd_train_{name}", text, labels, registry=self.registry)

        self._round = gauge("round", "Rounds finished, restarts included.")
        gauge("rounds_planned", "Rounds of the whole run.").set(total_rounds)
        self._loss = gauge("loss", "The spec's objective in the last round per latent element, by task.", "task")
        self._step_loss = gauge(
            "step_loss", "What one solver step adds to the loss, by task and step from 0.", "task", "step"
        )
        self._kl = gauge(
            "kl",
            "Closed-form KL of student and teacher per latent element, by task, summed over the steps with noise and "
            "whatever the objective; absent under a deterministic sampler, where there is none.",
            "task",
        )
        self._step_kl = gauge(
            "step_kl", "Closed-form KL at one solver step with noise, by task and step from 0.", "task", "step"
        )
        self._reward = gauge(
            "reward", "Mean reward of the averaged student on the validation's prompts, by task and reward.",
            "task", "reward",
        )  # fmt: skip
        self._mse = gauge(
            "velocity_mse", "Mean squared velocity difference to the teacher, or of a teacher to its base.", "task"
        )
        said = "; ".join(f"{name}: {text.rstrip('.')}" for name, text in FIGURES.items())
        self._policy = gauge("policy", f"Of a teacher's training in the last round. {said}.", "task", "figure")
        self._norm = gauge("grad_norm", "Norm of the last round's gradient before clipping.")
        self._rate = gauge("learning_rate", "Learning rate of the last round.")
        self._speed = gauge("images_per_second", "Training images per second in the last round, over all ranks.")
        self._checkpoint_round = gauge("checkpoint_round", "Round of the newest checkpoint.")
        self._images = counter("images", "Training images computed since this process started, over all ranks.")
        self._phases = counter("phase_seconds", "Seconds spent since this process started, by phase.", "phase")
        self._requests = counter("teacher_requests", "Requests to teacher servers, over all ranks.")
        self._retries = counter("teacher_retries", "Requests to teacher servers that were repeated, over all ranks.")
        for phase in (*PHASES, "checkpoint", "validation"):
            self._phases.labels(phase)
        for task in tasks:
            self._loss.labels(task)
            self._mse.labels(task)
        self._seen = {"requests": 0, "retries": 0}
        self._rewards: Rewards = {}  # of the newest validation

    @property
    def progress(self) -> dict[str, Any]:
        return self._progress

    def stage(self, name: str) -> None:
        self._progress = {**self._progress, "stage": name}

    def resumed(self, round_: int) -> None:
        self._round.set(round_)
        self._progress = {**self._progress, "round": round_, "percentage": self._percentage(round_)}

    def finish_round(self, record: RoundRecord) -> None:
        self._round.set(record.round)
        self._norm.set(record.grad_norm)
        self._rate.set(record.learning_rate)
        self._speed.set(record.images_per_second)
        self._images.inc(record.images)
        for phase, seconds in record.phases.items():
            self._phases.labels(phase).inc(seconds)
        for name, task in record.tasks.items():
            self._loss.labels(name).set(task.loss)
            self._mse.labels(name).set(task.velocity_mse)
            for step, term in enumerate(task.loss_per_step):
                self._step_loss.labels(name, str(step)).set(term)
            if task.kl is not None:
                self._kl.labels(name).set(task.kl)
            for step, kl in enumerate(task.kl_per_step):
                if kl is not None:
                    self._step_kl.labels(name, str(step)).set(kl)
            for figure, value in record.figures.items():
                self._policy.labels(name, figure).set(value)
        if record.rewards:
            self._rewards = record.rewards
        for name, rewards in record.rewards.items():
            for reward, mean in rewards.items():
                self._reward.labels(name, reward).set(mean)
        for key, total, series in (
            ("requests", record.teacher_requests, self._requests),
            ("retries", record.teacher_retries, self._retries),
        ):
            series.inc(max(0, total - self._seen[key]))
            self._seen[key] = total
        self._recent.append(record.seconds)
        left = (self._total_rounds - record.round) * sum(self._recent) / len(self._recent)
        if self._validate_every is not None:
            validations = self._total_rounds // self._validate_every - record.round // self._validate_every
            left += validations * self._validation_seconds
        self._progress = {
            **self._progress,
            "round": record.round,
            "percentage": self._percentage(record.round),
            "remainingSeconds": round(left, 1),
            "imagesPerSecond": round(record.images_per_second, 3),
            "metrics": [_figures(name, task, self._told(name, record)) for name, task in record.tasks.items()],
        }

    def _told(self, task: str, record: RoundRecord) -> Mapping[str, float]:
        """Rewards of a task: of the newest validation, and of the images that a teacher's training has sampled."""
        sampled = {"sampled": record.figures["reward"]} if "reward" in record.figures else {}
        return {**self._rewards.get(task, {}), **sampled}

    def validated(self, began: float) -> None:
        """A validation is done; `began` is the value of time.monotonic() before it."""
        self._validation_seconds = time.monotonic() - began
        self._phases.labels("validation").inc(self._validation_seconds)

    def saved(self, round_: int, path: Path, began: float) -> None:
        """A checkpoint was written; `began` is the value of time.monotonic() before it."""
        self._phases.labels("checkpoint").inc(time.monotonic() - began)
        self._checkpoint_round.set(round_)
        self._progress = {**self._progress, "checkpoint": {"round": round_, "path": str(path)}}

    def _percentage(self, round_: int) -> float:
        return round(100 * round_ / self._total_rounds, 2)


def _figures(name: str, task: TaskRecord, rewards: Mapping[str, float]) -> dict[str, Any]:
    """A task's row of /progress: numbers, except for its name."""
    return {
        "task": name,
        "loss": task.loss,
        **({} if task.kl is None else {"kl": task.kl}),
        "velocityMse": task.velocity_mse,
        **{f"reward/{reward}": mean for reward, mean in rewards.items()},
    }
