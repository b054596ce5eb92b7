"""Every stage in order, in a folder of its own below runs/. `mlflow run` calls this. Each repeat is a process."""

import shutil
import time
from pathlib import Path

from pipeline import children, cli, config, download, files, hardware, repeats, terminal
from pipeline.errors import StageError

REPEATED = ("train", "evaluate", "sustain")
"""The stages of a repeat, in order."""


def run(settings: config.Settings, folder: Path) -> None:
    """Run all stages in a new folder below `runs/`, beside `folder`, which is DVC's. An interrupted run of the same
    work goes on in its folder."""
    start_child = children.starter("run", settings.device)  # first: it imports torch meanwhile
    runs, reports = folder.parent / "runs", folder.parent / "reports"
    run_folder = _new_folder(runs, f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.recipe}")
    for stage in (hardware, download):
        stage.run(settings, run_folder)
    interrupted = repeats.find_unfinished(runs, settings, run_folder) if settings.resume == "auto" else None
    if interrupted is not None:
        shutil.rmtree(run_folder)
        run_folder = interrupted
        terminal.say(f"resumed  in {run_folder.parent.name}/{run_folder.name}")
    repeats.run_repeats(settings, run_folder, REPEATED, settings.repeats, start_child)
    from pipeline import compare  # not before: a machine without its scipy can be measured all the same

    try:
        compare.run(settings, run_folder, reports)
    except StageError as error:  # the runs are measured, and wait for the store
        terminal.say(f"note     no report: {error}")


def run_repeat(settings: config.Settings, folder: Path, number: int) -> None:
    """In a child: those stages of one repeat that have no record."""
    from pipeline import evaluate, sustain, train  # torch takes seconds to import, and a driver does without

    missing = repeats.missing_stages(folder, REPEATED, number)
    net = train.train(settings, folder, number)[1] if "train" in missing else None
    if "evaluate" in missing:
        evaluate.run(settings, folder, number, net)
    del net  # the score takes the memory
    if "sustain" in missing:
        sustain.run(settings, folder, number)


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
    if children.is_child():
        children.watch_driver()
        from pipeline import evaluate, sustain, train  # noqa: F401  # while the driver prepares the work

        repeats.run_stage(run_repeat, __doc__)
    else:
        cli.main(run, __doc__)
        cli.leave()
