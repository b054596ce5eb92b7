"""Intervals and ratios: against scipy and by hand, and what they promise, in simulations."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pipeline import stats

A, B = [10.0, 11.0, 12.5, 9.5, 10.5], [7.0, 7.2, 6.9]


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
    found = stats.typical(A)
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(logs(A)), scipy_stats.sem(logs(A)))
    assert found == pytest.approx((10.5, math.exp(low), math.exp(high), 5))
    assert stats.typical(A, 0.99).high > found.high


def test_a_mean_has_students_interval():
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(A), scipy_stats.sem(A))
    assert stats.mean(A) == pytest.approx((np.mean(A), low, high, 5))


def test_one_value_has_no_interval():
    assert stats.typical([3.0]) == stats.mean([3.0]) == (3.0, None, None, 1)


def test_equal_values_have_an_interval_of_no_width():
    assert stats.typical([2.0, 2.0, 2.0]) == pytest.approx((2, 2, 2, 3))


def test_the_interval_holds_the_median_however_odd_the_values():
    found = stats.typical([1.0] * 13 + [4.0] * 7)
    assert found.low <= found.value == 1.0 < found.high


def test_a_spread_beyond_all_numbers_is_infinite():
    assert stats.typical([1e-300, 1e300]).high == math.inf
    assert stats.ratio([1e-300, 1e300], [1.0, 1.1]).high == math.inf


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_interval_holds_the_true_median_in_95_of_100(count):
    generator, trials = np.random.default_rng(count), 3000
    missed = 0
    for _ in range(trials):
        found = stats.typical(drawn(generator, count, 0.05))
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


def test_a_single_value_gives_a_ratio_alone():
    assert stats.ratio([3.0], [2.0, 2.0]) == (pytest.approx(1.5), None, None, None)
    assert stats.difference([1.0, 2.0], [3.0]) == (-1.5, None, None, None)


def test_without_any_spread_every_difference_is_found():
    assert stats.ratio([3.0, 3.0], [2.0, 2.0]) == pytest.approx((1.5, 1.5, 1.5, 1))
    assert stats.difference([3.0, 3.0], [3.0, 3.0]) == (0, 0, 0, 0)


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


# --- runs that share a process


def in_processes(generator, sizes, within, between):
    """Logarithms of runs in processes of these sizes."""
    return np.concatenate([generator.normal(generator.normal(0, between), within, size) for size in sizes]).tolist()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5,), (2, 3), (5, 5), (4, 1, 1)])
def test_what_runs_of_one_process_can_not_show_is_added(sizes):
    generator, within, between = np.random.default_rng(sizes), 1.0, 2.0
    samples = [in_processes(generator, sizes, within, between) for _ in range(20_000)]
    seen = np.mean([np.var(values, ddof=1) for values in samples]) / sum(sizes)
    hidden = stats.between_processes(sizes, between**2, 4)
    assert seen + hidden.square == pytest.approx(np.var([np.mean(values) for values in samples]), rel=0.05)


def test_runs_in_processes_of_their_own_hide_nothing_and_those_of_one_process_all():
    assert stats.between_processes([1, 1, 1], 4.0, 9) == (0, 9)
    assert stats.between_processes([7], 4.0, 9) == (4, 9)
    assert stats.between_processes([1], 4.0, 9) == stats.NONE  # a single run has no interval to widen


def test_a_part_of_the_error_widens_an_interval_by_its_own_quantile():
    hidden = stats.Part(0.01, 3)
    squares, quantiles = [scipy_stats.sem(logs(A)) ** 2, 0.01], [scipy_stats.t.ppf(0.975, df) for df in (4, 3)]
    half = np.average(quantiles, weights=squares) * math.sqrt(sum(squares))
    assert math.log(stats.typical(A, unseen=hidden).high) == pytest.approx(np.mean(logs(A)) + half)
    squares, quantiles = [scipy_stats.sem(logs(B)) ** 2, *squares], [scipy_stats.t.ppf(0.975, 2), *quantiles]
    half = np.average(quantiles, weights=squares) * math.sqrt(sum(squares))
    found = stats.ratio(A, B, unseen=[hidden, stats.NONE])
    assert math.log(found.high / found.value) == pytest.approx(half)
    assert found.detectable > stats.ratio(A, B).detectable


def test_equal_runs_of_one_process_still_leave_what_they_can_not_show():
    found = stats.ratio([3.0, 3.0], [2.0, 2.0], unseen=[stats.Part(0.01, 4)] * 2)
    assert math.log(found.high / 1.5) == pytest.approx(scipy_stats.t.ppf(0.975, 4) * math.sqrt(0.02))


@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("within", [0.5, 1, 5])
@pytest.mark.parametrize("layout", ["one process", "two processes", "pairs", "one against own"])
def test_machines_that_are_alike_are_called_so_however_their_runs_share_processes(layout, within, count):
    sizes = {"one process": [(count,)] * 2, "two processes": [(count, count)] * 2, "pairs": [(2,) * count] * 2}
    one, other = sizes.get(layout, [(count,), (1,) * count])
    generator, trials, called = np.random.default_rng([count, len(layout)]), 1000, 0
    for _ in range(trials):
        samples = [in_processes(generator, each, within, 1) for each in (one, other)]
        hidden = [stats.between_processes(each, 1, 4) for each in (one, other)]
        found = stats.difference(*samples, unseen=hidden)
        called += not found.low <= 0 <= found.high
    assert called <= at_most(0.05, trials)


@pytest.mark.parametrize(("degrees", "kept"), [(4, True), (10**6, False)])
def test_a_spread_that_was_itself_estimated_is_not_known(degrees, kept):
    """From five processes; its mean square has four degrees of freedom."""
    generator, trials, called = np.random.default_rng(5), 2000, 0
    for _ in range(trials):
        samples = [in_processes(generator, [5], 0.3, 1) for _ in range(2)]
        hidden = stats.between_processes([5], np.var(generator.normal(0, 1, 5), ddof=1), degrees)
        found = stats.difference(*samples, unseen=[hidden] * 2)
        called += not found.low <= 0 <= found.high
    assert (called <= at_most(0.05, trials)) == kept
    assert kept or called > 0.1 * trials


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
    sizes = [stats.difference(spaced(n, 1.0), spaced(n, 1.0)).detectable for n in (2, 3, 5, 10, 30)]
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
