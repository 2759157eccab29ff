"""The result table on the page, gaps and their reasons included."""

import re

import pytest

from dashboard.render.summary_chart import column_chart, column_frame
from dashboard.render.summary_table import (
    headline_html,
    missing_lines,
    summary_columns,
    summary_table_html,
)
from services.contract.records import Summary, SummaryCell, SummaryRow
from services.contract.states import State


def cell(metric, mean, std=None, *, runs=2, best=False, missing=None, benchmark="demo_news"):
    return SummaryCell(benchmark=benchmark, metric=metric, mean=mean, std=std, runs=runs, best=best, missing=missing)


def row(method, alpha, cells, *, runs=2, ended=2):
    return SummaryRow(method=method, alpha=alpha, runs=runs, ended=ended, cells=cells)


@pytest.fixture
def summary():
    return Summary(
        sweep_id="sw-1",
        state=State.SUCCEEDED,
        rows=[
            row("SFT", 0, [cell("rouge_l", 20.125, 1.5), cell("support", 80.0, 0.5)]),
            row(
                "KD alpha=0.1",
                0.1,
                [cell("rouge_l", 19.0, None, runs=1), cell("support", None, runs=0, missing="no | detector")],
                ended=1,
            ),
            row("KD alpha=1", 1, [cell("rouge_l", 25.0, 0.25, best=True), cell("support", 90.5, 2.0, best=True)]),
        ],
    )


def cells_of(markup):
    """Text of every body cell, row by row, by a regular expression rather than by the code under test."""
    body = markup.split("<tbody>")[1]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", part) for part in body.split("</tr>")[:-1]]
    return [[re.sub(r"<[^>]+>", "", one) for one in parts] for parts in rows]


def test_table_in_the_papers_form(summary):
    assert cells_of(summary_table_html(summary)) == [
        ["SFT", "2", "20.12 ± 1.50", "80.00 ± 0.50"],
        ["KD alpha=0.1", "1 of 2 ended", "19.00n=1", "–"],
        ["KD alpha=1", "2", "★ 25.00 ± 0.25", "★ 90.50 ± 2.00"],
    ]
    assert 'title="no | detector">–' in summary_table_html(summary)


def test_gaps_of_one_reason_are_one_line():
    gaps = [cell(metric, None, runs=0, missing="not evaluated") for metric in ("rouge_l", "support")]
    some = Summary(sweep_id="s", state=State.RUNNING, rows=[row("SFT", 0, gaps, ended=0)])
    assert missing_lines(some) == ["SFT lacks demo_news ROUGE-L, demo_news Support: not evaluated"]


def test_a_cell_that_a_row_lacks_is_a_gap_too():
    ragged = Summary(
        sweep_id="s",
        state=State.RUNNING,
        rows=[row("SFT", 0, [cell("rouge_l", 1.0)]), row("KD alpha=1", 1, [], ended=0)],
    )
    assert summary_columns(ragged) == [("demo_news", "rouge_l")]
    assert missing_lines(ragged) == ["KD alpha=1 lacks demo_news ROUGE-L: no run of this method has been evaluated yet"]


def test_table_text_is_escaped():
    odd = Summary(
        sweep_id="s",
        state=State.SUCCEEDED,
        rows=[row("<b>SFT", 0, [cell("<i>m", None, runs=0, missing='"<u>', benchmark="<s>b")])],
    )
    assert not re.findall(r"<[bius]>", summary_table_html(odd))


def test_tiles_compare_the_best_method_with_sft(summary):
    text = re.sub(r"<[^>]+>", " ", headline_html(summary))
    assert "25.00 ± 0.25" in text
    assert "+4.88 against SFT (20.12 ± 1.50)" in text
    assert "+10.50 against SFT (80.00 ± 0.50)" in text


def test_no_tile_before_sft_and_a_kd_method_have_a_mean(summary):
    only_sft = summary.model_copy(update={"rows": summary.rows[:1]})
    only_kd = summary.model_copy(update={"rows": summary.rows[2:]})
    assert headline_html(only_sft) == headline_html(only_kd) == ""


def test_error_bars_reach_one_deviation_either_way(summary):
    frame = column_frame(summary, ("demo_news", "rouge_l"))
    assert list(frame["method"]) == ["SFT", "KD alpha=0.1", "KD alpha=1"]
    assert list(frame["low"]) == pytest.approx([18.625, 19.0, 24.75])
    assert list(frame["high"]) == pytest.approx([21.625, 19.0, 25.25])
    assert list(column_frame(summary, ("demo_news", "support"))["method"]) == ["SFT", "KD alpha=1"]
    chart = column_chart(summary, ("demo_news", "rouge_l")).to_dict()
    low, high = chart["layer"][1]["encoding"]["x"]["scale"]["domain"]
    assert low < 18.625
    assert high > 25.25
