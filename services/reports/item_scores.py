"""Per-item results of several runs, aligned by item."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

ItemRow = tuple[str, str, Mapping[str, float]]
"""Benchmark, item id, and the item's value of each metric."""


class ItemScores:
    """One number per run, benchmark, metric and item; 8 bytes each, so that large sweeps fit."""

    def __init__(self) -> None:
        self._places: dict[str, dict[str, int]] = {}
        self._values: dict[tuple[str, str, str], tuple[NDArray[np.int64], NDArray[np.float64]]] = {}

    def add_run(self, run_id: str, rows: Iterable[ItemRow]) -> None:
        """Reads a run's rows once."""
        columns: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
        for benchmark, item_id, scores in rows:
            places = self._places.setdefault(benchmark, {})
            place = places.setdefault(item_id, len(places))
            for metric, value in scores.items():
                found = columns.setdefault((benchmark, metric), ([], []))
                found[0].append(place)
                found[1].append(value)
        for (benchmark, metric), (at, values) in columns.items():
            self._values[run_id, benchmark, metric] = (np.array(at, dtype=np.int64), np.array(values))

    def has(self, run_id: str, benchmark: str, metric: str) -> bool:
        return (run_id, benchmark, metric) in self._values

    def values_of(self, run_id: str, benchmark: str, metric: str) -> NDArray[np.float64]:
        """By item, in an order that all runs share; NaN where the run has no value."""
        values = np.full(len(self._places.get(benchmark, {})), np.nan)
        if self.has(run_id, benchmark, metric):
            at, found = self._values[run_id, benchmark, metric]
            values[at] = found
        return values
