"""What the checks of a gate say, in words; needs no numpy, for the command line reads them, too."""

from collections.abc import Mapping, Sequence
from typing import Any


def failures(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence per failed check."""
    return [
        f"{check['task']}: {check['reward']} is {check['actual']:.3f}, {check['rule']} needs {check['required']:.3f} "
        f"(less {check['chance']:.3f} for chance)"
        for check in checks
        if not check["passed"]
    ]
