"""What is said of one machine against another, and when it isn't."""

import math
from dataclasses import replace

import pytest

from pipeline.comparison import claims, stats
from pipeline.comparison.claims import Rules, Side

SPREAD = [1.0, 1.01, 0.99, 1.005, 0.995]
MINUTE, HOUR = 60_000, 3_600_000
ACCURACIES = (0.75, 0.751, 0.749, 0.752, 0.748)
RULES = Rules(stats.LEVEL, 0.03, 0.01, "on this work")


def side(name, seconds, count=5, accuracies=ACCURACIES, apart=HOUR, **others):
    """A side whose runs took about `seconds` and started `apart` milliseconds from each other; `accuracies`: by seed,
    from 0."""
    by_kind = None if accuracies is None else {"test": dict(enumerate(accuracies[:count]))}
    times = [seconds * each for each in SPREAD[:count]]
    return Side(name, others.pop("hardware", name), times, [apart * n for n in range(count)], by_kind, **others)


def said(me, it, **rules):
    return claims.compared(me, it, replace(RULES, **rules))


# --- faster and slower


def test_faster_is_said_with_its_interval_and_what_it_rests_on():
    found = said(side("A", 2.0), side("B", 3.0))
    assert found.kind == "faster"
    assert (
        found.sentence
        == "A is 1.48 to 1.52 times as fast as B on this work (5 runs each in 5 sessions, equal accuracy)."
    )
    assert found.basis in found.sentence and found.reason == ""
    expected = stats.ratio(side("B", 3.0).seconds, side("A", 2.0).seconds)
    assert found.speedup[:3] == pytest.approx(expected[:3])
    assert found.accuracy.difference == 0 and found.accuracy.established


def test_slower_is_said_as_taking_longer():
    found = said(side("A", 3.0), side("B", 2.0, 3))
    assert found.kind == "slower" and found.speedup.high < 1
    assert found.sentence.startswith("A takes 1.4") and "times as long as B" in found.sentence


def test_an_adjusted_level_takes_a_claim_back():
    me, it = side("A", 2.0), side("B", 2.04)
    assert said(me, it).kind == "faster"
    found = said(me, it, level=stats.shared(stats.LEVEL, 40))
    assert found.kind == "none" and found.speedup.low < 1 < found.speedup.high


def test_no_difference_found_tells_which_would_have_been():
    found = said(side("A", 2.0), side("B", 2.001))
    assert found.kind == "none" and found.reason == "no difference found"
    assert f"{claims.percent(found.speedup.detectable - 1)} would have been" in found.sentence


def test_a_comparison_that_would_have_missed_twice_the_speed_says_too_few_runs():
    me, it = (replace(side(name, 2.0, 3), seconds=[1.0, 2.0, 1.5]) for name in "AB")
    found = said(me, it)
    assert found.speedup.detectable > 2 and "too few runs" in found.sentence and "%" not in found.sentence


def test_without_any_spread_there_is_one_number():
    me, it = (replace(side(name, 1.0, 3), seconds=[seconds] * 3) for name, seconds in (("A", 2.0), ("B", 3.0)))
    assert said(me, it).sentence.startswith("A is 1.50 times as fast as B on this work (3 runs each in 3 sessions")


# --- the unit of evidence


def test_with_three_sessions_on_a_side_its_sessions_are_the_units():
    starts = [0, MINUTE, 2 * HOUR, 2 * HOUR + MINUTE, 5 * HOUR]
    me, it = replace(side("A", 2.0), started=starts), side("B", 3.0)
    assert me.sessions == 3 and len(me.units) == 3
    assert me.units[0] == pytest.approx(math.sqrt(me.seconds[0] * me.seconds[1]))
    assert "5 runs each in 3 and 5 sessions" in said(me, it).sentence


@pytest.mark.parametrize("apart", [MINUTE, HOUR])
def test_fewer_than_three_sessions_claim_nothing_below_the_smallest(apart):
    exact = [1.0, 1.0001, 0.9999, 1.00005, 0.99995]
    me, it = (
        replace(side(name, seconds, apart=apart), seconds=[seconds * each for each in exact])
        for name, seconds in (("A", 2.0), ("B", 2.1))
    )
    found = said(me, it)
    assert found.kind == ("small" if apart == MINUTE else "faster")
    assert ("not established" in found.sentence) == (apart == MINUTE)
    assert found.speedup.low > 1
    larger = replace(it, seconds=[each * 1.05 for each in it.seconds])
    assert said(me, larger).kind == "faster"


def test_the_smallest_difference_is_a_setting():
    me, it = side("A", 2.0, apart=MINUTE), side("B", 2.6, apart=MINUTE)
    assert said(me, it, smallest=0.03).kind == "faster" and said(me, it, smallest=0.2).kind == "small"


def test_what_few_sessions_would_have_found_is_no_less_than_they_may_claim():
    few, many = (said(*(side(name, 2.0, apart=apart) for name in "AB")) for apart in (MINUTE, HOUR))
    assert few.kind == many.kind == "none"
    assert few.speedup.detectable > many.speedup.detectable * 1.03


def test_the_interval_of_few_sessions_has_room_for_the_effect_of_the_hour():
    few, many = (said(side("A", 2.0, apart=apart), side("B", 3.0, apart=apart)) for apart in (MINUTE, HOUR))
    half = math.hypot(math.log(many.speedup.high / 1.5), math.log(1.03))
    assert (few.speedup.low, few.speedup.high) == pytest.approx((1.5 / math.exp(half), 1.5 * math.exp(half)))


@pytest.mark.parametrize(
    ("mine", "its", "words"),
    [((5, HOUR), (5, HOUR), "5 runs each in 5 sessions"), ((5, HOUR), (3, HOUR), "5 and 3 runs in 5 and 3 sessions"),
     ((5, 3 * MINUTE), (5, MINUTE), "5 runs each, all within 12 minutes"),
     ((5, HOUR), (5, 3 * MINUTE), "5 runs each, of B all within 12 minutes"), ((1, 1), (1, 1), "1 run each")],
)  # fmt: skip
def test_evidence_is_told_by_runs_and_sessions(mine, its, words):
    me, it = (side(name, 2.0, count, apart=apart) for name, (count, apart) in (("A", mine), ("B", its)))
    assert claims.evidence(me, it) == words


def test_no_time_is_told_of_runs_whose_starts_are_not_known():
    me, it = (replace(side(name, 2.0), started=[None] * 5) for name in "AB")
    assert claims.evidence(me, it) == "5 runs each"


@pytest.mark.parametrize(
    ("minutes", "words"),
    [(0, "1 minute"), (1, "1 minute"), (11.2, "12 minutes"), (90, "90 minutes"), (150, "2.5 hours"), (4320, "3 days")],
)
def test_a_duration_is_never_nothing(minutes, words):
    assert claims.duration(minutes) == words


# --- no claim


@pytest.mark.parametrize(("mine", "its"), [(1, 5), (5, 1), (1, 1), (2, 5), (5, 2)])
def test_fewer_than_three_runs_give_a_ratio_and_no_claim(mine, its):
    found = said(side("A", 2.0, mine), side("B", 3.0, its))
    assert found.kind == "few" and found.speedup.low is None and found.reason == "too few runs"
    assert "times as fast as B" in found.sentence and "-S repeats=5" in found.sentence


def test_an_interval_of_more_than_tenfold_is_too_few_runs():
    wild = replace(side("A", 1.0, 3), seconds=[1.0, 3.0, 1.5])
    found = said(wild, side("B", 300.0, 3))
    assert found.speedup.low > 1 and found.speedup.high > 10 * found.speedup.low
    assert found.kind == "few" and " to " not in found.sentence


def test_a_problem_of_either_side_is_named_and_nothing_is_claimed():
    good, bad = side("A", 2.0), side("B", 3.0, problem="3 of 5 planned runs are there")
    for found in (said(good, bad), said(bad, good)):
        assert found.kind == "problem" and found.reason == "B: 3 of 5 planned runs are there"
        assert found.reason in found.sentence and found.speedup.low is None
    assert said(good, bad).speedup.value == pytest.approx(1.5)


# --- conditions


def test_versions_of_torch_that_differ_are_told():
    me, it = (side(name, 2.0 + (name == "B"), conditions={"torch": version, "cores": "2" if name == "A" else "4"})
              for name, version in (("A", "2.11"), ("B", "2.14")))  # fmt: skip
    found = said(me, it)
    assert "torch 2.11 and 2.14" in found.basis and "cores" not in found.basis


def test_of_one_kind_of_hardware_all_conditions_are_told():
    me, it = (
        side(name, 2.0 + (name == "B"), hardware="GPU", conditions={"power limit": watts, "torch": "2.14"})
        for name, watts in (("A", "700"), ("B", ""))
    )
    assert said(me, it).basis.endswith("power limit 700 and not known")


# --- accuracies


def test_a_side_that_may_be_worse_makes_no_claim():
    found = said(side("A", 2.0, accuracies=[each - 0.02 for each in ACCURACIES]), side("B", 3.0))
    assert found.kind == "parity" and found.speedup.low is None
    assert found.reason == "accuracy not established (could be up to 2.0 points worse)"
    assert found.reason in found.sentence


def test_a_side_that_may_be_better_makes_no_claim_either():
    found = said(side("A", 2.0), side("B", 3.0, accuracies=[each - 0.02 for each in ACCURACIES]))
    assert found.kind == "parity" and found.reason.endswith("2.0 points better)")


def test_noise_that_hides_a_difference_is_no_equality():
    """No difference is found between these; that is no proof that there is none."""
    noisy = [0.79, 0.75, 0.71], [0.68, 0.64, 0.60]
    assert said(side("A", 2.0, 3, noisy[0]), side("B", 3.0, 3, noisy[1])).kind == "parity"


def test_the_margin_is_a_setting():
    me, it = side("A", 2.0, accuracies=[each - 0.02 for each in ACCURACIES]), side("B", 3.0)
    found = said(me, it, margin=0.03)
    assert found.kind == "faster" and "equal accuracy to within 2.0 points" in found.sentence


def test_accuracies_are_paired_by_seed():
    seeds = [0.70, 0.75, 0.80, 0.72, 0.78]  # which differ by seed far more than the sides do
    found = said(side("A", 2.0, accuracies=seeds), side("B", 3.0, accuracies=[each + 0.001 for each in seeds]))
    assert found.kind == "faster" and found.accuracy.pairs == 5


def test_too_few_seeds_establish_nothing():
    found = said(side("A", 2.0, accuracies=ACCURACIES[:2]), side("B", 3.0))
    assert found.kind == "parity" and "too few seeds" in found.reason


def test_accuracies_of_the_same_images_are_compared():
    def given(**by_kind):
        return replace(
            side("A", 2.0), accuracies={kind: dict.fromkeys(range(5), value) for kind, value in by_kind.items()}
        )

    mine = given(test=0.9, validation=0.5)
    assert said(mine, given(validation=0.5)).kind == "none"
    assert said(mine, given(test=0.5)).kind == "parity"
    assert "not known" in said(mine, given()).reason


def test_a_work_without_accuracies_needs_none():
    found = said(side("A", 2.0, accuracies=None), side("B", 3.0, accuracies=None))
    assert found.kind == "faster" and "accuracy" not in found.sentence


# --- figures as words


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0.000"), (0.0012345, "0.00123"), (0.6044, "0.604"), (0.99, "0.990"), (1, "1.00"), (1.525, "1.52"),
     (31.46, "31.5"), (312.4, "312"), (20816.6, "20,817"), (math.inf, "∞")],
)  # fmt: skip
def test_a_figure_has_three_digits_or_all_before_the_point(value, shown):
    assert claims.factor(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(140.2, "140"), (1.0, "1.00"), (1 / 140.2, "1/140"), (0.5, "1/2.00")])
def test_a_ratio_under_1_is_a_fraction(value, shown):
    assert claims.ratio_words(value) == shown


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(1.49, 1.55, ("1.49", "1.55")), (312.2, 331.4, ("312", "331")), (0.604, 0.611, ("0.604", "0.611")),
     (1.5001, 1.5004, ("1.5001", "1.5004")), (1.001, 1.2, ("1.001", "1.200")), (0.8, 0.9996, ("0.8000", "0.9996")),
     (0.101, 39.6, ("0.101", "39.6")), (2.0, 2.0, ("2.00", "2.00")), (0.0, math.inf, ("0.000", "∞"))],
)  # fmt: skip
def test_an_intervals_ends_are_told_apart_from_each_other_and_from_one(low, high, shown):
    assert claims.factors(low, high, ratio=True) == shown


def test_only_a_ratio_is_told_apart_from_one():
    assert claims.factors(0.9, 0.9996) == ("0.900", "1.000")


@pytest.mark.parametrize(("value", "shown"), [(0.0031, "0.31%"), (0.031, "3.1%"), (0.75, "75.0%"), (3.123, "312%")])
def test_a_share_in_per_cent(value, shown):
    assert claims.percent(value) == shown


def test_large_numbers_in_words():
    assert [claims.large(value) for value in (999.6, 8_327_000, 1.992e9)] == ["1,000", "8.327 million", "1.992 billion"]
