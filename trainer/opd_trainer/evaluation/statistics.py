"""Means with bootstrap intervals. Images are paired: the same prompt and noise for every model.

Images of one prompt are not independent: a prompt that is hard is hard in all of them. So whole prompts are drawn, each
with all its images (the cluster bootstrap; Davison and Hinkley 1997, section 3.8). Where every prompt occurs once, this
is the ordinary bootstrap over images.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from opd_core.artifacts import Score

RESAMPLES = 10_000
_LEVELS = (2.5, 97.5)
_DRAWS_AT_ONCE = 4_000_000  # of 8 bytes

Floats = NDArray[np.float64]


def mean_score(values: ArrayLike, prompts: Sequence[str], seed: int) -> Score:
    """Mean of [N] rewards with its 95 % percentile bootstrap interval over `prompts` [N]."""
    values = np.asarray(values, np.float64)
    sums = resampled_sums(per_prompt(np.stack([values, np.ones_like(values)], 1), prompts), seed)
    low, high = interval(sums[:, 0] / sums[:, 1])
    return Score(mean=float(values.mean()), low=low, high=high, n=len(values))


def upper_bound(values: ArrayLike, prompts: Sequence[str], seed: int, chance: float) -> float:
    """The mean of [N] values is above this with probability `chance`: one-sided percentile bootstrap over `prompts`."""
    values = np.asarray(values, np.float64)
    sums = resampled_sums(per_prompt(np.stack([values, np.ones_like(values)], 1), prompts), seed)
    return max(float(np.quantile(sums[:, 0] / sums[:, 1], 1 - chance)), float(values.mean()))


def kept_share(
    base: ArrayLike, teacher: ArrayLike, student: ArrayLike, prompts: Sequence[str], seed: int
) -> dict[str, float | None]:
    """The share of the teacher's gain over the base that the student keeps, with a paired 95 % bootstrap interval.

    (mean(student) - mean(base)) / (mean(teacher) - mean(base)) over [N] rewards each. All are None
    where the teacher gains nothing, be it in one resample: a share of what may be nothing says nothing.
    """
    b, t, s = (np.asarray(values, np.float64) for values in (base, teacher, student))
    gain = t.mean() - b.mean()
    if gain <= 0:
        return {"share": None, "low": None, "high": None}
    share = float((s - b).mean() / gain)
    sums = resampled_sums(per_prompt(np.stack([t - b, s - b], 1), prompts), seed)
    if (sums[:, 0] <= 0).any():
        return {"share": None, "low": None, "high": None}
    low, high = interval(sums[:, 1] / sums[:, 0])
    return {"share": share, "low": low, "high": high}


def per_prompt(columns: Floats, prompts: Sequence[str]) -> Floats:
    """Sums [P, K] over the rows [N, K] of each distinct prompt."""
    distinct, owner = np.unique(np.asarray(prompts), return_inverse=True)
    sums = np.zeros((len(distinct), columns.shape[1]))
    np.add.at(sums, owner, columns)
    return sums


def resampled_sums(clusters: Floats, seed: int) -> Floats:
    """Column sums [RESAMPLES, K] of P rows drawn from `clusters` [P, K] with replacement; the draws depend on P and
    `seed` alone."""
    count, generator = len(clusters), np.random.default_rng(seed)
    columns = np.ascontiguousarray(clusters.T)
    at_once = max(1, _DRAWS_AT_ONCE // count)
    parts = []
    for start in range(0, RESAMPLES, at_once):
        rows = generator.integers(count, size=(min(at_once, RESAMPLES - start), count))
        parts.append(np.stack([column.take(rows).sum(1) for column in columns], 1))
    return np.concatenate(parts)


def interval(resampled: Floats) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(resampled, _LEVELS)
    return float(low), float(high)
