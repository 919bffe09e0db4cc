"""Of many teachers and tasks those that are worth reading: the worst, or the first, and how many others there are."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

SHOWN = 8
_T = TypeVar("_T")


def worst(items: Sequence[_T], badness: Callable[[_T], float], shown: int = SHOWN) -> tuple[list[_T], list[_T]]:
    """Those to show and the others. All in their order where they are few; else the worst first, NaN before all."""
    if len(items) <= shown:
        return list(items), []

    def rank(item: _T) -> float:
        value = badness(item)
        return math.inf if math.isnan(value) else value

    ranked = sorted(items, key=rank, reverse=True)
    return ranked[:shown], ranked[shown:]


def named(names: Sequence[str], shown: int = SHOWN) -> str:
    """ "geneval, ocr", or "geneval, ocr and 48 others"."""
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[:shown])} and {others(len(names) - shown)}"


def others(count: int) -> str:
    return f"{count} other{'s'[: count != 1]}"


def lost(kept: float | None) -> float:
    """How bad a share is that a student keeps of a teacher's gain; None, of a teacher that gains nothing, is not."""
    return -math.inf if kept is None else 1 - kept
