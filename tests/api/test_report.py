"""A sweep's report over HTTP, in every form, from what the runs left in a real store."""

import csv
import io
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.contract.api_client import ApiClient
from services.contract.errors import InvalidInputError, NotFoundError
from services.contract.records import Generation, MetricPoint, Score
from services.contract.report_records import Report
from services.contract.spec import SweepSpec
from services.contract.states import StageKind, State
from services.reports.versus import Versus
from services.store.store import Store

ITEMS = 40


def answer(number: int, support: float) -> Generation:
    return Generation(
        benchmark="demo_news",
        item_id=f"item-{number}",
        source="a source",
        reference="a reference",
        output="an <b>output</b>",
        scores={"support": support},
        spans=[],
    )


@pytest.fixture
def sweep_id(api: ApiClient, store: Store, spec: SweepSpec) -> str:
    """Two seeds of SFT and KD; KD supports item i by i % 3 points more. The last run fails in training."""
    sweep = api.submit_sweep(spec)
    for place, run in enumerate(api.all_runs(sweep.id)):
        for stage in run.stages:
            attempt = store.begin_attempt(stage.id, worker="w", lease_seconds=60)
            if attempt is None:
                continue
            if place == 3:
                store.end_attempt(attempt, State.FAILED)
                continue
            if stage.kind == StageKind.TRAIN:
                store.add_metrics(
                    attempt, [MetricPoint(name="loss", step=step, value=2.0 - step / 50) for step in range(50)]
                )
            else:
                gain = 0 if run.method == "SFT" else 1
                store.add_generations(attempt, [answer(i, 50.0 + gain * (i % 3)) for i in range(ITEMS)])
                mean = sum(50.0 + gain * (i % 3) for i in range(ITEMS)) / ITEMS
                store.put_scores(attempt, [Score(benchmark="demo_news", metric="support", value=mean, items=ITEMS)])
            store.end_attempt(attempt, State.SUCCEEDED)
    return sweep.id


def test_the_report_as_a_record(api: ApiClient, sweep_id: str) -> None:
    report = Report.model_validate_json(api.report(sweep_id))
    (found,) = report.comparisons
    assert found.difference == pytest.approx(sum(i % 3 for i in range(ITEMS)) / ITEMS)
    assert (found.pairs, found.items, found.better) == (1, ITEMS, True)
    assert [(one.method, dict(one.states)) for one in report.runs] == [
        ("SFT", {State.SUCCEEDED: 2}),
        ("KD alpha=1", {State.SUCCEEDED: 1, State.FAILED: 1}),
    ]
    assert [one.method for one in report.failures] == ["KD alpha=1"]


def test_forms_have_their_media_types(api: ApiClient, sweep_id: str) -> None:
    wanted = {
        "json": "application/json",
        "md": "text/markdown; charset=utf-8",
        "csv": "text/csv; charset=utf-8",
        "tex": "application/x-tex",
        "html": "text/html; charset=utf-8",
    }
    for form, media_type in wanted.items():
        answered = httpx.get(f"{api.url}/v1/sweeps/{sweep_id}/report", params={"format": form})
        assert (answered.status_code, answered.headers["content-type"]) == (200, media_type)
    page = api.report(sweep_id, form="html")
    assert "an &lt;b&gt;output&lt;/b&gt;" in page
    assert page.count("<figure>") == 2  # the differences and the loss; without accuracy or ROUGE-L no trade-off
    with pytest.raises(InvalidInputError, match="format"):
        api.report(sweep_id, form="docx")
    with pytest.raises(NotFoundError):
        api.report("sw-none")


def test_a_new_result_is_in_the_next_report(api: ApiClient, store: Store, spec: SweepSpec) -> None:
    sweep = api.submit_sweep(spec)
    assert Report.model_validate_json(api.report(sweep.id)).summary.rows[0].cells == []
    run = api.all_runs(sweep.id)[0]
    for stage in run.stages:
        attempt = store.begin_attempt(stage.id, worker="w", lease_seconds=60)
        assert attempt is not None
        if stage.kind == StageKind.EVALUATE:
            store.put_scores(attempt, [Score(benchmark="demo_news", metric="support", value=1.0, items=1)])
        store.end_attempt(attempt, State.SUCCEEDED)
    report = Report.model_validate_json(api.report(sweep.id))
    assert report.summary.rows[0].cells[0].mean == 1.0
    assert report.comparisons[0].missing is not None


def test_the_command_writes_files(
    api: ApiClient, sweep_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTHKD_API_URL", api.url)
    result = CliRunner().invoke(app, ["report", sweep_id, "--out", str(tmp_path / "r"), "--format", "csv,html"])
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (tmp_path / "r").iterdir()) == ["report.csv", "report.html"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r" / "report.csv").read_text(encoding="utf-8"))))
    assert [row["method"] for row in rows] == ["SFT", "KD alpha=1"]
    refused = CliRunner().invoke(app, ["report", sweep_id, "--out", str(tmp_path / "r"), "--format", "docx"])
    assert isinstance(refused.exception, InvalidInputError)


def test_runs_are_compared_by_their_ids(
    api: ApiClient, sweep_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTHKD_API_URL", api.url)
    runs = api.all_runs(sweep_id)
    result = CliRunner().invoke(app, ["compare", runs[0].id, runs[2].id, "--json"])
    assert result.exit_code == 0, result.output
    found = Versus.model_validate_json(result.output)
    assert found.differences[0].difference == pytest.approx(sum(i % 3 for i in range(ITEMS)) / ITEMS)
    assert isinstance(CliRunner().invoke(app, ["compare", runs[0].id, "run-none"]).exception, NotFoundError)
