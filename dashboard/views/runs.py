"""Runs: the training curves of a sweep's runs over each other, and where each run stands."""

from collections.abc import Sequence
from datetime import UTC, datetime

import streamlit as st

from dashboard.live import live, problems_shown
from dashboard.readings import read_metrics
from dashboard.render.colours import run_colours
from dashboard.render.curves import CURVES, count_below_log, curve_chart, curve_frame, curves_by_metric, grouped
from dashboard.render.run_table import drawn_first, legend_html, run_table_html
from dashboard.render.words import run_label
from dashboard.session import choose_sweep, client
from services.contract.records import RunRecord
from services.contract.states import ENDED

SHOWN_AT_FIRST = 12


def draw_page() -> None:
    st.title("Runs")
    with problems_shown():
        sweep = choose_sweep()
        if sweep is not None:
            live(lambda: draw_runs(sweep.id), ended=sweep.state in ENDED)


def draw_runs(sweep_id: str) -> bool:
    # The sweep is read before its runs: a sweep that has ended has no run that goes on.
    sweep = client().sweep(sweep_id)
    runs = client().all_runs(sweep_id)
    shown = choose_runs(sweep_id, runs)
    if shown:
        draw_curves(shown, colours=run_colours(runs))
    else:
        st.info("Choose at least one run above to see its curves.")
    st.subheader(f"All {len(runs)} runs" if len(runs) > 1 else "The run")
    st.html(run_table_html(runs, now=datetime.now(UTC)))
    return sweep.state in ENDED


def choose_runs(sweep_id: str, runs: Sequence[RunRecord]) -> list[RunRecord]:
    labels = [run_label(run) for run in runs]
    chosen = st.multiselect(
        "Runs to draw",
        labels,
        default=[run_label(run) for run in drawn_first(runs, limit=SHOWN_AT_FIRST)],
        key=f"runs-{sweep_id}",
        placeholder="Choose runs",
    )
    return [run for run in runs if run_label(run) in chosen]


def draw_curves(runs: Sequence[RunRecord], *, colours: dict[str, str]) -> None:
    points = read_metrics(runs)
    curves = curves_by_metric({run_label(run): points[run.id] for run in runs})
    if not curves:
        st.info("No step has been logged yet. The curves appear with the first one.", icon=":material/hourglass_empty:")
        return
    smoothing, scale = st.columns([3, 1], vertical_alignment="bottom", gap="large")
    weight = smoothing.slider(
        "Smoothing",
        0.0,
        0.99,
        0.5,
        0.01,
        key="smoothing",
        help="Weight of the past in a moving average. The measured values stay behind it, faint.",
    )
    log = scale.toggle("Logarithmic values", key="log-axes")
    drawn = {run_label(run): colours[run_label(run)] for run in runs}
    st.html(legend_html(drawn))
    st.caption("Over optimizer steps; point at a line for its run and values.")
    left_out = {}
    for title, names in grouped(curves).items():
        st.subheader(title)
        columns = st.columns(2, gap="large")
        for place, name in enumerate(names):
            frame = curve_frame(curves[name], weight=weight)
            with columns[place % 2]:
                st.markdown(f"**{CURVES.get(name, name)}**")
                chart = curve_chart(frame, colours=drawn, log=log, smoothed=weight > 0)
                st.altair_chart(chart, width="stretch", key=f"curve-{name}")
            if log and count_below_log(frame):
                left_out[name] = count_below_log(frame)
    if left_out:
        counts = ", ".join(f"{count} of {name}" for name, count in left_out.items())
        st.caption(f"Not above 0, so not drawn on logarithmic axes: {counts}.")


draw_page()
