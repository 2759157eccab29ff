"""What runs left in a real store, as the API tells it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.contract.api_client import ApiClient
from services.contract.errors import InvalidInputError, SmoothKDError
from services.contract.evaluation_spec import JudgeSpec
from services.contract.records import Artifact, Generation, MetricPoint, Score, Span
from services.contract.spec import SweepSpec
from services.contract.states import StageKind, State
from services.store.store import Store

POINTS = [
    MetricPoint(name=name, step=step, value=step / 7 - 1)
    for name in ("hard_loss", "loss", "epoch")
    for step in range(4)
]


@pytest.fixture
def sweep_id(api: ApiClient, store: Store, spec: SweepSpec) -> str:
    """SFT seeds 0 and 1, then KD seeds 0 and 1: of ten words SFT gets item i wrong in i, KD in a third of that."""
    sweep = api.submit_sweep(spec)
    for run, support in zip(api.all_runs(sweep.id), (40.0, 50.0, 60.0, 90.0), strict=True):
        for stage in run.stages:
            attempt = store.begin_attempt(stage.id, worker="w", lease_seconds=60)
            assert attempt is not None
            if stage.kind == StageKind.TRAIN:
                store.add_metrics(attempt, POINTS)
                store.add_artifact(attempt, Artifact(run_id=run.id, name="model", path=f"runs/{run.id}/model"))
            else:
                share = 1 if run.method == "SFT" else 3
                store.add_generations(attempt, [answer(number, bad=number // share) for number in range(7)])
                store.put_scores(attempt, [Score(benchmark="demo_news", metric="support", value=support, items=7)])
            store.end_attempt(attempt, State.SUCCEEDED)
    return sweep.id


def answer(number: int, *, bad: int) -> Generation:
    spans = [
        Span(start=5 * place, end=5 * place + 4, detector="lexical", kind="word", score=1, explanation="not there")
        for place in range(bad)
    ]
    return Generation(
        benchmark="demo_news",
        item_id=f"item-{number}",
        source="source",
        reference="reference",
        output=" ".join(["word"] * 10),
        scores={"support": 100.0 - 10 * bad},
        spans=spans,
    )


def test_metrics_by_name_and_step(api: ApiClient, sweep_id: str) -> None:
    run_id = api.runs(sweep_id).items[0].id
    assert api.metrics(run_id) == sorted(POINTS, key=lambda point: (point.name, point.step))
    assert api.metrics(run_id, names=["loss", "epoch"], after_step=2) == [
        point for point in sorted(POINTS, key=lambda point: point.name) if point.name != "hard_loss" and point.step == 3
    ]
    assert api.metrics(run_id, names=["nothing"]) == []


def test_generations_scores_and_artifacts(api: ApiClient, sweep_id: str) -> None:
    run = api.runs(sweep_id).items[0]
    page = api.generations(run.id, limit=4)
    rest = api.generations(run.id, limit=4, cursor=page.next_cursor)
    assert page.items + rest.items == [answer(number, bad=number) for number in range(7)]
    assert rest.next_cursor is None
    assert api.generations(run.id, benchmark="xsum").items == []
    assert [(score.metric, score.value) for score in api.scores(run.id)] == [("support", 40.0)]
    assert [artifact.path for artifact in api.artifacts(run.id)] == [f"runs/{run.id}/model"]


def test_summary(api: ApiClient, sweep_id: str) -> None:
    summary = api.summary(sweep_id)
    assert summary.state == State.SUCCEEDED
    assert [(row.method, row.runs, row.ended) for row in summary.rows] == [("SFT", 2, 2), ("KD alpha=1", 2, 2)]
    sft, kd = (row.cells[0] for row in summary.rows)
    # Sample standard deviations of (40, 50) and (60, 90): 10 / sqrt 2 and 30 / sqrt 2.
    assert (sft.mean, sft.std, sft.best) == (45.0, pytest.approx(7.0710678), False)
    assert (kd.mean, kd.std, kd.best) == (75.0, pytest.approx(21.2132034), True)


def test_case_studies_page_by_page(api: ApiClient, sweep_id: str) -> None:
    first_of = {run.method: run.id for run in reversed(api.all_runs(sweep_id))}
    seen, cursor = [], None
    while True:
        page = api.case_studies(sweep_id, limit=3, cursor=cursor)
        seen += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    # Tenths: item i differs by i - i // 3; ties stand in order of their ids.
    expected = sorted(range(7), key=lambda number: (number // 3 - number, number))
    assert [study.item_id for study in seen] == [f"item-{number}" for number in expected]
    assert [study.difference for study in seen] == pytest.approx([(n - n // 3) / 10 for n in expected])
    for study in seen:
        assert [(output.method, output.run_id) for output in study.outputs] == list(first_of.items())[::-1]
    assert [len(output.spans) for output in seen[0].outputs] == [5, 1]


def test_case_studies_of_one_benchmark(api: ApiClient, sweep_id: str) -> None:
    assert len(api.case_studies(sweep_id, benchmark="demo_news").items) == 7
    assert api.case_studies(sweep_id, benchmark="xsum").items == []
    with pytest.raises(InvalidInputError, match="cursor"):
        api.case_studies(sweep_id, cursor="bm9uc2Vuc2U")


def test_before_anything_ran(api: ApiClient, spec: SweepSpec) -> None:
    sweep = api.submit_sweep(spec)
    assert [row.cells for row in api.summary(sweep.id).rows] == [[], []]
    assert api.case_studies(sweep.id).items == []
    assert api.metrics(api.runs(sweep.id).items[0].id) == []


def test_case_studies_by_a_metric_and_in_a_file(
    api: ApiClient, sweep_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = api.case_studies(sweep_id, metric="support", limit=3)
    # SFT's support of item i is 100 - 10 i, KD's 100 - 10 (i // 3).
    assert [(one.item_id, one.metric) for one in page.items[:1]] == [("item-5", "support")]
    assert [round(100 * one.difference) for one in page.items] == [40, 40, 30]
    rest = api.case_studies(sweep_id, metric="support", limit=10, cursor=page.next_cursor)
    assert [round(100 * one.difference) for one in rest.items] == [20, 20, 10, 0]
    assert api.case_studies(sweep_id, metric="rouge_l").items == []
    monkeypatch.setenv("SMOOTHKD_API_URL", api.url)
    command = ["sweep", "cases", sweep_id, "--metric", "support", "--limit", "2"]
    saved = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "cases.json")])
    assert saved.exit_code == 0, saved.output
    assert [one["item_id"] for one in json.loads((tmp_path / "cases.json").read_text())] == [
        one.item_id for one in page.items[:2]
    ]
    assert "40.0 points better" in CliRunner().invoke(app, command).output
    for wrong in ([*command, "--out", "cases.docx"], ["sweep", "cases", sweep_id, "--metric", "nothing"]):
        assert isinstance(CliRunner().invoke(app, wrong).exception, SmoothKDError)


def test_lower_is_better_turns_the_order(api: ApiClient, store: Store, spec: SweepSpec) -> None:
    sweep = api.submit_sweep(spec)
    for run in api.all_runs(sweep.id):
        for stage in run.stages:
            attempt = store.begin_attempt(stage.id, worker="w", lease_seconds=60)
            assert attempt is not None
            if stage.kind == StageKind.EVALUATE:
                gain = 0.0 if run.method == "SFT" else 5.0
                scored = [
                    answer(number, bad=0).model_copy(update={"scores": {"cost": 20.0 - gain * (number % 2)}})
                    for number in range(4)
                ]
                store.add_generations(attempt, scored)
                cost = Score(benchmark="demo_news", metric="cost", value=1.0, items=4, higher_is_better=False)
                store.put_scores(attempt, [cost])
            store.end_attempt(attempt, State.SUCCEEDED)
    found = api.case_studies(sweep.id, metric="cost").items
    assert [(one.item_id, one.difference) for one in found] == [
        ("item-1", pytest.approx(0.05)),
        ("item-3", pytest.approx(0.05)),
        ("item-0", pytest.approx(0)),
        ("item-2", pytest.approx(0)),
    ]


def test_single_pages_of_differences_either_way_hold_every_item_once(
    api: ApiClient, store: Store, spec: SweepSpec
) -> None:
    sweep = api.submit_sweep(spec)
    gains = [10.0, -40.0, 30.0, -20.0, 0.0]
    for run in api.all_runs(sweep.id):
        for stage in run.stages:
            attempt = store.begin_attempt(stage.id, worker="w", lease_seconds=60)
            assert attempt is not None
            if stage.kind == StageKind.EVALUATE:
                scored = [
                    answer(number, bad=0).model_copy(
                        update={"scores": {"support": 50.0 + gain * (run.method != "SFT")}}
                    )
                    for number, gain in enumerate(gains)
                ]
                store.add_generations(attempt, scored)
            store.end_attempt(attempt, State.SUCCEEDED)
    seen, cursor = [], None
    for _ in gains:
        page = api.case_studies(sweep.id, metric="support", limit=1, cursor=cursor)
        seen += [(one.item_id, round(100 * one.difference)) for one in page.items]
        cursor = page.next_cursor
    assert seen == [("item-1", -40), ("item-2", 30), ("item-3", -20), ("item-0", 10), ("item-4", 0)]
    assert cursor is None


def test_runs_by_different_judges_are_not_compared(
    api: ApiClient, store: Store, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTHKD_API_URL", api.url)
    runs = []
    for hhem, length in (("one", 64), ("other", 96)):
        asked = {"metrics": ("support", "factual_consistency"), "judges": JudgeSpec(hhem=hhem)}
        evaluation = spec.evaluation.model_copy(update={**asked, "max_new_tokens": length})
        sweep = api.submit_sweep(spec.model_copy(update={"evaluation": evaluation}))
        run = api.all_runs(sweep.id)[0]
        runs.append(run.id)
        for stage in run.stages:
            attempt = store.begin_attempt(stage.id, worker="w", lease_seconds=60)
            assert attempt is not None
            if stage.kind == StageKind.EVALUATE:
                scores = {"support": 50.0, "factual_consistency": 60.0}
                store.add_generations(
                    attempt, [answer(n, bad=0).model_copy(update={"scores": scores}) for n in range(3)]
                )
                judged = Score(benchmark="demo_news", metric="factual_consistency", value=60.0, items=3, judged_by=hhem)
                store.put_scores(attempt, [judged])
            store.end_attempt(attempt, State.SUCCEEDED)
    a, b = runs
    shown = CliRunner().invoke(app, ["compare", a, b, "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    missing = {one["metric"]: one["missing"] for one in found["differences"]}
    assert missing == {"support": None, "factual_consistency": f"{a} has it by one, {b} by other"}
    assert found["note"].startswith(f"Outputs of {a} have up to 64 tokens, those of {b} up to 96")
