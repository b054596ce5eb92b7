"""What is claimed about one machine against another, and what ends a claim."""

import math
from dataclasses import replace

import pytest

from pipeline import config
from pipeline.comparison import claims, stats
from pipeline.comparison.claims import Side

SPREAD = [1.0, 1.01, 0.99, 1.005, 0.995]
MINUTE, HOUR = 60_000, 3_600_000
ACCURACIES = (0.75, 0.751, 0.749, 0.752, 0.748)
WORSE = [accuracy - 0.02 for accuracy in ACCURACIES]
SETTINGS = config.Compare(reference=None, prices="prices.yaml", tainted=False, smallest=0.03, accuracy_margin=0.01)


def side(name, seconds, count=5, accuracies=ACCURACIES, apart=HOUR, spread=SPREAD, **others):
    """A side whose runs took about `seconds` and started `apart` milliseconds from each other. `accuracies`: by seed,
    from 0."""
    by_kind = None if accuracies is None else {"test": dict(enumerate(accuracies[:count]))}
    times = [seconds * factor for factor in spread[:count]]
    return Side(name, others.pop("hardware", name), times, [apart * n for n in range(count)], by_kind, **others)


def compare(candidate, baseline, level=stats.LEVEL, **settings):
    return claims.compare(candidate, baseline, replace(SETTINGS, **settings), level, "on this work")


# --- faster, slower or no difference


def test_a_claim_has_its_interval_and_its_evidence():
    claim = compare(side("A", 2.0), side("B", 3.0))
    assert (claim.kind, claim.basis, claim.reason) == ("faster", "5 runs each in 5 sessions, equal accuracy", "")
    assert claim.sentence == f"A is 1.48 to 1.52 times as fast as B on this work ({claim.basis})."
    assert claim.speedup[:3] == pytest.approx(stats.ratio(side("B", 3.0).seconds, side("A", 2.0).seconds)[:3])
    assert claim.accuracy.difference == 0 and claim.accuracy.established
    claim = compare(side("A", 3.0), side("B", 2.0, 3))
    assert claim.kind == "slower" and claim.speedup.high < 1
    assert claim.sentence.startswith("A takes 1.4") and "times as long as B" in claim.sentence


def test_no_difference_found_names_the_one_that_would_have_been():
    claim = compare(side("A", 2.0), side("B", 2.001))
    assert claim.kind == "none" and claim.speedup.detectable < 1.05 and "%" in claim.sentence
    wild = [1.0, 1.6, 1.3]
    claim = compare(side("A", 2.0, 3, spread=wild), side("B", 2.0, 3, spread=wild))
    assert claim.kind == "none" and claim.speedup.detectable > 2 and "%" not in claim.sentence
    levels = stats.LEVEL, stats.bonferroni(stats.LEVEL, 40)
    assert [compare(side("A", 2.0), side("B", 2.04), level).kind for level in levels] == ["faster", "none"]


# --- sessions


@pytest.mark.parametrize(
    ("apart", "slower", "smallest", "kind"),
    [(MINUTE, 1.05, 0.03, "small"), (HOUR, 1.05, 0.03, "faster"), (MINUTE, 1.3, 0.03, "faster"),
     (MINUTE, 1.3, 0.2, "small"), (MINUTE, 1.0, 0.03, "none")],
)  # fmt: skip
def test_fewer_than_three_sessions_claim_nothing_below_the_smallest(apart, slower, smallest, kind):
    steady = [1.0, 1.0001, 0.9999, 1.00005, 0.99995]
    candidate, baseline = (
        side(name, seconds, apart=apart, spread=steady) for name, seconds in (("A", 1), ("B", slower))
    )
    assert compare(candidate, baseline, smallest=smallest).kind == kind


def test_the_interval_of_few_sessions_has_room_for_the_effect_of_the_hour():
    few, many = (compare(side("A", 2.0, apart=apart), side("B", 3.0, apart=apart)) for apart in (MINUTE, HOUR))
    half = math.hypot(math.log(many.speedup.high / 1.5), math.log(1.03))
    assert (few.speedup.low, few.speedup.high) == pytest.approx((1.5 / math.exp(half), 1.5 * math.exp(half)))
    assert few.speedup.detectable > many.speedup.detectable * 1.03


@pytest.mark.parametrize(
    ("candidate", "baseline", "basis"),
    [((5, HOUR), (3, HOUR), "5 and 3 runs in 5 and 3 sessions"),
     ((5, 3 * MINUTE), (5, MINUTE), "5 runs each, all within 12 minutes"),
     ((5, HOUR), (5, 3 * MINUTE), "5 runs each, those of B within 12 minutes"), ((1, 1), (1, 1), "1 run each")],
)  # fmt: skip
def test_the_basis_names_runs_and_sessions(candidate, baseline, basis):
    sides = [side(name, 2.0, n, None, apart) for name, (n, apart) in (("A", candidate), ("B", baseline))]
    assert compare(*sides).basis == basis


# --- no claim


@pytest.mark.parametrize(("first", "second"), [(1, 5), (1, 1), (5, 2)])
def test_fewer_than_three_runs_give_a_ratio_and_no_claim(first, second):
    claim = compare(side("A", 2.0, first), side("B", 3.0, second))
    assert claim.kind == "few" and claim.speedup.low is None
    assert "times as fast as B" in claim.sentence and "-S repeats=5" in claim.sentence


def test_an_interval_of_more_than_tenfold_is_too_few_runs():
    claim = compare(side("A", 1.0, 3, spread=[1.0, 3.0, 1.5]), side("B", 300.0, 3))
    assert claim.kind == "few" and claim.speedup.low > 1 and claim.speedup.high > 10 * claim.speedup.low


def test_a_problem_of_either_side_is_named_and_nothing_is_claimed():
    good, bad = side("A", 2.0), side("B", 3.0, problem="3 of 5 planned runs are there")
    for claim in (compare(good, bad), compare(bad, good)):
        assert claim.kind == "problem" and claim.reason == "B: 3 of 5 planned runs are there"
        assert claim.reason in claim.sentence and claim.speedup.low is None
    assert compare(good, bad).speedup.value == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("candidate", "baseline", "reason"),
    [(WORSE, ACCURACIES, "2.0 points worse"), (ACCURACIES, WORSE, "2.0 points better"),
     ((0.79, 0.75, 0.71), (0.68, 0.64, 0.60), "points better"), (ACCURACIES[:2], ACCURACIES, "too few seeds")],
)  # fmt: skip
def test_accuracies_that_are_not_shown_to_be_equal_make_no_claim(candidate, baseline, reason):
    sides = side("A", 2.0, accuracies=candidate), side("B", 3.0, accuracies=baseline)
    claim = compare(*sides)
    assert claim.kind == "parity" and claim.speedup.low is None
    assert reason in claim.reason and claim.reason in claim.sentence
    assert compare(*sides, accuracy_margin=1.0).kind == ("parity" if "seeds" in reason else "faster")


# --- conditions


@pytest.mark.parametrize(("hardware", "limits"), [("GPU", ["power limit 700 and not known"]), (None, [])])
def test_unlike_conditions_are_named_for_equal_hardware_and_torch_always(hardware, limits):
    sides = [
        side(name, seconds, hardware=hardware or name, conditions={"torch": torch, "power limit": limit})
        for name, seconds, torch, limit in (("A", 2.0, "2.11", "700"), ("B", 3.0, "2.14", ""))
    ]
    assert compare(*sides).basis.split(", ")[2:] == ["torch 2.11 and 2.14", *limits]
