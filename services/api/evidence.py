"""What results are computed from, out of the store."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Protocol

from services.api.summary import RankedItem, rank_items, summarise
from services.contract.records import Generation, RunRecord, Score
from services.contract.report_records import Report
from services.contract.states import StageKind
from services.reports.build import build_report
from services.reports.item_scores import ItemScores
from services.store.pages import MAX_LIMIT
from services.store.store import Store


class Ranking(Protocol):
    """Run ids (from ``compared_runs``), a benchmark or None for all of them, and a metric, to ranked items."""

    def __call__(
        self, run_ids: tuple[str, ...], benchmark: str | None, metric: str, *, higher_is_better: bool = True
    ) -> list[RankedItem]: ...


Reporting = Callable[[str], Report]
"""A sweep's id to its report."""


def read_runs(store: Store, sweep_id: str) -> list[RunRecord]:
    """All runs of a sweep, in grid order."""
    page = store.runs(sweep_id, limit=MAX_LIMIT)
    runs = list(page.items)
    while page.next_cursor is not None:
        page = store.runs(sweep_id, limit=MAX_LIMIT, cursor=page.next_cursor)
        runs += page.items
    return runs


def read_scores(store: Store, runs: Sequence[RunRecord]) -> dict[str, list[Score]]:
    """The scores of every run whose evaluation has begun, by run id."""
    begun = [run.id for run in runs if any(stage.kind == StageKind.EVALUATE and stage.attempt for stage in run.stages)]
    return {run_id: store.scores(run_id) for run_id in begun}


def read_generations(store: Store, run_id: str, *, benchmark: str | None = None) -> Iterator[Generation]:
    """A run's answers, a page in memory at a time."""
    cursor = None
    while True:
        page = store.generations(run_id, benchmark=benchmark, limit=MAX_LIMIT, cursor=cursor)
        yield from page.items
        cursor = page.next_cursor
        if cursor is None:
            return


def read_answers(store: Store, items: Sequence[RankedItem]) -> Callable[[str], list[Generation]]:
    """A run's answers to these items alone, by run id."""
    wanted = [(item.benchmark, item.item_id) for item in items]
    return lambda run_id: store.answers(run_id, wanted)


def make_ranking(store: Store) -> Ranking:
    """Ranks items, and remembers the last few rankings: the answers of a run that was evaluated never change."""

    @lru_cache(maxsize=8)
    def rank(
        run_ids: tuple[str, ...], benchmark: str | None, metric: str, *, higher_is_better: bool = True
    ) -> list[RankedItem]:
        runs = [store.run(run_id) for run_id in run_ids]
        answers = partial(read_generations, store, benchmark=benchmark)
        return rank_items(runs, answers, metric=metric, higher_is_better=higher_is_better)

    return rank


def make_reporting(store: Store) -> Reporting:
    """Builds reports, and remembers the last few: a page and its formats ask for the same one."""

    @lru_cache(maxsize=4)
    def report(sweep_id: str, _changes: int) -> Report:
        sweep = store.sweep(sweep_id)
        runs = read_runs(store, sweep_id)
        scores = read_scores(store, runs)
        items = ItemScores()
        for run in runs:
            if scores.get(run.id):
                items.add_run(run.id, store.item_scores(run.id))
        return build_report(sweep, runs, summarise(sweep, runs, scores), scores=scores, items=items)

    return lambda sweep_id: report(sweep_id, store.change_counter())
