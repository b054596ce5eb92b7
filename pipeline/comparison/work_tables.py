"""The work of a recipe: its tables, with every machine at the same settings and with each at its best."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from pipeline.comparison import claims, stats
from pipeline.comparison.claims import Claim, Side
from pipeline.comparison.context import Context, claimable, energy_source, side_of
from pipeline.comparison.costs import costs_of_work
from pipeline.comparison.groups import CURRENT_VERSION, Group, group_runs
from pipeline.comparison.runs import WORK, Entity, Run, clean, is_fraction, is_measurement, measurements
from pipeline.comparison.schema import Row, Section, Table

COURSES = ("val/accuracy", "time/train_seconds", "time/val_seconds")
"""The metrics of which every epoch is read."""

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
"""The figures of a recipe's work, and their metrics. The time to decode images is taken off process_seconds: the first
process decodes them, and later ones read the cache."""

TOTAL = WORK_METRICS["total_seconds"]

ACCURACIES = {"test": "test_accuracy", "validation": "best_accuracy"}
"""Figures between 0 and 1, by the images they are of, the better choice first. Their estimates are means."""

MEMORY_OF = {"cpu": "process", "mps": "driver"}
"""What peak memory is of, by device; `tensors` elsewhere. Only figures of one kind are comparable."""


def by_work(runs: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """The runs by workload and by version of the code. The current version comes first, then what most machines did."""
    same_work: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        same_work.setdefault((run.tag("workload", "?"), run.version), []).append(run)

    def order(item: tuple[tuple[str, str], list[Run]]) -> tuple[Any, ...]:
        (workload, version), members = item
        entities = {run.entity() for run in members}
        return version != CURRENT_VERSION, -len(entities), -len(members), workload, version

    return [(*key, members) for key, members in sorted(same_work.items(), key=order)]


def section_of(context: Context, workload: str, version: str, runs: Sequence[Run]) -> Section:
    """The tables of runs that did the same work with the same version of the code."""
    groups = group_runs(runs, lambda run: run.execution, WORK, allow_tainted=context.settings.tainted)
    tags = runs[0].tags
    title = clean(f"{tags.get('recipe')} on {tags.get('dataset')} with {tags.get('weights')} weights")
    target = _number(runs[0].params.get("train.target_accuracy", ""))
    tables = [_table(context, groups, chosen, settings, target) for chosen, settings in _choices(groups)]
    in_tables = {run["id"] for table in tables for row in table.rows for run in row.head.runs}
    others = [
        context.other(group, TOTAL, group.problem or "its settings are in no table")
        for group in groups
        if group.runs[0].run_id not in in_tables
    ]
    return Section(workload, version, title, target, tables, others)


def _choices(groups: Sequence[Group]) -> list[tuple[list[Group], Mapping[str, str] | None]]:
    """The groups of each table and the settings that they share.

    First all machines at the same settings: at fp32, those that most machines have run. Then each machine at its best
    (settings None), unless that table would say the same.
    """
    same_settings: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        if group.settings["precision"] == "fp32":
            same_settings.setdefault(tuple(group.settings.values()), []).append(group)
    best: dict[Entity, Group] = {}
    for group in sorted(groups, key=lambda group: (bool(group.problem), *_by_time(group))):
        best.setdefault(group.entity, group)
    if not same_settings:
        return [(list(best.values()), None)]
    same = min(same_settings.values(), key=_by_frequency)
    choices: list[tuple[list[Group], Mapping[str, str] | None]] = [(same, same[0].settings)]
    if any(all(group is not other for other in same) for group in best.values()):
        choices.append((list(best.values()), None))
    return choices


def _by_frequency(groups: Sequence[Group]) -> tuple[Any, ...]:
    """Sorts sets of groups: first those that most machines ran, without a problem if possible."""
    sound = {group.entity for group in groups if not group.problem}
    entities = {group.entity for group in groups}
    return -len(sound), -len(entities), -sum(len(group.runs) for group in groups), tuple(groups[0].settings.values())


def _by_time(group: Group) -> tuple[Any, ...]:
    """Sorts groups from the fastest to the slowest, those without a time last."""
    values = measurements(group.runs, TOTAL)
    return not values, median(values) if values else 0.0, -len(group.runs), *group.settings.values()


def _table(
    context: Context,
    groups: Sequence[Group],
    chosen: Sequence[Group],
    settings: Mapping[str, str] | None,
    target: float | None,
) -> Table:
    """The table of the `chosen` among all groups. `settings`: what they share, None for each machine's best."""
    chosen = sorted(chosen, key=lambda group: (*_by_time(group), context.name(group)))
    timed = [group for group in chosen if measurements(group.runs, TOTAL)]
    baseline = context.baseline(timed)
    rows = [_row(context, group, target) for group in chosen]
    if baseline is None:
        return Table(settings, None, 0, stats.LEVEL, rows)
    # A best was picked among several groups: every pair that it might have been counts as a comparison.
    candidates = Counter(group.entity for group in (chosen if settings else groups) if claimable(group))
    comparisons = candidates[baseline.entity] * sum(
        candidates[group.entity] for group in timed if group is not baseline
    )
    level = stats.bonferroni(stats.LEVEL, comparisons)
    for index, group in enumerate(chosen):
        if any(group is other for other in timed):
            claim, whole = _claims(context, groups, group, baseline, level, best=settings is None)
            rows[index] = replace(rows[index], claim=claim, whole=whole)
    return Table(settings, _side_name(context, baseline, best=settings is None), comparisons, level, rows)


def _claims(
    context: Context, groups: Sequence[Group], candidate: Group, baseline: Group, level: float, *, best: bool
) -> tuple[Claim, Claim]:
    """What is claimed of the candidate's work, and of its whole process. `best`: each machine is at its best."""
    if candidate is baseline:
        return Claim("reference"), Claim("reference")
    if reason := _not_run(context, groups, candidate, baseline):
        name = _side_name(context, candidate, best=True)
        claim = Claim("other", f"{name}: not compared with {context.name(baseline)}: {reason}.", reason=reason)
        return claim, claim

    def compare(key: str, where: str) -> Claim:
        sides = [_side(context, group, key, best=best) for group in (candidate, baseline)]
        if not all(side.seconds for side in sides):
            return Claim("alone")
        return claims.compare(sides[0], sides[1], context.settings, level, where)

    return compare("total_seconds", "on this work"), compare("process_seconds", "from process start to result")


def _not_run(context: Context, groups: Sequence[Group], candidate: Group, baseline: Group) -> str:
    """The precision of one side that the other never ran, in a sentence. Then settings would be compared, not machines.
    '' if both ran both."""
    for group, other in ((candidate, baseline), (baseline, candidate)):
        precision = group.settings["precision"]
        if not any((g.entity, g.settings["precision"]) == (other.entity, precision) for g in groups):
            return f"{context.name(other)} was not run in {precision}"
    return ""


def _side_name(context: Context, group: Group, *, best: bool) -> str:
    """The machine; with its precision where each machine is at its best, since these differ."""
    return f"{context.name(group)} at {group.settings['precision']}" if best else context.name(group)


def _side(context: Context, group: Group, key: str, *, best: bool) -> Side:
    """A side of the claim about the times `key`. Its seconds are empty if no run has that time."""
    accuracies = {images: _by_seed(group.runs, WORK_METRICS[figure]) for images, figure in ACCURACIES.items()}
    return side_of(
        _side_name(context, group, best=best),
        group,
        [(run, value) for run in group.runs if (value := _value(run, key)) is not None],
        {images: by_seed for images, by_seed in accuracies.items() if by_seed},
    )


def _by_seed(runs: Sequence[Run], metric: str) -> dict[int, float]:
    """An accuracy by seed. A seed that ran twice gives one value, the mean: equal seeds are not independent."""
    values: dict[int, list[float]] = {}
    for run in runs:
        value, seed = run.fraction(metric), run.params.get("settings.seed", "")
        if value is not None and seed.isdecimal():
            values.setdefault(int(seed), []).append(value)
    return {seed: fmean(repeated) for seed, repeated in values.items()}


def _row(context: Context, group: Group, target: float | None) -> Row:
    figures, values = _figures(context, group)
    source = energy_source(group.runs, "energy.source", WORK_METRICS["images_per_joule"])
    if not source:
        figures.pop("images_per_joule", None)
        figures.pop("joules", None)
    reached, timed = len(values.get("seconds_to_target", ())), len(values.get("total_seconds", ()))
    if reached < timed:
        figures.pop("seconds_to_target", None)  # no median, as some runs never reached the target
    typical = group.runs[0]
    if timed:
        center = figures["total_seconds"].value
        typical = min(group.runs, key=lambda run: abs((run.measurement(TOTAL) or math.inf) - center))
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
    """The group's figures, and each run's values of them."""
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
    """The figures that a run has: those of WORK_METRICS, and of its median epoch epoch_seconds and images_per_second.
    The speed metric is the last epoch's, and every epoch has the same number of images."""
    figures = {key: _value(run, key) for key in WORK_METRICS}
    seconds = [value for value in context.courses(run.run_id)["time/train_seconds"] if is_measurement(value)]
    if seconds:
        figures["epoch_seconds"] = median(seconds)
        last = run.measurement("speed/train_images_per_second")
        figures["images_per_second"] = last * seconds[-1] / median(seconds) if last is not None else None
    return {key: value for key, value in figures.items() if value is not None}


def _value(run: Run, key: str) -> float | None:
    """A figure of WORK_METRICS."""
    if key in ACCURACIES.values():
        return run.fraction(WORK_METRICS[key])
    value = run.measurement(WORK_METRICS[key])
    if value is None or key != "process_seconds":
        return value
    value -= run.measurement("time/data_seconds") or 0.0
    return value if is_measurement(value) else None


def _course(context: Context, run: Run) -> list[tuple[float, float]]:
    """Seconds since the start, and validation accuracy, after each epoch; empty where they are not known. The last
    epoch ends at `time/total_seconds`, which includes what came before the first."""
    accuracy, training, validation = (context.courses(run.run_id)[key] for key in COURSES)
    total = run.measurement(TOTAL)
    if total is None or not accuracy or not len(accuracy) == len(training) == len(validation):
        return []
    durations = [sum(epoch) for epoch in zip(training, validation, strict=True)]
    ends = [total - math.fsum(durations[done:]) for done in range(1, len(durations) + 1)]
    if not (all(map(is_fraction, accuracy)) and all(map(is_measurement, ends)) and ends == sorted(ends)):
        return []
    return list(zip(ends, accuracy, strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
