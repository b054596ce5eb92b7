"""Deliver the runs that wait in pending/ to the MLflow store. Every command that uses the store does so, too."""

import sys
from pathlib import Path

from pipeline import children, config, terminal
from pipeline.tracking import pending, publisher


def run(settings: config.Settings, folder: Path) -> None:
    """Deliver all that waits. Exits with status 1 if the store does not take all of it."""
    del settings, folder  # entries say where they belong
    before = pending.waiting()
    publisher.deliver_all()
    left = pending.waiting()
    if left:
        children.tell_waiting()
        sys.exit(1)
    terminal.say(f"publish  {len(before)} delivered, nothing waits")


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
