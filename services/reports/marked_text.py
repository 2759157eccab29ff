"""Model output with its unsupported spans marked, as HTML for ``cards.css``.

Offsets are Python's: code points, so an emoji counts one. Text is escaped here and nowhere else
on its way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from services.contract.records import Span

KINDS = {
    "entity": "a name that the source does not support",
    "number": "a number that the source does not support",
    "word": "a word that the source does not support",
}
"""What the legend says of each kind; other kinds are shown in a colour of their own under their own name."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of text that the same spans cover from its first to its last character; none: plain text."""

    text: str
    spans: tuple[Span, ...]


def marked_html(text: str, spans: Sequence[Span]) -> str:
    """The text, escaped, with each covered piece in a ``mark`` that explains itself on hover and on focus."""
    return "".join(_segment_html(segment) for segment in segments(text, spans))


def segments(text: str, spans: Sequence[Span]) -> list[Segment]:
    """The text cut wherever a span starts or ends; joined again the pieces are the text.

    Spans may overlap and nest. What lies beyond the text's end covers nothing.
    """
    length = len(text)
    cuts = {0, length}
    for span in spans:
        cuts.update((min(span.start, length), min(span.end, length)))
    edges = sorted(cuts)
    return [
        Segment(text=text[start:end], spans=tuple(span for span in spans if span.start <= start and end <= span.end))
        for start, end in pairwise(edges)
    ]


def count_outside(text: str, spans: Sequence[Span]) -> int:
    """How many spans cover no character of the text: they belong to another text, and the page says so."""
    return sum(span.start >= min(span.end, len(text)) for span in spans)


def _segment_html(segment: Segment) -> str:
    text = escape(segment.text)
    if not segment.spans:
        return text
    shown = _shown(segment.spans)
    # An element and not an attribute: the browser's sanitiser drops attributes that look like markup.
    tip = "\n".join(dict.fromkeys(_explanation(span) for span in segment.spans))
    return (
        f'<mark class="sk-span {kind_class(shown.kind)}" style="--strength:{12 + 24 * shown.score:.0f}%" '
        f'tabindex="0">{text}<span class="sk-tip" role="tooltip">{escape(tip)}</span></mark>'
    )


def _shown(spans: Sequence[Span]) -> Span:
    """The surest of the innermost: one detector's sentence must not hide the word in it that another names."""
    innermost = [one for one in spans if not any(_lies_within(other, one) for other in spans)]
    return max(innermost, key=lambda span: span.score)


def _lies_within(inner: Span, outer: Span) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end and inner.end - inner.start < outer.end - outer.start


def _explanation(span: Span) -> str:
    return f"{span.kind}: {span.explanation} ({span.detector}, certainty {span.score:.0%})"


def kind_class(kind: str) -> str:
    """The class that gives a kind its colour and underline."""
    return f"sk-kind-{kind}" if kind in KINDS else "sk-kind-other"
