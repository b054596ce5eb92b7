"""Intervals and ratios: against scipy and by hand, and what they promise, in simulations."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pipeline.comparison import stats

A, B = [10.0, 11.0, 12.5, 9.5, 10.5], [7.0, 7.2, 6.9]


def together(count):
    """Start times of `count` processes of one session."""
    return [60_000 * number for number in range(count)]


def typical(values, level=stats.LEVEL):
    return stats.typical(values, together(len(values)), level)


def drawn(generator, count, spread, middle=1.0):
    """`count` times whose logarithms vary by `spread`."""
    return (middle * np.exp(generator.normal(0, spread, count))).tolist()


def at_most(share, trials):
    """The most of `trials` that chance explains where `share` of them are expected: three standard deviations more."""
    return share * trials + 3 * math.sqrt(share * (1 - share) * trials)


def logs(values):
    return [math.log(value) for value in values]


# --- one group


def test_a_median_has_students_interval_on_logarithms():
    found = typical(A)
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(logs(A)), scipy_stats.sem(logs(A)))
    assert found == pytest.approx((10.5, math.exp(low), math.exp(high), 5))
    assert typical(A, 0.99).high > found.high


def test_a_mean_has_students_interval():
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(A), scipy_stats.sem(A))
    assert stats.mean(A) == pytest.approx((np.mean(A), low, high, 5))


@pytest.mark.parametrize("values", [[3.0], [2.0, 4.0]])
def test_fewer_than_three_values_have_no_interval(values):
    assert typical(values) == stats.mean(values) == (3.0, None, None, len(values))


def test_equal_values_have_an_interval_of_no_width():
    assert typical([2.0, 2.0, 2.0]) == pytest.approx((2, 2, 2, 3))


def test_the_interval_holds_the_median_however_odd_the_values():
    found = typical([1.0] * 13 + [4.0] * 7)
    assert found.low <= found.value == 1.0 < found.high


def test_a_spread_beyond_all_numbers_is_infinite():
    assert typical([1e-300, 1.0, 1e300]).high == math.inf
    assert stats.ratio([1e-300, 1.0, 1e300], [1.0, 1.1, 1.2]).high == math.inf


@pytest.mark.parametrize("count", [3, 5, 10])
def test_the_interval_holds_the_true_median_in_95_of_100(count):
    generator, trials = np.random.default_rng(count), 3000
    missed = 0
    for _ in range(trials):
        found = typical(drawn(generator, count, 0.05))
        missed += not found.low <= 1 <= found.high
    assert missed <= at_most(0.05, trials)


# --- two groups


def test_a_ratio_is_of_geometric_means_and_its_statistic_is_welchs():
    found = stats.ratio(A, B)
    assert found.value == pytest.approx(scipy_stats.gmean(A) / scipy_stats.gmean(B))
    welch = scipy_stats.ttest_ind(logs(A), logs(B), equal_var=False)
    squares = [scipy_stats.sem(logs(values)) ** 2 for values in (A, B)]
    quantiles = [scipy_stats.t.ppf(0.975, len(values) - 1) for values in (A, B)]
    critical = np.average(quantiles, weights=squares)  # Cochran and Cox
    error = math.log(found.value) / welch.statistic
    assert math.log(found.low) == pytest.approx(math.log(found.value) - critical * error)
    assert math.log(found.high) == pytest.approx(math.log(found.value) + critical * error)
    assert found.low < math.exp(welch.confidence_interval().low)  # wider than by Satterthwaite's degrees of freedom


def test_with_equal_numbers_the_critical_value_is_students():
    found = stats.difference([1.0, 2.0, 3.0], [11.0, 15.0, 19.0])
    error = math.sqrt(1 / 3 + 16 / 3)
    assert found.value == pytest.approx(-13)
    assert found.high - found.value == pytest.approx(scipy_stats.t.ppf(0.975, 2) * error)


def test_which_group_comes_first_does_not_matter():
    one, other = stats.ratio(A, B), stats.ratio(B, A)
    assert (one.value, one.low, one.high) == pytest.approx((1 / other.value, 1 / other.high, 1 / other.low))
    assert one.detectable == pytest.approx(other.detectable)


def test_the_unit_does_not_matter():
    assert stats.ratio([1000 * value for value in A], [1000 * value for value in B]) == pytest.approx(stats.ratio(A, B))


def test_fewer_than_three_values_give_a_ratio_alone():
    assert stats.ratio([3.0], [2.0, 2.0, 2.0]) == (pytest.approx(1.5), None, None, None)
    assert stats.difference([1.0, 2.0], [3.0, 3.0, 3.0]) == (-1.5, None, None, None)


def test_without_any_spread_every_difference_is_found():
    assert stats.ratio([3.0] * 3, [2.0] * 3) == pytest.approx((1.5, 1.5, 1.5, 1))
    assert stats.difference([3.0] * 3, [3.0] * 3) == (0, 0, 0, 0)


def test_spread_on_one_side_alone():
    found = stats.difference([5.0, 5.0, 5.0], [1.0, 2.0, 3.0])
    assert found.high - found.value == pytest.approx(scipy_stats.t.ppf(0.975, 2) * math.sqrt(1 / 3))


@pytest.mark.parametrize("counts", [(3, 3), (3, 10), (3, 30), (5, 5), (10, 10)])
@pytest.mark.parametrize("spreads", [(1, 1), (2, 1), (1, 2), (5, 1)])
def test_machines_that_are_alike_are_called_so_in_95_of_100(counts, spreads):
    generator, trials = np.random.default_rng([*counts, *spreads]), 2000
    called = 0
    for _ in range(trials):
        one, other = (drawn(generator, n, 0.01 * spread) for n, spread in zip(counts, spreads, strict=True))
        found = stats.ratio(one, other)
        called += not found.low <= 1 <= found.high
    assert called <= at_most(0.05, trials)


def test_satterthwaites_degrees_of_freedom_would_not_keep_that():
    generator, trials = np.random.default_rng(0), 20_000
    one, other = generator.normal(0, 2, (trials, 3)), generator.normal(0, 1, (trials, 10))
    called = scipy_stats.ttest_ind(one, other, axis=1, equal_var=False).pvalue
    assert (called < 0.05).mean() > 0.065
    assert (called < 0.05 / 39).mean() > 6 * 0.05 / 39


def test_of_forty_machines_that_are_alike_none_is_called_faster_in_95_of_100():
    generator, trials, others = np.random.default_rng(40), 400, 39
    level, called = stats.shared(stats.LEVEL, others), 0
    for _ in range(trials):
        reference = drawn(generator, 10, 0.01)
        found = [
            stats.ratio(drawn(generator, int(generator.integers(3, 11)), 0.01), reference, level) for _ in range(others)
        ]
        called += any(not each.low <= 1 <= each.high for each in found)
    assert called <= at_most(0.05, trials)


def test_an_error_that_is_shared():
    assert stats.shared(0.95, 5) == pytest.approx(0.99)
    assert stats.shared(0.95, 1) == stats.shared(0.95, 0) == 0.95


# --- what could have been found


def spaced(count, spread):
    """`count` numbers whose standard deviation is `spread`, their mean 0."""
    values = np.linspace(-1, 1, count)
    return (spread * values / values.std(ddof=1)).tolist()


@pytest.mark.parametrize("count", [3, 5, 10])
def test_a_detectable_difference_is_found_in_80_of_100(count):
    generator, trials, spread = np.random.default_rng(count), 2000, 0.02
    assumed = stats.difference(spaced(count, spread), spaced(count, spread))
    found = 0
    for _ in range(trials):
        one = generator.normal(assumed.detectable, spread, count).tolist()
        each = stats.difference(one, generator.normal(0, spread, count).tolist())
        found += not each.low <= 0 <= each.high
    assert found / trials == pytest.approx(0.8, abs=0.04)


def test_more_runs_find_less_and_many_machines_more():
    sizes = [stats.difference(spaced(n, 1.0), spaced(n, 1.0)).detectable for n in (3, 5, 10, 30)]
    assert sizes == sorted(sizes, reverse=True)
    pair = spaced(5, 1.0), spaced(5, 1.0)
    assert stats.difference(*pair, stats.shared(0.95, 10)).detectable > stats.difference(*pair).detectable


def test_a_slow_down_of_3_per_cent_is_found_among_ten_runs_of_a_steady_machine():
    generator, trials, spread = np.random.default_rng(3), 1000, 0.015
    found = 0
    for _ in range(trials):
        each = stats.ratio(drawn(generator, 10, spread, 1.03), drawn(generator, 10, spread))
        found += each.low > 1
    assert found >= 800


# --- sessions

HOUR, MINUTE = 3_600_000, 60_000


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([0, 10, 59], [[0, 1, 2]]),
        ([0, 59, 60, 119, 120], [[0, 1], [2, 3], [4]]),
        ([120, 0, 60], [[1], [2], [0]]),
        ([0, 30, 61, 90], [[0, 1], [2, 3]]),
    ],
)
def test_processes_that_start_within_an_hour_are_a_session(starts, expected):
    assert stats.sessions([MINUTE * start for start in starts]) == expected


def test_unknown_starts_make_one_session():
    assert stats.sessions([0, None, 9 * HOUR]) == [[0, 1, 2]]


def test_with_three_sessions_the_session_is_the_unit():
    values, starts = [2.0, 8.0, 5.0, 7.0], [0, MINUTE, HOUR, 2 * HOUR]
    assert stats.units(values, starts) == pytest.approx([4.0, 5.0, 7.0])
    assert stats.units(values, [0, MINUTE, HOUR, HOUR]) == values


def test_the_median_is_of_all_runs_and_its_interval_of_sessions():
    values, starts = [2.0, 8.0, 5.0, 7.0], [0, MINUTE, HOUR, 2 * HOUR]
    found = stats.typical(values, starts)
    low, high = scipy_stats.t.interval(0.95, 2, np.mean(logs([4, 5, 7])), scipy_stats.sem(logs([4, 5, 7])))
    assert found == pytest.approx((6.0, math.exp(low), math.exp(high), 4))


# --- equal accuracy


def by_seed(values):
    return dict(enumerate(values))


def test_pairs_are_compared_seed_by_seed():
    first, second = by_seed([0.70, 0.75, 0.80]), by_seed([0.699, 0.749, 0.799])
    found = stats.equivalence(first, second, 0.01)
    assert (found.pairs, found.established) == (3, True)
    assert (found.difference, found.low, found.high) == pytest.approx((0.001, 0.001, 0.001))


def test_the_interval_of_pairs_is_one_of_90_per_cent():
    first, second = by_seed([0.70, 0.75, 0.80]), by_seed([0.69, 0.76, 0.80])
    low, high = scipy_stats.t.interval(0.90, 2, 0, scipy_stats.sem([0.01, -0.01, 0]))
    assert stats.equivalence(first, second, 0.01)[1:4] == pytest.approx((low, high, 3))


def test_seeds_that_both_ran_are_the_pairs():
    first = by_seed([0.70, 0.75, 0.80, 0.10])
    assert stats.equivalence(first, by_seed([0.70, 0.75, 0.80]), 0.01).established


def test_without_common_seeds_all_values_are_compared():
    first, second = {0: 0.70, 1: 0.701, 2: 0.702}, {5: 0.70, 6: 0.701, 7: 0.702}
    found = stats.equivalence(first, second, 0.01)
    squares = 2 * scipy_stats.sem([0.70, 0.701, 0.702]) ** 2
    assert (found.pairs, found.established) == (0, True)
    assert found.high == pytest.approx(scipy_stats.t.ppf(0.95, 2) * math.sqrt(squares))


def test_absence_of_a_difference_is_no_equality():
    """The case of the trial: intervals so wide that 25 points go unseen."""
    found = stats.equivalence({0: 0.79, 1: 0.75, 2: 0.71}, {3: 0.68, 4: 0.64, 5: 0.60}, 0.01)
    assert not found.established
    assert found.low < 0 or found.high > 0.11


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7]])
def test_too_few_seeds_establish_nothing(values):
    found = stats.equivalence(by_seed(values), by_seed(values), 0.01)
    assert found == (0.0, None, None, 0, False)


@pytest.mark.parametrize(("shift", "spread", "least", "most"), [(-0.02, 0.009, 0, 0.05), (0, 0.0046 / 2**0.5, 0.8, 1)])
def test_a_loss_does_not_pass_and_equal_machines_do(shift, spread, least, most):
    generator, trials, passed = np.random.default_rng(7), 1000, 0
    for _ in range(trials):
        first, second = (by_seed(generator.normal(0.75 + add, spread, 5).tolist()) for add in (shift, 0))
        passed += stats.equivalence(first, second, 0.01).established
    assert least <= passed / trials <= most
