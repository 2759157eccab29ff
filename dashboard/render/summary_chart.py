"""The result table as points with error bars, one small chart per benchmark and metric."""

import altair as alt
import pandas as pd

from dashboard.render.summary_table import Column, find_cell
from services.contract.records import Summary
from services.reports.colours import method_colours


def column_frame(summary: Summary, column: Column) -> pd.DataFrame:
    """Columns method, mean, std, low, high (mean -/+ one standard deviation), runs; methods without a mean are absent.

    Below two runs there is no deviation: low and high are the mean.
    """
    rows = []
    for row in summary.rows:
        cell = find_cell(row, column)
        if cell is not None and cell.mean is not None:
            spread = cell.std or 0.0
            rows.append((row.method, cell.mean, cell.std, cell.mean - spread, cell.mean + spread, cell.runs))
    return pd.DataFrame(rows, columns=["method", "mean", "std", "low", "high", "runs"])


def column_chart(summary: Summary, column: Column) -> alt.LayerChart | alt.FacetChart:
    """Methods in table order from top to bottom; SFT's mean continues as a dashed line through the others."""
    frame = column_frame(summary, column)
    order = [row.method for row in summary.rows]
    colours = method_colours(order)
    scale = alt.Scale(domain=[m for m in order if m in colours], range=[colours[m] for m in order if m in colours])
    methods = alt.Y("method:N", sort=order, title=None, axis=alt.Axis(labelLimit=220, domain=False, ticks=False))
    # Room on both sides, and a point alone in the middle of two units.
    room = max(0.12 * (frame["high"].max() - frame["low"].min()), 1.0 if len(frame) == 1 else 0.2)
    values = alt.Scale(zero=False, nice=False, domain=[frame["low"].min() - room, frame["high"].max() + room])
    ticks = alt.Axis(format=".1f", tickCount=6)
    base = alt.Chart(frame).encode(y=methods, color=alt.Color("method:N", scale=scale, legend=None))
    bars = base.mark_rule(strokeWidth=3, opacity=0.55).encode(
        x=alt.X("low:Q", title=None, scale=values, axis=ticks), x2="high:Q"
    )
    points = base.mark_circle(size=130, opacity=1).encode(
        x=alt.X("mean:Q", title=None, scale=values),
        tooltip=[
            alt.Tooltip("method:N", title="method"),
            alt.Tooltip("mean:Q", title="mean", format=".2f"),
            alt.Tooltip("std:Q", title="standard deviation", format=".2f"),
            alt.Tooltip("runs:Q", title="runs"),
        ],
    )
    baseline = (
        alt.Chart(frame[frame["method"] == "SFT"])
        .mark_rule(strokeDash=[4, 4], opacity=0.6, color=colours["SFT"])
        .encode(x=alt.X("mean:Q", scale=values))
    )
    return alt.layer(baseline, bars, points).properties(height=46 * max(len(order), 1) + 20)
