"""``smoothkd detect --detector lookback``: which words of a summary the model wrote without looking at the document."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contract.records import Span
from services.contract.settings import Settings
from services.evaluation.lookback.examples import Characters, decode_answer
from services.evaluation.lookback.features import Array, Progress, load_lens_model, measure_summaries
from services.evaluation.lookback.labels import overlaps, words_of
from services.evaluation.lookback.lens import (
    Lens,
    SpanScore,
    factual_rate,
    load_lens,
    score_spans,
    score_windows,
    summary_score,
    token_scores,
)
from services.evaluation.lookback.measure import MeasuredAnswer

log = logging.getLogger(__name__)

DETECTOR = "lookback"


@dataclass(frozen=True, kw_only=True)
class Detection:
    """``score``: how likely the summary holds a hallucination, 0 to 1. ``factual_rate``: share of its windows of eight
    tokens judged factual, 0 to 100. Both are None with a ``missing`` reason where nothing could be measured.

    ``truncated``: the document's end did not fit into the model's window.
    """

    score: float | None
    factual_rate: float | None
    spans: list[Span]
    windows: list[SpanScore]
    missing: str | None = None
    truncated: bool = False


def detect_lookback(
    pairs: Sequence[tuple[str, str]],
    *,
    model: str,
    lens: str | Path,
    settings: Settings,
    instruction: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Detection]:
    """One detection for each (document, summary), in order.

    ``model`` is the lens's own or one fine-tuned from it; InvalidInputError for another. ``instruction`` is the one
    that the summaries answer, the lens's own if None.
    """
    loaded = load_lens(lens)
    lens_model = load_lens_model(model, settings=settings)
    loaded.check_model(model, lens_model.fingerprint)
    measured = measure_summaries(
        lens_model, pairs, instruction=instruction or loaded.instruction, cache=cache, progress=progress
    )
    if truncated := sum(one.truncated for one in measured):
        log.warning(
            "%d of %d documents do not fit into the model's window of %d tokens beside their summaries and were read "
            "without their end",
            truncated,
            len(pairs),
            lens_model.window,
        )
    detections = []
    for (_, summary), ratios in zip(pairs, measured, strict=True):
        if ratios.missing is not None:
            detections.append(_missing(ratios.missing))
        else:
            detections.append(
                detect(loaded, ratios.ratios_TLH, text=summary, offsets=ratios.offsets, truncated=ratios.truncated)
            )
    return detections


def detect_generated(lens: Lens, answer: MeasuredAnswer, *, tokenizer: Any) -> tuple[str, Detection]:
    """The text of an answer that was measured while it was generated, and what the lens says of it."""
    text, offsets = decode_answer(tokenizer, answer.ids)
    if not text.strip():
        return text, _missing("the summary is empty")
    return text, detect(lens, answer.ratios_TLH.numpy(), text=text, offsets=offsets)


def detect(
    lens: Lens, ratios_TLH: Array, *, text: str, offsets: Sequence[Characters], truncated: bool = False
) -> Detection:
    """Windows, spans and scores of one text from the ratios of its tokens."""
    windows = score_windows(lens, ratios_TLH, offsets=offsets)
    return Detection(
        score=summary_score(windows),
        factual_rate=factual_rate(windows, threshold=lens.threshold),
        spans=_spans(lens, windows, text, offsets),
        windows=windows,
        truncated=truncated,
    )


def rate_spans(
    lens: Lens, ratios_TLH: Array, *, offsets: Sequence[Characters], spans: Sequence[Characters]
) -> float | None:
    """The factual rate over given spans instead of windows, 0 to 100."""
    return factual_rate(score_spans(lens, ratios_TLH, offsets=offsets, spans=spans), threshold=lens.threshold)


def _spans(lens: Lens, windows: Sequence[SpanScore], text: str, offsets: Sequence[Characters]) -> list[Span]:
    """Runs of words whose mean probability of being hallucinated is above what the lens takes for factual."""
    tokens = token_scores(windows, tokens=len(offsets))
    runs: list[list[tuple[Characters, float]]] = []
    last_was = False
    for word in words_of(text):
        scores = [score for score, offset in zip(tokens, offsets, strict=True) if overlaps(offset, (word,))]
        score = sum(scores) / len(scores) if scores else 0.0
        suspected = score > 1 - lens.threshold
        if suspected:
            runs[-1].append((word, score)) if last_was else runs.append([(word, score)])
        last_was = suspected
    return [_span(run) for run in runs]


def _span(run: list[tuple[Characters, float]]) -> Span:
    score = max(score for _, score in run)
    return Span(
        start=run[0][0][0],
        end=run[-1][0][1],
        detector=DETECTOR,
        kind="passage",
        score=min(score, 1.0),
        explanation=(
            "While writing this, the model attended to the document as it does when it invents "
            f"({score:.0%} likely to be unsupported)."
        ),
    )


def _missing(reason: str) -> Detection:
    return Detection(score=None, factual_rate=None, spans=[], windows=[], missing=reason)
