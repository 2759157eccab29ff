"""From measured, labelled summaries to a lens's coefficients, and an honest measure of what they are worth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]
from sklearn.model_selection import GroupKFold  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

from services.contract.errors import DatasetError
from services.evaluation.lookback.features import MeasuredSummary
from services.evaluation.lookback.labels import LabelledSummary, overlaps
from services.evaluation.lookback.lens import Array, Lens, mean_ratios, window_ranges
from services.evaluation.lookback.validation import LensReport, Validated, report_novel_words, report_scores, validate

STRENGTHS = (0.0001, 0.001, 0.01, 0.1)
"""Candidates for C of the logistic regression over standardised ratios; folds of documents choose."""
INNER_FOLDS = 3

Bools = NDArray[np.bool_]
Groups = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TrainingItem:
    """A labelled summary with its ratios; ``group`` numbers its document."""

    summary: LabelledSummary
    measured: MeasuredSummary
    group: int


@dataclass(frozen=True, kw_only=True)
class SpanSet:
    """N spans: their mean ratios (N, L*H), which are factual, and the documents they come from."""

    ratios_NF: Array
    factual_N: Bools
    groups_N: Groups


def fit_lens(lens: Lens, items: Sequence[TrainingItem]) -> tuple[Lens, float]:
    """``lens`` with coefficients from all items, and the strength of regularisation that did best on inner folds."""
    spans = collect_spans(items, kind=lens.spans)
    factual = int(spans.factual_N.sum())
    if factual in (0, len(spans.factual_N)):
        raise DatasetError(
            f"every span is {'factual' if factual else 'hallucinated'}; a lens needs both kinds",
            fix="Add summaries of the other kind.",
        )
    strength = _choose_strength(spans)
    coef, intercept = _fit(spans.ratios_NF, spans.factual_N, strength)
    rounded = {"coef": [float(f"{value:.6g}") for value in coef], "intercept": round(intercept, 6)}
    return lens.model_copy(update=rounded), strength


def cross_validate(lens: Lens, items: Sequence[TrainingItem], *, folds: int, seed: int) -> tuple[LensReport, float]:
    """AUROC over all documents, each scored by a lens that never saw it, and the threshold that suits those scores.

    The strength of regularisation is chosen within each fold's training documents.
    """
    groups = np.array([item.group for item in items])
    documents = len(set(groups.tolist()))
    if documents < folds:
        raise DatasetError(
            f"{documents} documents are too few for {folds} folds", fix="Add documents or lower the folds."
        )
    scored: list[Validated] = []
    for training, held_out in GroupKFold(folds, shuffle=True, random_state=seed).split(groups, groups=groups):
        fold_lens, _ = fit_lens(lens, [items[index] for index in training])
        scored += [validate(fold_lens, items[i].summary, items[i].measured, group=items[i].group) for i in held_out]
    novel_words = report_novel_words([item.summary for item in items], seed=seed)
    return report_scores(scored, seed=seed).model_copy(update={"novel_words": novel_words}), best_threshold(scored)


def collect_spans(items: Sequence[TrainingItem], *, kind: str) -> SpanSet:
    """Windows of eight tokens, factual when no token is hallucinated; for ``predefined``, the labelled spans and the
    stretches between them (Chuang et al. 2024, sections 2.2 and 2.3)."""
    ratios, factual, groups = [], [], []
    for item in items:
        hallucinated = [overlaps(characters, item.summary.spans) for characters in item.measured.offsets]
        ranges = window_ranges(len(hallucinated)) if kind == "windows" else _stretches(hallucinated)
        ratios.append(mean_ratios(item.measured.ratios_TLH, ranges))
        factual += [not any(hallucinated[first:after]) for first, after in ranges]
        groups += [item.group] * len(ranges)
    return SpanSet(ratios_NF=np.concatenate(ratios), factual_N=np.array(factual), groups_N=np.array(groups))


def best_threshold(scored: Sequence[Validated]) -> float:
    """The probability of being factual that tells windows apart with the best balanced accuracy."""
    factual_N = np.array([window.factual for item in scored for window in item.windows])
    hallucinated_N = np.array([flag for item in scored for flag in item.windows_hallucinated])
    order_N = np.argsort(factual_N)
    # What lies below the threshold is judged hallucinated.
    found_N = np.cumsum(hallucinated_N[order_N]) / max(int(hallucinated_N.sum()), 1)
    lost_N = np.cumsum(~hallucinated_N[order_N]) / max(int((~hallucinated_N).sum()), 1)
    place = int(np.argmax(found_N - lost_N))
    after = min(place + 1, len(order_N) - 1)
    return round(float(factual_N[order_N[place]] + factual_N[order_N[after]]) / 2, 6)


def _stretches(hallucinated: list[bool]) -> list[tuple[int, int]]:
    edges = [index for index in range(1, len(hallucinated)) if hallucinated[index] != hallucinated[index - 1]]
    return list(zip([0, *edges], [*edges, len(hallucinated)], strict=True))


def _choose_strength(spans: SpanSet) -> float:
    documents = len(set(spans.groups_N.tolist()))
    scores = dict.fromkeys(STRENGTHS, 0.0)
    if documents < INNER_FOLDS:
        return STRENGTHS[1]
    for training, held_out in GroupKFold(INNER_FOLDS).split(spans.ratios_NF, groups=spans.groups_N):
        if any(len(set(spans.factual_N[part].tolist())) < 2 for part in (training, held_out)):
            continue
        for strength in STRENGTHS:
            coef, intercept = _fit(spans.ratios_NF[training], spans.factual_N[training], strength)
            logits = spans.ratios_NF[held_out] @ coef + intercept
            scores[strength] += float(roc_auc_score(spans.factual_N[held_out], logits))
    return max(STRENGTHS, key=lambda strength: scores[strength])


def _fit(ratios_NF: Array, factual_N: Bools, strength: float) -> tuple[NDArray[np.float64], float]:
    """Coefficients and intercept for ratios as they are; the fit itself standardises them."""
    scaler = StandardScaler().fit(ratios_NF.astype(np.float64))
    regression = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(ratios_NF), factual_N)
    coef = regression.coef_[0] / scaler.scale_
    return coef, float(regression.intercept_[0] - coef @ scaler.mean_)
