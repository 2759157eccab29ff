"""Plots as SVG that a page can hold: no script, nothing fetched, text as text."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from services.contract.metric_words import metric_title
from services.contract.report_records import Comparison, TradeOff
from services.reports.colours import BASELINE

# Once and for all: a context would change them under other threads' feet. Text stays text, a dollar is a dollar, and
# the same figure has the same identifiers.
mpl.rcParams.update(
    {"svg.fonttype": "none", "svg.hashsalt": "smoothkd", "font.family": "sans-serif", "text.parse_math": False}
)

POINTS_PER_CURVE = 400
Array = NDArray[np.float64]


def trade_off_plot(trade_off: TradeOff, *, colours: Mapping[str, str]) -> str:
    """A point per method, the Pareto front as a line; better is up and right."""
    figure, axes = _figure(5.6, 3.8)
    front = sorted((point.quality, point.faithfulness) for point in trade_off.points if point.on_front)
    axes.plot(*zip(*front, strict=True), color="#94a3b8", linestyle="--", linewidth=1.2, zorder=1)
    for point in trade_off.points:
        axes.scatter(
            point.quality,
            point.faithfulness,
            s=64,
            color=colours[point.method],
            edgecolor="#1c2527" if point.on_front else "none",
            zorder=2,
        )
        axes.annotate(
            point.method, (point.quality, point.faithfulness), textcoords="offset points", xytext=(7, 5), fontsize=8.5
        )
    axes.margins(x=0.22, y=0.16)
    axes.set_xlabel(f"{metric_title(trade_off.quality)} ({', '.join(trade_off.quality_benchmarks)})")
    axes.set_ylabel(f"{metric_title(trade_off.faithfulness)} ({', '.join(trade_off.faithfulness_benchmarks)})")
    return _svg(figure)


def comparison_plot(comparisons: Sequence[Comparison], *, colours: Mapping[str, str]) -> str:
    """Differences from SFT with their intervals; one row each, 0 as a line."""
    shown = [one for one in comparisons if one.difference is not None]
    figure, axes = _figure(7.2, 0.8 + 0.3 * len(shown))
    axes.axvline(0, color=BASELINE, linestyle="--", linewidth=1.2)
    for place, one in enumerate(shown):
        assert one.difference is not None
        assert one.low is not None
        assert one.high is not None
        colour = colours[one.method]
        axes.plot([one.low, one.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.scatter(
            one.difference, place, s=36, color=colour if one.better is not None else "white", edgecolor=colour, zorder=3
        )
    axes.set_yticks(
        range(len(shown)), [f"{one.benchmark} {metric_title(one.metric)}, {one.method}" for one in shown], fontsize=8.5
    )
    axes.invert_yaxis()
    axes.set_xlabel("difference from SFT, in the metric's points")
    return _svg(figure)


def curve_plot(
    title: str, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, colours: Mapping[str, str]
) -> str:
    """A line per run over optimizer steps, thinned to the extremes of every stretch."""
    figure, axes = _figure(5.2, 2.7)
    for label, (steps, values) in curves.items():
        kept = _kept(np.asarray(values, dtype=np.float64), limit=POINTS_PER_CURVE)
        axes.plot(np.asarray(steps)[kept], np.asarray(values)[kept], color=colours[label], linewidth=1.3, alpha=0.85)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel("optimizer step")
    return _svg(figure)


def density_plot(curves: Mapping[str, tuple[Array, Array]], *, colours: Mapping[str, str], x_label: str) -> str:
    """Kernel densities over each other, one per label: (positions, densities)."""
    figure, axes = _figure(6.4, 3.8)
    for label, (positions, densities) in curves.items():
        axes.plot(positions, densities, color=colours[label], linewidth=2, label=label)
        axes.fill_between(positions, densities, color=colours[label], alpha=0.12)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize=8.5)
    return _svg(figure)


def reliability_plot(bins: Mapping[str, Sequence[tuple[float, float, int]]], *, colours: Mapping[str, str]) -> str:
    """Accuracy over mean confidence of each bin, (confidence, accuracy, items); the diagonal is perfect calibration."""
    figure, axes = _figure(4.2, 3.9)
    axes.plot([0, 1], [0, 1], color="#94a3b8", linestyle="--", linewidth=1.2)
    for label, points in bins.items():
        axes.plot(*zip(*[(x, y) for x, y, _ in points], strict=True), color=colours[label], linewidth=1.4, label=label)
        most = max(items for _, _, items in points)
        for x, y, items in points:
            axes.scatter(x, y, s=12 + 60 * items / most, color=colours[label], alpha=0.85, zorder=2)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.legend(frameon=False, fontsize=8.5)
    return _svg(figure)


def figure_html(svg: str, *, caption: str) -> str:
    """The plot as a picture inside the page; as a data URI its identifiers cannot meet those of another plot."""
    data = base64.b64encode(svg.encode()).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The same figure gives the same text: no date, no random identifiers."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    # The prolog names a DTD on the network, which no browser needs.
    return text[text.index("<svg") :]


def _kept(values: Array, *, limit: int) -> NDArray[np.int64]:
    """Indices to draw: all, or first, last, and the lowest and highest of limit/2 stretches."""
    if len(values) <= limit:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), limit // 2)
    kept = {0, len(values) - 1}
    for stretch in stretches:
        kept |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    return np.array(sorted(kept))
