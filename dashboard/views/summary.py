"""Summary: SFT against every KD method over the whole sweep, in the form of the paper's tables."""

from functools import partial

import streamlit as st

from dashboard.live import live, problems_shown
from dashboard.render.summary_chart import column_chart, column_frame
from dashboard.render.summary_table import (
    headline_html,
    missing_html,
    summary_columns,
    summary_table_html,
)
from dashboard.render.words import state_counts
from dashboard.session import choose_sweep, client
from services.contract.metric_words import MEANINGS, metric_title
from services.contract.records import Summary, SweepRecord
from services.contract.states import ENDED

REPORT_HELP = (
    "The table, every method's difference from SFT on the same items with its uncertainty, trade-offs, failures; the "
    "page also has plots, training curves and case studies."
)
REPORTS = {
    "html": ("HTML page", "text/html"),
    "md": ("Markdown", "text/markdown"),
    "csv": ("CSV", "text/csv"),
    "tex": ("LaTeX", "application/x-tex"),
}


def draw_page() -> None:
    st.title("Summary")
    with problems_shown():
        sweep = choose_sweep()
        if sweep is not None:
            live(lambda: draw_summary(sweep.id), ended=sweep.state in ENDED)


def draw_summary(sweep_id: str) -> bool:
    sweep = client().sweep(sweep_id)
    summary = client().summary(sweep_id)
    if not sweep.spec.evaluation.benchmarks:
        st.info("This sweep names no benchmark, so there is nothing to compare. Add `evaluation: {benchmarks: [...]}`.")
    elif not summary_columns(summary):
        draw_waiting(sweep)
    else:
        draw_results(sweep, summary)
    return sweep.state in ENDED


def draw_waiting(sweep: SweepRecord) -> None:
    if sweep.state in ENDED:
        st.warning(f"No run was evaluated ({state_counts(sweep.runs)}). The Runs page says what went wrong.")
        st.page_link("views/runs.py", label="Runs", icon=":material/show_chart:", query_params={"sweep": sweep.id})
    else:
        st.info(
            f"No run has been evaluated yet ({state_counts(sweep.runs)}). The table fills as runs end.",
            icon=":material/hourglass_empty:",
        )


def draw_results(sweep: SweepRecord, summary: Summary) -> None:
    headline = headline_html(summary)
    if headline:
        st.html(headline)
    st.html(summary_table_html(summary))
    st.caption(
        "Mean ± sample standard deviation over learning rate × batch size × seed; n, where fewer runs "
        "than the row's stand behind a cell. ★ marks the best of a column."
    )
    missing = missing_html(summary)
    if missing:
        st.html(missing)
    draw_report(sweep)
    draw_charts(summary)


def draw_report(sweep: SweepRecord) -> None:
    """Buttons that save the report, which the API makes when it is asked for one."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("Report:", width="content", help=REPORT_HELP)
        for form, (label, media_type) in REPORTS.items():
            st.download_button(
                label,
                partial(client().report, sweep.id, form=form),
                f"{sweep.name}.{form}",
                media_type,
                icon=":material/download:",
                on_click="ignore",
                key=f"report-{form}",
            )


def draw_charts(summary: Summary) -> None:
    st.subheader("Means with one standard deviation")
    drawn = [column for column in summary_columns(summary) if not column_frame(summary, column).empty]
    columns = st.columns(2, gap="large")
    for place, (benchmark, metric) in enumerate(drawn):
        with columns[place % 2]:
            st.markdown(f"**{benchmark} · {metric_title(metric)}**", help=MEANINGS.get(metric))
            chart = column_chart(summary, (benchmark, metric))
            st.altair_chart(chart, width="stretch", key=f"chart-{benchmark}-{metric}")


draw_page()
