"""A finished sweep with known differences: KD alpha=1 supports every item 4 points better, in noise; alpha=0.1 not."""

from datetime import UTC, datetime

import numpy as np

from services.api.summary import summarise
from services.contract.records import Problem, RunRecord, Score, StageRecord, SweepRecord
from services.contract.report_records import Report
from services.contract.spec import expand
from services.contract.spec_reading import parse_sweep
from services.contract.states import StageKind, State
from services.reports.build import build_report
from services.reports.item_scores import ItemScores

ITEMS = 200
SPEC = parse_sweep(
    {
        "name": "made_up",
        "teacher": {"model": "org/big_teacher"},
        "student": {"model": "org/small_student"},
        "dataset": {"path": "demo_instructions"},
        "grid": {"alpha": [0, 0.1, 1], "learning_rate": [1e-5, 5e-6], "seed": [0, 1]},
        "evaluation": {"benchmarks": ["demo_news", "arc_easy"]},
    }
)
GAIN = {"SFT": 0.0, "KD alpha=0.1": 0.0, "KD alpha=1": 4.0}


def make_runs() -> list[RunRecord]:
    """Twelve runs; the last, a KD alpha=1, has failed."""
    return [make_run(place) for place in range(12)]


def make_run(place: int) -> RunRecord:
    spec = expand(SPEC)[place]
    failed = place == 11
    state = State.FAILED if failed else State.SUCCEEDED
    stage = StageRecord(
        id=f"run-{place}-e",
        sweep_id="sw-1",
        run_id=f"run-{place}",
        kind=StageKind.EVALUATE,
        state=state,
        attempt=0 if failed else 1,
    )
    return RunRecord(
        id=f"run-{place}",
        sweep_id="sw-1",
        method=spec.method,
        spec=spec,
        state=state,
        cancel_requested=False,
        stages=[stage],
        progress=1.0,
        problem=Problem(reason="training", what="the loss is <not> finite") if failed else None,
    )


def make_item_values(run: RunRecord) -> dict[str, np.ndarray]:
    """By metric, one number per item; item difficulty is shared, noise is each run's own."""
    difficulty = np.random.default_rng(1).normal(60, 15, ITEMS)
    noise = np.random.default_rng([7, int(run.id.removeprefix("run-"))])
    return {
        "support": difficulty + GAIN[run.method] + noise.normal(0, 3, ITEMS),
        "rouge_l": difficulty / 2 + noise.normal(0, 3, ITEMS),
        "acc_norm": 100.0 * (noise.random(ITEMS) < 0.5),
    }


def make_report(*, resamples: int = 2000) -> Report:
    runs = make_runs()
    scores: dict[str, list[Score]] = {}
    items = ItemScores()
    for run in runs[:-1]:
        values = make_item_values(run)
        items.add_run(
            run.id,
            [
                *(
                    (
                        "demo_news",
                        f"item-{place}",
                        {name: float(values[name][place]) for name in ("support", "rouge_l")},
                    )
                    for place in range(ITEMS)
                ),
                *(("arc_easy", f"q-{place}", {"acc_norm": float(values["acc_norm"][place])}) for place in range(ITEMS)),
            ],
        )
        scores[run.id] = [
            Score(
                benchmark="arc_easy" if name == "acc_norm" else "demo_news",
                metric=name,
                value=float(of_items.mean()),
                items=ITEMS,
            )
            for name, of_items in values.items()
        ]
    sweep = SweepRecord(
        id="sw-1",
        name=SPEC.name,
        spec=SPEC,
        state=State.FAILED,
        cancel_requested=False,
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        runs={State.SUCCEEDED: 11, State.FAILED: 1},
    )
    return build_report(sweep, runs, summarise(sweep, runs, scores), scores=scores, items=items, resamples=resamples)
