"""Every stage in order, in a folder of its own below runs/; what `mlflow run` calls. Each repeat is a process."""

import shutil
import time
from pathlib import Path

from pipeline import config, download, files, hardware, repeats

RUNS = config.ROOT / "runs"

REPEATED = ("train", "evaluate", "sustain")
"""The stages of a repeat, in order."""


def run(settings: config.Settings, folder: Path) -> None:
    """All stages, in a folder of their own below `runs/`: the files in `folder` are DVC's. Repeats that were cut off go
    on in the folder that they have."""
    begun = time.monotonic()
    own = _own_folder(f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.recipe}")
    for stage in (hardware, download):
        stage.run(settings, own)
    if settings.repeats > 1:
        cut_off = repeats.find_unfinished(RUNS, settings, own)
        if cut_off is not None:
            shutil.rmtree(own)
            own = cut_off
        repeats.run_repeats(settings, own, REPEATED, settings.repeats, repeats.child_command("run"))
    else:
        once(settings, own, time.monotonic() - begun)
    from pipeline import compare  # not before: a machine that lacks its scipy can be measured all the same

    compare.run(settings, own)


def once(settings: config.Settings, folder: Path, earlier: float) -> None:
    """A single training and the stages after it, in this process, in which the stages before took `earlier` seconds."""
    from pipeline import evaluate, sustain, train  # torch takes seconds to import, and a driver does without

    train.run(settings, folder, earlier=earlier)
    evaluate.run(settings, folder)
    sustain.run(settings, folder)
    for stage in REPEATED:
        repeats.summarise(folder, stage)


def repeat(settings: config.Settings, folder: Path, number: int) -> None:
    """One of several repeats, in the process that its driver started for it: the stages whose record is missing."""
    from pipeline import evaluate, sustain, train

    stages = {"train": train.run, "evaluate": evaluate.run, "sustain": sustain.run}
    for stage in repeats.missing_stages(folder, REPEATED, number):
        stages[stage](settings, folder, number)


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
            raise files.write_error(own, error) from error


if __name__ == "__main__":
    from pipeline import cli

    if not repeats.run_as_child(repeat, __doc__):
        cli.main(run, __doc__)
