"""Whether a student may be served: a test of non-inferiority.

A rule is missed where the student is worse than it asks for beyond chance: the upper end of the one-sided paired
bootstrap interval of what it has above the requirement is below zero. The level is that of all rules of a gate together
(each has `FALSE_ALARMS` over their number, Bonferroni), so a student exactly as good as its gate asks for passes at
least 95 % of the time. With few prompts a gate refuses only what is far off: `chance` says how far, afterwards, and
`checks.gate_line` before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from opd_core.api.types import GateRule

from opd_trainer.evaluation.checks import FALSE_ALARMS
from opd_trainer.evaluation.statistics import mean, upper_bound
from opd_trainer.evaluation.tags import Tags, tags_for

Rewards = Mapping[str, Mapping[str, Sequence[float]]]  # task -> reward -> [N]


def compared_with(rules: Sequence[GateRule]) -> list[str]:
    """Names of the models, besides the student, whose scores the rules ask for."""
    tasks = dict.fromkeys(rule.task for rule in rules if rule.of_teacher is not None)
    return ["base", *(f"teacher:{task}" for task in tasks)] if tasks else []


def check_gate(
    rules: Sequence[GateRule],
    models: Mapping[str, Rewards],
    prompts: Mapping[str, Sequence[str]],
    seed: int,
    tags: Tags,
) -> list[dict[str, Any]]:
    """One check per rule: {task, reward, rule, required, actual, chance, passed}, with `required` as a mean reward.

    `ofTeacher: f` requires base + f (teacher - base): a share of the teacher's gain, whatever the reward's scale.
    `chance` is by how much `actual` may be below `required` and still pass.

    Args:
        models: "student" and the models that the rules are `compared_with` -> their per-image rewards.
        prompts: of each task, [N]; images of one prompt count together. tags: of each task, [N] or none.
    """
    checks = []
    for rule in rules:

        def rewards(model: str, rule: GateRule = rule) -> "np.ndarray[Any, np.dtype[np.float64]]":
            return np.asarray(models[model][rule.task][rule.reward], np.float64)

        student = rewards("student")
        if rule.at_least is not None:
            required, words = np.full_like(student, rule.at_least), f"atLeast {rule.at_least:g}"
        else:
            assert rule.of_teacher is not None
            base = rewards("base")
            required = base + rule.of_teacher * (rewards(f"teacher:{rule.task}") - base)
            words = f"ofTeacher {rule.of_teacher:g}"
        above = student - required
        of_images = tags_for(rule.reward, rule.task, tags)
        most = upper_bound(above, prompts[rule.task], seed, FALSE_ALARMS / len(rules), of_images)
        checks.append(
            {
                "task": rule.task,
                "reward": rule.reward,
                "rule": words,
                "required": mean(required, of_images),
                "actual": mean(student, of_images),
                "chance": most - mean(above, of_images),
                "passed": most >= -1e-12,  # of rounding, where nothing varies
            }
        )
    return checks
