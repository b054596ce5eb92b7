"""Bundles of real runs, what may be one of them, and what comparing them says."""
