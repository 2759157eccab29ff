"""Case studies to keep and to send on: JSON, Markdown, or one self-contained HTML page."""

import json
import re
from collections.abc import Sequence

from services.contract.metric_words import metric_title
from services.contract.records import CaseOutput, CaseStudy, RunRecord
from services.reports.case_cards import difference_text
from services.reports.colours import method_colours
from services.reports.detectors import agreement_text, marked_by_first
from services.reports.marked_text import segments
from services.reports.page import page_html, studies_html

FORMATS = ("json", "md", "html")


def export_studies(studies: Sequence[CaseStudy], runs: Sequence[RunRecord], *, title: str, form: str) -> str:
    """The studies in one of FORMATS. ``runs`` are all runs of the sweep, for settings and colours.

    JSON has the spans of every detector, the others those of the first that marked anything, and how far all agree.
    """
    if form == "json":
        return json.dumps([study.model_dump(mode="json") for study in studies], indent=2, ensure_ascii=False) + "\n"
    if form == "md":
        return "\n".join([f"# {_inline(title)}", "", *(line for study in studies for line in _markdown(study))]) + "\n"
    assert form == "html", f"{form} is none of {FORMATS}"
    colours = method_colours([*(run.method for run in runs), *(o.method for study in studies for o in study.outputs)])
    return page_html(title, f"{len(studies)} case studies", studies_html(studies, runs, colours))


def _markdown(study: CaseStudy) -> list[str]:
    lines = [
        f"## {_inline(study.benchmark)}, {_inline(study.item_id)}",
        "",
        f"{difference_text(study)}.",
        "",
        *([_escape(alike), ""] if (alike := agreement_text(study)) else []),
        "Source:",
        "",
        *_quote(study.source),
        "",
        "Reference:",
        "",
        *_quote(study.reference),
        "",
    ]
    for output in marked_by_first(study).outputs:
        scores = ", ".join(f"{metric_title(name)} {value:.1f}" for name, value in output.scores.items())
        lines += [f"### {_inline(output.method)}" + (f" ({scores})" if scores else ""), ""]
        lines += [f"> {line}" if line else ">" for line in _marked(output).split("\n")]
        lines.append("")
        for span in sorted(output.spans, key=lambda span: (span.start, span.end)):
            text = _inline(output.output[span.start : span.end])
            lines.append(f"- “{text}”: {_inline(span.explanation)} ({span.detector}, certainty {span.score:.0%})")
        lines += [""] if output.spans else []
    return lines


def _marked(output: CaseOutput) -> str:
    """The text with unsupported pieces in bold; neighbouring pieces are one."""
    parts: list[tuple[str, bool]] = []
    for segment in segments(output.output, output.spans):
        marked = bool(segment.spans)
        if parts and parts[-1][1] == marked:
            parts[-1] = (parts[-1][0] + segment.text, marked)
        else:
            parts.append((segment.text, marked))
    return "".join(_bold(_escape(text)) if marked else _escape(text) for text, marked in parts)


def _bold(text: str) -> str:
    # Markdown takes no bold that begins or ends with a space, or that spans paragraphs.
    return re.sub(r"(\S(?:[^\n]*\S)?)", r"**\1**", text)


def _quote(text: str) -> list[str]:
    return [f"> {_escape(line)}" if line else ">" for line in text.split("\n")]


def _inline(text: str) -> str:
    return _escape(" ".join(text.split()))


def _escape(text: str) -> str:
    """Text that Markdown shows as it stands, and that no renderer takes for HTML or a link."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~<>&$-])", r"\\\1", text)
