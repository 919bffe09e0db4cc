"""`summary.json`: what a run found, from the per-image rewards of its models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from opd_core.api.types import Spec, Teacher
from opd_core.artifacts import Score

from opd_trainer.evaluation.gate import Rewards, check_gate, compared_with
from opd_trainer.evaluation.statistics import kept_share, mean_score

Prompts = Mapping[str, Sequence[str]]  # task -> [N]


def score_name(spec: Spec, task: str, reward: str) -> str:
    """The reward's name, with its task where two tasks use the same reward."""
    shared = sum(reward in teacher.rewards for teacher in spec.teachers) > 1
    return f"{task}/{reward}" if shared else reward


def scores_of(spec: Spec, rewards: Rewards, prompts: Prompts) -> dict[str, Score]:
    """Means with intervals, by reward."""
    return {
        score_name(spec, task, reward): mean_score(values, prompts[task], spec.evaluation.seed)
        for task, by_reward in rewards.items()
        for reward, values in by_reward.items()
    }


def summarise(spec: Spec, models: Mapping[str, Rewards], prompts: Prompts) -> dict[str, Any]:
    """`scores`; `belowBase`, the tasks whose own teacher is worse than the base beyond chance, if there are any; and
    where the student is among `models` also `kept` and `gate`, or `gateNeeds` where models that a rule compares with
    are not among them.

    Args:
        models: "base", "teacher:<name>"..., "student" -> their per-image rewards.
    """
    summary: dict[str, Any] = {
        "scores": {
            model: {name: score.model_dump() for name, score in scores_of(spec, rewards, prompts).items()}
            for model, rewards in models.items()
        }
    }
    if below := [teacher.name for teacher in spec.teachers if _is_below_base(spec, teacher, models, prompts)]:
        summary["belowBase"] = below
    if "student" not in models:
        return summary
    summary["kept"] = {}
    for teacher in spec.teachers:
        trio = [models.get(model) for model in ("base", f"teacher:{teacher.name}", "student")]
        values = [rewards[teacher.name][teacher.rewards[0]] for rewards in trio if rewards is not None]
        if len(values) == len(trio):
            base, best, student = values
            summary["kept"][teacher.name] = kept_share(base, best, student, prompts[teacher.name], spec.evaluation.seed)
    if absent := [model for model in compared_with(spec.evaluation.gate) if model not in models]:
        summary["gateNeeds"] = absent
        return summary
    summary["gate"] = check_gate(spec.evaluation.gate, models, prompts, spec.evaluation.seed)
    return summary


def _is_below_base(spec: Spec, teacher: Teacher, models: Mapping[str, Rewards], prompts: Prompts) -> bool:
    scored = [models[model] for model in ("base", f"teacher:{teacher.name}") if model in models]
    if len(scored) < 2:
        return False
    base, own = (np.asarray(each[teacher.name][teacher.rewards[0]], np.float64) for each in scored)
    return mean_score(base - own, prompts[teacher.name], spec.evaluation.seed).low > 0


def task_means(spec: Spec, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task: mean of its first reward for base, its teacher and the student, as far as they were scored, and
    the share kept."""
    rows = []
    for teacher in spec.teachers:
        name = score_name(spec, teacher.name, teacher.rewards[0])
        models = {"base": "base", "teacher": f"teacher:{teacher.name}", "student": "student"}
        scored = {role: model for role, model in models.items() if model in summary["scores"]}
        means = {role: summary["scores"][model][name]["mean"] for role, model in scored.items()}
        share = summary["kept"].get(teacher.name, {}).get("share")
        row = {
            "task": teacher.name,
            "reward": teacher.rewards[0],
            **means,
            **({} if share is None else {"kept": share}),
        }
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return rows
