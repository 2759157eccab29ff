"""How well scores tell two classes apart, with an interval that respects that items of one document belong together."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

RESAMPLES = 1000


class Auroc(BaseModel):
    """Area under the ROC curve; ``low`` and ``high`` bound 95 % of bootstrap resamples of documents.

    ``value`` is None with a ``missing`` reason where only one class occurs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float | None
    low: float | None = None
    high: float | None = None
    items: int = Field(description="Scored items of both classes.")
    positives: int
    missing: str | None = None


def measure_auroc(
    labels: Sequence[bool], scores: Sequence[float], *, groups: Sequence[Hashable], seed: int = 0
) -> Auroc:
    """AUROC of ``scores`` (higher: more likely labelled True) with a bootstrap over ``groups`` (documents)."""
    label_N = np.asarray(labels, dtype=bool)
    positives = int(label_N.sum())
    if positives in (0, len(label_N)):
        missing = "nothing to score" if not len(label_N) else "every item has the same label"
        return Auroc(value=None, items=len(label_N), positives=positives, missing=missing)
    order_N = np.argsort(np.asarray(scores, dtype=np.float64), kind="stable")
    ranked = _Ranked(np.asarray(scores, dtype=np.float64)[order_N], label_N[order_N])
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_N = np.array([numbers[group] for group in groups])[order_N]
    random = np.random.default_rng(seed)
    resampled = []
    for _ in range(RESAMPLES):
        counts = np.bincount(random.integers(0, len(numbers), len(numbers)), minlength=len(numbers))
        value = ranked.auroc(counts[group_N].astype(np.float64))
        if value is not None:
            resampled.append(value)
    low, high = np.percentile(resampled, [2.5, 97.5]) if resampled else (None, None)
    return Auroc(
        value=_rounded(ranked.auroc(np.ones(len(label_N)))),
        low=_rounded(low),
        high=_rounded(high),
        items=len(label_N),
        positives=positives,
    )


class _Ranked:
    """Items in the order of their scores, so that every resample costs only sums."""

    def __init__(self, score_N: NDArray[np.float64], label_N: NDArray[np.bool_]) -> None:
        self.label_N = label_N
        self.starts = np.flatnonzero(np.concatenate([[True], np.diff(score_N) > 0]))

    def auroc(self, weight_N: NDArray[np.float64]) -> float | None:
        """Weighted share of pairs in the right order, ties counted half; None where a class has no weight."""
        positive = np.add.reduceat(weight_N * self.label_N, self.starts)
        negative = np.add.reduceat(weight_N * ~self.label_N, self.starts)
        pairs = positive.sum() * negative.sum()
        if pairs == 0:
            return None
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / pairs)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)
