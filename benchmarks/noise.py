"""How much times of the same work differ within a process and between processes: what `compare` can't see in repeats.

python -m benchmarks.noise [--processes N] [--repeats N] [--into FILE] [-S key=value ...]; the settings are the
pipeline's. N processes, one after the other, each set up once, do three works N times: `linear-probe`'s training and
one epoch of `blog`'s, every repeat with a seed of its own (their seconds are those of `time/total_seconds`), and
`finetune`'s step on a fixed batch, repeated for STEP_SECONDS (seconds of a step). No repeat is left out.

What FILE (reports/bench/noise.json) holds stays, and what is measured joins it: the same command at another hour, on
another day or on another machine of this kind tells what differs between them. Printed are, of all in FILE, the
standard deviations within a process and between processes in per cent, by `pipeline/noise.py`; `compare` reads
pipeline/noise.json.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import bare, results
from pipeline import config, files, noise, training
from pipeline.clock import Clock

TRAININGS = {"linear-probe": (), "blog": ("epochs=1",)}
"""Recipes, and what is set of them."""

STEP = "finetune"

STEP_SECONDS = 2.0
"""About how long the step is repeated for one figure."""


def measured(overrides: Sequence[str], repeats: int) -> dict[str, Any]:
    """What one process finds; this one, which should have done nothing before."""
    settings = results.settings_of([*overrides, f"recipe={STEP}"])
    conditions = results.conditions_of(settings, overrides)
    seconds, accuracies = {}, {}
    for recipe, own in TRAININGS.items():
        chosen = results.settings_of([*overrides, *own, f"recipe={recipe}"])
        seconds[recipe], accuracies[recipe] = _trainings(chosen, repeats)
    seconds[STEP] = _steps(settings, repeats)
    return {
        "backend": training.device_for(settings.device, settings.work).name,
        "conditions": conditions,
        "seconds": seconds,
        "accuracies": accuracies,
    }


def _trainings(settings: config.Settings, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds, and validation accuracies after the last epoch."""
    splits = bare.splits_of(settings)
    work, working = bare.set_up(settings, splits)
    seconds, accuracies = [], []
    for repeat in range(repeats):
        training.restart(work, settings.seed + repeat)
        work.job.clock = Clock(work.job.backend.synchronise)
        rows, *_ = bare.trained_once(work, settings, splits, working)
        seconds.append(work.job.clock.total(*training.TOTAL))
        accuracies.append(rows[-1]["val/accuracy"])
    return seconds, accuracies


def _steps(settings: config.Settings, repeats: int) -> list[float]:
    """Seconds of a step."""
    splits = bare.splits_of(settings)
    work, _ = bare.set_up(settings, splits)
    step, _ = training.fixed_step(work, splits)
    bare.seconds_of(step, 2, work.job.backend)  # kernels are chosen, launches recorded
    steps = max(1, round(STEP_SECONDS / bare.seconds_of(step, 1, work.job.backend)))
    return [bare.seconds_of(step, steps, work.job.backend) / steps for _ in range(repeats)]


def in_process(words: Sequence[str]) -> dict[str, Any]:
    """What a process of its own finds; where it fails, this one ends with its status."""
    command = [sys.executable, "-m", "benchmarks.noise", "--here", *words]
    done = subprocess.run(command, cwd=config.ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(words: Sequence[str]) -> None:
    """Measures, adds to the file, and prints what all in it show."""
    parser = results.parser(__doc__, "--repeats", 5)
    parser.add_argument("--processes", type=results.whole, default=5, metavar="N", help="one after the other (5)")
    parser.add_argument("--into", type=Path, default=results.FOLDER / "noise.json", metavar="FILE", help="joined to it")
    parser.add_argument("--here", action="store_true", help="measure in this process, once, and print JSON")
    arguments = parser.parse_args(words)
    if arguments.here:
        with results.in_one_line():
            print(json.dumps(measured(arguments.overrides, arguments.repeats)))
        return
    results.settings_of(arguments.overrides)  # a wrong one is refused before anything starts
    path = arguments.into
    processes = files.read_json(path)["processes"] if path.exists() else []
    session = None
    settings = [word for text in arguments.overrides for word in ("-S", text)]
    for number in range(1, arguments.processes + 1):
        found = in_process(["--repeats", str(arguments.repeats), *settings])
        session = session or found["conditions"]["date"]
        processes.append({"session": session, **found})
        files.write_json(path, {"benchmark": "noise", "processes": processes})
        took = ", ".join(f"{work} {min(own):.4g} to {max(own):.4g} s" for work, own in found["seconds"].items())
        print(f"process {number} of {arguments.processes}: {took}", flush=True)
    for each in noise.measured(processes):
        hours = "" if each.hours is None else f" (between sessions {each.hours:.2%})"
        runs = f"{sum(map(len, each.logs))} repeats in {len(each.logs)} processes over {each.span:.1f} h"
        print(
            f"{each.hardware}, {each.work}: within a process {each.within:.2%}, between processes "
            f"{each.between:.2%}{hours}; {runs}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
