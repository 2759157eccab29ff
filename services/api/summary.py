"""A sweep's result table and its case studies, computed from what the runs left in the store. Pure functions."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from services.contract.evaluation_spec import MULTIPLE_CHOICE
from services.contract.metric_words import DETECTORS
from services.contract.records import (
    CaseOutput,
    CaseStudy,
    Generation,
    RunRecord,
    Score,
    Summary,
    SummaryCell,
    SummaryRow,
    SweepRecord,
)
from services.contract.states import ENDED, StageKind, State

BASELINE = "SFT"
UNSUPPORTED = "unsupported_words"
"""The share of the output's words that a span touches: what case studies are found by unless a metric is named."""
Column = tuple[str, str]
"""(benchmark, metric)"""


class RankedItem(NamedTuple):
    """A benchmark item's place among the case studies: smaller tuples come first."""

    negative_width: float
    benchmark: str
    item_id: str
    difference: float


def summarise(sweep: SweepRecord, runs: Sequence[RunRecord], scores: Mapping[str, Sequence[Score]]) -> Summary:
    """The paper's table (section 5): one row per method, one cell per benchmark and metric.

    ``runs`` are all runs of the sweep; ``scores`` holds those of each evaluated run, by run id. Mean and sample
    standard deviation run over every learning rate, batch size and seed that has a value. A cell without any
    value is None and says why. The best mean of a column is marked, ties included, once two methods have one.
    """
    columns = _columns(sweep, scores)
    methods: dict[str, list[RunRecord]] = {}
    for run in sorted(runs, key=_row_order):
        methods.setdefault(run.method, []).append(run)
    rows = [
        SummaryRow(
            method=method,
            alpha=of_method[0].spec.alpha,
            runs=len(of_method),
            ended=sum(run.state in ENDED for run in of_method),
            cells=[_cell(column, of_method, scores) for column in columns],
        )
        for method, of_method in methods.items()
    ]
    return Summary(sweep_id=sweep.id, state=sweep.state, rows=_mark_best(rows, columns))


def compared_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """One run per method for the case studies: its first in grid order whose evaluation has succeeded.

    The first, not the best-scoring: in a finished sweep every method then shows the same learning rate, batch
    size and seed, and none shows a pick of its luck. SFT comes first, then by alpha.
    """
    chosen: dict[str, RunRecord] = {}
    for run in runs:
        if any(stage.kind == StageKind.EVALUATE and stage.state == State.SUCCEEDED for stage in run.stages):
            chosen.setdefault(run.method, run)
    return sorted(chosen.values(), key=_row_order)


def rank_items(
    runs: Sequence[RunRecord],
    generations: Callable[[str], Iterable[Generation]],
    *,
    metric: str = UNSUPPORTED,
    higher_is_better: bool = True,
) -> list[RankedItem]:
    """Items that SFT and at least one distilled student answered, those first where they differ most, either way.

    ``runs`` come from ``compared_runs``; ``generations`` gives each one's answers by run id. They are read once
    and not kept, so a benchmark may be larger than memory. The difference is how much better that distilled student
    is than SFT which differs most from it, the worse one of two that differ alike: by the unsupported share of the
    words, or by a per-item metric of 100 points. Items without a value on either side are left out, and so are empty
    outputs by the share of their words. Differences of equal width stand in order of benchmark and item.
    """
    sign = 1.0 if metric != UNSUPPORTED and higher_is_better else -1.0
    baseline: dict[tuple[str, str], float] = {}
    distilled: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for answer in generations(run.id):
            item = (answer.benchmark, answer.item_id)
            share = _share(answer, metric)
            if share is None:
                continue
            if run.method == BASELINE:
                baseline[item] = sign * share
            else:
                distilled.setdefault(item, []).append(sign * share)
    found = []
    for item, share in baseline.items():
        if item in distilled:
            gains = [theirs - share for theirs in distilled[item]]
            widest = min(gains, key=lambda gain: (-abs(gain), gain))
            found.append(RankedItem(-abs(widest), *item, widest))
    return sorted(found)


def case_studies(
    items: Sequence[RankedItem],
    runs: Sequence[RunRecord],
    generations: Callable[[str], Iterable[Generation]],
    *,
    metric: str = UNSUPPORTED,
) -> list[CaseStudy]:
    """The same item answered by every method, side by side, for ranked items in their order.

    ``generations`` gives at least these items' answers, by run id.
    """
    answers: dict[tuple[str, str], dict[str, Generation]] = {(item.benchmark, item.item_id): {} for item in items}
    for run in runs:
        for answer in generations(run.id):
            if (answer.benchmark, answer.item_id) in answers:
                answers[answer.benchmark, answer.item_id][run.id] = answer
    return [_case_study(item, runs, answers[item.benchmark, item.item_id], metric=metric) for item in items]


def unsupported_share(generation: Generation) -> float:
    """Share of the output's words, split at white space, that a span touches, 0 to 1; 0 for an empty output.

    Where several detectors judged the output, the first of DETECTORS counts: together they would mark too much.
    """
    judged = next((name for name, metric in DETECTORS.items() if metric in generation.scores), None)
    spans = [span for span in generation.spans if judged in (None, span.detector) or span.detector not in DETECTORS]
    words = list(re.finditer(r"\S+", generation.output))
    touched = sum(any(span.start < word.end() and word.start() < span.end for span in spans) for word in words)
    return touched / len(words) if words else 0.0


def _row_order(run: RunRecord) -> tuple[bool, float, str]:
    return (run.method != BASELINE, run.spec.alpha, run.method)


def _columns(sweep: SweepRecord, scores: Mapping[str, Sequence[Score]]) -> dict[Column, bool]:
    """Whether higher is better, for each column in the order of the specification, then of the metrics."""
    found = {(score.benchmark, score.metric): score.higher_is_better for of_run in scores.values() for score in of_run}
    order: dict[str, int] = {benchmark.name: place for place, benchmark in enumerate(sweep.spec.evaluation.benchmarks)}
    return {column: found[column] for column in sorted(found, key=lambda column: order.get(column[0], len(order)))}


def _cell(column: Column, runs: Sequence[RunRecord], scores: Mapping[str, Sequence[Score]]) -> SummaryCell:
    benchmark, metric = column
    of_method = [score for run in runs for score in scores.get(run.id, ()) if (score.benchmark, score.metric) == column]
    values = [score.value for score in of_method if score.value is not None]
    reasons = dict.fromkeys(score.missing or "no reason given" for score in of_method if score.value is None)
    return SummaryCell(
        benchmark=benchmark,
        metric=metric,
        mean=statistics.fmean(values) if values else None,
        std=statistics.stdev(values) if len(values) > 1 else None,
        runs=len(values),
        missing=None if values else "; ".join(reasons) or "no run of this method has been evaluated",
    )


def _mark_best(rows: list[SummaryRow], columns: Mapping[Column, bool]) -> list[SummaryRow]:
    best: list[float | None] = []
    for place, higher_is_better in enumerate(columns.values()):
        means = [mean for row in rows if (mean := row.cells[place].mean) is not None]
        pick = max if higher_is_better else min
        best.append(pick(means) if len(means) > 1 else None)
    return [
        row.model_copy(
            update={
                "cells": [
                    cell.model_copy(update={"best": cell.mean is not None and cell.mean == wanted})
                    for cell, wanted in zip(row.cells, best, strict=True)
                ]
            }
        )
        for row in rows
    ]


def _share(answer: Generation, metric: str) -> float | None:
    if metric != UNSUPPORTED:
        value = answer.scores.get(metric)
        return None if value is None else value / 100
    # Chosen answers carry no spans, and an empty output no words: nothing in them could be unsupported.
    nothing = answer.benchmark in MULTIPLE_CHOICE or not answer.output.strip()
    return None if nothing else unsupported_share(answer)


def _case_study(
    item: RankedItem, runs: Sequence[RunRecord], answers: Mapping[str, Generation], *, metric: str
) -> CaseStudy:
    outputs = [
        CaseOutput(
            run_id=run.id,
            method=run.method,
            output=answers[run.id].output,
            scores=answers[run.id].scores,
            spans=answers[run.id].spans,
        )
        for run in runs
        if run.id in answers
    ]
    first = answers[outputs[0].run_id]
    return CaseStudy(
        benchmark=item.benchmark,
        item_id=item.item_id,
        source=first.source,
        reference=first.reference,
        outputs=outputs,
        metric=metric,
        difference=item.difference,
    )
