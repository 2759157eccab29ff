"""What the marks in an output mean."""

from collections.abc import Sequence
from html import escape

from services.contract.records import Span
from services.reports.marked_text import KINDS, kind_class


def legend_html(spans: Sequence[Span]) -> str:
    """One entry per kind that occurs, and the three usual kinds always."""
    kinds = list(KINDS) + sorted({span.kind for span in spans} - set(KINDS))
    entries = "".join(
        f'<span class="sk-key"><mark class="sk-span {kind_class(kind)}" style="--strength:32%">{escape(kind)}</mark>'
        f"{escape(KINDS.get(kind, 'unsupported, as its detector names it'))}</span>"
        for kind in kinds
    )
    return f'<div class="sk-legend">{entries}</div>'
