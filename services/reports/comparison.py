"""Every method against SFT on the same items, over runs that differ in nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.contract.records import RunRecord
from services.contract.report_records import Comparison
from services.reports.item_scores import ItemScores
from services.reports.paired import RESAMPLES, MeanDifference, adjust_p_values, bootstrap_means

BASELINE = "SFT"
SIGNIFICANT = 0.05
Column = tuple[str, str]
"""Benchmark and metric."""


def compare_with_baseline(
    runs: Sequence[RunRecord],
    items: ItemScores,
    *,
    columns: Mapping[Column, bool],
    valued: Mapping[str, set[Column]],
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """A comparison per method and column, methods in the order of ``runs``.

    ``columns`` says whether higher is better; ``valued`` names, by run id, the columns that the run has a score of.
    Runs are paired by learning rate, batch size and seed, and an item's difference is its mean over the pairs that
    have it. A comparison that cannot be made has no difference and says why. Empty without an SFT run.
    """
    methods = [method for method in dict.fromkeys(run.method for run in runs) if method != BASELINE]
    if not any(run.method == BASELINE for run in runs):
        return []
    found: dict[tuple[str, Column], Comparison] = {}
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in columns):
        asked = [(method, column) for method in methods for column in columns if column[0] == benchmark]
        sides = [_side(runs, method, column, items=items, valued=valued) for method, column in asked]
        # Drawing resamples is what takes time: all comparisons of a benchmark share them.
        means = _bootstrap(sides, resamples=resamples)
        for (method, column), side, mean in zip(asked, sides, means, strict=True):
            found[method, column] = _comparison(method, column, side, mean)
    return _adjusted([found[method, column] for method in methods for column in columns], columns=columns)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A method's differences from SFT: ``difference_N`` by item, or why there are none."""

    difference_N: NDArray[np.float64] | None
    left_out: int = 0
    pairs: int = 0
    missing: str = ""


def _side(
    runs: Sequence[RunRecord],
    method: str,
    column: Column,
    *,
    items: ItemScores,
    valued: Mapping[str, set[Column]],
) -> _Side:
    matched = [
        (baseline, run)
        for baseline in runs
        for run in runs
        if baseline.method == BASELINE and run.method == method and _setting(baseline) == _setting(run)
    ]
    scored = [pair for pair in matched if all(column in valued.get(run.id, ()) for run in pair)]
    if not scored:
        missing = "no run of this method and its SFT counterpart both have it"
        return _Side(difference_N=None, missing=missing)
    pairs = [pair for pair in scored if all(items.has(run.id, *column) for run in pair)]
    if not pairs:
        return _Side(difference_N=None, missing="its per-item results are not stored")
    baseline_PN, method_PN = (np.array([items.values_of(pair[side].id, *column) for pair in pairs]) for side in (0, 1))
    difference_PN = method_PN - baseline_PN
    both_PN = ~np.isnan(difference_PN)
    count_N = both_PN.sum(axis=0)
    difference_N = np.full(difference_PN.shape[1], np.nan)
    np.divide(np.where(both_PN, difference_PN, 0.0).sum(axis=0), count_N, out=difference_N, where=count_N > 0)
    either_N = (~np.isnan(baseline_PN) | ~np.isnan(method_PN)).any(axis=0)
    left_out = int((either_N & (count_N == 0)).sum())
    missing = "" if count_N.any() else "no item has a value on both sides"
    return _Side(difference_N=difference_N, left_out=left_out, pairs=len(pairs), missing=missing)


def _bootstrap(sides: Sequence[_Side], *, resamples: int) -> list[MeanDifference | None]:
    present = [side.difference_N for side in sides if side.difference_N is not None]
    if not present:
        return [None] * len(sides)
    means = iter(bootstrap_means(np.stack(present, axis=1), resamples=resamples))
    return [next(means) if side.difference_N is not None else None for side in sides]


def _comparison(method: str, column: Column, side: _Side, mean: MeanDifference | None) -> Comparison:
    benchmark, metric = column
    if mean is None:
        return Comparison(
            method=method,
            benchmark=benchmark,
            metric=metric,
            difference=None,
            items=0,
            left_out=side.left_out,
            pairs=side.pairs,
            missing=side.missing,
        )
    return Comparison(
        method=method,
        benchmark=benchmark,
        metric=metric,
        difference=mean.mean,
        low=mean.low,
        high=mean.high,
        p_value=mean.p_value,
        items=mean.items,
        left_out=side.left_out,
        pairs=side.pairs,
    )


def _adjusted(comparisons: Sequence[Comparison], *, columns: Mapping[Column, bool]) -> list[Comparison]:
    adjusted = iter(adjust_p_values([c.p_value for c in comparisons if c.p_value is not None]))
    return [
        comparison
        if comparison.p_value is None
        else _with_verdict(
            comparison, next(adjusted), higher_is_better=columns[comparison.benchmark, comparison.metric]
        )
        for comparison in comparisons
    ]


def _with_verdict(comparison: Comparison, p_adjusted: float, *, higher_is_better: bool) -> Comparison:
    assert comparison.difference is not None
    better = (comparison.difference > 0) == higher_is_better if p_adjusted < SIGNIFICANT else None
    return comparison.model_copy(update={"p_adjusted": p_adjusted, "better": better})


def _setting(run: RunRecord) -> tuple[float, int, int]:
    return run.spec.learning_rate, run.spec.batch_size, run.spec.seed
