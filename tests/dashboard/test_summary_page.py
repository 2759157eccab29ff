"""The Summary page: the table, its gaps, its downloads."""

from tests.dashboard.pages import CANCELLED, FINISHED, RUNNING, charts, html


def test_table_downloads_and_charts(api, visit):
    app = visit("summary", sweep=FINISHED)
    assert html(app).count("★") == 4
    assert "KD alpha=0.1 lacks xsum Support: the detector&#x27;s model is not installed" in html(app)
    assert [button.proto.label for button in app.get("download_button")] == ["HTML page", "Markdown", "CSV", "LaTeX"]
    assert len(charts(app)) == 4


def test_while_runs_go_on(api, visit):
    text = html(visit("summary", sweep=RUNNING))
    assert "1 of 2 ended" in text
    assert "KD alpha=1 lacks" in text


def test_nothing_evaluated(api, visit):
    assert "No run was evaluated (2 cancelled)" in visit("summary", sweep=CANCELLED).warning[0].value
