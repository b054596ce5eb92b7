"""Every stage in order, in one process and in a folder of its own below runs/; what `mlflow run` calls."""

import time
from pathlib import Path

from pipeline import compare, config, download, evaluate, hardware, train

RUNS = config.ROOT / "runs"


def run(settings: config.Settings, folder: Path) -> None:
    """Hardware, download, train, evaluate, compare. Not in `folder`, whose files are DVC's, but below `runs/`."""
    base = RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.recipe}"
    own, count = base, 1
    while own.exists():
        own, count = base.with_name(f"{base.name}-{count + 1}"), count + 1
    for stage in (hardware, download, train, evaluate, compare):
        stage.run(settings, own)


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
