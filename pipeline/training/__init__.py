"""The training loop, its set-up, optimizers and schedules."""
