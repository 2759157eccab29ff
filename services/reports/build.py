"""A sweep's report from its table, its runs and their per-item results. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence

from services.contract.records import RunRecord, Score, Summary, SweepRecord
from services.contract.report_records import MethodRuns, Report, RunFailure
from services.contract.states import State
from services.reports.comparison import Column, compare_with_baseline
from services.reports.item_scores import ItemScores
from services.reports.paired import RESAMPLES
from services.reports.trade_off import find_trade_offs
from services.reports.words import run_setting

FAILED = frozenset({State.FAILED, State.CANCELLED, State.SKIPPED})


def build_report(
    sweep: SweepRecord,
    runs: Sequence[RunRecord],
    summary: Summary,
    *,
    scores: Mapping[str, Sequence[Score]],
    items: ItemScores,
    resamples: int = RESAMPLES,
) -> Report:
    """``summary`` is the sweep's table; ``scores`` and ``items`` hold what its evaluated runs left, by run id."""
    directions: dict[Column, bool] = {
        (score.benchmark, score.metric): score.higher_is_better for of_run in scores.values() for score in of_run
    }
    order = [(cell.benchmark, cell.metric) for row in summary.rows[:1] for cell in row.cells]
    methods = [row.method for row in summary.rows]
    valued = {
        run_id: {(score.benchmark, score.metric) for score in of_run if score.value is not None}
        for run_id, of_run in scores.items()
    }
    return Report(
        sweep_id=sweep.id,
        name=sweep.name,
        state=sweep.state,
        created_at=sweep.created_at,
        student=sweep.spec.student.model,
        teacher=sweep.spec.teacher.model if sweep.spec.teacher else None,
        dataset=sweep.spec.dataset.path,
        summary=summary,
        directions={metric: better for (_, metric), better in directions.items()},
        comparisons=compare_with_baseline(
            sorted(runs, key=lambda run: methods.index(run.method)),
            items,
            columns={column: directions[column] for column in order},
            valued=valued,
            resamples=resamples,
        ),
        runs=[
            MethodRuns(method=method, states=Counter(run.state for run in runs if run.method == method))
            for method in methods
        ],
        failures=[_failure(run) for run in runs if run.state in FAILED],
        trade_offs=find_trade_offs(summary),
        resamples=resamples,
    )


def _failure(run: RunRecord) -> RunFailure:
    return RunFailure(run_id=run.id, method=run.method, setting=run_setting(run), state=run.state, problem=run.problem)
