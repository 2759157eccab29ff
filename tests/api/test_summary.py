"""The result table and the case studies, against numpy and hand-made answers."""

import random
from datetime import UTC, datetime

import numpy as np
import pytest

from services.api.summary import case_studies, compared_runs, rank_items, summarise, unsupported_share
from services.contract.records import Generation, RunRecord, Score, Span, StageRecord, SweepRecord
from services.contract.spec import RunSpec, expand
from services.contract.spec_reading import parse_sweep
from services.contract.states import StageKind, State

SWEEP = parse_sweep(
    {
        "name": "table",
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "dataset": {"path": "demo_instructions"},
        "grid": {"alpha": [1.0, 0, 0.1], "learning_rate": [1e-5, 5e-6], "batch_size": [2, 4], "seed": [0, 1, 2]},
        "evaluation": {"benchmarks": ["xsum", "demo_news"]},
    }
)


def make_run(spec: RunSpec, *, place: int, state: State = State.SUCCEEDED) -> RunRecord:
    run_id = f"run-{place}"
    stage = StageRecord(id=f"{run_id}-e", sweep_id="sw", run_id=run_id, kind=StageKind.EVALUATE, state=state, attempt=1)
    return RunRecord(
        id=run_id,
        sweep_id="sw",
        method=spec.method,
        spec=spec,
        state=state,
        cancel_requested=False,
        stages=[stage],
        progress=1.0,
    )


def make_runs(*, state: State = State.SUCCEEDED) -> list[RunRecord]:
    return [make_run(spec, place=place, state=state) for place, spec in enumerate(expand(SWEEP))]


def make_sweep() -> SweepRecord:
    return SweepRecord(
        id="sw",
        name="table",
        spec=SWEEP,
        state=State.RUNNING,
        cancel_requested=False,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        runs={},
    )


def score(value: float | None, *, benchmark: str = "xsum", metric: str = "rouge_l", **rest: object) -> Score:
    return Score.model_validate({"benchmark": benchmark, "metric": metric, "value": value, "items": 10, **rest})


def answer(item_id: str, output: str, *bad: str, benchmark: str = "demo_news") -> Generation:
    spans = [
        Span(
            start=output.index(text),
            end=output.index(text) + len(text),
            detector="lexical",
            kind="word",
            score=1.0,
            explanation="not in the source",
        )
        for text in bad
    ]
    return Generation(
        benchmark=benchmark, item_id=item_id, source="s", reference="r", output=output, scores={}, spans=spans
    )


def test_mean_and_standard_deviation_agree_with_numpy() -> None:
    values = random.Random(3)
    runs = make_runs()
    scores = {
        run.id: [score(values.uniform(0, 40)), score(values.uniform(0, 100), benchmark="demo_news", metric="support")]
        for run in runs
    }

    summary = summarise(make_sweep(), runs, scores)

    assert [(row.method, row.alpha) for row in summary.rows] == [
        ("SFT", 0.0),
        ("KD alpha=0.1", 0.1),
        ("KD alpha=1", 1.0),
    ]
    for row in summary.rows:
        assert (row.runs, row.ended) == (12, 12)
        assert [(cell.benchmark, cell.metric) for cell in row.cells] == [("xsum", "rouge_l"), ("demo_news", "support")]
        for place, cell in enumerate(row.cells):
            of_method = np.array([scores[run.id][place].value for run in runs if run.method == row.method])
            assert cell.mean == pytest.approx(of_method.mean(), rel=1e-12)
            assert cell.std == pytest.approx(of_method.std(ddof=1), rel=1e-12)
            assert (cell.runs, cell.missing) == (12, None)


def test_best_follows_the_direction_of_the_metric_and_marks_ties() -> None:
    runs = make_runs()
    by_method = {"SFT": (10.0, 5.0), "KD alpha=0.1": (20.0, 9.0), "KD alpha=1": (20.0, 3.0)}
    scores = {
        run.id: [
            score(by_method[run.method][0]),
            score(by_method[run.method][1], metric="wrong_facts", higher_is_better=False),
        ]
        for run in runs
    }
    rows = summarise(make_sweep(), runs, scores).rows
    assert [[cell.best for cell in row.cells] for row in rows] == [[False, False], [True, False], [True, True]]


def test_missing_values_stay_missing_with_their_reason() -> None:
    runs = make_runs()
    sft = [run for run in runs if run.method == "SFT"]
    kd = [run for run in runs if run.method == "KD alpha=1"]
    scores = {sft[0].id: [score(30.0)], sft[1].id: [score(None, missing="no output held a word")]}
    scores |= {run.id: [score(None, missing="the detector is not installed")] for run in kd[:2]}

    rows = {row.method: row.cells[0] for row in summarise(make_sweep(), runs, scores).rows}

    assert rows["SFT"].model_dump(include={"mean", "std", "runs", "missing", "best"}) == {
        "mean": 30.0,
        "std": None,
        "runs": 1,
        "missing": None,
        "best": False,  # nothing to compare with yet
    }
    assert (rows["KD alpha=1"].mean, rows["KD alpha=1"].missing) == (None, "the detector is not installed")
    assert (rows["KD alpha=0.1"].mean, rows["KD alpha=0.1"].missing) == (
        None,
        "no run of this method has been evaluated",
    )


def test_a_sweep_without_scores_still_lists_its_methods() -> None:
    runs = make_runs(state=State.QUEUED)
    rows = summarise(make_sweep(), runs, {}).rows
    assert [(row.method, row.ended, row.cells) for row in rows] == [
        ("SFT", 0, []),
        ("KD alpha=0.1", 0, []),
        ("KD alpha=1", 0, []),
    ]


def test_compared_runs_are_the_first_evaluated_of_each_method() -> None:
    specs = expand(SWEEP)
    runs = [
        make_run(spec, place=place, state=State.FAILED if place == 0 else State.SUCCEEDED)
        for place, spec in enumerate(specs)
    ]
    chosen = compared_runs(runs)
    first = {run.method: run.id for run in reversed(runs[1:])}
    assert [(run.method, run.id) for run in chosen] == [
        (method, first[method]) for method in ("SFT", "KD alpha=0.1", "KD alpha=1")
    ]


def test_unsupported_share_is_that_of_one_detector() -> None:
    judged = answer("a", "Ten ferries sank in Ostrel", "Ten", "ferries", "Ostrel")
    names = ("lookback", "consistency", "support")
    spans = [span.model_copy(update={"detector": name}) for span, name in zip(judged.spans, names, strict=True)]
    spans.append(spans[2].model_copy(update={"start": 0, "end": 11}))
    both = judged.model_copy(update={"spans": spans, "scores": {"support": 50.0, "consistency": 10.0}})
    assert unsupported_share(both) == pytest.approx(1 / 5)
    assert unsupported_share(both.model_copy(update={"scores": {"support": 50.0}})) == pytest.approx(3 / 5)
    assert unsupported_share(both.model_copy(update={"scores": {}})) == pytest.approx(3 / 5)


def test_unsupported_share_counts_touched_words() -> None:
    assert unsupported_share(answer("a", "The mayor of Ostrel left in 1998", "Ostrel", "1998")) == pytest.approx(2 / 7)
    assert unsupported_share(answer("a", "Ten ferries sank", "n ferr")) == pytest.approx(2 / 3)
    assert unsupported_share(answer("a", "all well")) == 0
    assert unsupported_share(answer("a", "")) == 0


def test_case_studies_come_widest_difference_first() -> None:
    runs = compared_runs(make_runs())
    sft, low, high = (run.id for run in runs)
    generations = {
        sft: [
            answer("1", "one two three four", "two"),  # 1/4 - 0 = 1/4
            answer("2", "one two", "one", "two"),  # 1 - 1/2 = 1/2: the better KD's
            answer("3", "one two", "one"),  # 1/2 - 1 = -1/2: KD is worse
            answer("7", "one two three four", "two"),  # 1/4 - 1 = -3/4 and 1/4 - 0 = 1/4: the wider one
            answer("8", "one two three four", "one", "two"),  # 1/2 - 1 and 1/2 - 0: alike, the worse one
            answer("4", "only SFT", "SFT"),
            answer("5", "one two", "one"),  # 1/2 - 1/2: the empty KD output is no better for being empty
            answer("9", ""),  # nor is an empty one of SFT
            answer("10", "one two", "one", "two"),  # nothing to compare it with
        ],
        low: [
            answer("1", "one two three four"),
            answer("2", "one two", "one"),
            answer("3", "one", "one"),
            answer("5", ""),
            answer("7", "one", "one"),
            answer("8", "one two three four"),
            answer("10", " "),
        ],
        high: [
            answer("2", "one two", "one", "two"),
            answer("3", "two", "two"),
            answer("5", "one two", "two"),
            answer("7", "one"),
            answer("8", "one", "one"),
            answer("6", "only KD"),
            answer("9", "one two", "one", "two"),
        ],
    }

    items = rank_items(runs, generations.__getitem__)
    studies = case_studies(items, runs, generations.__getitem__)

    assert [(study.item_id, study.difference) for study in studies] == [
        ("7", -0.75),
        ("2", 0.5),
        ("3", -0.5),
        ("8", -0.5),
        ("1", 0.25),
        ("5", 0.0),
    ]
    studies = studies[1:2] + studies[4:5]
    assert [output.method for output in studies[0].outputs] == ["SFT", "KD alpha=0.1", "KD alpha=1"]
    assert [output.method for output in studies[1].outputs] == ["SFT", "KD alpha=0.1"]
    assert studies[0].outputs[1].spans == generations[low][1].spans


def test_an_output_that_collapsed_counts_by_a_metric_that_knows_it() -> None:
    runs = compared_runs(make_runs())
    sft, low, high = (run.id for run in runs)
    scored = {
        run_id: [answer("1", output).model_copy(update={"scores": {"rouge_l": value}})]
        for run_id, output, value in ((sft, "one two", 40.0), (low, "", 0.0), (high, "one", 41.0))
    }
    (item,) = rank_items(runs, scored.__getitem__, metric="rouge_l")
    assert item.difference == pytest.approx(-0.4)


def test_without_a_baseline_there_is_nothing_to_compare() -> None:
    runs = [run for run in compared_runs(make_runs()) if run.method != "SFT"]
    assert rank_items(runs, lambda _: [answer("1", "one", "one")]) == []
