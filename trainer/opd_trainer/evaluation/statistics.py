"""Means with bootstrap intervals. Images are paired: the same prompt and noise for every model.

Images of one prompt are not independent: a prompt that is hard is hard in all of them. So whole prompts are drawn, each
with all its images (the cluster bootstrap; Davison and Hinkley 1997, section 3.8). Where every prompt occurs once, this
is the ordinary bootstrap over images.

With `tags` [N] a mean is the mean of the tags' means, and every tag's prompts are drawn among themselves (the
stratified bootstrap, section 3.2 there).
"""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from opd_core.artifacts import Score

RESAMPLES = 10_000
_LEVELS = (2.5, 97.5)
_DRAWS_AT_ONCE = 4_000_000  # of 8 bytes

Floats = NDArray[np.float64]


def mean_score(values: ArrayLike, prompts: Sequence[str], seed: int, tags: Sequence[str] = ()) -> Score:
    """Mean of [N] rewards with its 95 % percentile bootstrap interval over `prompts` [N]."""
    values = np.asarray(values, np.float64)
    low, high = interval(_resampled_means(values[:, None], prompts, seed, tags)[:, 0])
    return Score(mean=mean(values, tags), low=low, high=high, n=len(values))


def upper_bound(values: ArrayLike, prompts: Sequence[str], seed: int, chance: float, tags: Sequence[str] = ()) -> float:
    """The mean of [N] values is above this with probability `chance`: one-sided percentile bootstrap over `prompts`,
    expanded by what it is too narrow where they are few (Hesterberg 2015, The American Statistician 69(4), 3.4)."""
    values = np.asarray(values, np.float64)
    resampled = _resampled_means(values[:, None], prompts, seed, tags)[:, 0]
    free = max(1, len(set(prompts)) - max(1, len(set(tags))))
    level = NormalDist().cdf(_t_quantile(1 - chance, free) * np.sqrt(1 + 1 / free))
    return max(float(np.quantile(resampled, level)), mean(values, tags))


def _t_quantile(probability: float, free: int) -> float:
    """Of Student's t with `free` degrees of freedom, to 0.5 % from 8 on (Cornish and Fisher's expansion)."""
    z = NormalDist().inv_cdf(probability)
    return float(z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2))


def kept_share(
    base: ArrayLike,
    teacher: ArrayLike,
    student: ArrayLike,
    prompts: Sequence[str],
    seed: int,
    tags: Sequence[str] = (),
) -> dict[str, float | None]:
    """The share of the teacher's gain over the base that the student keeps, with a paired 95 % bootstrap interval.

    (mean(student) - mean(base)) / (mean(teacher) - mean(base)) over [N] rewards each. All are None
    where the teacher gains nothing, be it in one resample: a share of what may be nothing says nothing.
    """
    b, t, s = (np.asarray(values, np.float64) for values in (base, teacher, student))
    gain = mean(t - b, tags)
    if gain <= 0:
        return {"share": None, "low": None, "high": None}
    means = _resampled_means(np.stack([t - b, s - b], 1), prompts, seed, tags)
    if (means[:, 0] <= 0).any():
        return {"share": None, "low": None, "high": None}
    low, high = interval(means[:, 1] / means[:, 0])
    return {"share": mean(s - b, tags) / gain, "low": low, "high": high}


def mean(values: ArrayLike, tags: Sequence[str] = ()) -> float:
    """Over all [N] values, or over the means of their tags."""
    values = np.asarray(values, np.float64)
    return float(np.mean([values[rows].mean() for rows in _rows_by_tag(len(values), tags)]))


def _rows_by_tag(count: int, tags: Sequence[str]) -> list[NDArray[np.intp]]:
    """Numbers of each tag's rows, the tags in the order of their names; without tags all in one."""
    return [np.flatnonzero(np.asarray(tags) == tag) for tag in sorted(set(tags))] if tags else [np.arange(count)]


def _resampled_means(columns: Floats, prompts: Sequence[str], seed: int, tags: Sequence[str]) -> Floats:
    """Means [RESAMPLES, K] of the columns of [N, K]."""
    counted = np.concatenate([columns, np.ones((len(columns), 1))], 1)
    total, parts = np.zeros((RESAMPLES, columns.shape[1])), _rows_by_tag(len(columns), tags)
    for i, rows in enumerate(parts):
        sums = resampled_sums(per_prompt(counted[rows], [prompts[row] for row in rows]), (seed, i) if i else seed)
        total += sums[:, :-1] / sums[:, -1:]
    return total / len(parts)


def per_prompt(columns: Floats, prompts: Sequence[str]) -> Floats:
    """Sums [P, K] over the rows [N, K] of each distinct prompt."""
    distinct, owner = np.unique(np.asarray(prompts), return_inverse=True)
    sums = np.zeros((len(distinct), columns.shape[1]))
    np.add.at(sums, owner, columns)
    return sums


def resampled_sums(clusters: Floats, seed: int | Sequence[int]) -> Floats:
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
