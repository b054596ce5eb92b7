"""What is said of one machine against another, and when it isn't."""

import math

import pytest

from pipeline import claims, stats
from pipeline.claims import Claim, Side

SPREAD = [1.0, 1.01, 0.99, 1.005, 0.995]


def side(name, seconds, count=5, accuracies="same", **others):
    """A side whose runs took about `seconds`."""
    alike = {"test": [0.75, 0.751, 0.749, 0.752, 0.748][:count]}
    chosen = alike if accuracies == "same" else accuracies
    return Side(name, [seconds * each for each in SPREAD[:count]], others.pop("processes", count), chosen, **others)


def said(me, it, level=stats.LEVEL):
    return claims.compared(me, it, "on this work", level)


def test_faster_is_said_with_its_interval_its_runs_and_what_it_takes():
    memory = "at {} its memory"
    found = said(
        side("A", 2.0, besides={memory: (600.0, "device")}), side("B", 3.0, besides={memory: (1000.0, "device")})
    )
    assert found.kind == "faster"
    assert found.sentence == (
        "A is 1.48 to 1.52 times as fast as B on this work (n = 5 and 5, same accuracy), at 0.6 of its memory."
    )
    assert found.speedup == stats.ratio(side("B", 3.0).seconds, side("A", 2.0).seconds)
    assert found.accuracy.value == 0


@pytest.mark.parametrize(
    ("mine", "its", "words"),
    [(5, 3, "(n = 5 and 3, same"), (1, 1, "(n = 5 and 3, each in one process, same"),
     (1, 3, "(n = 5 in one process and 3 in 3 processes, same"), (2, 1, "(n = 5 in 2 processes and 3 in one process,")],
)  # fmt: skip
def test_runs_that_share_a_process_are_said_to(mine, its, words):
    assert words in said(side("A", 2.0, processes=mine), side("B", 3.0, 3, processes=its)).sentence


def test_what_runs_can_not_show_is_in_the_interval():
    me, it = (side(name, 2.0, processes=1, unseen=stats.Part(0.001, 4)) for name in "AB")
    found = said(me, it)
    assert found.speedup == stats.ratio(it.seconds, me.seconds, unseen=[it.unseen, me.unseen])
    assert found.speedup.detectable > 1.1


def test_slower_is_said_as_taking_longer():
    found = said(side("A", 3.0), side("B", 2.0, 3))
    assert found.kind == "slower" and found.speedup.high < 1
    assert found.sentence.startswith("A takes 1.46 to 1.54 times as long as B on this work (n = 5 and 3, same accuracy")


def test_no_difference_found_tells_which_could_have_been():
    found = said(side("A", 2.0), side("B", 2.001))
    assert found.kind == "none"
    assert found.sentence == (
        "A: no difference from B found on this work; one of 1.9% could have been (n = 5 and 5, same accuracy)."
    )
    assert found.speedup.detectable == pytest.approx(1.019, abs=0.0005)


def test_an_adjusted_level_takes_a_claim_back():
    me, it = side("A", 2.0), side("B", 2.04)
    assert said(me, it).kind == "faster"
    found = said(me, it, stats.shared(stats.LEVEL, 40))
    assert found.kind == "none" and found.speedup.low < 1 < found.speedup.high


@pytest.mark.parametrize(("mine", "its"), [(1, 5), (5, 1), (1, 1)])
def test_a_single_run_gives_a_ratio_and_no_claim(mine, its):
    found = said(side("A", 2.0, mine), side("B", 3.0, its))
    assert found.kind == "single" and found.speedup.low is None
    assert (
        found.sentence
        == f"A is 1.50 times as fast as B on this work, in a single run (n = {mine} and {its}): no claim."
    )


@pytest.mark.parametrize(("mine", "its"), [(2, 5), (5, 2), (2, 2)])
def test_two_runs_have_an_interval_and_make_no_claim(mine, its):
    found = said(side("A", 4.0, mine), side("B", 2.0, its))
    assert found.kind == "few" and found.speedup.high < 1
    assert "times as long as B" in found.sentence and "too few runs for a claim" in found.sentence
    assert "3 each are needed" in found.sentence


def test_three_runs_carry_a_claim():
    assert said(side("A", 2.0, 3), side("B", 3.0, 3)).kind == "faster"


def test_without_any_spread_there_is_one_number():
    me, it = (Side(name, [seconds] * 3, 3, {"test": [0.75] * 3}) for name, seconds in (("A", 2.0), ("B", 3.0)))
    assert said(me, it).sentence == "A is 1.50 times as fast as B on this work (n = 3 and 3, same accuracy)."


# --- accuracies


def test_where_accuracies_differ_the_reason_stands_in_the_speed_ups_place():
    found = said(side("A", 2.0, accuracies={"test": [0.70, 0.701, 0.699, 0.70, 0.70]}), side("B", 3.0))
    assert found.kind == "parity" and found.speedup is None
    assert found.sentence == (
        "A: no speed-up over B is claimed, for their accuracies differ (test images): 70.0% against 75.0%, "
        "4.8 to 5.2 points."
    )


def test_the_more_accurate_one_is_not_called_faster_either():
    found = said(side("A", 2.0), side("B", 3.0, accuracies={"test": [0.70, 0.701, 0.699, 0.70, 0.70]}))
    assert found.kind == "parity" and found.accuracy.value > 0


def test_a_sure_difference_of_less_than_half_a_point_is_none():
    mine = {"test": [0.7540, 0.7541, 0.7539, 0.7540, 0.7540]}
    its = {"test": [0.7501, 0.7500, 0.7499, 0.7500, 0.7500]}
    found = said(side("A", 2.0, accuracies=mine), side("B", 3.0, accuracies=its))
    assert found.kind == "faster" and found.accuracy.low > 0


def test_a_difference_within_noise_is_none_and_the_noise_is_said():
    mine = {"test": [0.72, 0.78, 0.75, 0.70, 0.80]}
    found = said(side("A", 2.0, accuracies=mine), side("B", 3.0))
    assert found.kind == "faster"
    assert "same accuracy to within 5.1 points)" in found.sentence


@pytest.mark.parametrize(("accuracy", "kind"), [(0.7405, "single"), (0.7395, "parity"), (0.7605, "parity")])
def test_a_single_accuracy_may_differ_by_a_point(accuracy, kind):
    found = said(side("A", 2.0, 1, accuracies={"test": [accuracy]}), side("B", 3.0, 1, accuracies={"test": [0.75]}))
    assert found.kind == kind
    assert ("single run" in found.sentence) and (found.speedup is None) == (kind == "parity")


def test_accuracies_of_the_same_images_are_compared():
    mine = {"test": [0.9] * 5, "validation": [0.5] * 5}
    assert said(side("A", 2.0, accuracies=mine), side("B", 3.0, accuracies={"validation": [0.5] * 5})).kind == "faster"
    assert said(side("A", 2.0, accuracies=mine), side("B", 3.0, accuracies={"test": [0.5] * 5})).kind == "parity"


def test_without_accuracies_nothing_is_claimed_of_a_work_that_has_them():
    found = said(side("A", 2.0, accuracies={}), side("B", 3.0))
    assert found == Claim("parity", "A: no speed-up over B is claimed, for their accuracies are not known.")
    found = said(side("A", 2.0, accuracies=None), side("B", 3.0, accuracies=None))
    assert found.kind == "faster" and found.sentence.endswith("on this work (n = 5 and 5).")


def test_what_is_tainted_is_named():
    found = claims.tainted(side("A", 2.0, taints="battery, load"))
    assert found.kind == "tainted" and "(battery, load)" in found.sentence and found.speedup is None


# --- what else it takes


@pytest.mark.parametrize(
    ("mine", "words"),
    [(100.0, ", at 0.1 of its memory."), (1004.0, "accuracy)."), (2000.0, ", at 2 times its memory."),
     (12_345.0, ", at 12 times its memory.")],
)  # fmt: skip
def test_memory_is_told_in_two_digits(mine, words):
    memory = "at {} its memory"
    me, it = side("A", 2.0, besides={memory: (mine, "device")}), side("B", 3.0, besides={memory: (1000.0, "device")})
    assert said(me, it).sentence.endswith(words)


def test_what_was_measured_of_two_things_is_not_compared():
    me, it = (side(name, 1.0 + (name == "B"), besides={"at {} its memory": (9.0, of)}) for name, of in ("Ad", "Bp"))
    assert "memory" not in said(me, it).sentence
    assert "memory" not in said(me, side("B", 3.0)).sentence


# --- figures as words


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0.000"), (0.0012345, "0.00123"), (0.6044, "0.604"), (0.99, "0.990"), (1, "1.00"), (1.525, "1.52"),
     (31.46, "31.5"), (312.4, "312"), (20816.6, "20,817"), (math.inf, "∞")],
)  # fmt: skip
def test_a_figure_has_three_digits_or_all_before_the_point(value, shown):
    assert claims.factor(value) == shown


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


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0031, "0.31%"), (0.031, "3.1%"), (0.75, "75.0%"), (3.123, "312%"), (math.inf, "over 1,000%")],
)  # fmt: skip
def test_a_share_in_per_cent(value, shown):
    assert claims.percent(value) == shown


def test_large_numbers_in_words():
    assert [claims.large(value) for value in (999.6, 8_327_000, 1.992e9)] == ["1,000", "8.327 million", "1.992 billion"]
