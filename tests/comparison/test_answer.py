"""The sentences that open a report."""

import pytest
from made import OLDER, B, C, Store, two

from pipeline.comparison.answer import answer


def scored(speed=1500.0, count=5, first=5, **others):
    """A, and B of that speed."""
    return Store().sustained(first).sustained(count, speed=speed, **B, **others)


def test_it_opens_with_the_claim_of_the_first_step_and_its_evidence():
    text = answer(scored(140_000.0).compare())
    assert text.startswith("GPU B: 140 times GPU A at convnet fp32 (13") and "5 runs each in 5 sessions)" in text
    assert text.count(".") == 1


def test_the_strongest_claims_come_first_and_the_others_are_counted():
    store = Store().sustained(6)
    for number, speed in enumerate((1500, 8000, 90, 2500, 300)):
        store.sustained(5, speed=float(speed), machine=f"{number}", hardware=f"M{number}")
    text = answer(store.compare())
    assert text.startswith("GPU A: 11.1 times M2 at convnet fp32")
    assert text.index("M2") < text.index("M1: ") < text.index("times M4")
    assert "M0" not in text and "2 more" in text


def test_machines_that_are_not_compared_are_named_with_the_reason():
    store = scored(3000.0, first=6).sustained(5, batch=128, **C)
    store.sustained(5, hardware="D", machine="d" * 12, taints="load").add(3, hardware="E", machine="e" * 12)
    store.add(3, hardware="F", machine="f" * 12, software__execution=OLDER)
    text = answer(store.compare())
    assert text.startswith("GPU B: 3.00 times GPU A")
    reasons = ("C (batch 128 against 256)", "D (disturbed (load))", "E (no score)")
    assert all(reason in text for reason in reasons) and "1 more" in text
    text = answer(scored(3000.0).add(3, **C, software__execution=OLDER).compare())
    assert f"C (measured by version {OLDER} of the code)" in text


def test_no_difference_is_named_after_the_claims():
    text = answer(scored(1001.0).compare())
    assert "no difference from GPU A found at convnet fp32" in text
    text = answer(scored(3000.0, first=6).sustained(5, speed=1000.0, **C).compare())
    assert text.endswith("No difference from GPU A is established for C.")


@pytest.mark.parametrize(
    ("store", "reason"),
    [(scored(2000.0, count=1, first=1), "too few runs (1 run each)"),
     (scored(2000.0, planned=7), "5 of 7 planned runs"),
     (Store().sustained().sustained().sustained(3, speed=2000.0, **B), "not planned"),
     (scored(2000.0, taints="load"), "disturbed (load)")],
)  # fmt: skip
def test_without_a_claim_it_gives_the_ratio_the_reason_and_the_command(store, reason):
    text = answer(store.compare())
    assert text.startswith("GPU B: 2.0") and "This is no claim" in text and reason in text
    assert "python -m pipeline.run -S repeats=5" in text
    assert ("-S label=NAME" in text) == any("repeats" in run["tags"] for run in store.runs)  # or it adds to the set


def test_without_a_score_it_is_about_the_work():
    text = answer(two().compare())
    assert text.startswith("GPU B: 2.00 times GPU A at finetune on cifar10 with pretrained weights (1.9")


def test_one_machine_has_its_figure_and_the_advice():
    comparison = Store().sustained(5).compare()
    text = answer(comparison)
    assert text.startswith("GPU A: 1,000 images/s at convnet fp32 (5 runs).") and text.endswith(comparison.advice)
    assert answer(Store().add(1).compare()).startswith("GPU A: 10.0 s for finetune on cifar10")
