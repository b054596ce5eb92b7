"""Measure time, energy and peak rates, and describe the machine and what disturbs it."""
