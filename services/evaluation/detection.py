"""``smoothkd detect``: a detector over a file of documents and summaries, whoever wrote them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contract.errors import DatasetError, InvalidInputError
from services.contract.records import Span
from services.contract.settings import Settings
from services.datasets.sources import local_rows
from services.evaluation.support import check_support

COLUMNS = ("document", "summary")


@dataclass(frozen=True, kw_only=True)
class Detection:
    """``score``: how likely the summary holds a hallucination, 0 to 1; None with the reason in ``missing``."""

    score: float | None
    spans: Sequence[Span]
    missing: str | None = None


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """``model`` and ``lens`` only count for the detectors that need one."""

    model: str
    lens: str
    settings: Settings


Pairs = Sequence[tuple[str, str]]
Detector = Callable[[Pairs, DetectorOptions], list[Detection]]


def detect_file(name: str, *, source: Path, target: Path, options: DetectorOptions) -> int:
    """Write each line of ``source`` with ``score``, ``spans`` and, where there is no score, ``missing`` to ``target``.

    Returns how many summaries have no score. DatasetError names a line that is broken or lacks a column, before
    anything is computed; ``target`` appears only when it is whole.
    """
    if name not in DETECTORS:
        raise InvalidInputError(f"{name!r} is no detector", fix=f"Choose one of {', '.join(DETECTORS)}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    rows = [_checked(row.values, place=row.place) for row in local_rows(source)]
    detections = DETECTORS[name]([(row["document"], row["summary"]) for row in rows], options)
    with partial.open("w", encoding="utf-8") as file:
        for row, detection in zip(rows, detections, strict=True):
            file.write(json.dumps({**row, **_as_json(detection)}, ensure_ascii=False) + "\n")
    partial.rename(target)
    return sum(detection.score is None for detection in detections)


def detect_lexical(pairs: Pairs, options: DetectorOptions) -> list[Detection]:
    """The share of names, numbers and content words that the document does not contain; needs no model."""
    detections = []
    for document, summary in pairs:
        support = check_support(summary, source=document)
        score = None if support.share is None else 1 - support.share / 100
        detections.append(Detection(score=score, spans=support.spans, missing=support.missing))
    return detections


def detect_lookback(pairs: Pairs, options: DetectorOptions) -> list[Detection]:
    """How little the model looks at the document while it writes (Lookback Lens)."""
    from services.evaluation.lookback.detect import detect_lookback as look

    found = look(pairs, model=options.model, lens=options.lens, settings=options.settings)
    return [Detection(score=item.score, spans=item.spans, missing=item.missing) for item in found]


def detect_consistency(pairs: Pairs, options: DetectorOptions) -> list[Detection]:
    """What goes beyond or against the source sentences that support it best; a small network on MiniLM."""
    from services.evaluation.consistency.detector import detect_consistency as judge

    return [
        Detection(score=item.score, spans=item.spans, missing=None if item.score is not None else "no word to judge")
        for item in judge(pairs, settings=options.settings)
    ]


DETECTORS: Mapping[str, Detector] = {
    "lexical": detect_lexical,
    "lookback": detect_lookback,
    "consistency": detect_consistency,
}


def _checked(row: Mapping[str, Any], *, place: str) -> dict[str, Any]:
    for column in COLUMNS:
        if not isinstance(row.get(column), str):
            raise DatasetError(
                f"{place} has no text under {column!r}",
                fix='Every line needs a document and its summary: {"document": "...", "summary": "..."}.',
            )
    return dict(row)


def _as_json(detection: Detection) -> dict[str, Any]:
    spans = [
        {"start": span.start, "end": span.end, "score": span.score, "reason": span.explanation}
        for span in detection.spans
    ]
    missing = {"missing": detection.missing} if detection.score is None else {}
    return {"score": detection.score, "spans": spans, **missing}
