"""A sweep's report: who is compared with whom, what is missing, and the forms it is written in."""

import base64
import csv
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from services.contract.records import CaseOutput, CaseStudy, MetricPoint, Span, SweepRecord
from services.contract.report_records import Comparison, Report
from services.reports.build import build_report
from services.reports.comparison import compare_with_baseline
from services.reports.item_scores import ItemScores
from services.reports.latex import latex_report
from services.reports.page import Evidence, html_report
from services.reports.tables import csv_report, markdown_report
from services.reports.trade_off import find_trade_offs
from tests.reports.made import ITEMS, SPEC, make_item_values, make_report, make_runs


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


def find(report: Report, method: str, metric: str) -> Comparison:
    return next(one for one in report.comparisons if (one.method, one.metric) == (method, metric))


def test_differences_are_paired_by_learning_rate_and_seed(report: Report) -> None:
    runs = {run.id: run for run in make_runs()}
    # SFT 0-3 and KD alpha=1 8-11 in the same order of settings; run 11 has failed, and with it run 3's partner.
    expected = np.mean(
        [
            make_item_values(runs[f"run-{8 + k}"])["support"] - make_item_values(runs[f"run-{k}"])["support"]
            for k in range(3)
        ],
        axis=0,
    )
    found = find(report, "KD alpha=1", "support")
    assert found.difference == pytest.approx(expected.mean())
    assert (found.pairs, found.items, found.left_out, found.missing) == (3, ITEMS, 0, None)
    half = 1.96 * expected.std(ddof=1) / np.sqrt(ITEMS)
    assert found.low == pytest.approx(expected.mean() - half, abs=0.05)
    assert found.high == pytest.approx(expected.mean() + half, abs=0.05)


def test_only_the_true_difference_is_found(report: Report) -> None:
    verdicts = {(one.method, one.metric): one.better for one in report.comparisons}
    assert verdicts == {
        (method, metric): True if (method, metric) == ("KD alpha=1", "support") else None
        for method in ("KD alpha=0.1", "KD alpha=1")
        for metric in ("support", "rouge_l", "acc_norm")
    }
    open_one = find(report, "KD alpha=0.1", "rouge_l")
    runs = make_runs()
    differences = np.mean(
        [make_item_values(runs[4 + k])["rouge_l"] - make_item_values(runs[k])["rouge_l"] for k in range(4)], axis=0
    )
    assert open_one.p_value == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.03)
    assert open_one.p_adjusted is not None
    assert open_one.p_adjusted >= open_one.p_value


def test_where_lower_is_better_less_is_better() -> None:
    runs = [make_runs()[0], make_runs()[8]]
    items = ItemScores()
    for run, value in zip(runs, (10.0, 5.0), strict=True):
        items.add_run(run.id, [("b", str(place), {"ece": value + place % 2}) for place in range(30)])
    column = ("b", "ece")
    valued = {run.id: {column} for run in runs}
    for higher_is_better in (True, False):
        found = compare_with_baseline(runs, items, columns={column: higher_is_better}, valued=valued, resamples=200)
        assert [(one.difference, one.better) for one in found] == [(-5.0, not higher_is_better)]


def test_what_cannot_be_compared_says_why() -> None:
    sft, kd = make_runs()[0], make_runs()[8]
    other_seed = make_runs()[9]
    column = ("b", "m")
    items = ItemScores()
    items.add_run(sft.id, [("b", "1", {"m": 1.0}), ("b", "2", {"m": 2.0})])
    items.add_run(kd.id, [("b", "3", {"m": 1.0})])

    def reason(runs: list, valued: set[str]) -> str | None:
        found = compare_with_baseline(
            runs, items, columns={column: True}, valued={run_id: {column} for run_id in valued}, resamples=50
        )
        assert [(one.difference, one.better, one.p_adjusted) for one in found] == [(None, None, None)]
        return found[0].missing

    assert reason([sft, kd], {sft.id, kd.id}) == "no item has a value on both sides"
    assert reason([sft, other_seed], {sft.id, other_seed.id}) == (
        "no run of this method and its SFT counterpart both have it"
    )
    items.add_run("partial", [("b", "1", {"m": 1.0})])
    partial = kd.model_copy(update={"id": "partial"})
    # Its items are there, its score is not: the benchmark failed half-way, and half of it is no result.
    assert "counterpart" in str(reason([sft, partial], {sft.id}))
    items.add_run("nothing", [])
    assert "not stored" in str(reason([sft, kd.model_copy(update={"id": "nothing"})], {sft.id, "nothing"}))
    assert compare_with_baseline([kd], items, columns={column: True}, valued={}, resamples=50) == []


def test_items_on_one_side_are_counted_not_averaged() -> None:
    sft, kd = make_runs()[0], make_runs()[8]
    items = ItemScores()
    items.add_run(sft.id, [("b", str(place), {"m": 1.0}) for place in range(10)])
    items.add_run(
        kd.id, [("b", str(place), {"m": 3.0 if place > 4 else 99.0} if place > 4 else {}) for place in range(12)]
    )
    column = ("b", "m")
    (found,) = compare_with_baseline(
        [sft, kd], items, columns={column: True}, valued={sft.id: {column}, kd.id: {column}}, resamples=50
    )
    assert (found.difference, found.items, found.left_out) == (2.0, 5, 7)


def test_trade_off_names_the_front_and_who_has_no_place(report: Report) -> None:
    (trade_off,) = report.trade_offs
    assert (trade_off.faithfulness, trade_off.quality) == ("support", "acc_norm")
    for point in trade_off.points:
        beaten = any(
            other.quality >= point.quality and other.faithfulness >= point.faithfulness and other != point
            for other in trade_off.points
        )
        assert point.on_front is not beaten
    summary = report.summary
    kd = summary.rows[2]
    gap = kd.model_copy(
        update={"cells": [c.model_copy(update={"mean": None}) if c.metric == "acc_norm" else c for c in kd.cells]}
    )
    (without,) = find_trade_offs(summary.model_copy(update={"rows": [*summary.rows[:2], gap]}))
    assert without.left_out == ["KD alpha=1 lacks acc_norm of arc_easy"]
    assert len(without.points) == 2


def test_markdown_has_the_table_counts_and_failures(report: Report) -> None:
    text = markdown_report(report)
    cell = report.summary.rows[2].cells[1]
    assert cell.metric in ("support", "rouge_l")
    support = next(cell for cell in report.summary.rows[2].cells if cell.metric == "support")
    assert f"**{support.mean:.2f} ± {support.std:.2f}** ▲" in text
    assert "- KD alpha=1, demo_news Support" in text or "n = 3 of 4 runs" in text
    assert "KD alpha=1 · lr 5e-06 · bs 4 · seed 1 (run-11): failed, the loss is <not> finite" in text
    found = find(report, "KD alpha=1", "support")
    assert f"| {found.difference:+.2f} ▲ | {found.low:+.2f} to {found.high:+.2f} |" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| ")}
    assert widths <= {5 + 1, 9 + 1, 4 + 1}


def test_csv_holds_every_number_in_full(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_report(report))))
    assert len(rows) == 3 * 3
    row = next(row for row in rows if (row["method"], row["metric"]) == ("KD alpha=1", "support"))
    found = find(report, "KD alpha=1", "support")
    assert [float(row[name]) for name in ("difference", "low", "high", "p_value", "p_adjusted")] == [
        found.difference,
        found.low,
        found.high,
        found.p_value,
        found.p_adjusted,
    ]
    assert (row["runs"], row["planned_runs"], row["pairs"]) == ("3", "4", "3")


def test_latex_is_balanced_escaped_and_in_booktabs(report: Report) -> None:
    text = latex_report(report)
    assert text.count(r"\begin{") == text.count(r"\end{") == 4
    assert all(text.count(rule) == 2 for rule in (r"\toprule", r"\bottomrule"))
    assert r"\multicolumn{1}{c}{arc\_easy}" in text
    assert r"\multicolumn{2}{c}{demo\_news}" in text
    assert r"made\_up" in text
    bare = re.sub(r"\\[\\&%$#_{}]", "", text.split("\n", 1)[1])
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    body = [line for line in text.splitlines() if line.endswith(r"\\") and "KD alpha=1 &" in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {4, 8}
    assert "_" not in re.sub(r"\\_", "", "".join(body))
    # Every sign of a number is mathematics, that of an interval's second end too.
    assert not re.search(r"[+-]\d", "".join(body))
    assert re.search(r"\$-\$\d+\.\d+ to \$\+\$\d", "".join(body))


class Loaded(HTMLParser):
    """What a page would load: every src and href."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "data", "poster")]


def make_study(text: str) -> CaseStudy:
    span = Span(start=0, end=len(text), detector="support", kind="word", score=0.7, explanation=text)
    outputs = [
        CaseOutput(run_id=f"run-{place}", method=method, output=text, scores={"support": 50.0}, spans=[span])
        for place, method in ((0, "SFT"), (8, "KD alpha=1"))
    ]
    return CaseStudy(benchmark="demo_news", item_id=text, source=text, reference=text, outputs=outputs, difference=0.5)


def test_the_page_stands_by_itself_and_shows_hostile_text_as_text(report: Report) -> None:
    hostile = '<script src="https://evil.example/x.js"></script>"\'><img src=x onerror=alert(1)>'
    points = {"run-0": [MetricPoint(name="loss", step=step, value=1 / (step + 1)) for step in range(2000)]}
    named = report.model_copy(update={"name": hostile})
    page = html_report(named, Evidence(runs=make_runs(), points=points, studies=[make_study(hostile)]))
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script src=") >= 6
    loaded = Loaded()
    loaded.feed(page)
    assert len(loaded.sources) == 3  # differences, trade-off, one training curve
    assert all(source.startswith("data:image/svg+xml;base64,") for source in loaded.sources)
    for source in loaded.sources:
        svg = base64.b64decode(source.partition(",")[2]).decode()
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.findall(r'(?:href|src)="(?!#)', svg)
        assert "<script" not in svg
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert len(page) < 400_000


def test_the_same_report_gives_the_same_page() -> None:
    evidence = Evidence(runs=[], points={}, studies=[])
    assert html_report(make_report(resamples=200), evidence) == html_report(make_report(resamples=200), evidence)


def test_a_sweep_without_results_still_has_a_report(report: Report) -> None:
    runs = make_runs()
    rows = [row.model_copy(update={"cells": []}) for row in report.summary.rows]
    sweep = SweepRecord(
        id="sw", name="n", spec=SPEC, state="queued", cancel_requested=False, created_at=report.created_at, runs={}
    )
    empty = build_report(
        sweep, runs, report.summary.model_copy(update={"rows": rows}), scores={}, items=ItemScores(), resamples=10
    )
    for text in (markdown_report(empty), csv_report(empty), latex_report(empty)):
        assert text
    assert "<h2>Case studies" not in html_report(empty, Evidence(runs=runs, points={}, studies=[]))
