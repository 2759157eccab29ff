"""Spans become marks: the text survives unchanged whatever it holds, and every character is marked by its own spans."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.render.spans import legend_html
from services.contract.records import Span
from services.reports.marked_text import count_outside, marked_html, segments


class Marks(HTMLParser):
    """An HTML parser's own view of the markup: all text, and the text, classes and tip of each mark."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.text = ""
        self.marks: list[dict[str, str]] = []
        self.tags: list[str] = []
        self._into = "text"
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "mark":
            self._into = "mark"
            self.marks.append({**dict(attrs), "text": "", "tip": ""})
        if ("class", "sk-tip") in attrs:
            self._into = "tip"

    def handle_endtag(self, tag):
        self._into = "text"

    def handle_data(self, data):
        if self._into == "tip":
            self.marks[-1]["tip"] += data
            return
        self.text += data
        if self._into == "mark":
            self.marks[-1]["text"] += data


def span(start, end, *, kind="entity", score=1.0, explanation="not in the article"):
    return Span(start=start, end=end, detector="lexical", kind=kind, score=score, explanation=explanation)


def test_one_span():
    seen = Marks(marked_html("born in Ostrel today", [span(8, 14)]))
    assert seen.text == "born in Ostrel today"
    assert [mark["text"] for mark in seen.marks] == ["Ostrel"]
    assert seen.marks[0]["tip"] == "entity: not in the article (lexical, certainty 100%)"
    assert "sk-kind-entity" in seen.marks[0]["class"].split()


def test_no_span_is_plain_escaped_text():
    assert marked_html("a < b & c", []) == "a &lt; b &amp; c"


def test_overlapping_spans_are_cut_and_explain_both():
    text = "Doctor Ilse Varga"
    spans = [
        span(0, 11, kind="entity", score=0.9, explanation="one"),
        span(7, 17, kind="word", score=0.4, explanation="two"),
    ]
    seen = Marks(marked_html(text, spans))
    assert [mark["text"] for mark in seen.marks] == ["Doctor ", "Ilse", " Varga"]
    assert seen.marks[1]["tip"].splitlines() == [
        "entity: one (lexical, certainty 90%)",
        "word: two (lexical, certainty 40%)",
    ]
    assert [mark["class"].split()[-1] for mark in seen.marks] == ["sk-kind-entity", "sk-kind-entity", "sk-kind-word"]


def test_a_nested_span_keeps_the_outer_one_on_both_sides():
    seen = Marks(marked_html("abcdefgh", [span(0, 8, kind="word", score=0.2), span(3, 5, kind="number", score=1.0)]))
    assert [(mark["text"], mark["class"].split()[-1]) for mark in seen.marks] == [
        ("abc", "sk-kind-word"),
        ("de", "sk-kind-number"),
        ("fgh", "sk-kind-word"),
    ]


def test_a_word_shows_within_a_surer_sentence_of_another_detector():
    seen = Marks(
        marked_html("abcdefgh", [span(0, 8, kind="sentence", score=0.9), span(3, 5, kind="number", score=0.6)])
    )
    assert [(mark["text"], mark["class"].split()[-1]) for mark in seen.marks] == [
        ("abc", "sk-kind-other"),
        ("de", "sk-kind-number"),
        ("fgh", "sk-kind-other"),
    ]
    assert len(seen.marks[1]["tip"].splitlines()) == 2


def test_adjacent_spans_stay_two_marks():
    seen = Marks(marked_html("17crowns", [span(0, 2, kind="number"), span(2, 8, kind="word")]))
    assert [mark["text"] for mark in seen.marks] == ["17", "crowns"]


def test_equal_spans_of_two_detectors_are_one_mark_and_equal_explanations_one_line():
    same = [span(0, 4), span(0, 4)]
    seen = Marks(marked_html("Venn", same))
    assert [mark["tip"].count("\n") for mark in seen.marks] == [0]


def test_out_of_range_spans_are_clipped_counted_and_never_lose_text():
    text = "short"
    spans = [span(3, 99), span(5, 9), span(40, 50)]
    seen = Marks(marked_html(text, spans))
    assert seen.text == text
    assert [mark["text"] for mark in seen.marks] == ["rt"]
    assert count_outside(text, spans) == 2


def test_a_span_that_ends_before_it_starts_marks_nothing():
    backwards = span(4, 2)
    assert Marks(marked_html("abcdef", [backwards])).marks == []
    assert count_outside("abcdef", [backwards]) == 1


@pytest.mark.parametrize(
    ("text", "word"),
    [("😀 Ostrel", "Ostrel"), ("👩‍🔬 said 17", "17"), ("naïve café — Zürich", "Zürich"), ("𝕏𝕐 Varga", "Varga")],
)
def test_offsets_count_code_points(text, word):
    start = text.index(word)
    seen = Marks(marked_html(text, [span(start, start + len(word))]))
    assert [mark["text"] for mark in seen.marks] == [word]
    assert seen.text == text


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "$x^2$ and **b** and `code` and [a](http://b)",
        "&lt;already&gt; &amp; 'quoted'",
    ],
)
def test_model_text_is_text_only(text):
    seen = Marks(marked_html(text, [span(1, 5, explanation=text)]))
    assert seen.text == text
    assert set(seen.tags) == {"mark", "span"}
    assert text in seen.marks[0]["tip"]


def test_a_kind_of_an_unknown_name_cannot_leave_its_attribute():
    seen = Marks(marked_html("abc", [span(0, 3, kind='"><b>')]))
    assert seen.tags == ["mark", "span"]
    assert seen.marks[0]["class"].split()[-1] == "sk-kind-other"
    assert Marks(legend_html([span(0, 3, kind='"><b>')])).text.count('"><b>') == 1


def test_the_legend_always_has_the_three_usual_kinds():
    assert [mark["text"] for mark in Marks(legend_html([])).marks] == ["entity", "number", "word"]


ranges = st.tuples(st.integers(0, 30), st.integers(1, 40))


@given(st.text(max_size=30), st.lists(ranges, max_size=6))
def test_every_character_is_covered_by_exactly_its_spans(text, bounds):
    spans = [span(start, end, explanation=str(index)) for index, (start, end) in enumerate(bounds)]
    pieces = segments(text, spans)
    assert "".join(piece.text for piece in pieces) == text
    covering = [piece.spans for piece in pieces for _ in piece.text]
    for place, found in enumerate(covering):
        assert set(found) == {one for one in spans if one.start <= place < one.end}
    assert count_outside(text, spans) == sum(not any(one in found for found in covering) for one in spans)
