"""What a gate can tell, and what its checks say, in words; needs no numpy, for the command line reads them, too."""

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from statistics import NormalDist
from typing import Any

# Of a student that is exactly as good as all rules ask for. It is promised at most 5 %; the rest is for what a
# bootstrap of few or skewed rewards gets wrong.
FALSE_ALARMS = 0.04
_REFUSALS = 0.8  # of a student that is as far below as a gate is said to see
_DEVIATION = sqrt(0.5)  # of the difference of two verdicts, 0 or 1, on one prompt: at most
_DEFICITS = (0.1, 0.05)


def gate_line(rules: int, prompts: int) -> str:
    """How far below one of its `rules` a student must be for a gate to see it with so many distinct prompts a task."""
    told = " and ".join(f"{prompts_needed(rules, deficit):,} for {deficit:g}" for deficit in _DEFICITS)
    seen = _seen(rules, prompts)
    return (
        f"with {prompts:,} prompts a task the gate refuses, 4 times in 5, a student that is {seen:.2f} "
        f"below a rule, where rewards are 0 or 1; it takes {told}"
    )


def prompts_needed(rules: int, deficit: float) -> int:
    """Distinct prompts for which a gate refuses a student that is so far below one of its rules 4 times in 5."""
    return ceil((_seen(rules, 1) / deficit) ** 2)


def _seen(rules: int, prompts: int) -> float:
    normal = NormalDist()
    return (normal.inv_cdf(1 - FALSE_ALARMS / rules) + normal.inv_cdf(_REFUSALS)) * _DEVIATION / sqrt(prompts)


def failures(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence per failed check."""
    return [
        f"{check['task']}: {check['reward']} is {check['actual']:.3f}, {check['rule']} needs {check['required']:.3f} "
        f"(less {check['chance']:.3f} for chance)"
        for check in checks
        if not check["passed"]
    ]
