"""Small parts of pages: run tables, sweep cards, case cards, colours, words."""

import re
from datetime import UTC, datetime, timedelta

import pytest

from dashboard.render.colours import run_colours
from dashboard.render.run_table import drawn_first, failures, run_table_html
from dashboard.render.sweep_card import sweep_card_html
from dashboard.render.words import duration, problem_html, run_label, state_counts
from services.contract.errors import SmoothKDError, SpecError
from services.contract.records import CaseOutput, CaseStudy, Problem, Span
from services.contract.states import State
from services.reports.case_cards import article_html, difference_html, outputs_html
from services.reports.colours import BASELINE, DISTILLED, method_colours
from tests.dashboard.seed import FAILURE, START, paper_sized, populated

HOSTILE = '<script>alert(1)</script> $x$ **b** "quoted" & <img src=x onerror=alert(1)>'


def text_of(markup):
    return re.sub(r"<[^>]+>", " ", markup)


def study(output, *, difference=0.25, spans=()):
    outputs = [
        CaseOutput(run_id=f"run-{place}", method=method, output=output, scores={"rouge_l": 31.25}, spans=list(spans))
        for place, method in enumerate(("SFT", "KD alpha=1"))
    ]
    return CaseStudy(
        benchmark="demo_news", item_id="i<1>", source=HOSTILE, reference=HOSTILE, outputs=outputs, difference=difference
    )


def test_case_cards_show_model_text_as_it_is():
    one = study(HOSTILE)
    markup = article_html(one) + outputs_html(one.outputs, settings={}, colours=method_colours(["SFT", "KD alpha=1"]))
    assert "<script" not in markup
    assert "<img" not in markup
    assert markup.count("&lt;script&gt;alert(1)&lt;/script&gt; $x$ **b** &quot;quoted&quot; &amp; ") == 4
    assert "i&lt;1&gt;" in markup
    assert text_of(markup).count("31.2") == 2


def test_case_cards_name_runs_and_warn_of_spans_that_belong_elsewhere():
    stray = Span(start=90, end=99, detector="lexical", kind="word", score=1, explanation="?")
    one = study("Short.", spans=[stray])
    markup = outputs_html(one.outputs, settings={"run-0": "lr 1e-05"}, colours=method_colours(["KD alpha=1"]))
    assert "lr 1e-05" in markup
    assert "run-1" in markup
    assert markup.count("1 of the spans stored for this output lie beyond its end") == 2


def test_an_empty_output_is_said_to_be_empty():
    markup = outputs_html(study("  ").outputs, settings={}, colours=method_colours(["KD alpha=1"]))
    assert markup.count("The output is empty.") == 2


@pytest.mark.parametrize(
    ("difference", "words"), [(0.25, "25 points fewer"), (-0.1, "10 points more"), (0.001, "no difference")]
)
def test_the_difference_in_words(difference, words):
    assert words in text_of(difference_html(study("x", difference=difference)))


def test_methods_and_runs_have_colours_that_read_on_light_and_dark_pages():
    runs = paper_sized(steps=1).runs["sw-0009-paper"]
    methods = method_colours(run.method for run in runs)
    assert methods["SFT"] == BASELINE
    assert len(set(methods.values())) == 5
    colours = run_colours(runs)
    assert set(colours) == {run_label(run) for run in runs}
    assert len(set(colours.values())) == 30
    for colour in (BASELINE, *DISTILLED):
        for page in ("#ffffff", "#101517"):
            assert contrast(colour, page) >= 3, f"{colour} on {page}"


def contrast(one, other):
    """Contrast ratio after WCAG 2.2; 3:1 is what it asks of graphics."""

    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_of_many_runs_those_of_every_method_are_drawn_first():
    runs = paper_sized(steps=1).runs["sw-0009-paper"]
    first = drawn_first(runs, limit=12)
    assert len(first) == 12
    counts = [sum(run.method == method for run in first) for method in dict.fromkeys(run.method for run in runs)]
    assert sorted(counts) == [2, 2, 2, 3, 3]
    assert [run for run in runs if run in first] == first
    assert drawn_first(runs[:3], limit=12) == runs[:3]


def test_the_run_table_says_what_failed_and_what_to_do():
    runs = populated().runs["sw-0004-running"]
    text = text_of(run_table_html(runs, now=START + timedelta(minutes=5)))
    for wanted in ("succeeded", "failed", "running", "queued", FAILURE.what, FAILURE.fix, "attempt 2", "42 %"):
        assert wanted in text
    assert failures(runs[0]) == []
    assert failures(runs[1]) == [("train", FAILURE)]
    only_run = runs[1].model_copy(update={"stages": []})
    assert failures(only_run) == [("run", FAILURE)]


def test_problem_text_is_escaped_and_commands_stand_out():
    problem = Problem(reason="training", what=HOSTILE, fix="Run `smoothkd up` & wait.")
    markup = problem_html(problem, title="<b>")
    assert "<script" not in markup
    assert "<code>smoothkd up</code> &amp; wait." in markup
    assert "&lt;b&gt;" in markup


def test_a_stray_backtick_is_kept():
    assert "say `x" in problem_html(SmoothKDError("w", fix="say `x"))


def test_several_mistakes_of_a_specification_are_a_list():
    error = SpecError("a; b", fix="f", details={"error.0": "grid.alpha: -1", "error.1": "name: <x>"})
    assert re.findall(r"<li>(.*?)</li>", problem_html(error)) == ["grid.alpha: -1", "name: &lt;x&gt;"]


def test_a_sweep_card_tells_states_models_and_progress():
    world = populated()
    text = text_of(sweep_card_html(world.sweeps["sw-0004-running"], progress=0.605))
    for wanted in ("learning-rates", "running", "SmolLM2-1.7B", "alpha 0, 1", "1 failed", "60 % done", "4 runs"):
        assert wanted in text
    assert "25 % done" not in text
    assert "50 % done" in text_of(sweep_card_html(world.sweeps["sw-0004-running"]))
    assert "% done" not in text_of(sweep_card_html(world.sweeps["sw-0003-finished"]))


def test_a_sweep_that_winds_down_says_so():
    sweep = populated().sweeps["sw-0004-running"].model_copy(update={"cancel_requested": True})
    assert ">cancelling<" in sweep_card_html(sweep)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.9, "59 s"), (60, "1 min 00 s"), (3725, "1 h 02 min"), (-5, "0 s")]
)
def test_durations(seconds, words):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    end = start + timedelta(seconds=seconds)
    assert duration(start, end, now=start) == words
    assert duration(start, None, now=end) == words
    assert duration(None, None, now=end) == ""


def test_states_are_counted_in_the_order_of_what_happened():
    counts = {State.QUEUED: 3, State.FAILED: 1, State.SUCCEEDED: 2, State.SKIPPED: 0}
    assert state_counts(counts) == "2 succeeded, 1 failed, 3 queued"
