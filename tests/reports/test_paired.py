"""The paired bootstrap against scipy's, and Holm's adjustment against his own example."""

import numpy as np
import pytest
from scipy import stats

from services.reports.paired import adjust_p_values, bootstrap_means


def test_interval_agrees_with_scipys_percentile_bootstrap() -> None:
    random = np.random.default_rng(3)
    difference = random.normal(0.8, 5.0, 150)
    found = bootstrap_means(difference[:, None], resamples=20_000)[0]
    reference = stats.bootstrap(
        (difference,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    assert found is not None
    assert found.mean == pytest.approx(difference.mean())
    assert (found.low, found.high) == (pytest.approx(reference.low, abs=0.03), pytest.approx(reference.high, abs=0.03))
    # For a mean of 150 items the bootstrap's p-value comes near the t-test's.
    assert found.p_value == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, abs=0.01)


def test_a_column_with_gaps_is_as_if_its_items_were_all_there_are() -> None:
    difference = np.random.default_rng(4).normal(1.0, 2.0, 400)
    holes = difference.copy()
    holes[::2] = np.nan
    whole, partial, empty = bootstrap_means(np.stack([difference, holes, np.full(400, np.nan)], axis=1))
    alone = bootstrap_means(difference[1::2, None])[0]
    assert whole is not None
    assert partial is not None
    assert alone is not None
    assert empty is None
    assert (whole.items, partial.items, alone.items) == (400, 200, 200)
    assert partial.mean == pytest.approx(alone.mean)
    assert (partial.low, partial.high) == (pytest.approx(alone.low, abs=0.02), pytest.approx(alone.high, abs=0.02))


def test_no_difference_at_all_is_no_finding_and_a_sure_one_has_the_smallest_p() -> None:
    none, sure = bootstrap_means(np.stack([np.zeros(50), np.ones(50)], axis=1), resamples=999)
    assert none is not None
    assert sure is not None
    assert (none.p_value, none.low, none.high) == (1.0, 0.0, 0.0)
    assert sure.p_value == pytest.approx(1 / 1000)


@pytest.mark.parametrize(
    "difference",
    [[1.0, 2.0], [10.0, 10.0, 10.0, 10.0, 10.0, -1.0], [1.0, -2.0, 3.0, 0.5, 0.0, 2.5, -0.1], [-4.0] * 8],
)
def test_the_p_value_of_few_items_is_that_of_all_patterns_of_signs(difference: list[float]) -> None:
    reference = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=np.inf)
    found = bootstrap_means(np.array(difference)[:, None], resamples=99)[0]
    assert found is not None
    assert found.p_value == pytest.approx(reference.pvalue)


def test_one_item_proves_nothing() -> None:
    found = bootstrap_means(np.array([[3.0]]))[0]
    assert found is not None
    assert found.p_value == 1.0


@pytest.mark.parametrize(("items", "mean"), [(15, 0.9), (40, -0.4), (300, 0.1)])
def test_the_p_value_of_more_items_comes_near_it(items: int, mean: float) -> None:
    difference = np.random.default_rng(items).normal(mean, 1.0, items)
    reference = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=40_000, rng=np.random.default_rng(1)
    )
    found = bootstrap_means(difference[:, None], resamples=20_000)[0]
    assert found is not None
    assert found.p_value == pytest.approx(reference.pvalue, abs=0.01)


@pytest.mark.parametrize("items", [6, 10, 15, 30])
def test_nothing_is_found_where_nothing_is_more_often_than_it_says(items: int) -> None:
    draws = np.random.default_rng(8).normal(0.0, 1.0, (items, 2000))
    found = bootstrap_means(draws, resamples=999)
    wrong = sum(one is not None and one.p_value < 0.05 for one in found) / 2000
    # Four standard errors of a share of 0.05 among 2000.
    assert wrong < 0.05 + 4 * 0.005


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_no_difference(sign: int) -> None:
    rounding = sign * np.random.default_rng(7).uniform(1e-7, 2e-5, 200)
    few = np.concatenate([rounding, np.linspace(1.0, 3.0, 5)])
    none, five = bootstrap_means(np.stack([np.append(rounding, [0] * 5), few], axis=1), resamples=999)
    assert none is not None
    assert five is not None
    assert none.p_value == 1.0
    # Those five alone are what there is to go by.
    assert five.p_value == pytest.approx(2 / 2**5)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    draws = random.normal(2.0, 3.0, (60, 400))  # 400 experiments of 60 items
    found = bootstrap_means(draws, resamples=1000)
    covered = sum(one is not None and one.low <= 2.0 <= one.high for one in found)
    assert 0.91 <= covered / 400 <= 0.975


def test_large_benchmarks_are_resampled_in_parts() -> None:
    difference = np.random.default_rng(6).normal(0.0, 1.0, 12_000)
    found = bootstrap_means(difference[:, None], resamples=1000)[0]
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * difference.std() / np.sqrt(12_000), rel=0.1)


def test_holm() -> None:
    # By hand: 4 x 0.01, 3 x 0.02, 2 x 0.03 and, never falling, 0.06 again for the last.
    assert adjust_p_values([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert adjust_p_values([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_p_values([]) == []
