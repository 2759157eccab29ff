"""How sure a mean difference is, given that both sides answered the same items: an interval by the paired bootstrap,
and the chance of such a difference by a sign-flip test.

Legend of shapes: N items, D of them that differ, K comparisons, B resamples or patterns of signs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
ROUNDING = 1e-4
"""By how much a metric of equal outputs may differ, in its own unit: models that judge round by what else is in a
batch."""
EXACT_ITEMS = 13
"""Up to so many items that differ, all patterns of signs are gone through."""
COUNTS_AT_ONCE = 4_000_000
"""Numbers in memory at a time; bounds what a large benchmark takes."""


@dataclass(frozen=True, kw_only=True)
class MeanDifference:
    """``low`` and ``high``: the central 95 % of resampled means; ``p_value``: two-sided, of no difference at all."""

    mean: float
    low: float
    high: float
    p_value: float
    items: int


def bootstrap_means(
    difference_NK: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[MeanDifference | None]:
    """The mean of each column over its items, with the percentile interval of the bootstrap over items.

    NaN marks an item that a comparison lacks; a column of nothing else gives None. All columns see the same
    resamples (Koehn, 2004, "Statistical significance tests for machine translation evaluation"). The p-value is that
    of a sign-flip test: the share of patterns of signs, all of them or as many as resamples, under which the mean is
    as far from 0 as it is (Fisher, 1935; (hits + 1) / (B + 1) for drawn ones). Resamples themselves would be too sure
    of few items, and take a single one for proof.
    """
    present_NK = ~np.isnan(difference_NK)
    filled_NK = np.where(present_NK, difference_NK, 0.0)
    mean_BK = _resampled_means(filled_NK, present_NK.astype(np.float64), resamples=resamples, seed=seed)
    p_values = _sign_flip_p_values(filled_NK, patterns=resamples, seed=seed)
    found: list[MeanDifference | None] = []
    for column in range(difference_NK.shape[1]):
        items = int(present_NK[:, column].sum())
        if not items:
            found.append(None)
            continue
        means_B = mean_BK[:, column]
        # A resample may hold none of a sparse column's items, and then says nothing of it.
        means_B = means_B[~np.isnan(means_B)]
        low, high = np.quantile(means_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        found.append(
            MeanDifference(
                mean=float(filled_NK[:, column].sum() / items),
                low=float(low),
                high=float(high),
                p_value=p_values[column],
                items=items,
            )
        )
    return found


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): below 0.05 all together err with a chance of at most 5 %."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _sign_flip_p_values(filled_NK: NDArray[np.float64], *, patterns: int, seed: int) -> list[float]:
    differing_NK = np.where(np.abs(filled_NK) > ROUNDING, filled_NK, 0.0)
    sum_K = np.abs(differing_NK.sum(axis=0))
    # Sums of the same numbers in another order differ in their last digits.
    least_K = sum_K - 1e-9 * (1 + sum_K)
    items = len(filled_NK)
    random = np.random.default_rng(seed)
    at_once = max(1, COUNTS_AT_ONCE // max(items, 1))
    hits_K = np.zeros(len(sum_K), dtype=np.int64)
    for start in range(0, patterns, at_once):
        signs_BN = random.integers(2, size=(min(at_once, patterns - start), items), dtype=np.int8) * 2.0 - 1.0
        hits_K += (np.abs(signs_BN @ differing_NK) >= least_K).sum(axis=0)
    found: list[float] = ((hits_K + 1) / (patterns + 1)).tolist()
    for column, least in enumerate(least_K):
        differing_D = differing_NK[differing_NK[:, column] != 0, column]
        if len(differing_D) <= EXACT_ITEMS:
            signs_BD = np.array(list(itertools.product((-1.0, 1.0), repeat=len(differing_D))))
            found[column] = float((np.abs(signs_BD @ differing_D) >= least).mean())
    return found


def _resampled_means(
    filled_NK: NDArray[np.float64], present_NK: NDArray[np.float64], *, resamples: int, seed: int
) -> NDArray[np.float64]:
    items = len(filled_NK)
    random = np.random.default_rng(seed)
    at_once = max(1, COUNTS_AT_ONCE // max(items, 1))
    parts = [np.empty((0, filled_NK.shape[1]))]
    for start in range(0, resamples if items else 0, at_once):
        rows = min(at_once, resamples - start)
        drawn = random.integers(items, size=(rows, items)) + items * np.arange(rows)[:, None]
        counts_BN = np.bincount(drawn.ravel(), minlength=rows * items).reshape(rows, items).astype(np.float64)
        weight_BK = counts_BN @ present_NK
        parts.append(
            np.divide(counts_BN @ filled_NK, weight_BK, out=np.full_like(weight_BK, np.nan), where=weight_BK > 0)
        )
    return np.concatenate(parts)
