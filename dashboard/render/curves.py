"""Training curves of several runs over each other: smoothing, thinning, and the Altair chart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import altair as alt
import pandas as pd

from services.contract.records import MetricPoint

CURVES = {
    "loss": "Loss (hard + alpha × soft, per response token)",
    "hard_loss": "Hard loss (against the data set's words)",
    "soft_loss": "Soft loss (against the teacher)",
    "student_entropy": "Entropy of the student (nats)",
    "teacher_entropy": "Entropy of the teacher (nats)",
    "agreement": "Agreement (share of tokens where student and teacher favour the same)",
    "held_out_ece": "Calibration error on held-out records",
    "held_out_loss": "Loss on held-out records",
    "held_out_accuracy": "Accuracy of next tokens on held-out records",
    "on_policy_share": "Steps on the student's own responses (share)",
    "decoded_tokens": "Length of the student's own responses (tokens)",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "label_wait_seconds": "Waiting for soft labels (seconds)",
    "label_cache_hits": "Soft labels from the cache (share)",
    "peak_memory_gib": "Memory at its peak (GiB)",
    "mfu": "Share of the GPUs' arithmetic (MFU)",
}
"""What is drawn first, in this order; other metrics follow under their own names."""

GROUPS = {
    "Loss": ("loss", "hard_loss", "soft_loss"),
    "What the student believes": (
        "student_entropy",
        "teacher_entropy",
        "agreement",
        "held_out_ece",
        "held_out_loss",
        "held_out_accuracy",
    ),
    "The student's own responses": ("on_policy_share", "decoded_tokens"),
    "Optimizer": ("learning_rate", "grad_norm"),
    "Speed and memory": ("tokens_per_second", "label_wait_seconds", "label_cache_hits", "peak_memory_gib", "mfu"),
}
OTHERS = "Others"
"""The group of metrics that belong to none."""

NOT_DRAWN = frozenset({"epoch"})

POINTS_PER_CHART = 6000
"""Beyond this a browser gets slow, and a screen has no pixels for more."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of one run, steps ascending."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def curves_by_metric(points: Mapping[str, Sequence[MetricPoint]]) -> dict[str, list[Curve]]:
    """From points by run label to curves by metric, the metrics of CURVES first and in its order."""
    names = {point.name for run_points in points.values() for point in run_points} - NOT_DRAWN
    order = [name for name in CURVES if name in names] + sorted(names - set(CURVES))
    return {name: [_curve(label, points[label], name) for label in points] for name in order}


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Metrics by the title of their group, groups and metrics in order; groups without any are left out."""
    group_of = {name: title for title, members in GROUPS.items() for name in members}
    groups: dict[str, list[str]] = {title: [] for title in (*GROUPS, OTHERS)}
    for name in names:
        groups[group_of.get(name, OTHERS)].append(name)
    return {title: members for title, members in groups.items() if members}


def smooth(values: Sequence[float], *, weight: float) -> list[float]:
    """Exponential moving average with ``weight`` on the past, 0 <= weight < 1, without the pull of its start.

    Each value is the weighted mean of all values so far, weights falling by ``weight`` per step back (Kingma and Ba,
    2015, section 3); weight 0 gives the values back.
    """
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return smoothed


def curve_frame(curves: Sequence[Curve], *, weight: float, limit: int = POINTS_PER_CHART) -> pd.DataFrame:
    """Columns run, step, value (as measured) and smoothed; thinned to about ``limit`` rows.

    Smoothing comes before thinning, and thinning keeps the lowest and the highest value of each stretch, so that
    neither spikes nor the smoothed curve depend on how much is shown.
    """
    rows: list[tuple[str, int, float, float]] = []
    for curve in curves:
        smoothed = smooth(curve.values, weight=weight)
        for index in _kept(curve.values, limit=max(limit // max(len(curves), 1), 20)):
            rows.append((curve.label, curve.steps[index], curve.values[index], smoothed[index]))
    return pd.DataFrame(rows, columns=["run", "step", "value", "smoothed"])


def curve_chart(
    frame: pd.DataFrame, *, colours: Mapping[str, str], log: bool, smoothed: bool
) -> alt.LayerChart | alt.FacetChart:
    """One line per run, with the measured values faint behind a smoothed line.

    On a logarithmic axis what is not above 0 has no place and is left out; ``count_below_log`` counts it.
    """
    column = "smoothed" if smoothed else "value"
    shown = frame[frame[column] > 0] if log else frame
    scale = alt.Scale(type="log" if log else "linear", zero=False, nice=True)
    colour = alt.Color("run:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None)
    step = alt.X("step:Q", title=None, axis=alt.Axis(tickMinStep=1, format="d", grid=False))
    # Learning rates read as 1e-5, not as 0.00001.
    ticks = alt.Axis(format="~e" if 0 < frame["value"].abs().max() < 1e-3 else ",.6~g")
    base = alt.Chart(shown).encode(x=step, color=colour)
    line = base.mark_line(strokeWidth=2, interpolate="linear").encode(
        y=alt.Y(f"{column}:Q", title=None, scale=scale, axis=ticks)
    )
    hit = base.mark_circle(size=70, opacity=0).encode(
        y=alt.Y(f"{column}:Q", scale=scale),
        tooltip=[
            alt.Tooltip("run:N", title="run"),
            alt.Tooltip("step:Q", title="step", format="d"),
            alt.Tooltip("value:Q", title="measured", format=".5~g"),
            *([alt.Tooltip("smoothed:Q", title="smoothed", format=".5~g")] if smoothed else []),
        ],
    )
    faint = base.mark_line(strokeWidth=1, opacity=0.25).encode(y=alt.Y("value:Q", title=None, scale=scale))
    layers = [faint.transform_filter("datum.value > 0") if log else faint, line, hit] if smoothed else [line, hit]
    return alt.layer(*layers).properties(height=230)


def count_below_log(frame: pd.DataFrame) -> int:
    """Measured values that a logarithmic axis has no place for."""
    return int((frame["value"] <= 0).sum())


def _curve(label: str, points: Sequence[MetricPoint], name: str) -> Curve:
    own = sorted((point.step, point.value) for point in points if point.name == name)
    return Curve(label=label, steps=tuple(step for step, _ in own), values=tuple(value for _, value in own))


def _kept(values: Sequence[float], *, limit: int) -> list[int]:
    """Indices to draw: all, or the first, the last, and the extremes of limit/2 stretches of equal length."""
    if len(values) <= limit:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    stretches = limit // 2
    for stretch in range(stretches):
        indices = range(stretch * len(values) // stretches, (stretch + 1) * len(values) // stretches)
        kept.add(min(indices, key=values.__getitem__))
        kept.add(max(indices, key=values.__getitem__))
    return sorted(kept)
