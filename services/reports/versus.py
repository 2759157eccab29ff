"""Two evaluations against each other on the items that both have."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from services.contract.errors import InvalidInputError
from services.contract.metric_words import FAITHFULNESS, measured_on, metric_title
from services.contract.records import Generation, Record, Score
from services.reports.paired import RESAMPLES, MeanDifference, adjust_p_values, bootstrap_means

SIGNIFICANT = 0.05
Item = tuple[str, str]
"""Benchmark and item id."""
Column = tuple[str, str]
"""Benchmark and metric."""


class MetricDifference(Record):
    """``difference`` is the mean of B - A over the items that have the metric on both sides, ``low`` to ``high`` its
    95 % interval; ``b_better`` is None where the adjusted p-value leaves it open. Without a difference, ``missing``
    says why."""

    benchmark: str
    metric: str
    mean_a: float | None = None
    mean_b: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    b_better: bool | None = None
    items: int = 0
    missing: str | None = None


class Versus(Record):
    """B against A; ``only_a`` and ``only_b`` count items that the other side lacks, which are in no difference."""

    a: str
    b: str
    items: int = Field(description="Items that both sides have.")
    only_a: int
    only_b: int
    differences: list[MetricDifference]
    verdict: str
    note: str | None = Field(default=None, description="What else than the model differs.")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One side: what it is called, its items' scores and a fingerprint of each item's question.

    ``judged_by``: what ``factual_rate of xsum`` depends on beside the outputs, in words that are equal for one judge.
    ``max_new_tokens``: how long its outputs could be. Both are empty where nobody knows.
    """

    name: str
    items: Mapping[Item, Mapping[str, float]]
    questions: Mapping[Item, str]
    scores: Mapping[Column, Score]
    judged_by: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int | None = None


def read_evaluation(
    name: str,
    generations: Iterable[Generation],
    scores: Sequence[Score],
    *,
    judged_by: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
) -> Evaluation:
    """A side from its generations, of which only numbers are kept, and its scores.

    ``judged_by``: what is known beside what the scores say, of values that no score is told of.
    """
    items: dict[Item, Mapping[str, float]] = {}
    questions: dict[Item, str] = {}
    for generation in generations:
        item = (generation.benchmark, generation.item_id)
        items[item] = generation.scores
        asked = f"{generation.source}\0{generation.reference}".encode("utf-8", "surrogatepass")
        questions[item] = hashlib.sha256(asked).hexdigest()
    by_column = {(score.benchmark, score.metric): score for score in scores}
    return Evaluation(
        name=name,
        items=items,
        questions=questions,
        scores=by_column,
        judged_by={measured_on(score.benchmark, score.metric): score.judged_by for score in scores if score.judged_by}
        | dict(judged_by or {}),
        max_new_tokens=max_new_tokens,
    )


def compare_evaluations(a: Evaluation, b: Evaluation, *, resamples: int = RESAMPLES) -> Versus:
    """B against A, metric by metric. InvalidInputError when they share no item, or ask other things under one id."""
    common = sorted(a.items.keys() & b.items.keys())
    _check_items(a, b, common)
    columns = _columns(a, b, common)
    found = [_measure(a, b, common, column, resamples=resamples) for column in columns]
    adjusted = iter(adjust_p_values([one.p_value for one in found if one.p_value is not None]))
    found = [
        one
        if one.p_value is None
        else _decided(one, next(adjusted), higher_is_better=_higher_is_better(a, b, (one.benchmark, one.metric)))
        for one in found
    ]
    return Versus(
        a=a.name,
        b=b.name,
        items=len(common),
        only_a=len(a.items) - len(common),
        only_b=len(b.items) - len(common),
        differences=found,
        verdict=_verdict(a.name, b.name, found),
        note=_note(a, b),
    )


def _check_items(a: Evaluation, b: Evaluation, common: Sequence[Item]) -> None:
    if not common:
        raise InvalidInputError(
            f"{a.name} ({_describe(a)}) and {b.name} ({_describe(b)}) have no item in common",
            fix="Evaluate both on the same benchmarks with the same data.",
        )
    other = [item for item in common if a.questions[item] != b.questions[item]]
    if other:
        benchmark, item_id = other[0]
        raise InvalidInputError(
            f"{len(other)} of {len(common)} items have another source or reference in {b.name} than in {a.name}, "
            f"for example {item_id} of {benchmark}",
            fix="Evaluate both on the same data file.",
        )


def _describe(side: Evaluation) -> str:
    benchmarks = sorted({benchmark for benchmark, _ in side.items})
    return f"{len(side.items)} items of {', '.join(benchmarks)}" if benchmarks else "no per-item results"


def _columns(a: Evaluation, b: Evaluation, common: Sequence[Item]) -> list[Column]:
    """Columns with per-item values on either side, then those of which only the means are known."""
    found = dict.fromkeys((item[0], metric) for item in common for side in (a, b) for metric in side.items[item])
    return list(found) + [column for column in {**a.scores, **b.scores} if column not in found]


def _measure(
    a: Evaluation, b: Evaluation, common: Sequence[Item], column: Column, *, resamples: int
) -> MetricDifference:
    benchmark, metric = column
    if (unlike := _unlike_judges(a, b, column)) is not None:
        return MetricDifference(benchmark=benchmark, metric=metric, missing=unlike)
    value_AN, value_BN = (
        np.array([side.items[item].get(metric, np.nan) for item in common if item[0] == benchmark], dtype=np.float64)
        for side in (a, b)
    )
    both_N = ~np.isnan(value_AN) & ~np.isnan(value_BN)
    if not both_N.any():
        reasons = (f"{side.name}: {_reason(side, column, value_N)}" for side, value_N in ((a, value_AN), (b, value_BN)))
        return MetricDifference(benchmark=benchmark, metric=metric, missing="; ".join(reasons))
    difference = bootstrap_means((value_BN - value_AN)[:, None], resamples=resamples)[0]
    assert isinstance(difference, MeanDifference)
    return MetricDifference(
        benchmark=benchmark,
        metric=metric,
        mean_a=float(value_AN[both_N].mean()),
        mean_b=float(value_BN[both_N].mean()),
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
        p_value=difference.p_value,
        items=difference.items,
    )


def _unlike_judges(a: Evaluation, b: Evaluation, column: Column) -> str | None:
    """Why values of one name are not of one kind."""
    measured = measured_on(*column)
    by = a.judged_by.get(measured), b.judged_by.get(measured)
    if None in by or by[0] == by[1]:
        return None
    return f"{a.name} has it by {by[0]}, {b.name} by {by[1]}"


def _note(a: Evaluation, b: Evaluation) -> str | None:
    if a.max_new_tokens is None or b.max_new_tokens in (None, a.max_new_tokens):
        return None
    return (
        f"Outputs of {a.name} have up to {a.max_new_tokens} tokens, those of {b.name} up to {b.max_new_tokens}: "
        "differences may come from their length."
    )


def _reason(side: Evaluation, column: Column, value_N: NDArray[np.float64]) -> str:
    if not np.isnan(value_N).all():
        return "has values for other items only"
    score = side.scores.get(column)
    if score is None:
        return "not measured"
    return score.missing or "no per-item results"


def _higher_is_better(a: Evaluation, b: Evaluation, column: Column) -> bool:
    score = a.scores.get(column) or b.scores.get(column)
    return score is None or score.higher_is_better


def _decided(one: MetricDifference, p_adjusted: float, *, higher_is_better: bool) -> MetricDifference:
    assert one.difference is not None
    b_better = (one.difference > 0) == higher_is_better if p_adjusted < SIGNIFICANT else None
    return one.model_copy(update={"p_adjusted": p_adjusted, "b_better": b_better})


def _verdict(a: str, b: str, differences: Sequence[MetricDifference]) -> str:
    """One paragraph in plain words: faithfulness first, since that is what people ask."""
    faithful = [one for one in differences if one.metric in FAITHFULNESS and one.difference is not None]
    better = [one for one in faithful if one.b_better]
    worse = [one for one in faithful if one.b_better is False]
    if better and worse:
        opening = f"{b} is more faithful than {a} by {_names(better)}, and less by {_names(worse)}."
    elif better:
        opening = f"{b} makes up less than {a}, by {_names(better)}."
    elif worse:
        opening = f"{b} makes up more than {a}, by {_names(worse)}."
    elif faithful:
        opening = f"These items do not show that {b} makes up more or less than {a}."
    else:
        opening = "No measure of faithfulness is on both sides."
    others = [one for one in differences if one.metric not in FAITHFULNESS and one.difference is not None]
    parts = [
        f"{word}: {_names(chosen)}."
        for word, chosen in (
            (f"Better in {b}", [one for one in others if one.b_better]),
            (f"Worse in {b}", [one for one in others if one.b_better is False]),
            ("Open", [one for one in [*faithful, *others] if one.b_better is None]),
        )
        if chosen
    ]
    return " ".join([opening, *parts])


def _names(differences: Sequence[MetricDifference]) -> str:
    return ", ".join(
        f"{metric_title(one.metric)} of {one.benchmark} ({one.difference:+.2f}, {one.low:+.2f} to {one.high:+.2f})"
        for one in differences
    )
