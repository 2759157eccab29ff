"""Plots hold what they are given, as text and as points, whatever the names, and however many threads draw."""

import base64
import re
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import numpy as np

from services.contract.report_records import TradeOff, TradeOffPoint
from services.reports.plots import (
    POINTS_PER_CURVE,
    curve_plot,
    density_plot,
    figure_html,
    reliability_plot,
    trade_off_plot,
)

SVG = "{http://www.w3.org/2000/svg}"
ODD = ["a $x^2 & <b>", "r_un $", "100 % \\alpha"]
COLOURS = dict(zip(ODD, ("#112233", "#445566", "#778899"), strict=True))


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_names_stay_as_they_are() -> None:
    positions = np.linspace(0, 1, 5)
    svg = density_plot(dict.fromkeys(ODD, (positions, positions)), colours=COLOURS, x_label="nats $")
    assert set(ODD) <= set(texts(svg))
    assert "nats $" in texts(svg)
    assert svg.startswith("<svg")  # no prolog, which would name a DTD on the network
    for colour in COLOURS.values():
        assert colour in svg


def test_every_method_has_its_point_and_the_front_its_line() -> None:
    points = [
        TradeOffPoint(method=name, quality=place, faithfulness=-place, on_front=place < 2)
        for place, name in enumerate(ODD)
    ]
    trade_off = TradeOff(
        faithfulness="support",
        quality="acc_norm",
        faithfulness_benchmarks=["demo_news"],
        quality_benchmarks=["arc_easy", "hellaswag"],
        points=points,
        left_out=[],
    )
    svg = trade_off_plot(trade_off, colours=COLOURS)
    assert set(ODD) <= set(texts(svg))
    assert "Accuracy (norm.) (arc_easy, hellaswag)" in texts(svg)
    assert svg.count("<clipPath") == 1


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    values = np.random.default_rng(0).normal(size=20_000)
    values[12_345] = 50.0
    svg = curve_plot("loss", {ODD[0]: (range(20_000), list(values))}, colours=COLOURS)
    curve = max(re.findall(r'd="(M [^"]+)"', svg), key=len)
    heights = sorted(float(y) for _, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", curve))
    assert 300 <= len(heights) <= POINTS_PER_CURVE + 2
    assert heights[1] - heights[0] > 0.8 * (heights[-1] - heights[1])  # one spike far above all others


def test_bins_are_drawn_by_their_size() -> None:
    svg = reliability_plot({ODD[0]: [(0.25, 0.5, 1), (0.75, 1.0, 100)]}, colours=COLOURS)
    assert ODD[0] in texts(svg)
    assert svg.count("<use") >= 2


def test_threads_draw_the_same_as_one() -> None:
    def draw(_: int) -> str:
        return curve_plot("loss", {ODD[0]: (range(50), [1 / (step + 1) for step in range(50)])}, colours=COLOURS)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(draw, range(24)))) == 1


def test_a_figure_is_a_picture_with_its_caption_escaped() -> None:
    html = figure_html("<svg/>", caption='a "b" <c>')
    assert base64.b64encode(b"<svg/>").decode() in html
    assert html.count("a &quot;b&quot; &lt;c&gt;") == 2
