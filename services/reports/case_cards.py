"""One case study as HTML: the article, the reference, and the outputs of SFT and KD students side by side."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from services.contract.metric_words import MEANINGS, metric_title
from services.contract.records import CaseOutput, CaseStudy
from services.reports.detectors import agreement_text, marked_by_first
from services.reports.marked_text import count_outside, marked_html

STYLE = Path(__file__).with_name("cards.css")
UNSUPPORTED = "unsupported_words"
"""What studies are found by unless a metric is named."""


def article_html(study: CaseStudy) -> str:
    """The source, in a box that scrolls by itself, and the reference summary above it."""
    return (
        f'<div class="sk-card sk-reference"><div class="sk-card-head"><strong>Reference</strong></div>'
        f'<div class="sk-text" dir="auto">{escape(study.reference)}</div></div>{source_html(study)}'
    )


def source_html(study: CaseStudy) -> str:
    """The source alone, in a box that scrolls by itself."""
    words = len(study.source.split())
    return (
        f'<div class="sk-card sk-article"><div class="sk-card-head"><strong>Article</strong>'
        f'<span class="sk-dim">{escape(study.item_id)} · {words} words</span></div>'
        f'<div class="sk-text" dir="auto" tabindex="0">{escape(study.source)}</div></div>'
    )


def outputs_html(outputs: Sequence[CaseOutput], *, settings: Mapping[str, str], colours: Mapping[str, str]) -> str:
    """A card per output. ``settings`` says by run id what sets the run apart; ``colours`` are by method."""
    cards = "".join(
        _output_html(output, setting=settings.get(output.run_id, output.run_id), colour=colours[output.method])
        for output in outputs
    )
    return f'<div class="sk-outputs">{cards}</div>'


def study_html(study: CaseStudy, *, number: int, settings: Mapping[str, str], colours: Mapping[str, str]) -> str:
    """A whole case study for a page that stands by itself, marked by the first of its detectors."""
    alike = agreement_text(study)
    return (
        f"<section><h3>{number}. {escape(study.benchmark)}, {escape(study.item_id)}</h3>"
        f"<p>{difference_html(study)}</p>{article_html(study)}"
        + (f'<p class="sk-note">{escape(alike)}</p>' if alike else "")
        + f"{outputs_html(marked_by_first(study).outputs, settings=settings, colours=colours)}</section>"
    )


def difference_html(study: CaseStudy) -> str:
    """What ``difference_text`` says, the amount coloured by whose favour it is in."""
    title, amount, rest = map(escape, _difference_words(study))
    tone = {1: "sk-difference sk-better", 0: "sk-difference", -1: "sk-difference sk-worse"}[_favour(study)]
    return f'<span class="{tone}">{title}: <strong>{amount}</strong>{rest}</span>'


def difference_text(study: CaseStudy) -> str:
    """How the KD output that differs most compares with SFT's, by the metric that the study was found by."""
    title, amount, rest = _difference_words(study)
    return f"{title}: {amount}{rest}"


def _difference_words(study: CaseStudy) -> tuple[str, str, str]:
    """The metric, the amount, and what it is the amount of."""
    title, points, favour = metric_title(study.metric), abs(100 * study.difference), _favour(study)
    if not favour:
        return title, "no difference", " between SFT's and any KD output"
    if study.metric == UNSUPPORTED:
        amount = f"{points:.0f} points {'fewer' if favour > 0 else 'more'}"
    else:
        amount = f"{points:.1f} points {'better' if favour > 0 else 'worse'}"
    return title, amount, " than SFT's in the KD output that differs most"


def _favour(study: CaseStudy) -> int:
    """1 for KD, -1 for SFT, 0 for neither: what would be shown as no points is no difference."""
    points = 100 * study.difference
    least = 0.5 if study.metric == UNSUPPORTED else 0.05
    return 0 if abs(points) < least else 1 if points > 0 else -1


def study_title(study: CaseStudy, *, number: int) -> str:
    """For lists to choose from: place, item, difference."""
    return f"{number}. {study.item_id} ({100 * study.difference:+.0f} points)"


def _output_html(output: CaseOutput, *, setting: str, colour: str) -> str:
    marks = len(output.spans)
    outside = count_outside(output.output, output.spans)
    note = (
        f'<p class="sk-note">{outside} of the spans stored for this output lie beyond its end and are not shown.</p>'
        if outside
        else ""
    )
    text = marked_html(output.output, output.spans) if output.output.strip() else "<em>The output is empty.</em>"
    return (
        f'<article class="sk-card sk-output" style="--method:{colour}">'
        f'<div class="sk-card-head"><span class="sk-method" style="--method:{colour}">{escape(output.method)}</span>'
        f'<span class="sk-dim">{escape(setting)}</span></div>'
        f'<div class="sk-text" dir="auto">{text}</div>{note}'
        f'<div class="sk-scores"><span><strong>{marks}</strong> unsupported span{"s" if marks != 1 else ""}</span>'
        f"{_scores_html(output.scores)}</div></article>"
    )


def _scores_html(scores: Mapping[str, float]) -> str:
    return "".join(
        f'<span title="{escape(MEANINGS.get(name, name))}">{escape(metric_title(name))} '
        f"<strong>{value:.1f}</strong></span>"
        for name, value in scores.items()
    )
