"""What a lens is worth against human labels: per word, per summary and per window, next to a look-up of words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from services.evaluation.lookback.auroc import Auroc, measure_auroc
from services.evaluation.lookback.examples import Characters
from services.evaluation.lookback.features import MeasuredSummary
from services.evaluation.lookback.labels import LabelledSummary, overlaps, words_of
from services.evaluation.lookback.lens import Lens, SpanScore, score_windows, summary_score, token_scores
from services.evaluation.words import word_key

_WORD = re.compile(r"\w+")


class DetectionQuality(BaseModel):
    """AUROC of finding hallucinated words, and summaries with any hallucinated word."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: Auroc
    summaries: Auroc


class LensReport(DetectionQuality):
    """``windows``: AUROC over windows of eight tokens, the paper's measure. ``novel_words``: what a look-up reaches on
    the same labels, a word being suspected when the document lacks it, a summary by its share of such words."""

    windows: Auroc
    novel_words: DetectionQuality | None = None
    skipped: int = 0
    seen_in_training: bool = False


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A labelled summary as a lens scores it. ``group`` is its document."""

    summary: LabelledSummary
    group: int
    offsets: list[Characters]
    windows: list[SpanScore]

    @property
    def windows_hallucinated(self) -> list[bool]:
        hallucinated = [overlaps(characters, self.summary.spans) for characters in self.offsets]
        return [any(hallucinated[window.first : window.after]) for window in self.windows]

    def word_scores(self) -> list[float]:
        """For each word the mean score of its tokens; 1 is certainly hallucinated."""
        tokens = token_scores(self.windows, tokens=len(self.offsets))
        scores = []
        for word in words_of(self.summary.summary):
            touched = [tokens[index] for index, offset in enumerate(self.offsets) if overlaps(offset, (word,))]
            scores.append(float(np.mean(touched)) if touched else 0.0)
        return scores


def validate(lens: Lens, summary: LabelledSummary, measured: MeasuredSummary, *, group: int) -> Validated:
    """Score a measured summary with a lens, beside its labels."""
    windows = score_windows(lens, measured.ratios_TLH, offsets=measured.offsets)
    return Validated(summary=summary, group=group, offsets=measured.offsets, windows=windows)


def report_scores(scored: Sequence[Validated], *, seed: int = 0) -> LensReport:
    """AUROC with intervals over everything scored."""
    word_labels: list[bool] = []
    word_scores: list[float] = []
    word_groups: list[int] = []
    window_labels: list[bool] = []
    window_scores: list[float] = []
    window_groups: list[int] = []
    for item in scored:
        word_labels += [overlaps(word, item.summary.spans) for word in words_of(item.summary.summary)]
        word_scores += item.word_scores()
        window_labels += item.windows_hallucinated
        window_scores += [1 - window.factual for window in item.windows]
        word_groups += [item.group] * (len(word_labels) - len(word_groups))
        window_groups += [item.group] * len(item.windows)
    return LensReport(
        words=measure_auroc(word_labels, word_scores, groups=word_groups, seed=seed),
        summaries=measure_auroc(
            [item.summary.is_hallucinated for item in scored],
            [summary_score(item.windows) for item in scored],
            groups=[item.group for item in scored],
            seed=seed,
        ),
        windows=measure_auroc(window_labels, window_scores, groups=window_groups, seed=seed),
    )


def report_novel_words(summaries: Sequence[LabelledSummary], *, seed: int = 0) -> DetectionQuality:
    """The baseline: words of the summary that the document lacks, compared without case and inflection."""
    keys: dict[str, frozenset[str]] = {}
    labels, scores, groups, shares = [], [], [], []
    for item in summaries:
        if item.document not in keys:
            keys[item.document] = frozenset(word_key(word) for word in _WORD.findall(item.document))
        novel = []
        for start, end in words_of(item.summary):
            parts = [word_key(part) not in keys[item.document] for part in _WORD.findall(item.summary[start:end])]
            scores.append(float(any(parts)))
            labels.append(overlaps((start, end), item.spans))
            groups.append(item.document)
            novel += parts
        shares.append(float(np.mean(novel)) if novel else 0.0)
    return DetectionQuality(
        words=measure_auroc(labels, scores, groups=groups, seed=seed),
        summaries=measure_auroc(
            [item.is_hallucinated for item in summaries],
            shares,
            groups=[item.document for item in summaries],
            seed=seed,
        ),
    )
