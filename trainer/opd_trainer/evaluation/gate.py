"""Whether a student may be served."""

from collections.abc import Mapping, Sequence
from typing import Any

from opd_core.api.types import GateRule

Means = Mapping[str, Mapping[tuple[str, str], float]]  # model -> (task, reward) -> mean


def compared_with(rules: Sequence[GateRule]) -> list[str]:
    """Names of the models, besides the student, whose scores the rules ask for."""
    tasks = dict.fromkeys(rule.task for rule in rules if rule.of_teacher is not None)
    return ["base", *(f"teacher:{task}" for task in tasks)] if tasks else []


def check_gate(rules: Sequence[GateRule], means: Means) -> list[dict[str, Any]]:
    """One check per rule: {task, reward, rule, required, actual, passed}, with `required` as a mean reward.

    `ofTeacher: f` requires base + f (teacher - base): a share of the teacher's gain, whatever the reward's scale.

    Args:
        means: of "student" and of the models that the rules are `compared_with`.
    """
    checks = []
    for rule in rules:
        key = (rule.task, rule.reward)
        if rule.at_least is not None:
            required, words = rule.at_least, f"atLeast {rule.at_least:g}"
        else:
            assert rule.of_teacher is not None
            base, teacher = means["base"][key], means[f"teacher:{rule.task}"][key]
            required, words = base + rule.of_teacher * (teacher - base), f"ofTeacher {rule.of_teacher:g}"
        actual = means["student"][key]
        checks.append(
            {
                "task": rule.task,
                "reward": rule.reward,
                "rule": words,
                "required": required,
                "actual": actual,
                "passed": actual >= required,
            }
        )
    return checks


def failures(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence per failed check."""
    return [
        f"{check['task']}: {check['reward']} is {check['actual']:.3f}, {check['rule']} needs {check['required']:.3f}"
        for check in checks
        if not check["passed"]
    ]
