"""The clock, what a machine is, what disturbs it, and what it could do at most."""
