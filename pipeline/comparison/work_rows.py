"""One row of a table of a recipe's work: the figures of a group, and the course of its most typical run."""

import math
from collections.abc import Sequence
from statistics import fmean, median

from pipeline.comparison import stats
from pipeline.comparison.context import Context, energy_source
from pipeline.comparison.costs import costs_of_work
from pipeline.comparison.groups import Group
from pipeline.comparison.runs import WORK, Run, is_fraction, is_measurement, most_typical
from pipeline.comparison.schema import Row

COURSES = ("val/accuracy", "time/train_seconds", "time/val_seconds")
"""The metrics that are read for every epoch."""

WORK_METRICS = {
    "total_seconds": "time/total_seconds",
    "process_seconds": "time/process_seconds",
    "seconds_to_target": "time/to_target_seconds",
    "feature_images_per_second": "speed/feature_images_per_second",
    "peak_mib": "memory/peak_mib",
    "images_per_joule": "energy/images_per_joule",
    "joules": "energy/joules",
    "test_accuracy": "test/accuracy",
    "best_accuracy": "best/val_accuracy",
}
"""The figures of a recipe's work, and their metrics. The time to decode images is subtracted from process_seconds,
because the first process decodes them and later ones read the cache."""

TOTAL = WORK_METRICS["total_seconds"]

ACCURACIES = {"test": "test_accuracy", "validation": "best_accuracy"}
"""Figures between 0 and 1, by the images that they were measured on, the preferred ones first. Means, not medians."""

MEMORY_OF = {"cpu": "process", "mps": "driver"}
"""What peak memory includes, by device; only `tensors` on others. Figures of two kinds are not comparable."""


def make_row(context: Context, group: Group, target: float | None) -> Row:
    """Make the row of a group. `target`: the recipe's target accuracy, if any."""
    figures, values = _figures(context, group)
    source = energy_source(group.runs, "energy.source", WORK_METRICS["images_per_joule"])
    if not source:
        figures.pop("images_per_joule", None)
        figures.pop("joules", None)
    reached, timed = len(values.get("seconds_to_target", ())), len(values.get("total_seconds", ()))
    if reached < timed:
        figures.pop("seconds_to_target", None)  # no median if some runs never reached the target
    typical = most_typical(group.runs, TOTAL)
    head = context.head(group, WORK)
    return Row(
        head=head,
        settings=group.settings,
        shown=context.run_link(typical),
        figures=figures,
        values=values,
        memory_of=MEMORY_OF.get(head.device, "tensors"),
        energy_source=source,
        reached=(reached, timed) if target is not None and timed else None,
        course=_course(context, typical),
        costs=costs_of_work(context.prices.get(head.hardware), figures),
    )


def _figures(context: Context, group: Group) -> tuple[dict[str, stats.Estimate], dict[str, list[float]]]:
    """The group's figures, and the values of all runs that they come from."""
    values: dict[str, list[float]] = {}
    starts: dict[str, list[int | None]] = {}
    for run in group.runs:
        for key, value in _run_figures(context, run).items():
            values.setdefault(key, []).append(value)
            starts.setdefault(key, []).append(run.started)
    figures = {
        key: stats.mean_estimate(values[key])
        if key in ACCURACIES.values()
        else stats.median_estimate(values[key], starts[key])
        for key in values
    }
    return figures, values


def _run_figures(context: Context, run: Run) -> dict[str, float]:
    """The figures of a run: those of WORK_METRICS, and epoch_seconds and images_per_second of its median epoch.

    The speed metric is that of the last epoch. It is scaled by time, because all epochs have equally many images.
    """
    figures = {key: value_of(run, key) for key in WORK_METRICS}
    seconds = [value for value in context.courses(run.run_id)["time/train_seconds"] if is_measurement(value)]
    if seconds and not run.is_resumed:
        figures["epoch_seconds"] = median(seconds)
        last = run.measurement("speed/train_images_per_second")
        figures["images_per_second"] = last * seconds[-1] / median(seconds) if last is not None else None
    return {key: value for key, value in figures.items() if value is not None}


def value_of(run: Run, key: str) -> float | None:
    """A run's value of a figure of WORK_METRICS; None if it has none."""
    if key in ACCURACIES.values():
        return run.fraction(WORK_METRICS[key])
    value = run.measurement(WORK_METRICS[key])
    if value is None or key != "process_seconds":
        return value
    value -= run.measurement("time/data_seconds") or 0.0
    return value if is_measurement(value) else None


def _course(context: Context, run: Run) -> list[tuple[float, float]]:
    """(seconds since the start, validation accuracy) after each epoch; empty if not known. The last epoch ends at
    `time/total_seconds`, which includes the time before the first epoch."""
    accuracy, training, validation = (context.courses(run.run_id)[key] for key in COURSES)
    total = run.measurement(TOTAL)
    if total is None or not accuracy or not len(accuracy) == len(training) == len(validation):
        return []
    durations = [sum(seconds) for seconds in zip(training, validation, strict=True)]
    ends = [total - math.fsum(durations[epoch:]) for epoch in range(1, len(durations) + 1)]
    if not (all(map(is_fraction, accuracy)) and all(map(is_measurement, ends)) and ends == sorted(ends)):
        return []
    return list(zip(ends, accuracy, strict=True))


def accuracy_by_seed(runs: Sequence[Run], metric: str) -> dict[int, float]:
    """An accuracy by seed. A seed that ran twice gives one value, the mean, because its runs are not independent."""
    values: dict[int, list[float]] = {}
    for run in runs:
        value, seed = run.fraction(metric), run.params.get("settings.seed", "")
        if value is not None and seed.isdecimal():
            values.setdefault(int(seed), []).append(value)
    return {seed: fmean(repeated) for seed, repeated in values.items()}
