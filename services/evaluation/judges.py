"""Hallucination detectors as functions from labelled outputs to judgements, so that all are measured alike.

A detector that learns from labels judges each document by what it learnt without that document's group.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold

from services.contract.settings import Settings
from services.evaluation.consistency.held_out import Judgement, read_held_out
from services.evaluation.consistency.labelled import Example
from services.evaluation.lookback.features import MeasuredSummary, load_lens_model, measure_summaries
from services.evaluation.lookback.fit import TrainingItem, fit_lens
from services.evaluation.lookback.labels import LabelledSummary
from services.evaluation.lookback.lens import Lens, load_lens, score_windows, summary_score, token_scores
from services.evaluation.support import check_support
from services.evaluation.verdict import Verdict
from services.evaluation.words import STOP_WORDS

FOLDS = 5
LENS = "smollm2-135m-instruct"

_WORD = re.compile(r"\w+")


def judge_novel_words(examples: Sequence[Example]) -> list[Judgement]:
    """The baseline: the share of an output's words, stop words apart, that the document does not contain."""
    judgements = []
    vocabularies: dict[str, set[str]] = {}
    for example in examples:
        if example.document not in vocabularies:
            vocabularies[example.document] = {word.lower() for word in _WORD.findall(example.document)}
        known = vocabularies[example.document]
        ranges = [
            (match.start(), match.end(), float(match.group().lower() not in known))
            for match in _WORD.finditer(example.output)
        ]
        content = [score for start, end, score in ranges if example.output[start:end].lower() not in STOP_WORDS]
        score = float(np.mean(content)) if content else None
        judgements.append(Judgement(key=example.key, score=score, ranges=ranges))
    return judgements


def judge_support(examples: Sequence[Example]) -> list[Judgement]:
    judgements = []
    for example in examples:
        support = check_support(example.output, source=example.document)
        score = None if support.share is None else 1 - support.share / 100
        ranges = [(span.start, span.end, span.score) for span in support.spans]
        judgements.append(Judgement(key=example.key, score=score, ranges=ranges))
    return judgements


def judge_by(
    examples: Sequence[Example], judge: Callable[[Sequence[tuple[str, str]]], list[Verdict]]
) -> list[Judgement]:
    """By a model that nobody here has trained: HHEM or an NLI cross-encoder."""
    verdicts = judge([(example.document, example.output) for example in examples])
    return [
        Judgement(
            key=example.key,
            score=None if verdict.score is None else 1 - verdict.score / 100,
            ranges=[(span.start, span.end, span.score) for span in verdict.spans],
        )
        for example, verdict in zip(examples, verdicts, strict=True)
    ]


def judge_held_out(examples: Sequence[Example], *, folder: Path) -> list[Judgement]:
    """The consistency networks of the training's folds, each on the documents that it has not seen."""
    judgements = read_held_out(folder)
    return [judgements[example.key] for example in examples if example.key in judgements]


def judge_lookback(examples: Sequence[Example], *, settings: Settings, cache: Path | None = None) -> list[Judgement]:
    """The shipped lens's model with lenses fitted anew to XSumFaith for each of FOLDS folds by document.

    Outputs that cannot be measured have no score. ``cache`` keeps what was measured between runs.
    """
    shipped = load_lens(LENS)
    pairs = [(example.document, example.output) for example in examples]
    measured = measure_summaries(
        load_lens_model(shipped.model, settings=settings), pairs, instruction=shipped.instruction, cache=cache
    )
    groups = [example.group for example in examples]
    judgements: dict[str, Judgement] = {}
    for train, test in GroupKFold(FOLDS, shuffle=True, random_state=0).split(groups, groups=groups):
        items = [
            TrainingItem(summary=_labelled(examples[index]), measured=measured[index], group=examples[index].group)
            for index in train
            if examples[index].origin == "xsumfaith" and measured[index].missing is None
        ]
        lens, _ = fit_lens(shipped, items)
        for index in test:
            judgements[examples[index].key] = _judge_measured(lens, examples[index], measured[index])
    return [judgements[example.key] for example in examples]


def _labelled(example: Example) -> LabelledSummary:
    return LabelledSummary(document=example.document, summary=example.output, spans=tuple(example.spans or ()))


def _judge_measured(lens: Lens, example: Example, measured: MeasuredSummary) -> Judgement:
    if measured.missing is not None:
        return Judgement(key=example.key, score=None, ranges=[])
    windows = score_windows(lens, measured.ratios_TLH, offsets=measured.offsets)
    tokens = token_scores(windows, tokens=len(measured.offsets))
    ranges = [(start, end, score) for (start, end), score in zip(measured.offsets, tokens, strict=True)]
    return Judgement(key=example.key, score=summary_score(windows), ranges=ranges)
