"""Curves: smoothing against pandas, thinning that hides nothing, and axes that drop only what they must."""

import random

import pandas as pd
import pytest

from dashboard.render.curves import (
    CURVES,
    GROUPS,
    Curve,
    count_below_log,
    curve_chart,
    curve_frame,
    curves_by_metric,
    grouped,
    smooth,
)
from services.contract.records import MetricPoint


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 0.99])
def test_smoothing_is_the_bias_corrected_exponential_mean(weight):
    noise = random.Random(3)
    values = [noise.gauss(5, 2) for _ in range(200)]
    expected = pd.Series(values).ewm(alpha=1 - weight, adjust=True).mean()
    assert smooth(values, weight=weight) == pytest.approx(list(expected))


def test_smoothing_starts_at_the_first_value():
    assert smooth([7.0], weight=0.99) == pytest.approx([7.0])
    assert smooth([], weight=0.5) == []


def test_metrics_come_in_reading_order_and_steps_ascend():
    points = {
        "a": [
            MetricPoint(name="grad_norm", step=1, value=1),
            MetricPoint(name="loss", step=2, value=2),
            MetricPoint(name="loss", step=1, value=3),
            MetricPoint(name="my_metric", step=1, value=4),
            MetricPoint(name="epoch", step=1, value=0.1),
        ],
        "b": [],
    }
    curves = curves_by_metric(points)
    assert list(curves) == ["loss", "grad_norm", "my_metric"]
    assert [(curve.label, curve.steps, curve.values) for curve in curves["loss"]] == [
        ("a", (1, 2), (3.0, 2.0)),
        ("b", (), ()),
    ]


def test_thinning_keeps_ends_and_spikes_and_the_smoothed_values():
    noise = random.Random(5)
    values = [noise.gauss(1, 0.1) for _ in range(10_000)]
    values[4321], values[8765] = 99.0, -99.0
    curve = Curve(label="run", steps=tuple(range(10_000)), values=tuple(values))
    thinned = curve_frame([curve, curve], weight=0.8, limit=400)
    assert len(thinned) <= 2 * 202
    assert {0, 4321, 8765, 9999} <= set(thinned["step"])
    expected = pd.Series(values).ewm(alpha=0.2, adjust=True).mean()
    assert list(thinned["smoothed"]) == pytest.approx([expected[step] for step in thinned["step"]])
    assert list(thinned["value"]) == [values[step] for step in thinned["step"]]


def test_short_curves_are_whole():
    curve = Curve(label="run", steps=(1, 2, 3), values=(3.0, 2.0, 1.0))
    frame = curve_frame([curve], weight=0.0)
    assert frame.to_dict("list") == {"run": ["run"] * 3, "step": [1, 2, 3], "value": [3, 2, 1], "smoothed": [3, 2, 1]}


def test_a_logarithmic_axis_drops_what_is_not_above_zero_and_counts_it():
    frame = curve_frame([Curve(label="SFT", steps=(1, 2, 3, 4), values=(0.0, -1.0, 2.0, 4.0))], weight=0.0)
    assert count_below_log(frame) == 2
    chart = curve_chart(frame, colours={"SFT": "#d97706"}, log=True, smoothed=False).to_dict()
    [rows] = chart["datasets"].values()
    assert [row["value"] for row in rows] == [2.0, 4.0]
    assert chart["layer"][0]["encoding"]["y"]["scale"]["type"] == "log"


def test_every_run_has_its_own_colour_and_the_measured_values_stay_behind_smoothed_ones():
    curves = [Curve(label=label, steps=(1, 2), values=(1.0, 2.0)) for label in ("a", "b")]
    frame = curve_frame(curves, weight=0.5)
    chart = curve_chart(frame, colours={"a": "#111111", "b": "#222222"}, log=False, smoothed=True).to_dict()
    assert [layer["encoding"]["y"]["field"] for layer in chart["layer"]] == ["value", "smoothed", "smoothed"]
    assert chart["layer"][1]["encoding"]["color"]["scale"] == {"domain": ["a", "b"], "range": ["#111111", "#222222"]}
    assert [tip["field"] for tip in chart["layer"][2]["encoding"]["tooltip"]] == ["run", "step", "value", "smoothed"]


def test_metrics_are_drawn_in_groups_and_none_is_lost() -> None:
    names = ["soft_loss", "custom", "mfu", "loss", "held_out_ece", "agreement"]
    assert grouped(names) == {
        "Loss": ["soft_loss", "loss"],
        "What the student believes": ["held_out_ece", "agreement"],
        "Speed and memory": ["mfu"],
        "Others": ["custom"],
    }
    assert {name for members in GROUPS.values() for name in members} == set(CURVES)
