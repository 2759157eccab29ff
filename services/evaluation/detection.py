"""``smoothkd detect``: a detector over a file of documents and summaries, whoever wrote them."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.contract.errors import DatasetError, InvalidInputError
from services.contract.records import Span
from services.contract.settings import Settings
from services.datasets.sources import local_rows
from services.evaluation.support import check_support
from services.evaluation.verdict import Verdict

COLUMNS = ("document", "summary")
ADDED = ("score", "spans", "missing")
LENS = "smollm2-135m-instruct"
"""The shipped lens, and the model that it was trained on."""
NOTHING = "no word to judge"
PAIRS_AT_A_TIME = 16
READS: Mapping[str, Sequence[str]] = {"lookback": ("model", "lens"), "hhem": ("model",), "nli": ("model",)}
"""Which options a detector reads."""
Judged = TypeVar("Judged")


@dataclass(frozen=True, kw_only=True)
class Detection:
    """``score``: how likely the summary holds a hallucination, 0 to 1; None with the reason in ``missing``."""

    score: float | None
    spans: Sequence[Span]
    missing: str | None = None


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """None is the detector's own default; which detector reads what is in READS."""

    settings: Settings
    model: str | None = None
    lens: str | None = None


Pairs = Sequence[tuple[str, str]]
Progress = Callable[[int, int], None]
"""Called with how many summaries are done, and how many there are."""
Detector = Callable[[Pairs, DetectorOptions, Progress], list[Detection]]


def detect_file(
    name: str, *, source: Path, target: Path, options: DetectorOptions, progress: Progress = lambda done, total: None
) -> int:
    """Write each line of ``source`` with ``score``, ``spans`` and, where there is no score, ``missing`` to ``target``.

    A line's own fields of these names are kept as ``input_score``, ``input_spans`` and ``input_missing``. Returns how
    many summaries have no score. DatasetError names a line that is broken or lacks a column, or says that there is
    none, and InvalidInputError that ``target`` cannot be written, before anything is computed; ``target`` appears only
    when it is whole.
    """
    if name not in DETECTORS:
        raise InvalidInputError(f"{name!r} is no detector", fix=f"Choose one of {', '.join(DETECTORS)}.")
    for option in ("model", "lens"):
        if getattr(options, option) is not None and option not in READS.get(name, ()):
            raise InvalidInputError(
                f"the detector {name} reads no {option}",
                fix=f"Leave --{option} out, or choose {' or '.join(one for one in READS if option in READS[one])}.",
            )
    rows = [_checked(row.values, place=row.place) for row in local_rows(source)]
    if not rows:
        raise DatasetError(f"{source} holds nothing to judge", fix="Name a file with at least one summary.")
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    with _writing(target):
        # Before anything is computed.
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    try:
        pairs = [(row["document"], row["summary"]) for row in rows]
        detections = [_finite(detection) for detection in DETECTORS[name](pairs, options, progress)]
        with _writing(target):
            with partial.open("w", encoding="utf-8") as file:
                for row, detection in zip(rows, detections, strict=True):
                    file.write(json.dumps({**row, **_as_json(detection)}, ensure_ascii=False) + "\n")
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return sum(detection.score is None for detection in detections)


def detect_lexical(pairs: Pairs, options: DetectorOptions, progress: Progress) -> list[Detection]:
    """The share of names, numbers and content words that the document does not contain; needs no model."""
    detections = []
    for document, summary in pairs:
        support = check_support(summary, source=document)
        score = None if support.share is None else 1 - support.share / 100
        detections.append(Detection(score=score, spans=support.spans, missing=support.missing))
        progress(len(detections), len(pairs))
    return detections


def detect_lookback(pairs: Pairs, options: DetectorOptions, progress: Progress) -> list[Detection]:
    """How little the model looks at the document while it writes (Lookback Lens)."""
    from services.evaluation.lookback.detect import detect_lookback as look

    model = options.model or LENS
    found = look(pairs, model=model, lens=options.lens or LENS, settings=options.settings, progress=progress)
    return [Detection(score=item.score, spans=item.spans, missing=item.missing) for item in found]


def detect_consistency(pairs: Pairs, options: DetectorOptions, progress: Progress) -> list[Detection]:
    """What goes beyond or against the source sentences that support it best; a small network on MiniLM, shipped."""
    from services.evaluation.consistency.detector import load_detector

    detector = load_detector()
    return [
        Detection(score=item.score, spans=item.spans, missing=None if item.score is not None else NOTHING)
        for item in _in_parts(detector.detect, pairs, progress)
    ]


def detect_hhem(pairs: Pairs, options: DetectorOptions, progress: Progress) -> list[Detection]:
    """Vectara's HHEM-2.1-Open, which judges the summary as a whole, and each sentence for spans."""
    from services.evaluation.hhem import NAME, load_hhem

    hhem = load_hhem(options.model or NAME, settings=options.settings)
    return [_from_verdict(verdict) for verdict in _in_parts(hhem.judge, pairs, progress)]


def detect_nli(pairs: Pairs, options: DetectorOptions, progress: Progress) -> list[Detection]:
    """Which sentences no part of the document entails, by any NLI cross-encoder."""
    from services.evaluation.nli import load_nli

    if options.model is None:
        raise InvalidInputError(
            "the detector nli needs a cross-encoder", fix="Name one, such as --model cross-encoder/nli-deberta-v3-base."
        )
    judge = load_nli(options.model, settings=options.settings)
    return [_from_verdict(verdict) for verdict in _in_parts(judge.judge, pairs, progress)]


DETECTORS: Mapping[str, Detector] = {
    "lexical": detect_lexical,
    "lookback": detect_lookback,
    "consistency": detect_consistency,
    "hhem": detect_hhem,
    "nli": detect_nli,
}


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidInputError(
            f"{target} cannot be written: {error.strerror}", fix="Name another --output, in a folder with room."
        ) from None


def _in_parts(judge: Callable[[Pairs], list[Judged]], pairs: Pairs, progress: Progress) -> list[Judged]:
    judged: list[Judged] = []
    for start in range(0, len(pairs), PAIRS_AT_A_TIME):
        judged += judge(pairs[start : start + PAIRS_AT_A_TIME])
        progress(len(judged), len(pairs))
    return judged


def _finite(detection: Detection) -> Detection:
    if detection.score is None or math.isfinite(detection.score):
        return detection
    return Detection(score=None, spans=[], missing="the detector's score is not finite; check its weights")


def _from_verdict(verdict: Verdict) -> Detection:
    if verdict.score is None:
        return Detection(score=None, spans=[], missing=verdict.missing or NOTHING)
    return Detection(score=1 - verdict.score / 100, spans=verdict.spans)


def _checked(row: Mapping[str, Any], *, place: str) -> dict[str, Any]:
    for column in COLUMNS:
        if not isinstance(row.get(column), str):
            raise DatasetError(
                f"{place} has no text under {column!r}",
                fix='Every line needs a document and its summary: {"document": "...", "summary": "..."}.',
            )
    for name in ADDED:
        if name in row and f"input_{name}" in row:
            raise DatasetError(
                f"{place} has both {name!r} and 'input_{name}'",
                fix=f"Rename one of them: the output has {name!r} of its own and keeps the input's as 'input_{name}'.",
            )
    return {f"input_{name}" if name in ADDED else name: value for name, value in row.items()}


def _as_json(detection: Detection) -> dict[str, Any]:
    spans = [
        {"start": span.start, "end": span.end, "score": span.score, "reason": span.explanation}
        for span in detection.spans
    ]
    missing = {"missing": detection.missing} if detection.score is None else {}
    return {"score": detection.score, "spans": spans, **missing}
