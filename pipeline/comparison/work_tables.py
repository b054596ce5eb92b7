"""The tables of a recipe's work: every machine at the same settings, and each machine at its best."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from pipeline.comparison import claims, stats
from pipeline.comparison.claims import Claim, Side
from pipeline.comparison.context import Context, make_side
from pipeline.comparison.groups import CURRENT_VERSION, Group, group_runs
from pipeline.comparison.runs import WORK, Entity, Run, clean, measurements
from pipeline.comparison.schema import Section, Table
from pipeline.comparison.work_rows import ACCURACIES, TOTAL, WORK_METRICS, accuracy_by_seed, make_row, value_of


def group_by_work(runs: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """Group runs by workload and version of the code: the current version first, then the most common work."""
    same_work: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        same_work.setdefault((run.tag("workload", "?"), run.version(WORK)), []).append(run)

    def order(section: tuple[str, str, list[Run]]) -> tuple[Any, ...]:
        workload, version, members = section
        entities = {run.entity() for run in members}
        return version != CURRENT_VERSION, -len(entities), -len(members), workload, version

    return sorted(((*key, members) for key, members in same_work.items()), key=order)


def make_section(context: Context, workload: str, version: str, runs: Sequence[Run]) -> Section:
    """Make the tables of runs that did the same work with the same version of the code."""
    groups = group_runs(runs, lambda run: run.execution, WORK, allow_tainted=context.settings.tainted)
    tags = runs[0].tags
    title = clean(f"{tags.get('recipe')} on {tags.get('dataset')} with {tags.get('weights')} weights")
    target = _number(runs[0].params.get("train.target_accuracy", ""))
    tables = [_table(context, groups, selected, settings, target) for selected, settings in _select(groups)]
    in_tables = {run["id"] for table in tables for row in table.rows for run in row.head.runs}
    others = [
        context.other(group, TOTAL, group.problem or "no table has its settings")
        for group in groups
        if group.runs[0].run_id not in in_tables
    ]
    return Section(workload, version, title, target, tables, others)


def _select(groups: Sequence[Group]) -> list[tuple[list[Group], Mapping[str, str] | None]]:
    """Select the groups of each table, with the settings that they share.

    The first table has all machines at the same settings: of those at fp32, the ones that most machines ran. The second
    has each machine at its best (settings None). It is left out if it would have the same rows.
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
    selections: list[tuple[list[Group], Mapping[str, str] | None]] = [(same, same[0].settings)]
    if any(group not in same for group in best.values()):
        selections.append((list(best.values()), None))
    return selections


def _by_frequency(groups: Sequence[Group]) -> tuple[Any, ...]:
    """Sort key: settings that most machines ran without a problem come first."""
    without_problem = {group.entity for group in groups if not group.problem}
    entities = {group.entity for group in groups}
    runs = sum(len(group.runs) for group in groups)
    return -len(without_problem), -len(entities), -runs, tuple(groups[0].settings.values())


def _by_time(group: Group) -> tuple[Any, ...]:
    """Sort key: the fastest group comes first, groups without a time last."""
    values = measurements(group.runs, TOTAL)
    return not values, median(values) if values else 0.0, -len(group.runs), *group.settings.values()


def _table(
    context: Context,
    groups: Sequence[Group],
    selected: Sequence[Group],
    settings: Mapping[str, str] | None,
    target: float | None,
) -> Table:
    """Make the table of the `selected` among all `groups`. `settings`: what they share; None: each at its best."""
    selected = sorted(selected, key=lambda group: (*_by_time(group), context.name(group)))
    names = {
        group: context.name(group) + (f" at {group.settings['precision']}" if settings is None else "")
        for group in selected
    }
    timed = [group for group in selected if measurements(group.runs, TOTAL)]
    baseline = context.baseline(timed)
    comparisons = 0
    if baseline is not None:
        # Each best was selected from several groups. Every pair that could have been selected counts as a comparison.
        candidates = Counter(group.entity for group in (selected if settings else groups) if group.claimable)
        others = [group for group in timed if group is not baseline]
        comparisons = candidates[baseline.entity] * sum(candidates[group.entity] for group in others)
    level = stats.bonferroni(stats.LEVEL, comparisons)
    rows = []
    for group in selected:
        row = make_row(context, group, target)
        if baseline is not None and group in timed:
            claim, whole = _claims(context, groups, names, group, baseline, level)
            row = replace(row, claim=claim, whole=whole)
        rows.append(row)
    return Table(settings, names[baseline] if baseline else None, comparisons, level, rows)


def _claims(
    context: Context,
    groups: Sequence[Group],
    names: Mapping[Group, str],
    candidate: Group,
    baseline: Group,
    level: float,
) -> tuple[Claim, Claim]:
    """The claims about the candidate's work and its whole process."""
    if candidate is baseline:
        return Claim("reference"), Claim("reference")
    if reason := _missing_precision(context, groups, candidate, baseline):
        sentence = f"{names[candidate]}: not compared with {context.name(baseline)}: {reason}."
        return Claim("other", sentence, reason=reason), Claim("other", sentence, reason=reason)

    def compare(key: str, where: str) -> Claim:
        sides = [_side(names[group], group, key) for group in (candidate, baseline)]
        if not all(side.seconds for side in sides):
            return Claim("alone")
        return claims.compare(sides[0], sides[1], context.settings, level, where)

    return compare("total_seconds", "on this work"), compare("process_seconds", "from process start to result")


def _missing_precision(context: Context, groups: Sequence[Group], candidate: Group, baseline: Group) -> str:
    """A precision that only one side has run, in words; '' if there is none. Comparing the two sides would then compare
    precisions and not machines."""
    for group, other in ((candidate, baseline), (baseline, candidate)):
        precision = group.settings["precision"]
        if not any((g.entity, g.settings["precision"]) == (other.entity, precision) for g in groups):
            return f"{context.name(other)} was not run in {precision}"
    return ""


def _side(name: str, group: Group, key: str) -> Side:
    """A side of the claim about the figure `key`. Its seconds are empty if no run has that figure."""
    seconds = [(run, value) for run in group.runs if (value := value_of(run, key)) is not None]
    accuracies = {images: accuracy_by_seed(group.runs, WORK_METRICS[figure]) for images, figure in ACCURACIES.items()}
    return make_side(name, group, seconds, {images: by_seed for images, by_seed in accuracies.items() if by_seed})


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
