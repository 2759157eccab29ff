"""People's annotations: the words that a person can mark, how far people agree, and labels for training a lens."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import krippendorff
import numpy as np

from services.contract.annotation_records import Annotation, AnnotatorAgreement, MarkedSpan

Characters = tuple[int, int]
Item = tuple[str, str, str]
"""Run id, benchmark, item id."""


@dataclass(frozen=True, kw_only=True)
class JudgedOutput:
    """An output with its source and everybody's judgements of it."""

    source: str
    output: str
    annotations: Sequence[Annotation]


def words_of(text: str) -> list[Characters]:
    """The characters of each word: what white space separates."""
    return [found.span() for found in re.finditer(r"\S+", text)]


def touched_words(words: Sequence[Characters], spans: Iterable[Characters]) -> list[int]:
    """The places of the words that one of the spans touches."""
    marked = list(spans)
    return [
        place
        for place, (start, end) in enumerate(words)
        if any(span_start < end and start < span_end for span_start, span_end in marked)
    ]


def spans_of_words(words: Sequence[Characters], places: Iterable[int]) -> list[MarkedSpan]:
    """Marked words as spans, neighbours as one; places that are no word's are passed over."""
    spans: list[MarkedSpan] = []
    last = -2
    for place in sorted(place for place in set(places) if 0 <= place < len(words)):
        start, end = words[place]
        if place == last + 1:
            spans[-1] = MarkedSpan(start=spans[-1].start, end=end)
        else:
            spans.append(MarkedSpan(start=start, end=end))
        last = place
    return spans


def annotator_agreement(outputs: Sequence[JudgedOutput]) -> AnnotatorAgreement:
    """Krippendorff's alpha, nominal, over the words of outputs that two or more people judged (Krippendorff, 2011)."""
    judged = [output for output in outputs if output.annotations]
    shared = [output for output in judged if len(output.annotations) > 1]
    counts_W2 = [counts for output in shared for counts in _votes_per_word(output)]
    alpha, missing = _alpha(counts_W2)
    return AnnotatorAgreement(
        alpha=alpha,
        missing=missing,
        annotators=Counter(annotation.annotator for output in judged for annotation in output.annotations),
        outputs=len(judged),
        shared=len(shared),
        words=len(counts_W2),
    )


def lens_labels(outputs: Iterable[JudgedOutput]) -> str:
    """JSON lines as ``smoothkd lens train`` reads them: document, summary, spans; and how many people judged.

    A character is hallucinated where more than half of them marked it. Outputs without text or source are left out.
    """
    lines = []
    for output in outputs:
        if output.annotations and output.output.strip() and output.source.strip():
            record = {
                "document": output.source,
                "summary": output.output,
                "spans": [{"start": start, "end": end} for start, end in _majority(output)],
                "annotators": len(output.annotations),
            }
            lines.append(json.dumps(record, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)


def judged_outputs(annotations: Iterable[Annotation], texts: Mapping[Item, tuple[str, str]]) -> list[JudgedOutput]:
    """Judgements joined to (source, output) by run and item; those of an output that is gone are left out."""
    by_item: dict[Item, list[Annotation]] = defaultdict(list)
    for annotation in annotations:
        by_item[annotation.run_id, annotation.benchmark, annotation.item_id].append(annotation)
    return [
        JudgedOutput(source=texts[item][0], output=texts[item][1], annotations=of_item)
        for item, of_item in by_item.items()
        if item in texts
    ]


def _votes_per_word(output: JudgedOutput) -> list[tuple[int, int]]:
    """(people who left it, people who marked it) of each word."""
    words = words_of(output.output)
    marks = Counter(
        place
        for annotation in output.annotations
        for place in touched_words(words, ((span.start, span.end) for span in annotation.spans))
    )
    people = len(output.annotations)
    return [(people - marks[place], marks[place]) for place in range(len(words))]


def _alpha(counts_W2: Sequence[tuple[int, int]]) -> tuple[float | None, str | None]:
    if not counts_W2:
        return None, "no output has been judged by two people"
    votes = np.array(counts_W2)
    if not votes.sum(axis=0).all():
        return None, "every word has the same mark from everybody, so chance agrees as well as people do"
    return float(krippendorff.alpha(value_counts=votes, level_of_measurement="nominal")), None


def _majority(output: JudgedOutput) -> list[Characters]:
    votes = np.zeros(len(output.output) + 1, dtype=np.int64)
    for annotation in output.annotations:
        marked = np.zeros_like(votes)
        for span in annotation.spans:
            marked[span.start : min(span.end, len(output.output))] = 1
        votes += marked
    # The last place belongs to no character: it ends a span that runs to the end.
    most = np.concatenate([[False], 2 * votes > len(output.annotations)])
    edges = np.flatnonzero(most[1:] != most[:-1])
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]
