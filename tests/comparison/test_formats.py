"""Numbers as text."""

import math

import pytest

from pipeline.comparison import formats


@pytest.mark.parametrize(
    ("format_number", "texts"),
    [(formats.format_figure, {0: "0.000", 0.0012345: "0.00123", 0.99: "0.990", 1.525: "1.52", 31.46: "31.5",
                              20816.6: "20,817", math.inf: "∞"}),
     (formats.format_ratio, {1.0: "1.00", 1 / 140.2: "1/140"}),
     (formats.format_percent, {0.0031: "0.31%", 0.75: "75.0%", 3.123: "312%"}),
     (formats.format_large, {999.6: "1,000", 8_327_000: "8.327 million", 1.992e9: "1.992 billion"}),
     (formats.format_duration, {0: "1 minute", 11.2: "12 minutes", 150: "2.5 hours", 4320: "3 days"})],
)  # fmt: skip
def test_a_number_has_the_digits_that_matter(format_number, texts):
    assert {value: format_number(value) for value in texts} == texts


@pytest.mark.parametrize(
    ("low", "high", "ends"),
    [(1.49, 1.55, ("1.49", "1.55")), (312.2, 331.4, ("312", "331")), (1.5001, 1.5004, ("1.5001", "1.5004")),
     (1.001, 1.2, ("1.001", "1.200")), (0.8, 0.9996, ("0.8000", "0.9996")), (0.101, 39.6, ("0.101", "39.6")),
     (2.0, 2.0, ("2.00", "2.00")), (0.0, math.inf, ("0.000", "∞"))],
)  # fmt: skip
def test_the_ends_of_a_ratios_interval_differ_from_each_other_and_from_one(low, high, ends):
    assert formats.format_interval(low, high, ratio=True) == ends
