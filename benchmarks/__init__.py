"""Side-by-side measurements: each prints a ratio of two ways of doing one thing, taken in one run."""
