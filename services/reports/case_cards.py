"""One case study as HTML: the article, the reference, and the outputs of SFT and KD students side by side."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from services.contract.metric_words import MEANINGS, metric_title
from services.contract.records import CaseOutput, CaseStudy
from services.reports.detectors import agreement_text, marked_by_first
from services.reports.marked_text import count_outside, marked_html

UNSUPPORTED = "unsupported_words"
STYLE = Path(__file__).with_name("cards.css")
UNLIKE = "the KD output that differs most against SFT's"
"""Whose difference a study shows."""


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
    """How much better than SFT the KD student is that differs most, by the metric that the study was found by."""
    points = 100 * study.difference
    if study.metric != UNSUPPORTED:
        tone = "sk-better" if points > 0 else "sk-worse"
        better = "better" if points > 0 else "worse" if points < 0 else "apart"
        return (
            f'<span class="sk-difference {tone}">{escape(metric_title(study.metric))}: '
            f"<strong>{abs(points):.1f} points {better}</strong>, {UNLIKE}</span>"
        )
    if abs(points) < 0.5:
        return '<span class="sk-difference">The outputs of SFT and KD are equally well supported</span>'
    fewer, tone = ("fewer", "sk-better") if points > 0 else ("more", "sk-worse")
    return (
        f'<span class="sk-difference {tone}">Unsupported words: <strong>{abs(points):.0f} points {fewer}</strong>, '
        f"{UNLIKE}</span>"
    )


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
