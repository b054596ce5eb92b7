"""How much times of one work on one machine differ, within a process and between processes, as it was measured.

Repeats in one process share what a process draws once: where its memory lies, which kernels were chosen, what else the
machine does in that hour. Their spread says nothing of it. `noise.json` holds what `benchmarks/noise.py` found by
running the same work in several processes, several times in each, at several hours; `comparison` takes from it what a
single process can't show.

Noise of times is relative: all here is of their natural logarithms, where a standard deviation of 0.01 is about 1%.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pipeline import files

FILE = Path(__file__).with_name("noise.json")

TRAINED_ON = {"linear-probe": "features", "blog": "images", "finetune": "images"}
"""What the works learn from: features that were computed once, or all images in each epoch."""

ANY = "any"
"""All works of a backend."""


class Noise(NamedTuple):
    """Standard deviations of one `work` on one kind of hardware: `within` a process, `between` processes, and of those
    `hours`, between sessions of measuring (None where there was one). `logs` are the logarithms themselves, by process;
    `accuracies` those of the work's repeats, by process (empty where it has none); `span`: hours from the first process
    to the last."""

    hardware: str
    backend: str
    work: str
    within: float
    between: float
    hours: float | None
    span: float
    logs: Sequence[Sequence[float]]
    accuracies: Sequence[Sequence[float]]


class Between(NamedTuple):
    """A standard deviation between processes, and the degrees of freedom of its estimate."""

    deviation: float
    degrees: int


Measured = Mapping[str, Mapping[str, Between]]
"""See `between`."""


def components(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The variances within groups and between them, by the method of moments: the mean squares of a one-way analysis
    of variance with random effects, set equal to their expectations; groups may be unequal, and a negative estimate is
    0 (S. R. Searle, G. Casella and C. E. McCulloch, Variance Components, 1992, section 3.6). None where they can't be
    told apart: of fewer than two groups, or where none has two values."""
    total, count = sum(map(len, groups)), len(groups)
    if count < 2 or total == count:
        return None
    grand = sum(map(math.fsum, groups)) / total
    means = [fmean(group) for group in groups]
    inside = math.fsum((value - mean) ** 2 for group, mean in zip(groups, means, strict=True) for value in group)
    outside = math.fsum(len(group) * (mean - grand) ** 2 for group, mean in zip(groups, means, strict=True))
    within = inside / (total - count)
    size = (total - sum(len(group) ** 2 for group in groups) / total) / (count - 1)
    return within, max(0.0, (outside / (count - 1) - within) / size)


def measured(processes: Iterable[Mapping[str, Any]]) -> list[Noise]:
    """What the `processes` of `noise.json` show, for each work, hardware, torch and settings; those of which there are
    too few say nothing."""
    alike: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for process in processes:
        under = process["conditions"]
        for work in process["seconds"]:
            key = (under["hardware"], process["backend"], work, under["torch"], under["threads"], *under["settings"])
            alike.setdefault(key, []).append(process)
    found = []
    for (hardware, backend, work, *_), same in alike.items():
        logs = [[math.log(value) for value in process["seconds"][work]] for process in same]
        parts = components(logs)
        if parts is None:
            continue
        sessions: dict[str, list[float]] = {}
        for process, own in zip(same, logs, strict=True):
            sessions.setdefault(process["session"], []).append(fmean(own))
        hours = components(list(sessions.values()))
        moments = [datetime.fromisoformat(process["conditions"]["date"]) for process in same]
        found.append(
            Noise(
                hardware=hardware,
                backend=backend,
                work=work,
                within=math.sqrt(parts[0]),
                between=math.sqrt(parts[1]),
                hours=math.sqrt(hours[1]) if hours else None,
                span=(max(moments) - min(moments)).total_seconds() / 3600,
                logs=logs,
                accuracies=[process["accuracies"][work] for process in same if work in process["accuracies"]],
            )
        )
    return found


def read(file: Path = FILE) -> list[Noise]:
    """What the processes of a file such as `noise.json` show."""
    return measured(files.read_json(file)["processes"])


def between(found: Iterable[Noise]) -> Measured:
    """The largest that was measured on each backend, of works by TRAINED_ON, and of ANY work."""
    largest: dict[str, dict[str, Between]] = {}
    for noise in found:
        own, there = Between(noise.between, len(noise.logs) - 1), largest.setdefault(noise.backend, {})
        for kind in {ANY, TRAINED_ON.get(noise.work, ANY)}:
            there[kind] = max(own, there.get(kind, own))
    return largest


def known(measured: Measured, backend: str, trained_on: str) -> Between:
    """What stands for trainings on a backend: what was measured of such; else the largest of any work there; where the
    backend has none, the largest on any."""
    there = measured.get(backend)
    if there is None:
        return max(each[ANY] for each in measured.values())
    return there.get(trained_on, there[ANY])
