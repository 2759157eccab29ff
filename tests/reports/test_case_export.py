"""Case studies in files: nothing lost in JSON, nothing of a model's text taken for markup in Markdown or HTML."""

import json
import re
from html import escape
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from services.contract.records import CaseOutput, CaseStudy, Span
from services.reports.case_export import export_studies
from services.reports.detectors import (
    agreement,
    agreement_text,
    covered_characters,
    detectors_of,
    marked_by,
    marked_by_first,
)
from tests.reports.made import make_runs

HOSTILE = (
    "</div><script>alert(1)</script> **b** [x](javascript:alert(1)) <img src=x onerror=alert(1)> `c` | $y$\n# no title"
)


def span(start: int, end: int, detector: str = "support", explanation: str = "not in the source") -> Span:
    return Span(start=start, end=end, detector=detector, kind="word", score=0.7, explanation=explanation)


def study(text: str = HOSTILE, *, spans: list[Span] | None = None) -> CaseStudy:
    marks = spans if spans is not None else [span(0, 6), span(3, 14, "lookback", HOSTILE)]
    outputs = [
        CaseOutput(run_id=run_id, method=method, output=text, scores={"support": 41.5}, spans=marks)
        for run_id, method in (("run-0", "SFT"), ("run-8", "KD alpha=1"))
    ]
    return CaseStudy(
        benchmark="demo_news", item_id="item|1", source=text, reference=text, outputs=outputs, difference=0.25
    )


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.marked = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag if ("class", "sk-tip") not in attrs else "tip")

    def handle_endtag(self, tag: str) -> None:
        if self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if "tip" in self._open or "style" in self._open:
            return
        self.text += data
        self.marked += data if "mark" in self._open else ""


def test_json_is_the_records() -> None:
    text = export_studies([study()], make_runs(), title="t", form="json")
    assert [CaseStudy.model_validate(one) for one in json.loads(text)] == [study()]


def test_html_shows_the_text_and_runs_nothing() -> None:
    page = Elements()
    page.feed(export_studies([study()], make_runs(), title=HOSTILE, form="html"))
    assert not {"script", "img", "a", "iframe"} & set(page.tags)
    assert page.text.count(HOSTILE) == 6  # title, heading, reference, source and two outputs
    assert page.marked == HOSTILE[:6] * 2


def test_markdown_renders_to_the_same_text() -> None:
    text = export_studies([study()], make_runs(), title="Cases", form="md")
    rendered = MarkdownIt("commonmark", {"html": True}).render(text)
    page = Elements()
    page.feed(rendered)
    assert not {"script", "img", "a", "code", "table"} & set(page.tags)
    assert page.tags.count("h1") == 1
    assert "Unsupported words: 25 points fewer than SFT's in the KD output that differs most." in page.text
    quoted = re.sub(r"\s+", " ", page.text)
    assert quoted.count(re.sub(r"\s+", " ", HOSTILE)) == 4
    assert page.tags.count("strong") == 2
    assert "“\\</div\\>”: not in the source" in text


@pytest.mark.parametrize(
    ("metric", "difference", "words", "tone"),
    [
        ("rouge_l", 0.254, "ROUGE-L: 25.4 points better than SFT's", "sk-better"),
        ("rouge_l", -0.254, "ROUGE-L: 25.4 points worse than SFT's", "sk-worse"),
        ("rouge_l", -3e-7, "ROUGE-L: no difference between SFT's", None),
        ("unsupported_words", -0.1, "Unsupported words: 10 points more than SFT's", "sk-worse"),
        ("unsupported_words", 0.1, "Unsupported words: 10 points fewer than SFT's", "sk-better"),
        ("unsupported_words", 0.001, "Unsupported words: no difference between SFT's", None),
    ],
)
def test_every_form_says_whose_favour_a_difference_is_in(
    metric: str, difference: float, words: str, tone: str | None
) -> None:
    found = study().model_copy(update={"metric": metric, "difference": difference})
    assert words in export_studies([found], make_runs(), title="t", form="md")
    page = export_studies([found], make_runs(), title="t", form="html")
    ((classes, shown),) = re.findall(r'<span class="(sk-difference[^"]*)">(.*?)</span>', page)
    assert classes.split() == ["sk-difference", *([tone] if tone else [])]
    assert re.sub("</?strong>", "", shown).startswith(escape(words))


def test_neighbouring_spans_are_one_bold_piece() -> None:
    one = study("Ana Lee won", spans=[span(0, 3), span(2, 7)])
    text = export_studies([one], make_runs(), title="t", form="md")
    assert "> **Ana Lee** won" in text
    rendered = MarkdownIt().render(export_studies([study("a b", spans=[span(0, 2)])], [], title="t", form="md"))
    assert "<strong>a</strong> b" in rendered


def test_agreement_of_detectors_by_characters() -> None:
    outputs = study("0123456789", spans=[span(0, 4), span(2, 6, "lookback"), span(9, 99, "nli")]).outputs
    # support 0-3, lookback 2-5, nli 9: unlike are 0, 1, 4, 5 / 0-3, 9 / 2-5, 9.
    assert agreement(outputs, ["support", "lookback", "nli"]) == {
        ("support", "lookback"): pytest.approx(0.6),
        ("support", "nli"): pytest.approx(0.5),
        ("lookback", "nli"): pytest.approx(0.5),
    }
    assert covered_characters(3, [span(1, 9)]) == [False, True, True]
    assert agreement(study("", spans=[]).outputs, ["support", "nli"]) == {}


@pytest.mark.parametrize("form", ["md", "html"])
def test_files_say_how_far_the_detectors_agree(form: str) -> None:
    text = "a" * 40
    marked = study(text, spans=[span(0, 6), span(3, 14, "lookback")])
    # Of 40 characters, the 3 before and the 8 after are marked by one alone.
    said = f"Support and Factual rate {29 / 40:.0%}."
    assert said in export_studies([marked], make_runs(), title="t", form=form)
    assert "both mark or neither" not in export_studies(
        [study(text, spans=[span(0, 6)])], make_runs(), title="t", form=form
    )


def test_a_detector_that_judged_and_marked_nothing_counts_in_the_agreement() -> None:
    marked = study("a" * 40, spans=[span(0, 6)])
    judged = [
        output.model_copy(update={"scores": {"support": 85.0, "factual_rate": 100.0}}) for output in marked.outputs
    ]
    one_more = marked.model_copy(update={"outputs": judged})
    assert (
        agreement_text(one_more)
        == f"Of these outputs' characters, both mark or neither marks: Support and Factual rate {34 / 40:.0%}."
    )
    # It has not judged them all.
    assert agreement_text(one_more.model_copy(update={"outputs": [judged[0], *marked.outputs[1:]]})) == ""


def test_the_first_detector_marks_a_page() -> None:
    both = study("0123456789", spans=[span(0, 4, "lookback"), span(2, 6), span(1, 2, "own")])
    assert detectors_of(both) == ["support", "lookback", "own"]
    assert [one.detector for one in marked_by_first(both).outputs[0].spans] == ["support"]
    assert [one.detector for one in marked_by(both, "own").outputs[1].spans] == ["own"]
