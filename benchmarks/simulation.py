"""Whether comparisons are fair: alike machines called different, and a slow-down found, in simulated comparisons.

python -m benchmarks.simulation [--trials N] [--seed N] [--from FILE]

Each trial is a store of two made machines with n runs each, compared as `compare` does it. Their times are drawn from
FILE (pipeline/noise.json, which `benchmarks/noise.py` measured), for each work and hardware in it: a process's own
deviation is normal, of the measured standard deviation (there are too few processes to draw from); those of repeats
around it are drawn from the ones measured, and so are accuracies from those of the work. The runs are repeats of one
process, in two processes, or each has a process of its own.

Printed is how often two machines alike are called faster or slower (5% are meant), and how often one is that is slower
by SLOWER. It ends with status 1 where alike machines are called different in more than MOST_CALLED, or a slow-down on
ASKED, with n = 10 in ten processes, is found in less than LEAST_FOUND. Repeats in one process are not asked for it:
what differs between processes is as much, and no repeat shows it.
"""

import argparse
import itertools
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import results
from pipeline import comparison, config, noise
from pipeline.noise import Noise

COUNTS = (3, 5, 10)
SLOWER = 1.03
MOST_CALLED, LEAST_FOUND = 0.065, 0.8
ASKED = "NVIDIA H200"
"""With whose noise a slow-down has to be found; how often it is with others' is told."""

PROCESSES = {"one process": 1, "two processes": 2, "own processes": None}
"""In how many processes the runs of a side are; None: each has its own."""

SETTINGS = config.Compare(reference="A", prices="", tainted=False)


def rates(each: Noise, between: noise.Measured, trials: int, generator: random.Random) -> dict[str, Any]:
    """The shares of trials that were called different, `alike`, and found slower, `slower`, by kind of processes and
    n."""
    found: dict[str, Any] = {}
    for (kind, processes), count in itertools.product(PROCESSES.items(), COUNTS):
        called = {
            name: sum(
                _claim(each, between, count, processes or count, factor, generator) in kinds for _ in range(trials)
            )
            for name, factor, kinds in (("alike", 1.0, ("faster", "slower")), ("slower", SLOWER, ("slower",)))
        }
        found.setdefault(kind, {})[count] = {name: many / trials for name, many in called.items()}
    return found


def _claim(
    each: Noise, between: noise.Measured, count: int, processes: int, factor: float, generator: random.Random
) -> str:
    """What is claimed of B against A, whose times are drawn alike, but for B's `factor`."""
    runs = [*_runs("A", each, count, processes, 1.0, generator), *_runs("B", each, count, processes, factor, generator)]
    found = comparison.compare(runs, lambda _: dict.fromkeys(comparison.COURSES, ()), _no_link, SETTINGS, None, between)
    (row,) = [row for row in found.parts[0].sections[0].tables[0].rows if row.machine == "B"]
    return row.claim.kind


def _no_link(experiment_id: str, run_id: str) -> str:
    return ""


def _runs(
    machine: str, each: Noise, count: int, processes: int, factor: float, generator: random.Random
) -> list[comparison.Run]:
    """`count` runs as equally as can be in `processes`, as `tracking.finished_runs` gives them."""
    errors = _errors(each.logs)
    accuracies = [value for own in each.accuracies for value in own] or [0.75]
    runs = []
    for process in range(processes):
        shift = generator.gauss(0, each.between)
        size = len(range(process, count, processes))
        tags = {"machine": machine, "hardware": machine, "backend": each.backend, "workload": "made"}
        if size > 1:
            tags |= {"repeats.id": f"{machine}{process}", "repeats": str(size)}
        for repeat in range(size):
            seconds = factor * math.exp(shift + generator.choice(errors))
            metrics = {"time/total_seconds": seconds, "test/accuracy": generator.choice(accuracies)}
            if noise.TRAINED_ON.get(each.work) == "features":
                metrics["speed/feature_images_per_second"] = 1 / seconds
            runs.append(
                {
                    "run_id": f"{machine}{process}.{repeat}",
                    "experiment_id": "0",
                    "started": 0,
                    "tags": tags,
                    "metrics": metrics,
                    "params": {"train.precision": "fp32"},
                }
            )
    return runs


def _errors(logs: Sequence[Sequence[float]]) -> list[float]:
    """Deviations of repeats from their process's mean, as large as they are around a mean that isn't estimated."""
    return [
        (value - fmean(own)) * math.sqrt(len(own) / (len(own) - 1)) for own in logs if len(own) > 1 for value in own
    ]


def failures(each: Noise, found: dict[str, Any]) -> list[str]:
    """What of the rates is not fair."""
    said = []
    for kind, by_count in found.items():
        for count, shares in by_count.items():
            if shares["alike"] > MOST_CALLED:
                said.append(f"alike machines called different in {shares['alike']:.1%} (n = {count}, {kind})")
        if each.hardware == ASKED and PROCESSES[kind] is None and by_count[10]["slower"] < LEAST_FOUND:
            said.append(f"a slow-down found in {by_count[10]['slower']:.1%} (n = 10, {kind})")
    return [f"{each.hardware}, {each.work}: {text}" for text in said]


def main(words: Sequence[str]) -> None:
    """Prints a table for each work on each hardware."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=results.whole, default=1000, metavar="N", help="of each kind (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--from", dest="file", type=Path, default=noise.FILE, metavar="FILE", help="what was measured")
    arguments = parser.parse_args(words)
    measured = noise.read(arguments.file)
    between = noise.between(measured)
    wrong = []
    for each in measured:
        found = rates(each, between, arguments.trials, random.Random(arguments.seed))
        print(
            f"{each.hardware}, {each.work}: {each.within:.2%} within a process, {each.between:.2%} between "
            f"{len(each.logs)}; {arguments.trials} trials each\n"
            f"{'':15} {'called different, alike':>26} {'found, ' + format(SLOWER - 1, '.0%') + ' slower':>26}\n"
            f"{'n =':15} " + " ".join(f"{count:>8}" for count in 2 * COUNTS)
        )
        for kind, by_count in found.items():
            shares = [by_count[count][name] for name in ("alike", "slower") for count in COUNTS]
            print(f"{kind:15} " + " ".join(f"{share:>8.1%}" for share in shares), flush=True)
        wrong += failures(each, found)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
