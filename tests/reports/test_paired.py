"""The paired bootstrap against scipy's, and Holm's adjustment against his own example."""

import itertools

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
    assert sure.p_value == pytest.approx(2 / 1000)


def test_a_handful_of_items_on_one_side_is_no_proof() -> None:
    """All D on one side: a sign-flip test, carried out over all sign patterns, gives the least p there can be."""
    for items in (1, 2, 5, 6, 8):
        difference = np.linspace(1.0, 3.0, items)
        signs = np.array(list(itertools.product([-1, 1], repeat=items)))
        sums = np.abs(signs @ difference)
        found = bootstrap_means(difference[:, None])[0]
        assert found is not None
        assert found.p_value == pytest.approx(np.mean(sums >= difference.sum() - 1e-9))
    # Items without a difference are no evidence either.
    padded = bootstrap_means(np.concatenate([np.linspace(1.0, 3.0, 5), np.zeros(45)])[:, None])[0]
    assert padded is not None
    assert padded.p_value >= 2 / 2**5


def test_rounding_is_no_difference() -> None:
    rounding = np.random.default_rng(7).uniform(1e-7, 2e-5, 200)
    found = bootstrap_means(rounding[:, None], resamples=999)[0]
    assert found is not None
    assert found.p_value == 1.0


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
