"""Two evaluations against each other: the same items, both means, an interval, a verdict in words."""

import numpy as np
import pytest
from scipy import stats

from services.contract.errors import InvalidInputError
from services.contract.records import Generation, Score
from services.reports.versus import Evaluation, compare_evaluations, read_evaluation


def generation(number: int, *, source: str = "source", benchmark: str = "demo_news", **scores: float) -> Generation:
    return Generation(
        benchmark=benchmark,
        item_id=str(number),
        source=f"{source} {number}",
        reference="reference",
        output="output",
        scores=scores,
        spans=[],
    )


def side(name: str, generations: list[Generation], *scores: Score) -> Evaluation:
    return read_evaluation(name, generations, scores)


@pytest.fixture(scope="module")
def values() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(8)
    first = random.normal(60, 15, 120)
    return first, first + random.normal(3, 6, 120)


def test_difference_and_interval_of_a_paired_test(values: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = values
    found = compare_evaluations(
        side("A", [generation(i, support=x) for i, x in enumerate(first)]),
        side("B", [generation(i, support=x) for i, x in enumerate(second)]),
    )
    (one,) = found.differences
    reference = stats.ttest_rel(second, first)
    low, high = reference.confidence_interval()
    assert (one.mean_a, one.mean_b) == (pytest.approx(first.mean()), pytest.approx(second.mean()))
    assert one.difference == pytest.approx((second - first).mean())
    assert (one.low, one.high) == (pytest.approx(low, abs=0.12), pytest.approx(high, abs=0.12))
    assert (one.b_better, one.items, found.only_a, found.only_b) == (True, 120, 0, 0)
    assert found.verdict.startswith("B makes up less than A, by Support of demo_news (+")


def test_the_other_way_round_it_is_worse(values: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = values
    found = compare_evaluations(
        side("B", [generation(i, support=x) for i, x in enumerate(second)]),
        side("A", [generation(i, support=x) for i, x in enumerate(first)]),
    )
    assert found.differences[0].b_better is False
    assert found.verdict.startswith("A makes up more than B")


def test_lower_is_better_and_open_ones_are_said_to_be_open() -> None:
    flip = np.tile([1.0, -1.0], 30)
    ece = Score(benchmark="demo_news", metric="ece", value=1.0, items=60, higher_is_better=False)
    found = compare_evaluations(
        side("A", [generation(i, ece=5.0, rouge_l=20.0) for i in range(60)], ece),
        side("B", [generation(i, ece=3.0, rouge_l=20.0 + flip[i]) for i in range(60)], ece),
    )
    assert {one.metric: one.b_better for one in found.differences} == {"ece": True, "rouge_l": None}
    assert found.verdict.startswith(
        "No measure of faithfulness is on both sides. Better in B: Calibration error of demo_news (-2.00"
    )
    assert "Open: ROUGE-L of demo_news" in found.verdict


def test_common_items_are_compared_and_the_others_counted() -> None:
    found = compare_evaluations(
        side("A", [generation(i, support=1.0) for i in range(10)]),
        side("B", [generation(i, support=2.0) for i in range(5, 22)]),
    )
    assert (found.items, found.only_a, found.only_b) == (5, 5, 12)
    assert found.differences[0].items == 5


def test_unlike_items_are_refused() -> None:
    first = side("A", [generation(i, support=1.0) for i in range(3)])
    with pytest.raises(InvalidInputError, match=r"A \(3 items of demo_news\) and B \(3 items of xsum\) have no item"):
        compare_evaluations(first, side("B", [generation(i, benchmark="xsum", support=1.0) for i in range(3)]))
    other = [generation(0, support=1.0), generation(1, support=1.0), generation(2, source="other", support=1.0)]
    with pytest.raises(InvalidInputError, match="1 of 3 items have another source or reference in B than in A"):
        compare_evaluations(first, side("B", other))
    with pytest.raises(InvalidInputError, match="no per-item results"):
        compare_evaluations(first, side("B", []))


def test_a_metric_of_one_side_says_why_it_is_missing() -> None:
    gone = Score(benchmark="demo_news", metric="factual_rate", value=None, missing="no lens fits", items=0)
    found = compare_evaluations(
        side("A", [generation(i, support=1.0, factual_rate=50.0) for i in range(3)]),
        side("B", [generation(i, support=1.0) for i in range(3)], gone),
    )
    missing = {one.metric: one.missing for one in found.differences}
    assert missing == {"support": None, "factual_rate": "A: has values for other items only; B: no lens fits"}


@pytest.mark.parametrize(
    ("by_a", "by_b", "missing"),
    [
        ({"support of demo_news": "x"}, {"support of demo_news": "y"}, "A has it by x, B by y"),
        ({"support of demo_news": "x"}, {"support of demo_news": "x"}, None),
        ({"support of xsum": "x"}, {"support of xsum": "y"}, None),
        ({"support of demo_news": "x"}, {}, None),
        ({}, {"support of demo_news": "y"}, None),
    ],
)
def test_values_by_judges_that_are_known_to_differ_are_not_compared(
    by_a: dict[str, str], by_b: dict[str, str], missing: str | None
) -> None:
    generations = [generation(i, support=float(i)) for i in range(4)]

    def scores(judged_by: dict[str, str]) -> list[Score]:
        (words,) = [*judged_by.values()] or [None]
        (named,) = [*judged_by] or ["support of demo_news"]
        metric, benchmark = named.split(" of ")
        return [Score(benchmark=benchmark, metric=metric, value=1.5, items=4, judged_by=words)]

    told = (
        [read_evaluation(name, generations, [], judged_by=by) for name, by in (("A", by_a), ("B", by_b))],
        [read_evaluation(name, generations, scores(by)) for name, by in (("A", by_a), ("B", by_b))],
    )
    for sides in told:
        one = compare_evaluations(*sides).differences[0]
        assert (one.difference is None) == (missing is not None)
        assert missing is None or missing in str(one.missing)
