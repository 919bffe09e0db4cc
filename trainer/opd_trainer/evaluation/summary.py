"""`summary.json`: what a run found, from the per-image rewards of its models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from opd_core.api.types import Spec, Teacher
from opd_core.artifacts import Score

from opd_trainer.evaluation.gate import Rewards, check_gate, compared_with
from opd_trainer.evaluation.statistics import kept_share, mean, mean_score
from opd_trainer.evaluation.tags import Tags, tags_for

Prompts = Mapping[str, Sequence[str]]  # task -> [N]


def score_name(spec: Spec, task: str, reward: str) -> str:
    """The reward's name, with its task where two tasks use the same reward."""
    shared = sum(reward in teacher.rewards for teacher in spec.teachers) > 1
    return f"{task}/{reward}" if shared else reward


def scores_of(spec: Spec, rewards: Rewards, prompts: Prompts, tags: Tags) -> dict[str, Score]:
    """Means with intervals, by reward; of the tags' means where the reward is averaged so."""
    return {
        score_name(spec, task, reward): mean_score(
            values, prompts[task], spec.evaluation.seed, tags_for(reward, task, tags)
        )
        for task, by_reward in rewards.items()
        for reward, values in by_reward.items()
    }


def summarise(spec: Spec, models: Mapping[str, Rewards], prompts: Prompts, tags: Tags) -> dict[str, Any]:
    """`scores`; `byTag`, what the scores are made of that are means of tags' means, if there are any; `belowBase`, the
    tasks whose own teacher is worse than the base beyond chance, if there are any; and where the student is among
    `models` also `kept` and `gate`, or `gateNeeds` where models that a rule compares with are not among them.

    Args:
        models: "base", "teacher:<name>"..., "student" -> their per-image rewards.
        tags: of each task, of its images; GenEval's.
    """
    summary: dict[str, Any] = {
        "scores": {
            model: {name: score.model_dump() for name, score in scores_of(spec, rewards, prompts, tags).items()}
            for model, rewards in models.items()
        }
    }
    if by_tag := {model: parts for model, rewards in models.items() if (parts := _by_tag(spec, rewards, tags))}:
        summary["byTag"] = by_tag
    if below := [teacher.name for teacher in spec.teachers if _is_below_base(spec, teacher, models, prompts, tags)]:
        summary["belowBase"] = below
    if "student" not in models:
        return summary
    summary["kept"] = {}
    for teacher in spec.teachers:
        trio = [models.get(model) for model in ("base", f"teacher:{teacher.name}", "student")]
        values = [rewards[teacher.name][teacher.rewards[0]] for rewards in trio if rewards is not None]
        if len(values) == len(trio):
            base, best, student = values
            of_images = tags_for(teacher.rewards[0], teacher.name, tags)
            share = kept_share(base, best, student, prompts[teacher.name], spec.evaluation.seed, of_images)
            summary["kept"][teacher.name] = share
    if absent := [model for model in compared_with(spec.evaluation.gate) if model not in models]:
        summary["gateNeeds"] = absent
        return summary
    summary["gate"] = check_gate(spec.evaluation.gate, models, prompts, spec.evaluation.seed, tags)
    return summary


def _by_tag(spec: Spec, rewards: Rewards, tags: Tags) -> dict[str, dict[str, Any]]:
    """Of the rewards that are averaged so: the mean of each tag, and the mean over all images alike."""
    return {
        score_name(spec, task, reward): {"tags": _means(values, of_images), "perImage": mean(values)}
        for task, by_reward in rewards.items()
        for reward, values in by_reward.items()
        if (of_images := tags_for(reward, task, tags))
    }


def _means(values: Sequence[float], tags: Sequence[str]) -> dict[str, float]:
    return {
        tag: mean([value for value, own in zip(values, tags, strict=True) if own == tag]) for tag in sorted(set(tags))
    }


def _is_below_base(spec: Spec, teacher: Teacher, models: Mapping[str, Rewards], prompts: Prompts, tags: Tags) -> bool:
    scored = [models[model] for model in ("base", f"teacher:{teacher.name}") if model in models]
    if len(scored) < 2:
        return False
    base, own = (np.asarray(each[teacher.name][teacher.rewards[0]], np.float64) for each in scored)
    of_images = tags_for(teacher.rewards[0], teacher.name, tags)
    return mean_score(base - own, prompts[teacher.name], spec.evaluation.seed, of_images).low > 0


def task_means(spec: Spec, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task: mean of its first reward for base, its teacher and the student, as far as they were scored, and
    the share kept."""
    rows = []
    for teacher in spec.teachers:
        name = score_name(spec, teacher.name, teacher.rewards[0])
        models = {"base": "base", "teacher": f"teacher:{teacher.name}", "student": "student"}
        scored = {role: model for role, model in models.items() if model in summary["scores"]}
        means = {role: summary["scores"][model][name]["mean"] for role, model in scored.items()}
        share = summary.get("kept", {}).get(teacher.name, {}).get("share")
        row = {
            "task": teacher.name,
            "reward": teacher.rewards[0],
            **means,
            **({} if share is None else {"kept": share}),
        }
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return rows
