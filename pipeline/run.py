"""Every stage in order, in a folder of its own below runs/. `mlflow run` calls this. Each repeat is a process."""

import shutil
import time
from pathlib import Path

from pipeline import config, download, files, hardware, repeats

REPEATED = ("train", "evaluate", "sustain")
"""The stages of a repeat, in order."""


def run(settings: config.Settings, folder: Path) -> None:
    """Run all stages in a new folder below `runs/`, beside `folder`, which is DVC's. An interrupted set of repeats goes
    on in its folder."""
    began = time.monotonic()
    runs, reports = folder.parent / "runs", folder.parent / "reports"
    run_folder = _new_folder(runs, f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.recipe}")
    for stage in (hardware, download):
        stage.run(settings, run_folder)
    if settings.repeats > 1:
        interrupted = repeats.find_unfinished(runs, settings, run_folder)
        if interrupted is not None:
            shutil.rmtree(run_folder)
            run_folder = interrupted
        repeats.run_repeats(settings, run_folder, REPEATED, settings.repeats, repeats.child_starter("run"))
    else:
        run_once(settings, run_folder, time.monotonic() - began)
    from pipeline import compare  # not before: a machine without its scipy can be measured all the same

    compare.run(settings, run_folder, reports)


def run_once(settings: config.Settings, folder: Path, earlier_seconds: float) -> None:
    """A single training and the stages after it. The earlier stages took `earlier_seconds` of this process."""
    from pipeline import evaluate, sustain, train  # torch takes seconds to import, and a driver does without

    train.run(settings, folder, earlier=earlier_seconds)
    evaluate.run(settings, folder)
    sustain.run(settings, folder)
    for stage in REPEATED:
        repeats.summarise(folder, stage)


def run_repeat(settings: config.Settings, folder: Path, number: int) -> None:
    """Those stages of one repeat that have no record, in the process that the driver started for it."""
    from pipeline import evaluate, sustain, train

    stages = {"train": train.run, "evaluate": evaluate.run, "sustain": sustain.run}
    for stage in repeats.missing_stages(folder, REPEATED, number):
        stages[stage](settings, folder, number)


def _new_folder(runs: Path, name: str) -> Path:
    """Create a folder. Two runs that start at the same moment get two folders."""
    folder, count = runs / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            count += 1
            folder = runs / f"{name}-{count}"
        except OSError as error:
            raise files.write_error(folder, error) from error


if __name__ == "__main__":
    from pipeline import cli

    if not repeats.run_as_child(run_repeat, __doc__):
        cli.main(run, __doc__)
