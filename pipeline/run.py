"""Every stage in order, in one process and in a folder of its own below runs/; what `mlflow run` calls."""

from pipeline import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

import time
from pathlib import Path

from pipeline import config, download, evaluate, files, hardware, sustain, train

RUNS = config.ROOT / "runs"


def run(settings: config.Settings, folder: Path) -> None:
    """All stages, in a folder of their own below `runs/`: the files in `folder` are DVC's."""
    own = _own_folder(f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.recipe}")
    for stage in (hardware, download, train, evaluate, sustain):
        stage.run(settings, own)
    from pipeline import compare  # not before: a machine that lacks its scipy can be measured all the same

    compare.run(settings, own)


def _own_folder(name: str) -> Path:
    """A new folder below `runs/`; making it, not looking for it, settles which of two runs has it."""
    own, count = RUNS / name, 1
    while True:
        try:
            own.mkdir(parents=True)
            return own
        except FileExistsError:
            count += 1
            own = RUNS / f"{name}-{count}"
        except OSError as error:
            raise files.cannot_write(own, error) from error


if __name__ == "__main__":
    cli.main(run, __doc__)
