"""The work of a recipe: its tables, every machine at the same settings and each at its best."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from pipeline.comparison import claims, groups, stats
from pipeline.comparison.claims import Claim, Side
from pipeline.comparison.costs import costs_of_work
from pipeline.comparison.groups import CURRENT, Entity, Group, Run, clean
from pipeline.comparison.rows import (
    Context,
    energy_source,
    execution_of,
    head_of,
    is_measured,
    is_share,
    link_to,
    may_be_claimed_of,
    metric_of,
    other_of,
    reference_index,
    rules_for,
    side_of,
    values_of,
)
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
"""The figures of a recipe's work, and the metrics they are. Of process_seconds the decoding of images is taken off: the
first process decodes them, and the next ones read what it kept."""

TOTAL = WORK_METRICS["total_seconds"]

ACCURACIES = {"test": "test_accuracy", "validation": "best_accuracy"}
"""Figures from 0 to 1 by the images they are of, the better ones first; of them means are taken."""

MEMORY_OF = {"cpu": "process", "mps": "driver"}
"""What peak memory is of, by device; `tensors` elsewhere. Only figures of one kind are comparable."""


def by_work(runs: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """The runs by their workload and by the version of what executed it; this version's first, and of those, what most
    machines did."""
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        tags = run["tags"]
        alike.setdefault((tags.get("workload", "?"), tags.get("software.execution", "1")), []).append(run)

    def order(item: tuple[tuple[str, str], list[Run]]) -> tuple[Any, ...]:
        (workload, version), same = item
        return version != CURRENT, -len({groups.entity_of(run) for run in same}), -len(same), workload, version

    return [(*key, same) for key, same in sorted(alike.items(), key=order)]


def section_of(context: Context, workload: str, version: str, runs: Sequence[Run]) -> Section:
    """The tables of runs that did the same work by the same version of the code."""
    everyone = groups.group(runs, execution_of, "taints", allow_tainted=context.settings.tainted)
    tags = runs[0]["tags"]
    title = clean(f"{tags.get('recipe')} on {tags.get('dataset')} with {tags.get('weights')} weights")
    target = _number(runs[0]["params"].get("train.target_accuracy", ""))
    tables = [_table(context, everyone, chosen, settings, target) for chosen, settings in _choices(everyone)]
    shown = {run["id"] for table in tables for row in table.rows for run in row.head.runs}
    others = [
        other_of(context, group, TOTAL, group.problem or "its settings are in no table")
        for group in everyone
        if group.runs[0]["run_id"] not in shown
    ]
    return Section(clean(workload), clean(version), title, target, tables, others)


def _choices(everyone: Sequence[Group]) -> list[tuple[list[Group], Mapping[str, str] | None]]:
    """The groups of each table, and the settings that they share: all at the same settings (fp32; of those, what most
    machines have run), and each machine at its best. The second is left out where it would say the same."""
    alike: dict[tuple[str, ...], list[Group]] = {}
    for group in everyone:
        if group.settings["precision"] == "fp32":
            alike.setdefault(tuple(group.settings.values()), []).append(group)
    best: dict[Entity, Group] = {}
    for group in sorted(everyone, key=lambda group: (bool(group.problem), *_by_time(group))):
        best.setdefault(group.entity, group)
    if not alike:
        return [(list(best.values()), None)]
    same = min(alike.values(), key=_commonness)
    if all(any(group is other for other in same) for group in best.values()):
        return [(same, same[0].settings)]
    return [(same, same[0].settings), (list(best.values()), None)]


def _commonness(same: Sequence[Group]) -> tuple[int, int, int, tuple[str, ...]]:
    fit = {group.entity for group in same if not group.problem}
    entities = {group.entity for group in same}
    return -len(fit), -len(entities), -sum(len(group.runs) for group in same), tuple(same[0].settings.values())


def _by_time(group: Group) -> tuple[Any, ...]:
    """Sorts groups from the fastest to the slowest, those without the figure last."""
    values = values_of(group.runs, TOTAL)
    return not values, median(values) if values else 0.0, -len(group.runs), *group.settings.values()


def _table(
    context: Context,
    everyone: Sequence[Group],
    chosen: Sequence[Group],
    settings: Mapping[str, str] | None,
    target: float | None,
) -> Table:
    ordered = sorted(chosen, key=lambda group: (*_by_time(group), context.names[group.entity]))
    rows = [_row(context, group, target) for group in ordered]
    timed = {index: group for index, group in enumerate(ordered) if values_of(group.runs, TOTAL)}
    first = reference_index(context, timed)
    if first is None:
        return Table(settings, None, 0, stats.LEVEL, rows)
    # A best was picked among several groups: every pair that it might have been counts as a comparison.
    tried = Counter(group.entity for group in (chosen if settings else everyone) if may_be_claimed_of(group))
    comparisons = sum(
        tried[group.entity] * tried[ordered[first].entity] for index, group in timed.items() if index != first
    )
    rules = rules_for(context, comparisons, "on this work")
    whole_rules = replace(rules, where="from process start to result")
    sides = {key: _sides(context, key, timed, named=settings is None) for key in ("total_seconds", "process_seconds")}
    precisions = _precisions(everyone)
    for index, group in timed.items():
        if index == first:
            rows[index] = replace(rows[index], claim=Claim("reference"), whole=Claim("reference"))
            continue
        untried = _untried(context, group, ordered[first], precisions)
        claim = untried or claims.compared(sides["total_seconds"][index], sides["total_seconds"][first], rules)
        whole = untried or Claim("alone")
        if not untried and index in sides["process_seconds"] and first in sides["process_seconds"]:
            whole = claims.compared(sides["process_seconds"][index], sides["process_seconds"][first], whole_rules)
        rows[index] = replace(rows[index], claim=claim, whole=whole)
    return Table(settings, sides["total_seconds"][first].name, comparisons, rules.level, rows)


def _precisions(everyone: Sequence[Group]) -> dict[Entity, set[str]]:
    """The precisions in which each entity did the work."""
    tried: dict[Entity, set[str]] = {}
    for group in everyone:
        tried.setdefault(group.entity, set()).add(group.settings["precision"])
    return tried


def _untried(
    context: Context, candidate: Group, reference: Group, precisions: Mapping[Entity, set[str]]
) -> Claim | None:
    """No claim where one side's best precision was not run on the other: settings would be compared, not machines."""
    for group, other in ((candidate, reference), (reference, candidate)):
        precision = group.settings["precision"]
        if precision not in precisions[other.entity]:
            reason = f"{context.names[other.entity]} was not run in {precision}"
            name = f"{context.names[candidate.entity]} at {candidate.settings['precision']}"
            sentence = f"{name}: not compared with {context.names[reference.entity]}: {reason}."
            return Claim("other", sentence, reason=reason)
    return None


def _sides(context: Context, key: str, timed: Mapping[int, Group], *, named: bool) -> dict[int, Side]:
    """The groups with the figure `key` as sides of a claim; `named`: by precision too, which their table mixes."""
    sides = {}
    for index, group in timed.items():
        runs = [run for run in group.runs if _value(run, key) is not None]
        if runs:
            name = context.names[group.entity]
            sides[index] = side_of(
                f"{name} at {group.settings['precision']}" if named else name,
                group,
                runs,
                [value for run in runs if (value := _value(run, key)) is not None],
                {
                    images: by_seed
                    for images, figure in ACCURACIES.items()
                    if (by_seed := _by_seed(group.runs, WORK_METRICS[figure]))
                },
            )
    return sides


def _by_seed(runs: Iterable[Run], metric: str) -> dict[int, float]:
    """An accuracy by seed. A seed that ran twice gives one value, its mean: equal seeds are no two samples."""
    values: dict[int, list[float]] = {}
    for run in runs:
        value, seed = metric_of(run, metric, share=True), run["params"].get("settings.seed", "")
        if value is not None and seed.isdecimal():
            values.setdefault(int(seed), []).append(value)
    return {seed: math.fsum(same) / len(same) for seed, same in values.items()}


def _row(context: Context, group: Group, target: float | None) -> Row:
    figures, values = _figures(context, group)
    shown = group.runs[0]
    if "total_seconds" in figures:
        middle, metric = figures["total_seconds"].value, TOTAL
        shown = min(group.runs, key=lambda run: abs((metric_of(run, metric) or math.inf) - middle))
    source = energy_source(group.runs, "energy.source", WORK_METRICS["images_per_joule"])
    if not source:
        for key in ("images_per_joule", "joules"):
            figures.pop(key, None)
    count, known = len(values.get("seconds_to_target", ())), len(values.get("total_seconds", ()))
    if count < known:
        figures.pop("seconds_to_target", None)  # those that never reached it have no time: no median
    head = head_of(context, group, "taints")
    return Row(
        head=head,
        settings=group.settings,
        shown=link_to(context, shown),
        figures=figures,
        values=values,
        memory_of=MEMORY_OF.get(head.device, "tensors"),
        energy_source=source,
        reached=(count, known) if target is not None and known else None,
        course=_course(context, shown),
        costs=costs_of_work(context.prices.get(head.hardware), figures),
    )


def _figures(context: Context, group: Group) -> tuple[dict[str, stats.Estimate], dict[str, list[float]]]:
    """The group's figures, and each run's value of them."""
    readers: dict[str, Callable[[Run], float | None]] = {key: partial(_value, key=key) for key in WORK_METRICS}
    readers["epoch_seconds"] = lambda run: _middle(_epoch_seconds(context, run))
    readers["images_per_second"] = lambda run: _median_speed(context, run)
    figures, values = {}, {}
    for key, read in readers.items():
        measured = [(value, run["started"]) for run in group.runs if (value := read(run)) is not None]
        if measured:
            values[key] = [value for value, _ in measured]
            if key in ACCURACIES.values():
                figures[key] = stats.mean(values[key])
            else:
                figures[key] = stats.typical(values[key], [start for _, start in measured])
    return figures, values


def _value(run: Run, key: str) -> float | None:
    """A figure of WORK_METRICS."""
    value = metric_of(run, WORK_METRICS[key], share=key in ACCURACIES.values())
    if value is None or key != "process_seconds":
        return value
    return value - (metric_of(run, "time/data_seconds") or 0.0)


def _epoch_seconds(context: Context, run: Run) -> list[float]:
    return [value for value in context.courses(run["run_id"])["time/train_seconds"] if is_measured(value)]


def _middle(seconds: Sequence[float]) -> float | None:
    return median(seconds) if seconds else None


def _median_speed(context: Context, run: Run) -> float | None:
    """Images a second of the median epoch: the metric is of the last one, and every epoch has the same images."""
    seconds, last = _epoch_seconds(context, run), metric_of(run, "speed/train_images_per_second")
    return last * seconds[-1] / median(seconds) if seconds and last is not None else None


def _course(context: Context, run: Run) -> list[tuple[float, float]]:
    """Seconds from the beginning, and validation accuracy, after each epoch; empty where that isn't known. The last
    epoch ends with `time/total_seconds`, which includes what came before the first."""
    accuracy, training, validation = (context.courses(run["run_id"])[key] for key in COURSES)
    total = metric_of(run, TOTAL)
    if total is None or not accuracy or not len(accuracy) == len(training) == len(validation):
        return []
    lasting = [sum(epoch) for epoch in zip(training, validation, strict=True)]
    ends = [total - math.fsum(lasting[done:]) for done in range(1, len(lasting) + 1)]
    if not (all(map(is_share, accuracy)) and all(map(is_measured, ends)) and ends == sorted(ends)):
        return []
    return list(zip(ends, accuracy, strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
